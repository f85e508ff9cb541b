"""The synthetic patches: their layout, their determinism, and that color alone does not reveal the class."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GroupKFold, cross_val_score

from hf_histo.data.synthetic import tissue
from hf_histo.errors import HistoError

SIZES = {"train": 240, "val": 60, "test": 120}


def read(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with h5py.File(file, "r") as source:
        keys = sorted(source, key=int)
        assert keys == [str(index) for index in range(len(keys))]
        for key in keys:
            assert set(source[key]) == {"img", "label", "metadata"}
            assert (source[key]["img"].dtype, source[key]["img"].shape) == (np.uint8, (3, 96, 96))
            assert (source[key]["label"].dtype, source[key]["label"].shape) == (np.int64, ())
            assert (source[key]["metadata"].dtype, source[key]["metadata"].shape) == (np.int64, (3,))
            assert source[key]["metadata"][2] == source[key]["label"][()]
        return np.stack([source[key]["img"][()] for key in keys]), np.stack(
            [source[key]["metadata"][()] for key in keys]
        )


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    folder = tmp_path_factory.mktemp("synthetic") / "demo"
    tissue.generate(folder, **SIZES)
    assert sorted(file.name for file in folder.iterdir()) == ["test.h5", "train.h5", "val.h5"]
    return {name: read(folder / f"{name}.h5") for name in SIZES}


def test_layout(splits: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> None:
    slides: dict[str, set[int]] = {}
    for name, (images, metadata) in splits.items():
        assert len(images) == SIZES[name]
        center, slide, label = metadata.T
        assert sorted(set(center)) == list(tissue.SPLITS[name])
        for each in tissue.SPLITS[name]:
            assert label[center == each].mean() == 0.5
        assert all(len(set(center[slide == each])) == 1 for each in set(slide))
        assert len(set(slide)) >= 3 and np.bincount(slide).max() <= tissue.PATCHES_PER_SLIDE
        slides[name] = set(slide.tolist())
    assert not (slides["train"] & slides["val"] or slides["train"] & slides["test"] or slides["val"] & slides["test"])


def test_images_differ_and_use_the_range(splits: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> None:
    images = np.concatenate([images for images, _ in splits.values()])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    assert images.std(axis=(1, 2, 3)).min() > 5
    assert images.min() < 60 and images.max() > 230


def test_centers_look_different(splits: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> None:
    colors = {
        center: images[metadata[:, 0] == center].mean(axis=(0, 2, 3))
        for images, metadata in splits.values()
        for center in set(metadata[:, 0].tolist())
    }
    for center, color in colors.items():
        assert min(np.abs(color - other).max() for each, other in colors.items() if each != center) > 8
    assert np.argmax([colors[center].mean() for center in range(5)]) == 2  # the test center is the palest


def color_features(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Color features without spatial information: marginal and joint histograms, and percentiles."""
    pixels = image.reshape(3, -1)
    marginal = [np.histogram(channel, 32, (0, 256))[0] for channel in pixels]
    joint = np.histogramdd(pixels.T, (8, 8, 8), [(0, 256)] * 3)[0].ravel()
    percentiles = np.percentile(pixels, [1, 5, 25, 50, 75, 95, 99], axis=1).ravel()
    return np.concatenate([*marginal, joint, percentiles, pixels.mean(1), pixels.std(1)])


def test_colors_do_not_reveal_the_class(splits: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> None:
    """A random forest fails on an unseen center and, cross-validated by pairs, on the training centers."""
    known = {name: np.stack([color_features(image) for image in images]) for name, (images, _) in splits.items()}
    labels = {name: metadata[:, 2] for name, (_, metadata) in splits.items()}
    forest = RandomForestClassifier(300, random_state=0).fit(known["train"], labels["train"])
    assert forest.score(known["test"], labels["test"]) <= 0.55
    slides = splits["train"][1][:, 1]
    found = cross_val_score(forest, known["train"], labels["train"], groups=slides, cv=GroupKFold(5))
    assert found.mean() <= 0.55


def test_a_pair_has_the_same_stain_in_other_places() -> None:
    random = np.random.default_rng(0)
    structure, colors = random.random((2, 2, 96, 96))
    found = tissue.recolored(structure, colors)
    assert sorted(map(tuple, found.reshape(2, -1).T)) == sorted(map(tuple, colors.reshape(2, -1).T))
    assert np.corrcoef(found[0].ravel(), structure[0].ravel())[0, 1] > 0.99
    assert np.corrcoef(found[1].ravel(), structure[1].ravel())[0, 1] > 0.9
    np.testing.assert_array_equal(tissue.recolored(structure, structure), structure)


def test_a_seed_fixes_every_array(tmp_path: Path) -> None:
    tissue.generate(tmp_path / "first", seed=3, train=6, val=2, test=2)
    tissue.generate(tmp_path / "again", seed=3, train=9, val=2, test=2)
    tissue.generate(tmp_path / "other", seed=4, train=6, val=2, test=2)
    first, again, other = (read(tmp_path / name / "train.h5") for name in ("first", "again", "other"))
    np.testing.assert_array_equal(first[0], again[0][:6])  # a larger split continues the smaller one
    np.testing.assert_array_equal(first[1], again[1][:6])
    assert not np.array_equal(first[0], other[0])
    for name in ("val", "test"):
        assert (tmp_path / "first" / f"{name}.h5").read_bytes() == (tmp_path / "again" / f"{name}.h5").read_bytes()


def test_one_pair() -> None:
    for center in range(5):
        source = tissue.slide(np.random.default_rng(center), center)
        first, again = (tissue.pair(np.random.default_rng(1), source) for _ in range(2))
        assert all((image.dtype, image.shape) == (np.uint8, (3, 96, 96)) for image in first)
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(*first)


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(HistoError, match=r"center=7: expected one of \[0, 1, 2, 3, 4\]"):
        tissue.slide(np.random.default_rng(0), 7)
    with pytest.raises(HistoError, match="val=0: expected at least 1"):
        tissue.generate(tmp_path / "demo", val=0)
    with pytest.raises(HistoError, match="exists, expected a new folder"):
        tissue.generate(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_no_half_written_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tissue, "pair", fail)
    with pytest.raises(OSError, match="No space left"):
        tissue.generate(tmp_path / "demo", train=4, val=2, test=2)
    assert list(tmp_path.iterdir()) == []
