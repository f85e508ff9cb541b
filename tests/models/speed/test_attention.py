"""Attention with a faster gradient on CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import ViTConfig, ViTForImageClassification

from hf_histo.config import AdapterOptions
from hf_histo.models import adapters, backbones
from hf_histo.models.speed import attention, folding

TORCHS = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"


class Attend(nn.Module):
    """Attention of the three tensors it is given."""

    def forward(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(*tensors, **options)


def drawn(dtype: torch.dtype, images: int = 3) -> list[torch.Tensor]:
    """Query, key and value for 2 heads, 7 and 5 tokens, as parts of one tensor, which have gaps between their rows."""
    torch.manual_seed(0)
    whole = torch.randn(images, 7, 3, 2, 4, dtype=dtype).permute(2, 0, 3, 1, 4)
    return [part.detach().requires_grad_() for part in (whole[0], whole[1, :, :, :5], whole[2, :, :, :5])]


def test_its_formula_is_the_gradient() -> None:
    tensors = drawn(torch.float64)
    assert torch.autograd.gradcheck(lambda *given: attention._Attention.apply(*given, 0.3), tensors)


def test_images_are_taken_in_parts_where_scores_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = drawn(torch.float64, images=5)
    of_output = torch.randn(5, 2, 7, 4, dtype=torch.float64)
    whole = torch.autograd.grad(attention._Attention.apply(*tensors, 0.3), tensors, of_output)
    monkeypatch.setattr(attention, "SCORES", 2 * 2 * 7 * 5)  # two images
    parts = torch.autograd.grad(attention._Attention.apply(*tensors, 0.3), tensors, of_output)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_the_output_is_torchs_and_the_gradient_is_as_near_to_the_exact_one() -> None:
    module, tensors = Attend(), [part.detach() * 3 for part in drawn(torch.bfloat16, images=50)]
    of_output = torch.randn(50, 2, 7, 4).bfloat16()
    found = {}
    for name, call in (("torch", module.forward), ("ours", attention.forward(module)), ("exact", module.forward)):
        given = [tensor.to(torch.float64 if name == "exact" else tensor.dtype).requires_grad_() for tensor in tensors]
        output = call(*given)
        found[name] = output.detach(), torch.autograd.grad(output, given, of_output.to(output.dtype))
    assert torch.equal(found["ours"][0], found["torch"][0])
    for ours, torchs, exact in zip(*(found[name][1] for name in ("ours", "torch", "exact")), strict=True):
        assert (ours - exact).norm() <= 1.2 * (torchs - exact).norm()
        assert (ours - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"attn_mask": torch.zeros(7, 5, dtype=torch.bfloat16)}, {"dropout_p": 0.5}]
)
def test_other_calls_are_torchs(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(attention, "_Attention")
    module = Attend()
    torch.manual_seed(0)
    expected = module(*drawn(torch.bfloat16), **options)
    torch.manual_seed(0)
    assert torch.equal(attention.forward(module)(*drawn(torch.bfloat16), **options), expected)
    attention.forward(module)(*drawn(torch.float32))
    with torch.no_grad():
        attention.forward(module)(*drawn(torch.bfloat16))


def events(model: nn.Module, pixels: torch.Tensor) -> set[str]:
    """Names of the operators of a training step in bfloat16."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixel_values=pixels).logits.sum()
        loss.backward()
    return {str(event.key) for event in profiler.key_averages()}


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_models_of_both_libraries_have_it_while_they_are_folded(library: str) -> None:
    model: Any
    if library == "timm":
        backbone = backbones.load("test_vit.r160_in1k", 3, random_weights=True, image_size=64)
        model = adapters.add(backbone, AdapterOptions(target_modules="attention-qkvo")).train()
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = ViTForImageClassification(ViTConfig(image_size=64, **sizes)).train()
    pixels = torch.randn(2, 3, 64, 64)
    assert TORCHS in events(model, pixels)
    with folding.folded(model, pixels):
        inside = events(model, pixels)
    assert TORCHS not in inside
    assert "aten::_softmax_backward_data" in inside
    assert TORCHS in events(model, pixels)


def test_with_checkpointed_activations_as_well() -> None:
    backbone = backbones.load("test_vit.r160_in1k", 3, random_weights=True, image_size=64)
    model: Any = adapters.add(backbone, AdapterOptions(target_modules="attention-qkvo")).train()
    model.base_model.model.timm_model.set_grad_checkpointing(True)
    pixels = torch.randn(2, 3, 64, 64)
    with folding.folded(model, pixels):
        assert TORCHS not in events(model, pixels)
