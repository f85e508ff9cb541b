"""A convolution or linear layer under LoRA as one with the sum of both weights: the same function, with fewer passes.

peft runs the update beside the layer, which writes tensors as large as the layer's output three more times, and as many
in the backward pass. Here the update is added to the weight at each call, and the gradients of its two factors come
from tensors of `rank` channels. The gradient of the whole weight is never formed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Conv2d, Linear
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight


def is_simple(layer: nn.Module) -> bool:
    """Whether a function of this module can stand for peft's: one plain update of a plain, frozen layer."""
    if not isinstance(layer, Conv2d | Linear) or len(layer.active_adapters) != 1:
        return False
    base, name = layer.get_base_layer(), layer.active_adapters[0]
    return (
        not layer.merged
        and not layer.disable_adapters
        and (_is_plain_convolution(base) or type(base) is nn.Linear)
        and name in layer.lora_A
        and name not in layer.lora_variant  # DoRA among them
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


def _is_plain_convolution(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def forward(
    layer: Conv2d, weight: torch.Tensor, bias: torch.Tensor | None, factor: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of a convolution that `is_simple`, with a weight and a bias that may hold more than its own.

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
        dtype = _dtype(x)
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


def linear_forward(layer: nn.Module, parts: Sequence[nn.Module]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of `layer`, a linear layer, or several ones whose outputs are concatenated, as one linear layer.

    Args:
        layer: the whole; its own forward serves inputs of so few tokens that adding up the weights would cost more.
        parts: frozen `nn.Linear` or layers that are `is_simple`, in the order of their outputs: `layer` itself, or
            those that it concatenates. The updates' factors and scales are looked up in them at each call.

    As `forward`, it runs in the precision of autocast, with a sum made in the precision of the weights.
    """
    layers: list[Any] = [part.get_base_layer() if isinstance(part, Linear) else part for part in parts]
    ends = [sum(each.out_features for each in layers[:count]) for count in range(len(layers) + 1)]
    spans = [slice(start, end) for start, end in itertools.pairwise(ends)]
    adapted = [(place, part) for place, part in enumerate(parts) if isinstance(part, Linear)]
    plain = type(layer).forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.numel() <= layers[0].in_features ** 2:
            unchanged: torch.Tensor = plain(layer, x)
            return unchanged
        kind = x.device.type
        factors: list[Any] = []
        for _, part in adapted:
            name = part.active_adapters[0]
            factors += [part.lora_A[name].weight, part.lora_B[name].weight * part.scaling[name]]
        with torch.no_grad():
            weights = [each.weight for each in layers]
            for (place, _), down, up in zip(adapted, factors[::2], factors[1::2], strict=True):
                weights[place] = torch.addmm(weights[place], up, down)
            biases = [each.bias for each in layers if each.bias is not None]
        dtype = _dtype(x)
        with torch.autocast(kind, enabled=False):
            weight = torch.cat([part.to(dtype) for part in weights])
            bias = torch.cat(biases).to(dtype) if biases else None
            outputs: torch.Tensor = _LowRankLinear.apply(
                x.to(dtype), weight, bias, [spans[place] for place, _ in adapted], *factors
            )
            return outputs

    return forward


class _LowRankLinear(torch.autograd.Function):
    """x weightᵀ + bias, with gradients of x (..., c), and of each down (r, c) and up (o, r) that the weight contains.

    `spans` are the rows of `weight` that each pair of factors adds to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        spans: Sequence[slice],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, *(factor.to(x.dtype) for factor in factors))
        ctx.spans = spans
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, of_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, *factors = ctx.saved_tensors
        downs, ups = factors[::2], factors[1::2]
        of_x = of_output @ weight if ctx.needs_input_grad[0] else None
        x, of_output = x.flatten(0, -2), of_output.flatten(0, -2)
        of_parts = [of_output[:, span] for span in ctx.spans]
        # The factors' gradients of all parts in one pass over x each.
        ranks = [len(down) for down in downs]
        inner = F.linear(x, torch.cat(downs)).split(ranks, dim=1)
        of_inner = torch.cat([of_part @ up for of_part, up in zip(of_parts, ups, strict=True)], dim=1)
        of_downs = (of_inner.T @ x).split(ranks)
        of_ups = [of_part.T @ part for of_part, part in zip(of_parts, inner, strict=True)]
        return of_x, None, None, None, *itertools.chain.from_iterable(zip(of_downs, of_ups, strict=True))


def _dtype(x: torch.Tensor) -> torch.dtype:
    """The precision to compute in: that of autocast, where it is on, else that of the input."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _positions(x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]) -> int:
    """Height times width of what a convolution makes of x."""
    height, width = ((x.shape[axis] + 2 * padding[axis] - weight.shape[axis]) // stride[axis] + 1 for axis in (-2, -1))
    return height * width


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
