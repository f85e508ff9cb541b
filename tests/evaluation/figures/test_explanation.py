"""Heat maps are high where the evidence for a class is, on models for which it is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_histo.errors import HistoError
from hf_histo.evaluation.figures.explanation import blend, explanations, heat_map


class Wrapped(nn.Module):
    """Wraps a module that returns logits as a tensor in the interface of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(pixel_values))


def brightness() -> nn.Module:
    """A CNN whose single logit is the brightness of patches of 8 x 8 pixels."""
    convolution, linear = nn.Conv2d(3, 1, 8, 8, bias=False), nn.Linear(1, 1)
    nn.init.ones_(convolution.weight)
    nn.init.ones_(linear.weight)
    return Wrapped(nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear))


def test_the_map_is_where_the_light_is() -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, :, 8:16, 16:24] = 1
    heat = heat_map(brightness(), pixels, 1)
    assert heat.shape == (32, 32)
    assert heat.max() > 0.8
    assert heat[12, 20] == heat.max()
    assert heat[24:, :].max() == 0
    assert heat_map(brightness(), pixels, 0).max() == 0  # no evidence against it
    assert heat_map(brightness(), -pixels, 0)[12, 20] > 0.8


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    small = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=64, patch_size=16
    )
    return {
        "resnet": Wrapped(timm.create_model("test_resnet", num_classes=3)),
        "efficientnet": Wrapped(timm.create_model("test_efficientnet", num_classes=1)),
        "convnext": Wrapped(timm.create_model("test_convnext", num_classes=3)),
        "vit": Wrapped(timm.create_model("test_vit", num_classes=3, img_size=64)),
        "registers": Wrapped(timm.create_model("test_vit", num_classes=3, img_size=64, reg_tokens=4)),
        "average": Wrapped(
            timm.create_model("test_vit", num_classes=3, img_size=64, class_token=False, global_pool="avg")
        ),
        "transformers": ViTForImageClassification(small),
    }


@pytest.mark.parametrize("name", models())
def test_every_architecture_has_maps_that_depend_on_image_and_class(name: str) -> None:
    model = models()[name].eval().requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    one, two = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(pixel_values=one).logits
    maps = [heat_map(model, one, 1), heat_map(model, two, 1), heat_map(model, one, 0)]
    for heat in maps:
        assert heat.shape == (64, 64)
        assert heat.dtype == torch.float32
        assert heat.isfinite().all()
        assert heat.min() >= 0
        assert heat.max() <= 1
        assert not heat.requires_grad
    assert any(heat.max() > 0.5 for heat in maps)
    assert not torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    assert torch.equal(maps[0], heat_map(model, one, 1))
    with torch.no_grad():
        assert torch.equal(model(pixel_values=one).logits, expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_without_a_spatial_layer_is_refused() -> None:
    model = Wrapped(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)))
    with pytest.raises(HistoError, match="no spatial layer"):
        heat_map(model, torch.randn(1, 3, 8, 8), 1)


def test_blending_leaves_the_cold_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    heat = np.zeros((6, 7), dtype=np.float32)
    heat[2, 3] = 1
    changed = (blend(image, heat) != image).any(axis=2)
    assert changed[2, 3]
    assert changed.sum() == 1


def test_the_figure(tmp_path: Path) -> None:
    images = [np.zeros((8 + i, 9, 3), dtype=np.uint8) for i in range(7)]
    explanations(
        images, [np.ones(image.shape[:2], dtype=np.float32) for image in images], list("abcdefg"), tmp_path / "x.png"
    )
    assert PIL.Image.open(tmp_path / "x.png").size[0] > 1000
