"""Fused query-key-value layers (timm's `attn.qkv`), split so that LoRA can adapt query, key or value alone.

After LoRA is merged, they are fused again, so that the model has its original architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from hf_histo.errors import HistoError

FUSED = re.compile(r"(.*\.)?attn\.qkv")
SLICES = ("q", "k", "v")


class SplitLinear(nn.Module):
    """A linear layer with 3 x d outputs as three layers with d outputs, concatenated; it computes the same numbers.

    The layers are named q, k and v, so that `blocks.0.attn.qkv.q` is the query layer.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        for name, weight in zip(SLICES, fused.weight.detach().chunk(3), strict=True):
            part = nn.Linear(fused.in_features, len(weight), bias=fused.bias is not None, device="meta")
            part.weight = nn.Parameter(weight.clone(), requires_grad=fused.weight.requires_grad)
            self.add_module(name, part)
        if fused.bias is not None:
            for name, bias in zip(SLICES, fused.bias.detach().chunk(3), strict=True):
                self.get_submodule(name).bias = nn.Parameter(bias.clone(), requires_grad=fused.bias.requires_grad)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Outputs (..., 3 x d) of features (..., in_features)."""
        return torch.cat([self.get_submodule(name)(features) for name in SLICES], dim=-1)

    def fused(self) -> nn.Linear:
        """The equivalent single linear layer."""
        weights, biases = ([getattr(self.get_submodule(n), kind) for n in SLICES] for kind in ("weight", "bias"))
        layer = nn.Linear(weights[0].shape[1], 3 * len(weights[0]), bias=biases[0] is not None, device="meta")
        layer.weight = nn.Parameter(torch.cat(weights).detach())
        if biases[0] is not None:
            layer.bias = nn.Parameter(torch.cat(biases).detach())
        return layer


def split(model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """Split, in place, the fused layers of which q, k or v is a target; return the names of these targets.

    Args:
        model: any model.
        target_modules: as for peft: a regex that must match a full name, or a list of names or ends of names. A fused
            layer that is itself a target is not split.

    Raises `HistoError` for a fused layer whose weights the model reads without calling the layer, so that LoRA would
    have no effect.
    """
    found = []
    for name, module in list(model.named_modules()):
        if not (FUSED.fullmatch(name) and isinstance(module, nn.Linear)) or is_target(name, target_modules):
            continue
        slices = [f"{name}.{part}" for part in SLICES if is_target(f"{name}.{part}", target_modules)]
        if slices:
            if getattr(model.get_submodule(name.rpartition(".")[0]), "q_bias", None) is not None:
                raise HistoError(f"--target_modules: {name} is read with a bias kept elsewhere; adapt the whole of it")
            model.set_submodule(name, SplitLinear(module))
        found += slices
    return found


def is_split(model: nn.Module) -> bool:
    """Whether a fused layer of the model was split."""
    return any(isinstance(module, SplitLinear) for module in model.modules())


def fuse(model: nn.Module) -> None:
    """Fuse all split layers again, in place. Adapters must have been merged before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitLinear):
            model.set_submodule(name, module.fused())


def is_target(name: str, target_modules: str | Iterable[str]) -> bool:
    """Whether peft's rule for `target_modules` selects a layer of that name."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in target_modules)  # as peft reads a list
