"""Batch norm in a model that is adapted: frozen, or followed and saved.

Even with nothing trainable in it, a batch-norm layer in training mode moves its running statistics, and they are not
part of a saved adapter: the reloaded model would give other logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch-norm layers that keep running statistics, by full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def freeze(model: nn.Module) -> None:
    """Keep every batch-norm layer in evaluation mode and its scale and shift fixed, whatever `model.train()` does."""
    for layer in layers(model).values():
        layer.requires_grad_(False)
        layer.register_forward_pre_hook(_evaluate)


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Running means and variances, by their names in `model.state_dict()`."""
    return {
        f"{name}.{buffer}": getattr(layer, buffer).detach().clone()
        for name, layer in layers(model).items()
        for buffer in ("running_mean", "running_var")
    }


def _evaluate(layer: nn.Module, inputs: Any) -> None:
    layer.training = False
