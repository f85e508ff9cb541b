"""Foundation models by short name: location of the weights, expected input, and license.

An entry holds as much of the configuration as is needed to build the model without a network. Names, sizes and
arguments are those of the model cards and configurations on the Hub; when weights are loaded by transformers or
open_clip, the configuration file beside the weights is used instead.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig, TimmWrapperConfig

from hf_histo.models.clip import OpenClipConfig

Triple = tuple[float, float, float]

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Radford et al. 2021, "Learning transferable visual models from natural language supervision"
CLIP: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# H-optimus was trained with statistics of its own slides.
OPTIMUS: tuple[Triple, Triple] = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))

# timm architecture with a SwiGLU MLP, which arguments in JSON can't select; an entry overrides all its other arguments.
SWIGLU = "vit_giant_patch14_reg4_dinov2"


@dataclass(frozen=True)
class Entry:
    """A foundation model.

    Attributes:
        source: name on the Hub.
        library: library that loads it: "timm", "transformers" or "open_clip".
        normalization: mean and standard deviation of red, green, blue for values in [0, 1].
        license: license of the weights, as named by the model card.
        terms: whether terms must be accepted on the Hub before the download.
        image_size: side of the input in pixels.
        crop_pct: side of the center crop as a share of the resized image's shorter side.
        interpolation: interpolation of the resize.
        model: arguments that the library builds the model from. timm: architecture and model_args; transformers:
            model_type and arguments of its configuration; open_clip: `embed_dim`, `vision_cfg` and `quick_gelu`.
        note: how its use here differs from that of its authors.
    """

    source: str
    library: Literal["timm", "transformers", "open_clip"]
    normalization: tuple[Triple, Triple]
    license: str
    model: dict[str, Any] = field(repr=False)
    terms: bool = False
    image_size: int = 224
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    note: str = ""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing in the form of timm's `pretrained_cfg`."""
        mean, std = self.normalization
        return {
            "input_size": [3, self.image_size, self.image_size],
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "mean": list(mean),
            "std": list(std),
            "fixed_input_size": self.library == "timm",
            "license": self.license,
        }

    def config(self, num_outputs: int) -> PreTrainedConfig:
        """Configuration of an image classifier with `num_outputs` logits; it includes the preprocessing."""
        arguments = {**copy.deepcopy(self.model), "pretrained_cfg": self.preprocessing}
        if self.library == "timm":
            config: PreTrainedConfig = TimmWrapperConfig.from_dict(arguments, num_labels=num_outputs)
            return config
        if self.library == "open_clip":
            return OpenClipConfig(**arguments, num_labels=num_outputs)  # type: ignore[call-arg]  # of every one
        return AutoConfig.for_model(**arguments, num_labels=num_outputs)


def _timm(architecture: str, **model_args: Any) -> dict[str, Any]:
    return {"architecture": architecture, "model_args": model_args}


_DINOV2 = {"model_type": "dinov2", "patch_size": 14}

ENTRIES = {
    # The five of Dausort et al. 2024, "Exploring foundation models fine-tuning for cytology classification"
    # (arXiv 2411.14975), as their code names them (github.com/mdausort/Cytology-fine-tuning, main.py).
    "vit-b16": Entry(
        "google/vit-base-patch16-224",
        "transformers",
        HALF,
        "apache-2.0",
        {"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        interpolation="bilinear",
    ),
    "clip-b16": Entry(
        "timm/vit_base_patch16_clip_224.openai",
        "open_clip",
        CLIP,
        "apache-2.0 (the card's; OpenAI's code is MIT)",
        {
            "embed_dim": 512,
            "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
            "quick_gelu": True,
        },
        note="OpenAI's weights in the format of open_clip, whose class embedding is projected as in the study",
    ),
    "clip-l14": Entry(
        "timm/vit_large_patch14_clip_224.openai",
        "open_clip",
        CLIP,
        "apache-2.0 (the card's; OpenAI's code is MIT)",
        {
            "embed_dim": 768,
            "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
            "quick_gelu": True,
        },
    ),
    "biomedclip": Entry(
        "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        "open_clip",
        CLIP,
        "mit",
        {
            "embed_dim": 512,
            "vision_cfg": {
                "timm_model_name": "vit_base_patch16_224",
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": 224,
            },
        },
    ),
    "quiltnet": Entry(
        "wisdomik/QuiltNet-B-32",
        "open_clip",
        CLIP,
        "mit",
        {
            "embed_dim": 512,
            "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        },
    ),
    "uni": Entry(
        "MahmoodLab/UNI",
        "timm",
        IMAGENET,
        "cc-by-nc-nd-4.0",
        _timm("vit_large_patch16_224", img_size=224, init_values=1e-5, dynamic_img_size=True),
        terms=True,
        interpolation="bilinear",
    ),
    # Pathology models of today
    "quiltnet-b16": Entry(
        "wisdomik/QuiltNet-B-16",
        "open_clip",
        CLIP,
        "mit",
        {
            "embed_dim": 512,
            "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
        },
    ),
    "uni2-h": Entry(
        "MahmoodLab/UNI2-h",
        "timm",
        IMAGENET,
        "cc-by-nc-nd-4.0",
        _timm(SWIGLU, img_size=224, depth=24, reg_tokens=8, dynamic_img_size=True),
        terms=True,
        interpolation="bilinear",
    ),
    "virchow2": Entry(
        "paige-ai/Virchow2",
        "timm",
        IMAGENET,
        "cc-by-nc-nd-4.0",
        _timm(
            SWIGLU,
            img_size=224,
            embed_dim=1280,
            depth=32,
            num_heads=16,
            mlp_ratio=5.3375,
            no_embed_class=False,
            dynamic_img_size=True,
        ),
        terms=True,
        note="its authors join the class token with the mean of the patch tokens; here it is the class token",
    ),
    "h-optimus-0": Entry(
        "bioptimus/H-optimus-0", "timm", OPTIMUS, "apache-2.0", _timm(SWIGLU, img_size=224), terms=True
    ),
    "h-optimus-1": Entry(
        "bioptimus/H-optimus-1", "timm", OPTIMUS, "cc-by-nc-nd-4.0", _timm(SWIGLU, img_size=224), terms=True
    ),
    "phikon-v2": Entry(
        "owkin/phikon-v2",
        "transformers",
        IMAGENET,
        "owkin-non-commercial",
        {
            **_DINOV2,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 16,
            "image_size": 224,
        },
    ),
    "midnight": Entry(
        "kaiko-ai/midnight",
        "transformers",
        HALF,
        "mit",
        {
            **_DINOV2,
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 24,
            "use_swiglu_ffn": True,
            "image_size": 224,
        },
    ),
    "dinov2": Entry(
        "facebook/dinov2-base",
        "transformers",
        IMAGENET,
        "apache-2.0",
        {**_DINOV2, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 518},
        crop_pct=0.875,
    ),
    "dinov2-small": Entry(
        "facebook/dinov2-small",
        "transformers",
        IMAGENET,
        "apache-2.0",
        {**_DINOV2, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518},
        crop_pct=0.875,
    ),
    "dinov3": Entry(
        "timm/vit_base_patch16_dinov3.lvd1689m",
        "timm",
        IMAGENET,
        "dinov3-license",
        _timm("vit_base_patch16_dinov3"),
        image_size=256,
        note="transformers has no classifier on DINOv3; this is timm's copy, which needs no access",
    ),
}


def find(name: str) -> Entry | None:
    """The entry with this short name or name on the Hub; None for any other backbone."""
    if name in ENTRIES:
        return ENTRIES[name]
    return next((entry for entry in ENTRIES.values() if entry.source == name), None)
