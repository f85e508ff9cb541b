"""The study of prediction sets at held-out centers, on stored predictions of runs that need no training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hf_histo.config.commands import CoverageOptions
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.experiments.coverage import SetQuality, coverage, mean
from hf_histo.files import write_json


def predictions(center: int, shift: float, count: int, seed: int, *, hidden: bool = False) -> Predictions:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    logits = (2 * labels - 1) * 2 + random.normal(0, 1, count) + shift
    names, groups = ["normal", "tumor"], [f"{seed}-{i // 2}" for i in range(count)]
    return Predictions.make(
        range(count),
        np.full(count, center),
        groups,
        -np.ones(count, int) if hidden else labels,
        logits,
        label_names=names,
    )


def write_runs(folder: Path, *, hidden: bool = False) -> Path:
    """Runs that hold out center 0, which is like the others, and center 1, where all logits are higher."""
    for center, shift in ((0, 0.0), (1, 3.0)):
        place = folder / f"center-{center}-seed-0" / "adapter" / "predictions"
        place.mkdir(parents=True)
        predictions(2, 0.0, 400, seed=10 + center).write(place / "val.parquet")
        predictions(center, shift, 400, seed=center, hidden=hidden).write(place / "test.parquet")
    write_json(folder / "leave_one_center_out.json", {"runs": {f"center-{c}-seed-0": {} for c in (0, 1)}})
    return folder


def test_a_shift_breaks_the_coverage_of_a_class_and_labels_restore_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coverage(CoverageOptions(runs=write_runs(tmp_path / "runs"), output_dir=tmp_path / "out", draws=60))
    found = json.loads((tmp_path / "out" / "coverage.json").read_text())
    (alike,), (shifted,) = found["centers"]["0"], found["centers"]["1"]
    assert 0.8 < min(alike["before"]["classes"]) < 0.95
    assert min(shifted["before"]["classes"]) < 0.3
    for center in (alike, shifted):
        assert 0.89 < center["after"]["coverage"] < 0.96 and min(center["after"]["classes"]) > 0.89
        assert 0 < center["fifth"] < center["after"]["coverage"]
        assert center["withheld"] == 0
        assert center["certain_error"] < 1 - center["accuracy"]
    shown = capsys.readouterr().out
    text = (tmp_path / "out" / "coverage.md").read_text()
    assert text in shown and "| center 1 |" in text


def test_with_few_labels_sets_are_withheld_and_counted(tmp_path: Path) -> None:
    options = CoverageOptions(runs=write_runs(tmp_path / "runs"), output_dir=tmp_path / "out", draws=5, labeled=10)
    coverage(options)
    found = json.loads((tmp_path / "out" / "coverage.json").read_text())["centers"]["0"][0]
    assert found["withheld"] == 1 and found["after"]["coverage"] == 1 and found["after"]["decided"] == 0
    assert found["after"]["error"] is None
    assert "In 100.0% of the draws" in (tmp_path / "out" / "coverage.md").read_text()


def test_the_quality_of_sets_by_hand() -> None:
    members = np.array([[1, 0], [1, 1], [0, 0], [0, 1], [1, 0]], dtype=bool)
    found = SetQuality.of(members, np.array([0, 0, 0, 1, 1]))
    assert found == SetQuality(coverage=0.6, classes=(2 / 3, 0.5), size=1.0, decided=0.6, error=pytest.approx(1 / 3))


def test_a_class_that_no_other_group_has_is_left_out_of_the_mean() -> None:
    one, both = np.array([[1, 0]], dtype=bool), np.array([[0, 1], [0, 1]], dtype=bool)
    found = mean([SetQuality.of(one, np.array([0])), SetQuality.of(both, np.array([0, 1]))])
    assert found.classes == (0.5, 1.0) and found.coverage == 0.75


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HistoError, match=r"holds no leave_one_center_out\.json"):
        coverage(CoverageOptions(runs=tmp_path / "none", output_dir=tmp_path / "out"))
    hidden = write_runs(tmp_path / "hidden", hidden=True)
    with pytest.raises(HistoError, match="center-0-seed-0: no label of its test center is known"):
        coverage(CoverageOptions(runs=hidden, output_dir=tmp_path / "out"))
    with pytest.raises(HistoError, match="--labeled is 399, which leaves no other group among the 400 images"):
        coverage(CoverageOptions(runs=write_runs(tmp_path / "runs"), output_dir=tmp_path / "out", labeled=399))
