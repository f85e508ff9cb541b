"""Frozen batch norm inside of convolutions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_histo.config import AdapterOptions
from hf_histo.models import adapters, backbones, batchnorm
from hf_histo.models.speed import folding


def with_statistics(name: str) -> PreTrainedModel:
    """A backbone with random weights, whose batch norm does something: its statistics and scales are drawn, too."""
    torch.manual_seed(0)
    model = backbones.load(name, 3, random_weights=True)
    for layer in batchnorm.layers(model).values():
        for tensor in (layer.weight.data, layer.running_var, layer.running_mean, layer.bias.data):
            assert tensor is not None
            tensor.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("name", "method", "target_modules", "expected"),
    [
        ("test_resnet.r160_in1k", "linear", None, 15),
        ("test_resnet.r160_in1k", "lora", "last-conv", 15),  # three with LoRA
        ("test_resnet.r160_in1k", "lora", "all-conv", 15),
        ("test_efficientnet.r160_in1k", "linear", None, 13),  # timm's batch norm with an activation in it
    ],
)
def test_the_same_function_with_fewer_layers(name: str, method: str, target_modules: str | None, expected: int) -> None:
    model = with_statistics(name)
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
    assert torch.equal(adapted(pixel_values=pixels).logits, logits)
    after = adapted.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert after.keys() == before.keys()


def gradients(model: Any, pixels: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Of every trained parameter, and of the pixels."""
    model.zero_grad()
    pixels = pixels.clone().requires_grad_()
    (model(pixel_values=pixels).logits * weight).sum().backward()
    return [pixels.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    ("name", "target_modules"),
    [
        ("test_resnet.r160_in1k", "all-conv"),
        ("test_efficientnet.r160_in1k", "all-conv"),
        ("mobilenetv2_035", "all-conv"),  # ReLU6
        ("tf_mobilenetv3_small_075", "all-conv"),  # convolutions with the padding of TensorFlow
        ("test_vit.r160_in1k", r".*\.(patch_embed|attn)\.proj"),  # no norm behind the convolution; linear layers
        ("test_vit.r160_in1k", r".*\.mlp\.fc[12]"),
        ("test_vit.r160_in1k", r".*\.attn\.qkv"),
        ("test_vit.r160_in1k", r".*\.attn\.qkv\.[qv]"),  # two of the three parts of a fused layer
    ],
)
def test_the_same_gradients_under_lora(name: str, target_modules: str) -> None:
    torch.manual_seed(0)
    model = backbones.load(name, 3, random_weights=True, image_size=64)
    batchnorm.freeze(model)
    options = AdapterOptions(target_modules=target_modules, lora_rank=4, use_rslora=True)
    adapted = adapters.add(model, options).double().train()
    for parameter in adapted.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2  # LoRA starts with no update and no gradient of A
    # Enough images for more tokens than features: with fewer, linear layers are left to peft.
    pixels, weight = torch.randn(8, 3, 64, 64).double(), torch.randn(8, 3).double()
    plain = gradients(adapted, pixels, weight)
    with folding.folded(adapted, pixels.roll(1, -1)) as count:
        assert count > 0
        for inside, outside in zip(gradients(adapted, pixels, weight), plain, strict=True):
            torch.testing.assert_close(inside, outside, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "target_modules"),
    [
        ("test_resnet.r160_in1k", "all-conv"),
        pytest.param("test_vit.r160_in1k", "attention-mlp", marks=pytest.mark.slow),
    ],
)
def test_a_folded_model_is_one_graph_for_the_compiler(name: str, target_modules: str) -> None:
    """Else each layer is compiled by itself, until there are too many for torch, which then compiles none of them."""
    model = backbones.load(name, 3, random_weights=True, image_size=64)
    batchnorm.freeze(model)
    adapted = adapters.add(model, AdapterOptions(target_modules=target_modules)).train()
    pixels = torch.randn(8, 3, 64, 64)
    with folding.folded(adapted, pixels):
        compiled = torch.compile(adapted, backend="eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            compiled(pixel_values=pixels).logits.sum().backward()


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "mobilenetv2_035"])
def test_in_half_precision_as_near_as_that_is(name: str) -> None:
    torch.manual_seed(0)
    model = backbones.load(name, 3, random_weights=True, image_size=64)
    batchnorm.freeze(model)
    adapted = adapters.add(model, AdapterOptions(target_modules="all-conv")).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    pixels, weight = torch.randn(4, 3, 64, 64), torch.randn(4, 3)
    exact = gradients(adapted, pixels, weight)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(adapted, pixels, weight)
        with folding.folded(adapted, pixels):
            ours = gradients(adapted, pixels, weight)
    assert {gradient.dtype for gradient in ours} == {torch.float32}

    def error(found: list[torch.Tensor]) -> float:
        return sum(float((f - e).square().sum()) for f, e in zip(found, exact, strict=True)) ** 0.5

    assert error(ours) < 1.5 * error(plain)


