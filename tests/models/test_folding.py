"""Frozen batch norm inside of convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_histo.config import AdapterOptions
from hf_histo.models import adapters, backbones, batchnorm, folding


@pytest.mark.parametrize(
    ("name", "method", "target_modules", "expected"),
    [
        ("test_resnet.r160_in1k", "linear", None, 15),
        ("test_resnet.r160_in1k", "lora", "last-conv", 12),  # not behind the three layers with LoRA
        ("test_resnet.r160_in1k", "lora", "all-conv", 0),
        ("test_efficientnet.r160_in1k", "linear", None, 13),  # timm's batch norm with an activation in it
    ],
)
def test_the_same_function_with_fewer_layers(name: str, method: str, target_modules: str | None, expected: int) -> None:
    torch.manual_seed(0)
    model = backbones.load(name, 3, random_weights=True)
    for layer in batchnorm.layers(model).values():
        for tensor in (layer.weight.data, layer.running_var, layer.running_mean, layer.bias.data):
            assert tensor is not None
            tensor.uniform_(0.5, 1.5)
    batchnorm.freeze(model)
    adapted = adapters.add(model, AdapterOptions(method=method, target_modules=target_modules)).train()  # type: ignore[arg-type]
    pixels = torch.randn(2, 3, 32, 32)
    before = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    logits = adapted(pixel_values=pixels).logits
    with folding.folded(adapted, torch.randn(2, 3, 32, 32)) as count:
        assert count == expected
        assert adapted.training
        inside = adapted(pixel_values=pixels).logits
        assert inside.requires_grad
        torch.testing.assert_close(inside, logits, rtol=1e-4, atol=1e-6)
        assert torch.equal(inside, logits) is (expected == 0)
    assert torch.equal(adapted(pixel_values=pixels).logits, logits)
    after = adapted.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert after.keys() == before.keys()


class Shared(nn.Module):
    """A convolution whose output is also taken beside batch norm, where no module sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, pixel_values: torch.Tensor) -> object:
        found = self.conv(pixel_values)
        return type("Output", (), {"logits": (self.norm(found) + found).mean((2, 3))})


def test_a_convolution_that_others_take_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Shared()
    model.norm.running_var.fill_(4.0)  # type: ignore[union-attr]
    weight = model.conv.weight
    with folding.folded(model.eval(), torch.randn(2, 3, 8, 8)) as count:
        assert count == 0
        assert model.conv.weight is weight
