"""Attention in bfloat16 on CPUs with a faster gradient: the same function, whose backward pass is made of products.

The backward pass of torch's fused attention on CPUs takes about five times as long as its forward pass. Five products
of matrices and a softmax take half of that, in the same precision. The forward pass stays torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

SCORES = 2**24  # at most that many attention scores of float32 are held at a time: 64 MiB


def forward(module: nn.Module) -> Callable[..., Any]:
    """The function of a module that calls `F.scaled_dot_product_attention`, with the faster gradient where it can be.

    That is on CPUs, in bfloat16, without a mask and without dropout.
    """
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with Replaced(_attend):
            return plain(*args, **kwargs)

    return forward


class Replaced(TorchFunctionMode):
    """Within the block, `attend` is called in place of `F.scaled_dot_product_attention`, which it may call itself."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = self.attend if function is F.scaled_dot_product_attention else function
        return chosen(*args, **(kwargs or {}))


def _attend(*tensors: Any, **kwargs: Any) -> torch.Tensor:  # Any: arguments of `F.scaled_dot_product_attention`
    if not _fits(*tensors, **kwargs):
        return F.scaled_dot_product_attention(*tensors, **kwargs)
    query, key, value = tensors
    output: torch.Tensor = _Attention.apply(query, key, value, kwargs.get("scale") or query.shape[-1] ** -0.5)
    return output


def _fits(*tensors: torch.Tensor, **kwargs: Any) -> bool:
    """Whether a call of attention is a plain one of query, key and value, on a CPU, in bfloat16, with a gradient."""
    return (
        len(tensors) == 3
        and not any(isinstance(value, torch.Tensor) or value for name, value in kwargs.items() if name != "scale")
        and all(tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
        and tensors[0].ndim == 4
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
    )


class _Attention(torch.autograd.Function):
    """Attention of query (b, h, n, d), key and value (b, h, m, d), with scores and their softmax in float32 or better.

    The gradient is that of softmax(scale · query · keyᵀ) · value (Dao et al., FlashAttention, 2022, appendix B.2), with
    the probabilities computed again.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    @staticmethod
    def backward(ctx: Any, of_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        images = max(1, SCORES // (query.shape[1] * query.shape[2] * key.shape[2]))
        with torch.autocast(query.device.type, enabled=False):
            split = (each.split(images) for each in (query, key, value, of_output))
            parts = [_gradients(q, k, v, of, ctx.scale) for q, k, v, of in zip(*split, strict=True)]
            return *(torch.cat(of_part) for of_part in zip(*parts, strict=True)), None


def _gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of_output: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Parts of one tensor of q, k and v have gaps in memory, which slow every product down.
    query, key, value, of_output = (each.contiguous() for each in (query, key, value, of_output))
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(precise) * scale) @ key.to(precise).transpose(-2, -1)
    weights = scores.softmax(-1).to(query.dtype)
    of_value = weights.transpose(-2, -1) @ of_output
    of_weights = of_output @ value.transpose(-2, -1)
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    return (of_scores @ key) * scale, (of_scores.transpose(-2, -1) @ query) * scale, of_value
