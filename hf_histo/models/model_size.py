"""Size of a trained model and of its adapter, in parameters and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from hf_histo.models import adapters, peft_methods


def account(model: nn.Module, *, batch_norm: str) -> dict[str, dict[str, Any]]:
    """Size of a model in training, with or without an adapter.

    Args:
        model: a `PeftModel`, or the whole model of a "full" run, which counts as its own adapter.
        batch_norm: "frozen" or "track"; tracked statistics are part of an adapter.

    Returns:
        {"parameters": `adapters.parameter_counts`, and "share": trainable / total, in [0, 1];
        "bytes": size of the tensors of "model" (without the adapter, with the same head) and of "adapter" (content of
        `adapter_model.safetensors`), and "model_fp16" and "adapter_fp16", the same with floating-point numbers in half
        precision; "saved": 1 - adapter / model, the share of bytes that a download of the adapter saves}.

    A safetensors file is larger than its tensors by a header of about a hundred bytes per tensor.
    """
    counts = adapters.parameter_counts(model)
    whole = _whole(model)
    sent = adapters.weights(model, batch_norm=batch_norm) if isinstance(model, PeftModel) else whole
    full, small = _bytes(whole), _bytes(sent)
    return {
        "parameters": {**counts, "share": counts["trainable"] / counts["total"]},
        "bytes": {
            "model": full,
            "adapter": small,
            "model_fp16": _bytes(whole, half=True),
            "adapter_fp16": _bytes(sent, half=True),
            "saved": 1 - small / full,
        },
    }


def _whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and statistics without the adapter, and with one copy of the head, of which peft keeps two."""
    prefix = peft_methods.of_config(model.peft_config["default"]).prefix if isinstance(model, PeftModel) else "lora_"
    state = model.state_dict()
    parts = (f".{prefix}", ".original_module.")
    return {name: tensor for name, tensor in state.items() if not any(part in name for part in parts)}


def _bytes(state: Mapping[str, torch.Tensor], *, half: bool = False) -> int:
    return sum(
        tensor.numel() * (2 if half and tensor.is_floating_point() else tensor.element_size())
        for tensor in state.values()
    )
