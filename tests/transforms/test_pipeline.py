"""One pixel path: training, prediction, probes, explanations and the cache give a model the same tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from miniature import config, write_adapter, write_centers
from torch import nn

from hf_histo import inference
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.evaluation.figures import preview
from hf_histo.evaluation.forward import forward
from hf_histo.evaluation.metrics import classification
from hf_histo.experiments.frozen_features import FrozenFeatures
from hf_histo.inference import Classifier
from hf_histo.models import adapters, backbones
from hf_histo.training import losses, trainer
from hf_histo.transforms.augmentation import TestTimeViews, preset, uniform
from hf_histo.transforms.mixing import UNMIXED, Mixing
from hf_histo.transforms.mri import Preparation
from hf_histo.transforms.pipeline import Pipeline, collate
from hf_histo.transforms.preprocessing import Preprocessing

PLAIN = Preprocessing(32, 32, "bilinear", (0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
PREPARED = ["--gray", "--crop_to_brain", "--contrast=stretch"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_centers(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def data(source: tuple[Path, Path]) -> datasets.DatasetDict:
    return load(source[1])


class Recorder(nn.Module):
    """Passes `pixel_values` on as logits (B, n)."""

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=pixel_values.flatten(1))


@pytest.mark.parametrize("more", [[], PREPARED, ["--normalization=reinhard"]], ids=["plain", "prepared", "color"])
def test_every_use_sees_the_same_tensors(
    source: tuple[Path, Path],
    data: datasets.DatasetDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
) -> None:
    options = config(tmp_path / "run", *source, "--image_size=32", "--resize_size=36", *more)
    model = backbones.load(str(source[0]), 1)
    pipeline = Pipeline.of(options, model.config, str(source[0]))
    pipeline = pipeline.fitted(pipeline.read_training(data["train"]), options.centers.normalization)
    images = pipeline.read(data["val"])
    expected = pipeline.extended(data["val"]).evaluate(collate(images.__getitems__(range(len(images)))))
    assert expected.shape == (len(images), 3, 32, 32)
    assert expected.dtype == torch.float32
    plain = Pipeline(replace(pipeline.preprocessing, preparation=Preparation()))
    unchanged = plain.evaluate(collate(plain.read(data["val"]).__getitems__(range(len(images)))))
    assert torch.equal(expected, unchanged) is not bool(more)

    predicted = forward(Recorder(), data["val"], pipeline, batch_size=5)
    np.testing.assert_array_equal(predicted.astype(np.float32), expected.flatten(1).numpy())

    session = trainer.build(
        options,
        tmp_path / "run",
        model=adapters.add(model, options.adapter),
        train=pipeline.read_training(data["train"]),
        validation=images,
        pipeline=pipeline.extended(data["val"]),
        loss=losses.classification(1),
        compute_metrics=classification.for_trainer(),
    )
    assert session.model is not None
    session.model.eval()
    batch = session._prepare_inputs(collate(images.__getitems__(range(len(images)))))
    assert torch.equal(batch["pixel_values"].cpu(), expected)

    folder = write_adapter(
        tmp_path / "adapter", source[0], preprocessing=pipeline.preprocessing, normalizer=pipeline.normalizer
    )
    seen: list[torch.Tensor] = []

    def heat_map(model: nn.Module, pixels: torch.Tensor, chosen: int) -> torch.Tensor:
        seen.append(pixels)
        return torch.ones(pixels.shape[-2:])

    monkeypatch.setattr(inference, "heat_map", heat_map)
    maps = Classifier.from_pretrained(folder).explain(data["val"], [0] * len(images))
    assert torch.equal(torch.cat(seen), expected)
    stored = ImageTable(data["val"])
    assert [heat.shape for heat in maps] == [stored[row]["image"].shape[1:] for row in range(len(stored))]

    probed: dict[str, Any] = {}

    def features(model: nn.Module, rows: datasets.Dataset, pipeline: Pipeline, **kwargs: Any) -> Any:
        found = forward(Recorder(), rows, pipeline)
        probed[kwargs["description"]] = found
        return found

    monkeypatch.setattr("hf_histo.experiments.frozen_features.features", features)
    FrozenFeatures(options, data, tmp_path / "features.npz").of(data)
    np.testing.assert_array_equal(probed["Features of val"].astype(np.float32), expected.flatten(1).numpy())


def test_test_time_views_begin_with_the_evaluation_view(data: datasets.DatasetDict) -> None:
    pipeline = Pipeline(PLAIN, test_time_views=TestTimeViews(8))
    batch = collate(pipeline.read(data["val"]).__getitems__(range(4)))
    first, *others = pipeline.test_time(batch)
    assert torch.equal(first, pipeline.evaluate(batch))
    assert len(others) == 7
    (only,) = pipeline.single_view.test_time(batch)
    assert torch.equal(only, first)


def test_a_training_view_without_augmentation_is_the_evaluation_view() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = collate([{"image": image, "label": 0, "center": 0, "index": i} for i, image in enumerate(images)])
    pipeline = Pipeline(PLAIN)
    torch.testing.assert_close(pipeline.train(batch, 0), pipeline.evaluate(batch), rtol=0, atol=1e-4)
    torch.testing.assert_close(pipeline.train(batch, 0, normalize=False), images / 255, rtol=0, atol=1e-5)


def test_a_center_that_is_not_known_is_measured_once(data: datasets.DatasetDict) -> None:
    pipeline = Pipeline(PLAIN)
    assert pipeline.extended(data["val"]) is pipeline
    assert pipeline.fitted(pipeline.read_training(data["train"]), "none") is pipeline
    fitted = pipeline.fitted(pipeline.read_training(data["train"]), "rgb")
    assert fitted.extended(data["train"]) is fitted
    extended = fitted.extended(data["val"])
    assert extended.normalizer is not None and fitted.normalizer is not None
    assert extended.normalizer.centers.keys() == fitted.normalizer.centers.keys() | set(data["val"]["center"])
    assert extended.extended(data["val"]) is extended


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_stains_are_mixed_with_their_probability_and_nothing_else_moves(
    data: datasets.DatasetDict, share: float
) -> None:
    pipeline = Pipeline(PLAIN, preset("strong"), stain_mixing=share)
    images = pipeline.read_training(data["train"])
    pipeline = pipeline.fitted(images, "rgb")
    assert pipeline.normalizer is not None
    index = torch.arange(600)
    reference = pipeline.normalizer.targets(torch.zeros(600, dtype=torch.bool), torch.zeros(600, 2))
    targets = pipeline.stain_targets(index, 0)
    if share == 0:
        assert targets is None
        return
    assert targets is not None
    mixed = (targets != reference).any(1).numpy()
    assert abs(mixed.mean() - share) <= 5 * np.sqrt(share * (1 - share) / 600)
    if share == 0.3:
        # Independent of the first number that is drawn for the augmentation.
        area = uniform(0, 0, index, 1)[:, 0]
        assert abs(np.corrcoef(mixed, area)[0, 1]) < 5 / np.sqrt(600)
        later = pipeline.stain_targets(index, 1)
        assert later is not None
        assert not np.array_equal(mixed, (later != reference).any(1).numpy())

        batch = collate(images.__getitems__(range(24)))
        plain = replace(pipeline, stain_mixing=0.0).train(batch, 0)
        same = [torch.equal(one, other) for one, other in zip(pipeline.train(batch, 0), plain, strict=True)]
        assert same == (~mixed[:24]).tolist()


def test_a_view_gets_a_mixture_or_a_virtual_stain_or_the_reference(data: datasets.DatasetDict) -> None:
    pipeline = Pipeline(PLAIN, stain_mixing=0.3)
    pipeline = pipeline.fitted(pipeline.read_training(data["train"]), "reinhard")
    assert pipeline.normalizer is not None
    index = np.arange(2000)
    mixtures = pipeline.stain_targets(index, 0)
    both = replace(pipeline, virtual_stain=0.5).stain_targets(index, 0)
    assert mixtures is not None and both is not None
    reference = pipeline.normalizer.targets(torch.zeros(1, dtype=torch.bool), torch.zeros(1, 2))
    mixed, virtual = (mixtures != reference).any(1), (both != mixtures).any(1)
    assert not (mixed & virtual).any()
    assert mixed.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert virtual.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_preview_shows_mixed_views(
    data: datasets.DatasetDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets: list[dict[str, list[np.ndarray]]] = []
    monkeypatch.setattr(preview, "sheet", lambda rows, path: sheets.append(rows))
    for mixing in (UNMIXED, Mixing(mixup_alpha=1.0)):
        preview.preview(Pipeline(PLAIN, preset("flips"), mixing=mixing), data["train"], tmp_path / "preview.png")
    plain, mixed = sheets
    for name in plain:
        assert np.array_equal(plain[name][0], mixed[name][0])
        assert not any(np.array_equal(one, other) for one, other in zip(plain[name][1:], mixed[name][1:], strict=True))


def test_a_map_is_laid_back_where_the_head_was_cut_out() -> None:
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 10:40, 20:60] = 200
    preparation = Preparation(crop_to_brain=True)
    pipeline = Pipeline(replace(PLAIN, preparation=preparation, fit="squash"))
    rows, columns = preparation.box(image)
    assert preparation(image).shape[1:] == (rows.stop - rows.start, columns.stop - columns.start)
    heat = pipeline.back(torch.ones(32, 32), image)
    assert heat.shape == (60, 80)
    assert heat[rows, columns].min() > 0.99
    assert heat.sum() == pytest.approx(preparation(image)[0].numel(), rel=1e-4)
    assert Pipeline(PLAIN).back(torch.ones(32, 32), image).shape == (60, 80)
