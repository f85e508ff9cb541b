"""A convolution under LoRA as one convolution with the sum of both weights: the same function, with fewer passes.

peft runs the update beside the layer, which writes tensors as large as the layer's output three more times, and as many
in the backward pass. Here the update is added to the weight at each call, and the gradients of its two factors come
from tensors of `rank` channels. The gradient of the whole weight is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Conv2d
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight


def is_simple(layer: nn.Module) -> bool:
    """Whether `forward` can stand for peft's: one plain update of a plain convolution, all of whose input it sees."""
    if not isinstance(layer, Conv2d) or len(layer.active_adapters) != 1 or layer.merged or layer.disable_adapters:
        return False
    base, name = layer.get_base_layer(), layer.active_adapters[0]
    plain = type(base) is nn.Conv2d and base.groups == 1 and base.dilation == (1, 1) and base.padding_mode == "zeros"
    return (
        plain
        and name in layer.lora_A
        and name not in layer.lora_variant  # DoRA among them
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not isinstance(base.padding, str)
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


def forward(
    layer: Conv2d, weight: torch.Tensor, bias: torch.Tensor | None, factor: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of a layer that `is_simple`, with a weight and a bias that may hold more than its own.

    Args:
        layer: the update's factors and scale are looked up in it at each call.
        weight, bias: (o, c, k, k) and (o,) float, in place of those of the frozen convolution.
        factor: (o,) float, of each channel of the update; 1 by default.

    It runs in the precision of autocast where that is on, with a sum made in the precision of the weights. Where the
    weight is larger than what the layer gives, as in the fully connected layers of VGG, the update stays beside it.
    """
    base, name = layer.get_base_layer(), layer.active_adapters[0]
    assert isinstance(base, nn.Conv2d) and not isinstance(base.padding, str)
    stride, padding = base.stride, base.padding
    frozen: dict[torch.dtype, torch.Tensor] = {}  # the weight, converted once

    def forward(x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        down: Any = layer.lora_A[name].weight
        up: Any = layer.lora_B[name].weight * layer.scaling[name]
        if factor is not None:
            up = up * factor[:, None, None, None]
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            x, offset = x.to(dtype), bias if bias is None else bias.to(dtype)
            if weight[0].numel() < len(x) * _positions(x, weight, stride, padding):
                outputs: torch.Tensor = _LowRank.apply(x, down, up, weight, offset, stride, padding)
                return outputs
            if dtype not in frozen:
                frozen[dtype] = weight.to(dtype, memory_format=torch.channels_last)
            inner = F.conv2d(x, down.to(dtype), None, stride, padding)
            return F.conv2d(x, frozen[dtype], offset, stride, padding) + F.conv2d(inner, up.to(dtype))

    return forward


def _positions(x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]) -> int:
    """Height times width of what a convolution makes of x."""
    sides = zip(x.shape[-2:], weight.shape[-2:], stride, padding, strict=True)
    return math.prod((size + 2 * edge - kernel) // step + 1 for size, kernel, step, edge in sides)


class _LowRank(torch.autograd.Function):
    """conv(x, weight + up · down) + bias, with gradients of x (b, c, h, w), down (r, c, k, k) and up (o, r, 1, 1)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> torch.Tensor:
        merged = torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1)).view_as(weight)
        merged, down = (w.to(x.dtype, memory_format=torch.channels_last) for w in (merged, down))
        ctx.save_for_backward(x, down, up.to(x.dtype), merged)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, merged, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, of_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, down, up, merged = ctx.saved_tensors
        inner = F.conv2d(x, down, None, ctx.stride, ctx.padding)
        of_inner = F.conv2d(of_output, up.transpose(0, 1))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = conv2d_input(x.shape, merged, of_output, ctx.stride, ctx.padding)
        of_down = conv2d_weight(x, down.shape, of_inner, ctx.stride, ctx.padding)
        of_up = conv2d_weight(inner, up.shape, of_output)
        return of_x, of_down, of_up, None, None, None, None
