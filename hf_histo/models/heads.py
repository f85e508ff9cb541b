"""The classifier on top of a backbone: where it is, how it starts, and its dropout."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_histo.errors import HistoError


def name_of(model: PreTrainedModel) -> str:
    """Full name of the linear layer that gives the logits, e.g. 'timm_model.fc' or 'classifier'."""
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    if not linear:
        raise HistoError(f"{type(model).__name__}: found no linear layer with {model.config.num_labels} outputs")
    return linear[-1]


def module_of(model: nn.Module) -> nn.Module:
    """What the backbone calls as its head: the layer, or peft's wrapper that holds the frozen and the trained copy."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base.get_submodule(name_of(base).split(".modules_to_save.")[0])


def reset(model: PreTrainedModel) -> None:
    """Start the head anew: weights normal with deviation 0.01, bias zero, so that training starts from even odds."""
    head = model.get_submodule(name_of(model))
    assert isinstance(head, nn.Linear)
    nn.init.normal_(head.weight, std=0.01)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def add_dropout(model: PreTrainedModel, probability: float) -> None:
    """Drop the head's input with `probability` while training.

    A hook rather than a layer: the head keeps its name, so the saved weights load into the plain model.
    """

    def drop(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (nn.functional.dropout(inputs[0], probability, module.training),)

    model.get_submodule(name_of(model)).register_forward_pre_hook(drop)
