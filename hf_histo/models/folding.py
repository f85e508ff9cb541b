"""Frozen batch norm as part of the frozen convolution before it: the same function, with a pass over memory less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from hf_histo.models.features import Call, record, replaced


@contextmanager
def folded(model: nn.Module, pixels: torch.Tensor) -> Iterator[int]:
    """Within the block, every batch norm that directly follows a frozen convolution is part of it. Yields their number.

    Exact up to rounding: an affine map of each channel after a linear one. A convolution under LoRA is left alone,
    since what is normalized there is its sum with the update. Afterwards the weights are what they were, to the last
    bit; within, they must not be saved.

    Args:
        model: called as `model(pixel_values=...)`; its batch norm is frozen (`batchnorm.freeze`).
        pixels: a sample batch (B, 3, H, W), which shows what follows what.
    """
    training = model.training
    with ExitStack() as stack, torch.no_grad():
        calls, logits = record(model.eval(), pixels)
        pairs = list(_pairs(calls))
        for convolution, norm in pairs:
            stack.callback(_set, convolution, convolution.weight, convolution.bias)
            _set(convolution, *fuse_conv_bn_weights(*_parts(convolution, norm)))
            rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
            stack.enter_context(replaced(norm, rest.forward))
        close = torch.allclose(model(pixel_values=pixels).logits, logits, rtol=1e-3, atol=1e-4)
        if not close:  # something else took what a convolution gave
            stack.close()
        model.train(training)
        with torch.enable_grad():
            yield len(pairs) if close else 0


def _pairs(calls: list[Call]) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Frozen convolutions and the batch norms that took what they gave, each called once."""
    often = Counter(call.name for call in calls)
    norms = {id(c.given): c for c in calls if isinstance(c.module, nn.BatchNorm2d) and often[c.name] == 1}
    for call in calls:
        norm = norms.get(id(call.output))
        frozen = not any(p.requires_grad for p in call.module.parameters())
        if norm and frozen and type(call.module) is nn.Conv2d and often[call.name] == 1:
            assert isinstance(norm.module, nn.BatchNorm2d)
            yield call.module, norm.module


def _parts(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    mean, variance = norm.running_mean, norm.running_var
    return convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias


def _set(convolution: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    convolution.weight, convolution.bias = weight, bias
