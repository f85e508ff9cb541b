"""Each center's color is measured and normalized, independent of labels and other centers."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from hf_histo.data import schema
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.data.synthetic.tissue import generate
from hf_histo.errors import HistoError
from hf_histo.transforms.stain import METHODS, CenterNormalizer, measure


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> datasets.DatasetDict:
    folder = tmp_path_factory.mktemp("tissue")
    generate(folder / "data", train=90, val=30, test=30)
    return load(folder / "data", cache_dir=folder / "cache")


def colors(data: datasets.Dataset, normalizer: CenterNormalizer | None) -> dict[int, torch.Tensor]:
    """Mean and deviation of each center's channels, (6,)."""
    samples = ImageTable(data).__getitems__(range(len(data)))
    images = torch.stack([sample["image"] for sample in samples])
    centers = torch.tensor([sample["center"] for sample in samples])
    moved = images / 255 if normalizer is None else normalizer(images, centers)
    found = {}
    for center in centers.unique().tolist():
        pixels = moved[centers == center].transpose(0, 1).flatten(1)
        found[center] = torch.cat([pixels.mean(1), pixels.std(1)])
    return found


def spread(by_center: dict[int, torch.Tensor]) -> float:
    return float(torch.stack(list(by_center.values())).std(0).mean())


@pytest.mark.parametrize("method", METHODS[1:])
def test_centers_look_more_alike_the_unseen_one_too(tissue: datasets.DatasetDict, method: str) -> None:
    normalizer = CenterNormalizer.fit(ImageTable(tissue["train"]), method).extended(ImageTable(tissue["test"]))
    every = datasets.concatenate_datasets([tissue["train"], tissue["test"]])
    assert spread(colors(every, normalizer)) < 0.7 * spread(colors(every, None))


def test_rgb_gives_every_center_the_mean_color_of_training(tissue: datasets.DatasetDict) -> None:
    plain, moved = (
        colors(tissue["train"], None),
        colors(tissue["train"], CenterNormalizer.fit(ImageTable(tissue["train"]), "rgb")),
    )
    reference = torch.stack(list(plain.values())).mean(0)
    for found in moved.values():  # but for what is clipped to [0, 1]
        torch.testing.assert_close(found, reference, rtol=0, atol=0.01)


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_center_moved_to_itself_is_unchanged(tissue: datasets.DatasetDict, method: str) -> None:
    one = tissue["train"].filter(lambda row: row["center"] == 0)
    samples = ImageTable(one).__getitems__(range(8))
    images = torch.stack([sample["image"] for sample in samples])
    moved = CenterNormalizer.fit(ImageTable(one), method)(images, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(moved, images / 255, rtol=0, atol=0.02)


@pytest.mark.parametrize("method", ["rgb", "reinhard"])
def test_virtual_stains_have_mean_and_spread_of_the_centers(tissue: datasets.DatasetDict, method: str) -> None:
    normalizer = CenterNormalizer.fit(ImageTable(tissue["train"]), method)
    draws = torch.rand(4000, 6, generator=torch.Generator().manual_seed(0))
    found = normalizer.virtual(draws)
    every = [normalizer.centers[center] for center in normalizer.training]
    statistics = torch.tensor([[*one.location, *np.diag(one.scale)] for one in every], dtype=torch.float32)
    drawn = torch.cat([found[:, :3], found[:, [3, 7, 11]]], dim=1)
    spread = statistics.std(0)
    assert ((drawn.mean(0) - statistics.mean(0)).abs() < 0.1 * spread).all()
    torch.testing.assert_close(drawn.std(0), spread, rtol=0.05, atol=0)
    assert (drawn[:, 0] > statistics[:, 0].max()).any() and (found[:, [4, 5, 6, 8, 9, 10]] == 0).all()
    images = torch.stack([sample["image"] for sample in ImageTable(tissue["train"]).__getitems__(range(4))])
    centers = np.array([sample["center"] for sample in ImageTable(tissue["train"]).__getitems__(range(4))])
    moved = normalizer(images, centers, found[:4])
    assert moved.isfinite().all() and not torch.equal(moved, normalizer(images, centers))


def test_labels_do_not_matter(tissue: datasets.DatasetDict) -> None:
    hidden = tissue["train"].map(lambda row: {"label": -1})
    assert measure(ImageTable(hidden), "rgb") == measure(ImageTable(tissue["train"]), "rgb")


@pytest.mark.parametrize("method", METHODS[1:])
def test_it_survives_the_sidecar(tissue: datasets.DatasetDict, method: str) -> None:
    normalizer = CenterNormalizer.fit(ImageTable(tissue["train"]), method)
    extended = normalizer.extended(ImageTable(tissue["test"]))
    assert set(extended.centers) == {0, 2, 3, 4}
    assert TypeAdapter(CenterNormalizer).validate_json(json.dumps(extended.as_json())) == normalizer


def test_mixtures_lie_between_the_centers(tissue: datasets.DatasetDict) -> None:
    normalizer = CenterNormalizer.fit(ImageTable(tissue["train"]), "rgb")
    draws = torch.from_numpy(np.random.default_rng(0).random((500, 3)))
    targets = normalizer.targets(torch.arange(500) < 400, draws)
    every = torch.tensor([[*s.location, *np.ravel(s.scale)] for s in normalizer.centers.values()], dtype=torch.float32)
    assert (targets >= every.min(0).values - 1e-6).all()
    assert (targets <= every.max(0).values + 1e-6).all()
    assert targets[:400].std(0)[:3].min() > 0.1 * every.std(0)[:3].min()
    torch.testing.assert_close(targets[400:], every.mean(0).expand(100, -1))
    torch.testing.assert_close(targets[:400].mean(0), every.mean(0), rtol=0, atol=0.02)


def test_an_unknown_center_is_refused(tissue: datasets.DatasetDict) -> None:
    normalizer = CenterNormalizer.fit(ImageTable(tissue["train"]), "rgb")
    with pytest.raises(HistoError, match=r"center 7 .*\[0, 3, 4\]"):
        normalizer(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([7]))


@pytest.mark.parametrize("method", METHODS[1:])
def test_blank_images_have_no_statistics(method: str) -> None:
    white = {"bytes": schema.encode_ppm(np.full((8, 8, 3), 255, np.uint8)), "path": None}
    rows = {"id": ["a", "b"], "image": [white] * 2, "label": [0, 1], "center": [5, 5], "group": ["", ""]}
    blank = datasets.Dataset.from_dict(rows, features=schema.features(["normal", "tumor"]))
    with pytest.raises(HistoError, match="center 5"):
        measure(ImageTable(blank), method)


def test_damaged_statistics_are_refused(tissue: datasets.DatasetDict, tmp_path: Path) -> None:
    good = CenterNormalizer.fit(ImageTable(tissue["train"]), "rgb").as_json()
    bad_rows = ([[0.0] * 3] * 4, [[float("nan")] * 3] * 4, [[1e9] * 3] * 4, [[1.0]], [["1", "0", "0"]] * 4, {})
    for bad in ({"method": "magic"}, {"one": good["0"]}, *({"0": rows} for rows in bad_rows)):
        with pytest.raises(ValidationError):
            TypeAdapter(CenterNormalizer).validate_json(json.dumps(good | bad))
