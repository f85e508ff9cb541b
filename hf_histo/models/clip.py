"""CLIP models of open_clip: the image tower as a transformers classifier, the text tower for zero-shot weights.

open_clip is an extra (`pip install "hf_histo[open_clip]"`). A folder in its format holds `open_clip_config.json`,
`open_clip_model.safetensors` and the tokenizer files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_histo.errors import HistoError

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
SLICES = ("q_proj", "k_proj", "v_proj")


class OpenClipConfig(PreTrainedConfig):
    """Configuration of an image tower.

    `embed_dim`, `vision_cfg` and `quick_gelu` are those of `model_cfg` in an open_clip_config.json.
    """

    model_type = "open_clip"

    embed_dim: int = 512
    vision_cfg: dict[str, Any] | None = None
    quick_gelu: bool = False
    pretrained_cfg: dict[str, Any] | None = None


class OpenClipForImageClassification(PreTrainedModel):
    """A linear classifier on the embedding of open_clip's image tower, (B, `embed_dim`), which is not normalized.

    The tower's fused attention (`nn.MultiheadAttention`) is replaced by `SelfAttention`.
    """

    config_class = OpenClipConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"

    def __init__(self, config: OpenClipConfig) -> None:
        super().__init__(config)
        self.visual = _tower(config)
        for name, module in list(self.visual.named_modules()):
            if isinstance(module, nn.MultiheadAttention):
                self.visual.set_submodule(name, SelfAttention(module))
        self.classifier = nn.Linear(config.embed_dim, int(config.num_labels or 0))
        self.post_init()  # type: ignore[no-untyped-call]  # untyped in transformers

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: open_clip initializes its own modules."""

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Logits (B, num_labels) of normalized float32 images (B, 3, H, W); the loss is computed by the trainer."""
        return ImageClassifierOutput(logits=self.classifier(self.visual(pixel_values)))


AutoConfig.register("open_clip", OpenClipConfig)
AutoModelForImageClassification.register(OpenClipConfig, OpenClipForImageClassification)


class SelfAttention(nn.Module):
    """Self-attention with separate linear layers for query, key and value, which LoRA can adapt.

    Built from an `nn.MultiheadAttention`, whose outputs it reproduces; attention weights are not returned.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = fused.num_heads
        for name in SLICES:
            self.add_module(name, nn.Linear(fused.embed_dim, fused.embed_dim, bias=fused.in_proj_bias is not None))
        self.out_proj = nn.Linear(fused.embed_dim, fused.embed_dim, bias=fused.out_proj.bias is not None)
        self.load_state_dict(split_attention(fused.state_dict()))

    def forward(self, query: torch.Tensor, *others: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        """(B, n, d) to (B, n, d) and None; key and value are the query, and there is no mask, as in an image tower."""
        q, k, v = (
            self.get_submodule(name)(query).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for name in SLICES
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def split_attention(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a state dict of open_clip to the names and tensors of `SelfAttention`."""
    separate: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        place, fused, part = key.rpartition("in_proj_")
        if fused:
            separate |= {f"{place}{name}.{part}": piece for name, piece in zip(SLICES, tensor.chunk(3), strict=True)}
        else:
            separate[key] = tensor
    return separate


def config_of(folder: Path, pretrained_cfg: Mapping[str, Any] | None, num_outputs: int) -> OpenClipConfig:
    """The configuration declared by a folder in open_clip's format.

    Args:
        folder: contains `open_clip_config.json`.
        pretrained_cfg: preprocessing in timm's form; None reads it from the folder.
        num_outputs: number of logits.

    Raises `OSError`, `ValueError` or `KeyError` for a missing or invalid file.
    """
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    model, view = content["model_cfg"], content.get("preprocess_cfg", {})
    size = model["vision_cfg"]["image_size"]
    declared = pretrained_cfg or {
        "input_size": [3, size, size],
        "interpolation": view.get("interpolation", "bicubic"),
        "crop_pct": 1.0,
        "mean": view["mean"],
        "std": view["std"],
    }
    return OpenClipConfig(
        embed_dim=model["embed_dim"],
        vision_cfg=model["vision_cfg"],
        quick_gelu=model.get("quick_gelu", False),
        pretrained_cfg=dict(declared),
        num_labels=num_outputs,  # type: ignore[call-arg]  # of every configuration
    )


def load(folder: Path, config: PreTrainedConfig) -> OpenClipForImageClassification:
    """Load the image tower from a folder in open_clip's format, with a new classifier.

    Raises `ValueError` for weights that are missing, of another shape, or unreadable.
    """
    assert isinstance(config, OpenClipConfig)
    model = OpenClipForImageClassification(config)
    try:
        whole = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS}: {error}") from None
    tower = {key.removeprefix("visual."): value.float() for key, value in whole.items() if key.startswith("visual.")}
    try:
        model.visual.load_state_dict(split_attention(tower))
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return model


def text_embeddings(folder: Path, names: Sequence[str], prompt: str) -> torch.Tensor:
    """Text embeddings of K classes, float32 (K, embed_dim), scaled to length `exp(logit_scale)`.

    They are the weights of CLIP's zero-shot classifier on image embeddings of length 1: Radford et al. 2021, "Learning
    transferable visual models from natural language supervision", sec. 3.1.2.

    Args:
        folder: a folder in open_clip's format.
        names: class names; underscores become spaces.
        prompt: a sentence in which {} is replaced by the class name.

    Raises `HistoError` for a prompt without {}, and a folder whose text tower can't be loaded.
    """
    open_clip = _open_clip()
    if "{}" not in prompt:
        raise HistoError(f"--text_prompt is {prompt!r}, expected a sentence with {{}} where the class's name goes")
    try:
        model = open_clip.create_model(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HistoError(f"--text_prompt: {folder} gives no text tower ({reason}); leave it out") from None
    words = [name.replace("_", " ") for name in names]
    with torch.no_grad():
        classes: torch.Tensor = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, words, [prompt]).T
        scale: torch.Tensor = model.logit_scale.exp()
        return (scale * classes).float()


def _tower(config: OpenClipConfig) -> nn.Module:
    _open_clip()
    from open_clip.model import _build_vision_tower

    if not config.vision_cfg:
        raise ValueError("vision_cfg is empty, expected the one of an open_clip_config.json")
    # A copy: open_clip's declaration may request timm's pretrained weights, but the folder holds all weights.
    tower: nn.Module = _build_vision_tower(
        config.embed_dim, {**config.vision_cfg, "timm_model_pretrained": False}, config.quick_gelu
    )
    return tower


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError:
        raise HistoError(
            'open_clip is not installed, expected for this backbone; pip install "hf_histo[open_clip]"'
        ) from None
    return open_clip
