"""Batch norm and LoRA as part of the layers that they follow or adapt: the same function, fewer passes over memory.

`folded` is for training, where LoRA's factors change at each step; `merged` is for prediction, where nothing does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from hf_histo.models.qkv import SplitLinear
from hf_histo.models.speed import attention, low_rank
from hf_histo.models.speed.activation_cut import Call, record, replaced

_PLAIN = (nn.Conv2d, Conv2dSame)  # convolutions that a batch norm folds into
TOLERANCE = 1e-5  # between the logits of a model and of its merged form, times the largest logit if above 1


@contextmanager
def folded(model: nn.Module, pixels: torch.Tensor) -> Iterator[int]:
    """Within the block, layers take in their low-rank update, and convolutions the batch norm that directly follows.

    Exact up to rounding: batch norm is an affine map of each channel after a linear one, and a layer is linear in its
    weight. The update is added at each call, see `low_rank`; layers with dropout, DoRA or several adapters are left
    alone. Attention gets the gradient of `attention`. Afterwards the model is what it was, to the last bit; within, its
    frozen weights must not be saved.

    Args:
        model: called as `model(pixel_values=...)`; its batch norm is frozen (`batchnorm.freeze`).
        pixels: a sample batch (B, 3, H, W), which shows what follows what.

    Yields the number of layers that are changed.
    """
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
                stack.enter_context(replaced(norm, _rest(norm).forward))
            if isinstance(layer, LoraConv2d):
                stack.enter_context(replaced(layer, low_rank.forward(layer, weight, bias, factor)))
            else:
                _swap(convolution, weight, bias, stack)
        linear = list(_linear_layers(model))
        for layer, parts in linear:
            stack.enter_context(replaced(layer, low_rank.linear_forward(layer, parts)))
        for module in {call.module: None for call in calls if call.attends}:
            stack.enter_context(replaced(module, attention.forward(module)))
        for module in model.modules():
            if isinstance(module, nn.Hardtanh):  # ReLU6 among them
                stack.enter_context(replaced(module, partial(_clip, module)))
            elif isinstance(module, _PLAIN) and module.groups > 1 and max(module.stride) > 1:
                stack.enter_context(replaced(module, partial(_strided, module)))
        close = torch.allclose(model(pixel_values=pixels).logits, logits, rtol=1e-3, atol=1e-4)
        if not close:  # something else took what a convolution gave
            stack.close()
        model.train(training)
        with torch.enable_grad():
            yield len(pairs) + len(linear) if close else 0


@contextmanager
def merged(model: nn.Module, pixels: torch.Tensor) -> Iterator[bool]:
    """Within the block, LoRA is added into the layers that it adapts, and batch norm into the convolutions before it.

    The same logits up to rounding, which is checked on `pixels`: the largest difference is below `TOLERANCE` times the
    largest logit, or 1. Where it is not, or the batch norm in use is the batch's own, nothing is changed. Afterwards
    the model is what it was, to the last bit; within, its weights must not be saved or trained.

    Args:
        model: called as `model(pixel_values=...)`, in evaluation mode.
        pixels: a sample batch (B, 3, H, W), which shows what follows what.

    Yields whether the model is changed.
    """
    if not any(isinstance(module, nn.BatchNorm2d | BaseTunerLayer) for module in model.modules()):
        yield False
        return
    with ExitStack() as stack:
        with torch.no_grad():
            logits = model(pixel_values=pixels).logits
            for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
                _merge(layer, stack)
            calls, _ = record(model, pixels)
            for convolution, norm in _pairs(calls, frozen=False):
                assert isinstance(convolution, nn.Conv2d)
                if norm is not None and not norm.training:
                    _swap(convolution, *fuse_conv_bn_weights(*_parts(convolution, norm)), stack)
                    stack.enter_context(replaced(norm, _rest(norm).forward))
            difference = (model(pixel_values=pixels).logits - logits).abs().max()
        is_close = bool(difference <= TOLERANCE * max(1.0, float(logits.abs().max())))
        if not is_close:
            stack.close()
        yield is_close


def _merge(layer: BaseTunerLayer, stack: ExitStack) -> None:
    """Add an adapted layer's update into a copy of its weight until `stack` closes; leave one that peft can't merge."""
    base = layer.get_base_layer()
    if layer.merged or layer.disable_adapters or not isinstance(base, nn.Linear | nn.Conv2d):
        return
    with ExitStack() as attempt:
        attempt.callback(layer.merged_adapters.clear)
        _swap(base, _copy(base.weight), None if base.bias is None else _copy(base.bias), attempt)
        try:
            layer.merge()
        except (NotImplementedError, ValueError, RuntimeError):
            return
        stack.push(attempt.pop_all())


def _copy(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=False)


def _rest(norm: nn.BatchNorm2d) -> nn.Module:
    """What is left of a batch norm whose affine map is part of the convolution before."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()