def test_clipping_keeps_the_output_alone() -> None:
    """The gradient of ReLU6 from its output is that of torch, from its input, to the last bit; also at the bounds."""
    x = torch.tensor([-1.0, 0.0, 1e-45, 3.0, 6.0, 7.0, torch.inf, torch.nan], requires_grad=True)
    weight = torch.arange(1.0, 9.0)
    (plain,) = torch.autograd.grad((torch.nn.functional.relu6(x) * weight).nan_to_num().sum(), x)
    clipped = folding._clip(nn.ReLU6(inplace=True), x)
    torch.testing.assert_close(clipped, torch.nn.functional.relu6(x), rtol=0, atol=0, equal_nan=True)
    (ours,) = torch.autograd.grad((clipped * weight).nan_to_num().sum(), x)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"adapter": "dora"}])
def test_other_kinds_of_update_are_left_to_peft(options: dict[str, Any]) -> None:
    model = backbones.load("test_resnet.r160_in1k", 3, random_weights=True)
    batchnorm.freeze(model)
    adapted = adapters.add(model, AdapterOptions(target_modules="all-conv", **options))
    with folding.folded(adapted, torch.randn(2, 3, 32, 32)) as count:
        assert count == 0


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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("test_resnet.r160_in1k", {"method": "full"}),
        ("test_resnet.r160_in1k", {"method": "lora", "target_modules": "all-conv"}),
        ("test_resnet.r160_in1k", {"method": "lora", "target_modules": "all-conv", "adapter": "dora"}),
        ("test_efficientnet.r160_in1k", {"method": "lora", "target_modules": "all-conv"}),
        ("test_vit.r160_in1k", {"method": "lora", "target_modules": "attention-qkvo"}),
        ("test_vit.r160_in1k", {"method": "lora", "target_modules": "attention-qv"}),
    ],
)
def test_merged_for_prediction(name: str, settings: dict[str, Any]) -> None:
    model = with_statistics(name)
    adapted = adapters.add(model, AdapterOptions(**settings)).eval()
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)
    pixels = torch.randn(2, 3, 160, 160)
    before = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    with torch.no_grad():
        logits = adapted(pixel_values=pixels).logits
        ran: list[str] = []
        hooks = [
            module.register_forward_hook(lambda *_, name=name: ran.append(name))  # type: ignore[misc]
            for name, module in adapted.named_modules()
            if ".lora_A." in name
        ]
        with folding.merged(adapted, torch.randn(1, 3, 160, 160)) as is_merged:
            assert is_merged
            ran.clear()
            inside = adapted(pixel_values=pixels).logits
            assert ran == []  # no update beside its layer
        torch.testing.assert_close(inside, logits, rtol=0, atol=1e-5 * max(1, float(logits.abs().max())))
        assert not torch.equal(inside, logits)  # something was merged
        assert torch.equal(adapted(pixel_values=pixels).logits, logits)
        assert bool(ran) == (settings["method"] == "lora")
    for hook in hooks:
        hook.remove()
    after = adapted.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_a_model_that_changes_when_merged_is_left_alone() -> None:
    class Twice(nn.Module):
        """What the convolution gives is taken by a batch norm and by something else."""

        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.norm.running_mean.fill_(2.0)  # type: ignore[union-attr]

        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            features = self.convolution(pixel_values)
            return SimpleNamespace(logits=(self.norm(features) + features).mean((2, 3)))

    model, pixels = Twice().eval(), torch.randn(2, 3, 8, 8)
    logits = model(pixels).logits
    with torch.no_grad(), folding.merged(model, pixels) as is_merged:
        assert not is_merged
        assert torch.equal(model(pixels).logits, logits)
