"""Frozen batch norm, and LoRA, as part of the convolution before: the same function, with fewer passes over memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from hf_histo.models.speed import low_rank
from hf_histo.models.speed.activation_cut import Call, record, replaced


@contextmanager
def folded(model: nn.Module, pixels: torch.Tensor) -> Iterator[int]:
    """Within the block, a convolution takes in the batch norm that directly follows it, and its own low-rank update.

    Exact up to rounding: batch norm is an affine map of each channel after a linear one, and convolution is linear in
    its weight. The update is added at each call, see `low_rank`; layers with dropout, DoRA or several adapters are left
    alone. Afterwards the model is what it was, to the last bit; within, its frozen weights must not be saved.

    Args:
        model: called as `model(pixel_values=...)`; its batch norm is frozen (`batchnorm.freeze`).
        pixels: a sample batch (B, 3, H, W), which shows what follows what.

    Yields the number of convolutions that are changed.
    """
    if not any(isinstance(module, nn.BatchNorm2d) or low_rank.is_simple(module) for module in model.modules()):
        yield 0
        return
    training = model.training
    with ExitStack() as stack, torch.no_grad():
        calls, logits = record(model.eval(), pixels)
        pairs = list(_pairs(calls))
        for layer, norm in pairs:
            convolution = layer.get_base_layer() if isinstance(layer, LoraConv2d) else layer
            assert isinstance(convolution, nn.Conv2d)
            weight, bias, factor = convolution.weight, convolution.bias, None
            if norm is not None:
                weight, bias = fuse_conv_bn_weights(*_parts(convolution, norm))
                assert norm.running_var is not None
                factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
                rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
                stack.enter_context(replaced(norm, rest.forward))
            if isinstance(layer, LoraConv2d):
                stack.enter_context(replaced(layer, low_rank.forward(layer, weight, bias, factor)))
            else:
                stack.callback(_set, convolution, convolution.weight, convolution.bias)
                _set(convolution, weight, bias)
        close = torch.allclose(model(pixel_values=pixels).logits, logits, rtol=1e-3, atol=1e-4)
        if not close:  # something else took what a convolution gave
            stack.close()
        model.train(training)
        with torch.enable_grad():
            yield len(pairs) if close else 0


def _pairs(calls: list[Call]) -> Iterator[tuple[nn.Module, nn.BatchNorm2d | None]]:
    """Convolutions, frozen or under LoRA, and the batch norms that took what they gave, each called once."""
    often = Counter(call.name for call in calls)
    norms = {id(c.given): c for c in calls if isinstance(c.module, nn.BatchNorm2d) and often[c.name] == 1}
    for call in calls:
        found = norms.get(id(call.output))
        norm = found.module if found else None
        assert norm is None or isinstance(norm, nn.BatchNorm2d)
        frozen = type(call.module) is nn.Conv2d and not any(p.requires_grad for p in call.module.parameters())
        if often[call.name] == 1 and (low_rank.is_simple(call.module) or (frozen and norm is not None)):
            yield call.module, norm


def _parts(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    mean, variance = norm.running_mean, norm.running_var
    return convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias


def _set(convolution: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    convolution.weight, convolution.bias = weight, bias
