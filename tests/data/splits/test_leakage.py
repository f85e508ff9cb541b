"""Splits of class folders with copies: reported copies, removed images, and that no family is in two splits."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from hf_histo.data.load import fingerprint, load
from hf_histo.data.protocol import arrange
from hf_histo.data.splits.checks import shared_groups
from hf_histo.data.splits.leakage import grouped
from hf_histo.errors import HistoError

CLASSES = ("glioma", "none", "pituitary")


def picture(number: int) -> PIL.Image.Image:
    """A gray picture of its own, smooth enough to be distinct from others on a thumbnail."""
    noise = gaussian_filter(np.random.default_rng(number).normal(size=(48, 40)), 1.5)
    return PIL.Image.fromarray(np.uint8(np.clip(128 + 200 * noise, 0, 255)))


def write(folder: Path, rows: dict[str, list[tuple[str, int]]]) -> Path:
    """Images given as (class, picture) by split."""
    for split, images in rows.items():
        for place, (label, number) in enumerate(images):
            path = folder / split / label / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(path)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 training images, of which 30 are there twice; of 30 test images 12 are copies of training images."""
    train = [(CLASSES[number % 3], number) for number in [*range(60), *range(30)]]
    test = [(CLASSES[number % 3], number) for number in [*range(12), *range(100, 118)]]
    return write(tmp_path_factory.mktemp("mri") / "data", {"Training": train, "Testing": test})


def test_published_splits_cut_val_and_part_the_copies(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = load(folder)
    with caplog.at_level(logging.WARNING):
        data = arrange(files, "published")
    assert "test: 12 of 30 images are pixel-identical to images of train; 18 are not" in caplog.text
    assert "train: 90 files hold 60 distinct images" in caplog.text
    assert {name: len(split) for name, split in data.items()} == {
        "train": 90 - len(data["val"]), "val": len(data["val"]), "test": 30, "test_clean": 18,
    }  # fmt: skip
    assert data["test"]["id"][:] == files["test"]["id"][:]
    assert 6 <= len(data["val"]) <= 12 and set(data["val"]["label"]) == {0, 1, 2}
    shared = shared_groups(data)
    assert ("train", "val") not in shared and ("train", "test_clean") not in shared
    assert ("val", "test_clean") not in shared
    assert len(set(data["train"]["group"]) | set(data["val"]["group"])) == 60
    description = data["train"].info.description
    assert description.startswith(f"{files['train'].info.description}; near copies were searched for")
    assert f"val: {len(data['val'])} images of train" in description and "test: 12 of 30 have copies" in description
    assert fingerprint(data) == fingerprint(arrange(load(folder), "published")) != fingerprint(files)
    assert fingerprint(data) == fingerprint(data["test_clean"])


def test_clean_splits_hold_every_picture_once(folder: Path) -> None:
    data = arrange(load(folder), "clean")
    assert list(data) == ["train", "val", "test"]
    assert sum(map(len, data.values())) == 78  # distinct pictures
    assert shared_groups(data) == {}
    assert 12 <= len(data["test"]) <= 19
    assert fingerprint(data) == fingerprint(arrange(load(folder), "clean"))
    assert fingerprint(data) != fingerprint(arrange(load(folder), "published"))


def test_families_with_several_labels_are_left_out_of_clean_splits(tmp_path: Path) -> None:
    rows = [(CLASSES[number % 3], number) for number in range(30)]
    data = load(write(tmp_path, {"train": [*rows, ("none", 0)], "test": [("none", 40)]}))
    assert sum(map(len, grouped(data, only_one=True).values())) == 30
    assert sum(map(len, grouped(data).values())) == 32


def test_nothing_is_logged_or_cut_without_copies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [[(CLASSES[number % 3], number) for number in range(start, start + 9)] for start in (0, 20, 40)]
    files = load(write(tmp_path, dict(zip(("train", "val", "test"), rows, strict=True))))
    assert arrange(files, "files") is files
    data = arrange(files, "published")
    assert {name: split["id"][:] for name, split in data.items()} == {n: split["id"][:] for n, split in files.items()}
    assert "no copies across splits" in data["train"].info.description
    assert not caplog.records


def test_class_folders_without_splits_can_only_be_split_anew(tmp_path: Path) -> None:
    files = load(write(tmp_path, {".": [(CLASSES[number % 3], number) for number in range(45)]}))
    with pytest.raises(HistoError, match="there is no train, only full; expected clean"):
        arrange(files, "published")
    assert sum(map(len, arrange(files, "clean").values())) == 45


def test_near_images_stay_on_one_side(tmp_path: Path) -> None:
    """Neighboring slices are similar, but not copies."""
    volumes = 24

    def slices(volume: int) -> list[NDArray[np.float64]]:
        ends = [gaussian_filter(np.random.default_rng([volume, end]).normal(size=(48, 40)), 1.5) for end in range(2)]
        return [(1 - share) * ends[0] + share * ends[1] for share in (0.0, 0.25, 0.5, 0.75, 1.0)]

    for volume in range(volumes):
        for place, pixels in enumerate(slices(volume)):
            path = tmp_path / "data" / "Training" / CLASSES[volume % 2] / f"{volume}-{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(np.uint8(np.clip(128 + 200 * pixels, 0, 255))).save(path)
    data = load(tmp_path / "data", cache_dir=tmp_path / "cache")

    def volumes_of(rows: datasets.Dataset) -> set[str]:
        return {Path(key).stem.split("-")[0] for key in rows["id"]}

    copies, near = (arrange(data, "published", family) for family in ("copies", "near"))
    assert len(set(near["train"]["group"]) | set(near["val"]["group"])) == volumes
    assert not volumes_of(near["train"]) & volumes_of(near["val"])
    assert volumes_of(copies["train"]) & volumes_of(copies["val"])  # families of copies don't keep volumes together
    assert "near images as well" in near["train"].info.description
    assert "near images" not in copies["train"].info.description
