"""Predictions of all folds together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from hf_histo.config import Config
from hf_histo.evaluation.predictions import Predictions
from hf_histo.experiments.cross_validate import _pooled


def fold(folder: Path, center: int, transductive: list[str]) -> SimpleNamespace:
    labels = np.arange(8) % 2
    ids, groups = [f"{center}-{row}" for row in range(8)], [f"slide {center} {row // 2}" for row in range(8)]
    table = Predictions.make(
        ids,
        np.full(8, center),
        groups,
        labels,
        labels - 0.4,
        label_names=["normal", "tumor"],
        center_names=["Halle", "Leipzig"],
        transductive=transductive,
    )
    table.write(folder / "predictions" / "test.parquet")
    return SimpleNamespace(adapter=folder)


def test_folds_that_differ_in_what_was_measured_keep_their_names_and_the_mark(tmp_path: Path) -> None:
    results = [fold(tmp_path / "0", 0, ["color statistics"]), fold(tmp_path / "1", 1, [])]
    config = Config()
    config.data.negative_class = "normal"
    report = _pooled(results, config, tmp_path, seed=0)  # type: ignore[arg-type]  # with an adapter alone
    every = Predictions.read(tmp_path / "predictions" / "seed-0.parquet")
    assert (every.label_names, every.center_names) == (["normal", "tumor"], ["Halle", "Leipzig"])
    assert every.transductive == report["transductive"] == ["color statistics"]
