"""Power and false alarms of a verdict, on stored predictions of runs that need no training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hf_histo.config.commands import AcceptanceStudyOptions
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.experiments.acceptance_study import study
from hf_histo.files import write_json


def predictions(center: int, noise: float, seed: int) -> Predictions:
    random = np.random.default_rng(seed)
    labels = np.arange(160) % 2
    logits = (2 * labels - 1) * 2 + random.normal(0, noise, 160) + (noise - 1)
    groups = [f"{seed}-{i // 2}" for i in range(160)]
    return Predictions.make(range(160), np.full(160, center), groups, labels, logits)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs that hold out center 0, which is like the others, and center 1, where the model errs more."""
    folder = tmp_path / "runs"
    for center, noise in ((0, 1.0), (1, 4.0)):
        place = folder / f"center-{center}-seed-0" / "adapter" / "predictions"
        place.mkdir(parents=True)
        predictions(2, 1.0, seed=10 + center).write(place / "val.parquet")
        predictions(center, noise, seed=center).write(place / "test.parquet")
    write_json(folder / "leave_one_center_out.json", {"runs": {f"center-{c}-seed-0": {} for c in (0, 1)}})
    return folder


def test_a_worse_center_is_found_and_alike_ones_are_accepted(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(AcceptanceStudyOptions(runs=runs, output_dir=tmp_path / "out", counts=[60], draws=8))
    sites = json.loads((tmp_path / "out" / "acceptance_study.json").read_text())["sites"]
    assert sites.keys() == {"center 0", "center 1", "val, the other half"}
    (worse,) = sites["center 1"]["60"]
    assert worse["drop"] > 0.1 and worse["verdicts"]["accept"] <= 0.25
    for name in ("center 0", "val, the other half"):
        for found in sites[name]["60"]:
            assert found["verdicts"]["accept"] >= 0.8 and sum(found["verdicts"].values()) == pytest.approx(1)
            assert found["errors"].keys() == found["inside"].keys() == found["widths"].keys() == {"atc", "importance"}
            assert found["beyond"] is found["color_alarms"] is None
    assert "| center 1" in capsys.readouterr().out
    assert "| center 1" in (tmp_path / "out" / "acceptance_study.md").read_text()


def test_more_images_than_there_are(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(HistoError, match="--counts has 500, but a held-out center has 160 images"):
        study(AcceptanceStudyOptions(runs=runs, output_dir=tmp_path / "out", counts=[500]))


def test_half_of_val_has_no_more_images_than_it_has(runs: Path, tmp_path: Path) -> None:
    study(AcceptanceStudyOptions(runs=runs, output_dir=tmp_path / "out", counts=[160], draws=2))
    sites = json.loads((tmp_path / "out" / "acceptance_study.json").read_text())["sites"]
    assert [found["images"] for found in sites["val, the other half"]["160"]] == [80, 80]
    assert "| val, the other half |     80 |" in (tmp_path / "out" / "acceptance_study.md").read_text()


def test_val_of_one_group(runs: Path, tmp_path: Path) -> None:
    for file in runs.glob("*/adapter/predictions/val.parquet"):
        Predictions.read(file).assign(group="one").write(file)
    with pytest.raises(HistoError, match="val has one group, expected two or more"):
        study(AcceptanceStudyOptions(runs=runs, output_dir=tmp_path / "out", counts=[20], draws=2))
