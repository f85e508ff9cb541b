"""Whole runs: on images of different sizes, and under a launcher that asks for half precision."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import yaml
from accelerate.state import AcceleratorState
from miniature import SIZE, config, write_backbone

from hf_histo.config import FOR_CENTERS, OPTIONS, CenterOptions, parse, parse_fine_tuning
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import robustness
from hf_histo.evaluation.predictions import Predictions
from hf_histo.finetune import run_config, settled
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


@pytest.fixture
def one_center(source: tuple[Path, Path]) -> datasets.DatasetDict:
    data = load(source[1])
    return datasets.DatasetDict(data, train=data["train"].filter(lambda row: row["center"] == 0))


def test_defaults_for_several_centers_are_taken_back_where_there_is_one(
    source: tuple[Path, Path], one_center: datasets.DatasetDict, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse_fine_tuning(None, [f"--backbone={source[0]}", f"--data={source[1]}"])
    assert settled(options, load(source[1])) is options
    assert capsys.readouterr().out == ""
    assert settled(options, one_center) == parse(None, [f"--backbone={source[0]}", f"--data={source[1]}"])
    line = "not of several centers: --normalization none, --stain_mixing 0.0, --test_time_views 1, not as for several"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--stain_mixing=0.5", "--stain_mixing is 0.5, which can't act here"),
        ("--normalization=rgb --stain_mixing=0.5", "--stain_mixing is 0.5, which can't act here"),
        ("--virtual_stain=0.2", "--virtual_stain is 0.2, which can't act here"),
        ("--test_time_augmentation=strong", "which acts only with --test_time_views other than 1"),
    ],
)
def test_what_is_chosen_and_cannot_act_in_one_center_is_refused(
    given: str, message: str, one_center: datasets.DatasetDict
) -> None:
    with pytest.raises(HistoError, match=re.escape(message)):
        settled(parse_fine_tuning(None, given.split()), one_center)
    assert settled(parse_fine_tuning(None, ["--normalization=rgb"]), one_center).centers == CenterOptions("rgb")


@pytest.mark.parametrize("is_one", [False, True])
def test_a_run_records_the_defaults_that_it_had(
    is_one: bool, source: tuple[Path, Path], one_center: datasets.DatasetDict, tmp_path: Path
) -> None:
    quick = f"--image_size={SIZE} --resize_size={SIZE} --max_steps=2 --target_modules=last-conv"
    places = f"--output_dir={tmp_path / 'run'} --backbone={source[0]} --data={source[1]}"
    options = parse_fine_tuning(None, [*quick.split(), *places.split()])
    result = run_config(options, one_center if is_one else load(source[1]))
    used = {name: OPTIONS[name].default if is_one else value for name, value in FOR_CENTERS.items()}
    record = yaml.safe_load((tmp_path / "run/run.yaml").read_text())
    assert {name: record[name] for name in used} == used
    classifier = Classifier.from_pretrained(result.adapter)
    assert classifier.sidecar.views.count == used["test_time_views"]
    assert (classifier.sidecar.normalizer is None) == is_one
    shown = (result.summary(), (result.adapter / "report.html").read_text(), (result.adapter / "README.md").read_text())
    assert ("| test (transductive) |" in shown[0]) == (not is_one)
    for text in shown:
        assert ("Transductive: used the unlabeled images of test as a whole, for color statistics." in text) != is_one


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
    data = load(source[1])
    result = run_config(options, datasets.DatasetDict({**data, "test_clean": data["test"]}))  # of --split published
    found = json.loads((result.adapter / "metrics.json").read_text())["robustness"]
    assert found["splits"] == ["val", "test"]
    assert {side: found[side]["reason"] for side in ("before", "after")} == {"before": None, "after": None}
    assert found["before"]["pairs"][0]["images"] == found["after"]["pairs"][0]["images"]
    assert found["before"]["index"] is not None
    page, card = (result.adapter / "report.html").read_text(), (result.adapter / "README.md").read_text()
    for text in (page, card):
        assert "robustness index (1: the class alone, 0: the center alone)" in text
