"""Batch norm of an adapted backbone: frozen, or tracked and saved with the adapter.

A batch-norm layer in training mode updates its running statistics even if its parameters are frozen. peft does not save
these statistics with an adapter, so a reloaded model would give other logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_histo.errors import HistoError


def layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch-norm layers with running statistics, by full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def freeze(model: nn.Module) -> None:
    """Keep every batch-norm layer in evaluation mode and its scale and shift fixed, whatever `model.train()` does."""
    for layer in layers(model).values():
        layer.requires_grad_(False)
        layer.register_forward_pre_hook(_eval_mode)


def require(model: nn.Module) -> None:
    """Raise `HistoError` if the model has no batch norm to adapt."""
    if not layers(model):
        raise HistoError(f"{type(model).__name__} has no batch norm to adapt; leave --adapt_batch_norm out")


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Running means and variances, by their names in `model.state_dict()`."""
    return {
        f"{name}.{buffer}": getattr(layer, buffer).detach().clone()
        for name, layer in layers(model).items()
        for buffer in ("running_mean", "running_var")
    }


@contextmanager
def adapted(model: nn.Module, batches: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within the block, batch norm uses the statistics of `batches` (B, 3, H, W); its own are restored afterwards.

    Li et al. 2017, "Revisiting batch normalization for practical domain adaptation" (AdaBN): neither labels nor
    gradients are used. The statistics are averaged over batches, each counting by its number of images; it is
    normalized by its own statistics while those of later layers are measured, so that the result depends a little on
    how images are batched. Works with frozen layers as well.

    Raises `HistoError` if the model has no batch norm.
    """
    require(model)
    found, before = layers(model), statistics(model)
    momenta = {name: layer.momentum for name, layer in found.items()}
    hooks = [layer.register_forward_pre_hook(_train_mode) for layer in found.values()]
    try:
        for layer in found.values():
            layer.reset_running_stats()
        images = 0
        with torch.no_grad():
            for pixels in batches:
                images += len(pixels)
                for layer in found.values():
                    layer.momentum = len(pixels) / images
                model(pixel_values=pixels)
        for hook in hooks:
            hook.remove()
        model.eval()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in found.items():
            layer.momentum = momenta[name]
        model.load_state_dict(before, strict=False)
        model.eval()


def _train_mode(layer: nn.Module, inputs: Any) -> None:
    layer.training = True


def _eval_mode(layer: nn.Module, inputs: Any) -> None:
    layer.training = False
