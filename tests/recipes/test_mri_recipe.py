"""Brain MRI recipes: reported copies, results with and without copies, and cross-validation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from miniature import write_slices

from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions
from hf_histo.inference import Classifier

CLASSES = ("glioma", "none", "pituitary")
Call = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training and 18 test slices, brighter for a later class; a third of the test slices are copies."""
    return write_slices(tmp_path_factory.mktemp("data") / "slices", CLASSES)


@pytest.fixture
def call(backbone: Path, data: Path, shown_by: Call) -> Call:
    """Run a recipe quickly; return what it printed."""

    def call(recipe: str, output: Path, *more: str) -> str:
        quick = "--image_size=32 --fit=squash --num_train_epochs=1 --metric_for_best_model=balanced_accuracy"
        fixed = f"--data={data} --backbone={backbone} --output_dir={output} --method=linear --negative_class=none"
        return shown_by(recipe, *fixed.split(), *quick.split(), *more)

    return call


@pytest.mark.figures
def test_every_result_twice(call: Call, tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    shown = call("mri_lora.py", tmp_path / "run", "--class_balance=sampling")
    assert "test: 6 of 18 images are pixel-identical to images of train; 12 are not" in caplog.text
    assert "| test       |     18 |" in shown and "| test_clean |     12 |" in shown
    assert "sensitivity_at_0.95" in shown and "balanced_accuracy" in shown

    adapter = tmp_path / "run" / "adapter"
    card = (adapter / "README.md").read_text()
    measured = json.loads((adapter / "metrics.json").read_text())["splits"]
    for split in ("test", "test_clean"):
        assert f"### {split}\n" in card
        rows = Predictions.read(adapter / "predictions" / f"{split}.parquet")
        assert measured[split]["overall"]["sensitivity_at_0.9"]["value"] == pytest.approx(
            classification.compute(rows, negative=1)["sensitivity_at_0.9"]
        )
    assert "6 of 18 have copies in train or val" in card
    assert "Sensitivity for any class but none: " in card
    assert all(f"| {name} " in card for name in CLASSES)
    assert {"confusion_test.png", "confusion_test_clean.png"} <= {p.name for p in (adapter / "figures").iterdir()}
    assert len(Classifier.from_pretrained(adapter)([str(data / "Testing" / "none" / "1.png")])) == 1


def test_an_unknown_class_is_refused(call: Call, tmp_path: Path) -> None:
    shown = call("mri_lora.py", tmp_path / "run", "--negative_class=healthy")
    assert "--negative_class is 'healthy', expected the name of a class: glioma, none, pituitary" in shown


def test_folds_summed_up_and_resumed(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = call("cross_validate.py", out, "--folds=3")
    names = [f"fold-{fold}-seed-0" for fold in range(3)]
    written = json.loads((out / "cross_validate.json").read_text())
    assert list(written["runs"]) == names
    every = Predictions.read(out / "predictions" / "seed-0.parquet")
    assert len(every) == 54 and every["id"].is_unique
    families = every.groupby("group")["id"].nunique()
    assert sorted(families.unique()) == [1, 2] and len(families) == 48
    for name in names:
        fold = Predictions.read(out / name / "adapter" / "predictions" / "test.parquet")
        assert len(every[every["group"].isin(fold["group"])]) == len(fold)  # whole families
    values = [written["runs"][name]["balanced_accuracy"] for name in names]
    assert written["metrics"]["balanced_accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert written["metrics"]["balanced_accuracy"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert written["pooled"]["0"] == classification.report(every, negative=1)
    assert "| mean" in shown and "balanced accuracy" in shown and "Sensitivity for any class but none" in shown
    assert (out / "confusion-seed-0.png").is_file()

    stamp = (out / names[0] / "adapter" / "metrics.json").stat().st_mtime_ns
    again = call("cross_validate.py", out, "--folds=3")
    assert again[again.index("Held-out folds") :] == shown[shown.index("Held-out folds") :]
    assert (out / names[0] / "adapter" / "metrics.json").stat().st_mtime_ns == stamp
    assert "folds is 1" in call("cross_validate.py", tmp_path / "one", "--folds=1")
