"""Convert weights of an open_clip image tower back to open_clip's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_histo.models.clip import SLICES


def fuse_attention(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict with attention as open_clip stores it: the inverse of `clip.split_attention`."""
    together = {}
    for key, tensor in state.items():
        place, query, part = key.rpartition("q_proj.")
        if query:
            together[f"{place}in_proj_{part}"] = torch.cat([state[f"{place}{name}.{part}"] for name in SLICES])
        elif not key.rpartition(".")[0].endswith(("k_proj", "v_proj")):
            together[key] = tensor
    return together