def _linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Linear layers under LoRA with what they consist of: themselves, or the parts of a split one, all at once."""
    seen: set[nn.Module] = set()
    for layer in model.modules():
        parts = list(layer.children()) if isinstance(layer, SplitLinear) else [layer]
        is_fixed = all(low_rank.is_simple(part) or type(part) is nn.Linear for part in parts)
        if is_fixed and any(isinstance(part, LoraLinear) for part in parts) and not seen & {*parts}:
            seen |= {*parts}
            yield layer, parts


def _pairs(calls: list[Call], *, frozen: bool = True) -> Iterator[tuple[nn.Module, nn.BatchNorm2d | None]]:
    """Convolutions, frozen (or any) or under LoRA, and the batch norms that took what they gave, each called once."""
    often = Counter(call.name for call in calls)
    norms = {id(c.given): c for c in calls if isinstance(c.module, nn.BatchNorm2d) and often[c.name] == 1}
    if frozen:  # a norm that is trained stays, and a layer to whose output peft adds an update
        norms = {key: c for key, c in norms.items() if not any(p.requires_grad for p in c.module.parameters())}
        calls = [call for call in calls if not call.name.endswith(".base_layer")]
    for call in calls:
        found = norms.get(id(call.output))
        norm = found.module if found else None
        assert norm is None or isinstance(norm, nn.BatchNorm2d)
        is_fixed = not frozen or not any(p.requires_grad for p in call.module.parameters())
        folds = type(call.module) in _PLAIN and is_fixed and norm is not None
        is_adapted = isinstance(call.module, LoraConv2d) and low_rank.is_simple(call.module)
        if often[call.name] == 1 and (is_adapted or folds):
            yield call.module, norm


class _Clip(torch.autograd.Function):
    """clamp(x, low, high) whose gradient comes from the output, which the next layer keeps anyway.

    torch's own keeps the input, and copies it first where the layer works in place. The gradient is the same: the
    output is at a bound exactly where the input is at or beyond it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        output = x.clamp(low, high)
        ctx.save_for_backward(output)
        ctx.bounds = low, high
        return output

    @staticmethod
    def backward(ctx: Any, of_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(of_output, output, *ctx.bounds), None, None


def _clip(layer: nn.Hardtanh, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _Clip.apply(x, layer.min_val, layer.max_val)
    return output


def _strided(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A strided convolution in groups, on CPUs in float32: in bfloat16 its gradient takes 3 to 6 times as long."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return type(layer).forward(layer, x)
    with torch.autocast("cpu", enabled=False):
        return type(layer).forward(layer, x.float()).to(torch.get_autocast_dtype("cpu"))


def _parts(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    mean, variance = norm.running_mean, norm.running_var
    return convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias


def _swap(layer: nn.Linear | nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None, stack: ExitStack) -> None:
    """Give a layer another weight and bias until `stack` closes."""
    stack.callback(_set, layer, layer.weight, layer.bias)
    _set(layer, weight, bias)


def _set(layer: nn.Linear | nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer.weight, layer.bias = weight, bias
