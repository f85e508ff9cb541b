"""A prediction is the mean logit over its views, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from miniature import config, write_backbone, write_data
from torch import nn

from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.evaluation import forward as forward_module
from hf_histo.evaluation.forward import forward
from hf_histo.models import adapters, backbones
from hf_histo.transforms.augmentation import TestTimeViews, augment, preset
from hf_histo.transforms.pipeline import Pipeline
from hf_histo.transforms.preprocessing import Preprocessing

VIEW = Preprocessing(32, 32, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Linear(nn.Module):
    """Logits that depend on where a pixel is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 32 * 32, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=pixel_values.flatten(1) @ self.weight)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    folder = tmp_path_factory.mktemp("data")
    return load(write_data(folder / "data"), cache_dir=folder / "cache")["val"]


@pytest.fixture(scope="module")
def images(data: datasets.Dataset) -> torch.Tensor:
    return torch.stack([sample["image"] for sample in ImageTable(data).__getitems__(list(range(len(data))))])


def mean_logit(views: list[torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return np.mean([Linear()(view.contiguous()).logits.numpy() for view in views], axis=0)


def test_the_eight_views_of_the_square(data: datasets.Dataset, images: torch.Tensor) -> None:
    plain = VIEW(images)
    turned = [torch.rot90(view, turns, (-2, -1)) for view in (plain, plain.flip(-1)) for turns in range(4)]
    found = forward(Linear(), data, Pipeline(VIEW, test_time_views=TestTimeViews(8)))
    np.testing.assert_allclose(found, mean_logit(turned), rtol=0, atol=1e-4)
    np.testing.assert_allclose(forward(Linear(), data, Pipeline(VIEW)), mean_logit([plain]), rtol=0, atol=1e-4)


def test_drawn_views_are_those_of_the_augmentation(data: datasets.Dataset, images: torch.Tensor) -> None:
    index = torch.arange(len(data))
    drawn = [
        VIEW.normalize(augment(images, preset("crop-jitter"), 32, seed=7, epoch=view, index=index)) for view in range(3)
    ]
    pipeline = Pipeline(VIEW, test_time_views=TestTimeViews(3, "crop-jitter", seed=7))
    found = forward(Linear(), data, pipeline)
    np.testing.assert_allclose(found, mean_logit(drawn), rtol=0, atol=1e-4)
    batched = forward(Linear(), data, pipeline, batch_size=4)
    np.testing.assert_allclose(batched, found, rtol=0, atol=1e-4)
    for other in (
        TestTimeViews(2, "crop-jitter", seed=7),
        TestTimeViews(3, "crop-jitter", seed=8),
        TestTimeViews(3, "flips", seed=7),
        TestTimeViews(),
    ):
        assert np.abs(forward(Linear(), data, Pipeline(VIEW, test_time_views=other)) - found).min() > 1e-3


def test_batch_norm_takes_the_statistics_of_the_images_where_that_is_asked_for(
    data: datasets.Dataset, images: torch.Tensor
) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.norm(pixel_values).mean((-2, -1)))

    model = Normalized()
    plain = forward(model, data, Pipeline(VIEW))
    adapted = forward(model, data, Pipeline(VIEW), adapt_batch_norm=True)
    np.testing.assert_allclose(plain, VIEW(images).mean((-2, -1)), rtol=0, atol=1e-4)
    np.testing.assert_allclose(adapted.mean(axis=0), 0, atol=1e-4)
    assert np.abs(plain.mean(axis=0)).max() > 0.1
    assert np.array_equal(forward(model, data, Pipeline(VIEW)), plain)  # the model has its own again


def test_a_merged_adapter_gives_the_same_logits(
    tmp_path: Path, data: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = write_backbone(tmp_path / "backbone")
    options = config(tmp_path, backbone, tmp_path, "--target_modules=all-conv")
    model = adapters.add(backbones.load(str(backbone), 1), options.adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    found = []
    for few in (len(data), len(data) - 1):
        monkeypatch.setattr(forward_module, "FEW", few)
        found.append(forward(model, data, Pipeline(VIEW)))
    assert not np.array_equal(found[0], found[1])  # merged, it rounds otherwise
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4)
