"""The recipe as a user runs it: its files, and its one line of error."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from fixtures import write_challenge
from miniature import SIZE, write_adapter, write_data
from recipe_mains import RECIPES
from scipy.ndimage import gaussian_filter

from hf_histo.data import schema
from hf_histo.experiments.audit import features_of
from hf_histo.transforms.stain import CenterNormalizer, Statistics

RECIPE = RECIPES / "audit.py"


Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(in_process: Call) -> Call:
    return lambda tmp_path, *arguments: in_process(RECIPE.name, *arguments, "--cache_dir", tmp_path / "cache")


@pytest.fixture
def leaking(tmp_path: Path) -> Path:
    """Class folders whose test split has a byte copy of a training image, and a JPEG copy of another."""
    random = np.random.default_rng(0)
    for i in range(12):
        split, name = ("Training" if i < 8 else "Testing"), ("no_tumor", "$tumor$")[i % 2]
        pixels = gaussian_filter(random.normal(size=(60, 64, 3)), (2, 2, 0))
        image = PIL.Image.fromarray((128 + 40 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))
        (tmp_path / "data" / split / name).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / split / name / f"{i}.png")
        if i == 2:
            image.save(tmp_path / "same.png")
        if i == 3:
            image.save(tmp_path / "near.jpg", quality=60)
    (tmp_path / "same.png").rename(tmp_path / "data/Testing/no_tumor/same.png")
    (tmp_path / "near.jpg").rename(tmp_path / "data/Testing/no_tumor/near.jpg")
    return tmp_path / "data"


def test_end_to_end_and_no_overwriting(run: Call, leaking: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    done = run(tmp_path, "--data", leaking, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in output.iterdir()) == [
        "audit.json",
        "colors.png",
        "distribution.png",
        "duplicates.png",
        "inventory.parquet",
        "samples_test.png",
        "samples_train.png",
    ]
    found = {finding["kind"]: finding for finding in json.loads((output / "audit.json").read_text())["findings"]}
    assert list(found) == ["overlap", "similar_overlap", "similar_label_conflict"]
    named = [[image["id"] for group in finding["groups"] for image in group] for finding in found.values()]
    assert named[0] == ["Training/no_tumor/2.png", "Testing/no_tumor/same.png"]
    assert named[1] == named[2] == ["Training/$tumor$/3.png", "Testing/no_tumor/near.jpg"]
    assert all(finding["message"] in done.stdout for finding in found.values())
    assert "train: Training/$tumor$/3.png ($tumor$)  =  test: Testing/no_tumor/near.jpg (no_tumor)" in done.stdout
    assert len(pd.read_parquet(output / "inventory.parquet")) == 14

    before = (output / "audit.json").read_bytes()
    again = run(tmp_path, "--data", leaking, "--output_dir", output)
    assert again.returncode == 1
    assert again.stderr.startswith("error: --output_dir") and "--overwrite" in again.stderr
    strict = run(tmp_path, "--data", leaking, "--output_dir", output, "--overwrite", "--strict")
    assert strict.returncode == 1
    assert "error: --strict: findings in" in strict.stderr
    assert (output / "audit.json").read_bytes() == before


def test_several_centers_and_hidden_labels(run: Call, tmp_path: Path) -> None:
    write_challenge(tmp_path / "data", size=40)
    done = run(tmp_path, "--data", tmp_path / "data", "--output_dir", tmp_path / "report", "--strict")
    assert done.returncode == 0, done.stderr
    sheets = sorted(file.name for file in (tmp_path / "report").glob("samples*"))
    assert sheets == [
        "samples_test_center_2.png",
        "samples_train_center_0.png",
        "samples_train_center_3.png",
        "samples_train_center_4.png",
        "samples_val_center_1.png",
    ]
    assert "findings: 0" in done.stdout and "center 2: normal 0, tumor 0, (hidden) 4" in done.stdout


def test_splits_that_a_frozen_backbone_separates(shown_by: Callable[..., str], backbone: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    places = (f"--data={data}", f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'report'}")
    shown = shown_by("audit.py", *places, f"--backbone={backbone}")
    separations = json.loads((tmp_path / "report" / "audit.json").read_text())["separations"]
    assert [(of["split"], of["label"], of["train"], of["images"]) for of in separations][:3] == [
        ("val", "(all)", 24, 13),
        ("val", "normal", 12, 7),
        ("val", "tumor", 12, 6),
    ]
    assert 0 <= separations[0]["auroc"] <= 1 and f"{separations[0]['auroc']:.3f}" in shown
    assert separations[-1]["split"] == "test" and separations[-1]["auroc"] is None  # too few slides
    assert (tmp_path / "report" / "embedding.png").stat().st_size > 5000


def test_bad_input_is_one_line(run: Call, tmp_path: Path) -> None:
    done = run(tmp_path, "--data", tmp_path / "absent", "--output_dir", tmp_path / "report")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "absent: no such folder" in done.stderr
    assert not (tmp_path / "report").exists()


def test_centers_are_those_of_training_by_their_names(backbone: Path, tmp_path: Path) -> None:
    halle, jena = (Statistics((mean,) * 3, ((0.1, 0, 0), (0, 0.1, 0), (0, 0, 0.1))) for mean in (0.3, 0.6))
    normalizer = CenterNormalizer("rgb", halle, {0: halle, 1: jena}, (0, 1))
    adapter = write_adapter(tmp_path / "adapter", backbone, normalizer=normalizer, center_names=["Halle", "Jena"])
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)

    def features(centers: list[int], names: list[str]) -> np.ndarray:
        rows = {"id": ["a", "b"], "image": [{"bytes": schema.encode_ppm(pixels), "path": None}] * 2, "label": [0, 1]}
        kinds = schema.features(["normal", "tumor"], names)
        every = datasets.Dataset.from_dict({**rows, "center": centers, "group": ["", ""]}, features=kinds)
        return features_of(every, str(adapter), str(backbone))["after adaptation"]

    assert (features([0, 1], ["Halle", "Jena"]) == features([1, 0], ["Jena", "Halle"])).all()
