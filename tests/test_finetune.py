"""Whole runs: on images of different sizes, and under a launcher that asks for half precision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest
from accelerate.state import AcceleratorState
from miniature import config, write_backbone

from hf_histo.data.load import load
from hf_histo.evaluation.metrics import robustness
from hf_histo.evaluation.predictions import Predictions
from hf_histo.finetune import run_config
from hf_histo.inference import Classifier
from hf_histo.transforms.mri import Preparation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with 8 training, 4 validation and 4 test images, each of its own size and shape."""
    folder = tmp_path_factory.mktemp("mixed")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for i in range(count):
            pixels = random.integers(0, 256 // (1 + i % 2), (*random.integers(20, 90, 2), 3), dtype=np.uint8)
            path = folder / "data" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(path)
    return folder


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_images_of_different_sizes(folder: Path, tmp_path: Path, fit: str) -> None:
    more = {"crop": ["--crop_to_brain", "--contrast=stretch"], "pad": ["--normalization=rgb"]}[fit]
    more += [f"--fit={fit}", "--preview", "--num_train_epochs=1"]
    options = config(tmp_path / "run", write_backbone(tmp_path / "backbone"), folder / "data", *more)
    data = load(folder / "data")
    result = run_config(options, data)
    assert (tmp_path / "run/preview.png").is_file()

    classifier = Classifier.from_pretrained(result.adapter)
    assert classifier.sidecar.preprocessing.fit == fit
    assert classifier.sidecar.preprocessing.preparation == Preparation.of(options.preparation)
    assert classifier.sidecar.preprocessing.preparation.is_none == (fit == "pad")
    expected = Predictions.read(result.adapter / "predictions/test.parquet")
    pd.testing.assert_series_equal(classifier.predict(data["test"])["logit"], expected["logit"], atol=1e-5)
    if fit != "pad":  # alone, an image is resized on the device; color is measured on what is predicted together
        alone = classifier(folder / "data" / expected["id"][1])["logit"]
        np.testing.assert_allclose(alone, expected["logit"][1], rtol=0, atol=1e-5)


def test_predictions_are_in_float32_whatever_the_launcher_asks_for(
    source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, decisions would change, see SECURITY.md."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    data = load(source[1])
    result = run_config(config(tmp_path / "run", *source, "--num_train_epochs=1", "--target_modules=last-conv"), data)
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["precision"] == "bf16"
    saved = Predictions.read(result.adapter / "predictions" / "val.parquet")["logit"]

    found = [Classifier.from_pretrained(result.adapter).predict(data["val"])["logit"]]
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    found.append(Classifier.from_pretrained(result.adapter).predict(data["val"])["logit"])
    for logits in found:
        assert logits.to_numpy().tobytes() == saved.to_numpy().tobytes()


def test_robustness_to_the_center(source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "FEWEST", 2)
    options = config(tmp_path / "run", *source, "--num_train_epochs=1", "--target_modules=last-conv", "--robustness")
    result = run_config(options, load(source[1]))
    found = json.loads((result.adapter / "metrics.json").read_text())["robustness"]
    assert found["splits"] == ["val", "test"]
    assert {side: found[side]["reason"] for side in ("before", "after")} == {"before": None, "after": None}
    assert found["before"]["pairs"][0]["images"] == found["after"]["pairs"][0]["images"]
    assert found["before"]["index"] is not None
    page, card = (result.adapter / "report.html").read_text(), (result.adapter / "README.md").read_text()
    for text in (page, card):
        assert "robustness index (1: the class alone, 0: the center alone)" in text
