"""The methods of peft behind `--adapter`: which layers each adapts, and which of our options it has.

Left out are those of peft 0.21 that can't be saved, merged or repeated here: PSOFT, AdaMSS, OSF and FRoD decompose the
backbone's weights again when they are loaded, which another machine does otherwise; Lily can't be merged; RandLora
saves its random bases once for each layer; PVeRA draws noise in every pass; SHiRA takes places of a sparse matrix
unchecked from the file; AdaLoRA needs the state of its budget in
each checkpoint; the others are for prompts, tokens or decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import peft
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_histo.config import AdapterOptions

Kind = Literal["linear", "pointwise convolution", "convolution", "norm"]
LINEAR: tuple[Kind, ...] = ("linear",)
POINTWISE: tuple[Kind, ...] = ("linear", "pointwise convolution")
CONVOLUTION: tuple[Kind, ...] = (*POINTWISE, "convolution")
VECTOR_LENGTH = 64  # of VB-LoRA's bank: a divisor of the widths of vision transformers
INSIDE = "base_model.model."  # before peft's names of what is in the model

Misfit = Callable[[nn.Module], str | None]


@dataclass(frozen=True)
class PeftMethod:
    """A method of peft.

    Attributes:
        title: its name in tables, with the source.
        config: peft's class of its configuration.
        prefix: starts the name of each of its weights, after that of the layer.
        kinds: the kinds of layers that peft adapts, and can merge again to the same function.
        settings: the field of `config` for each of our options that the method has.
        fixed: fields of `config` that we set alone.
        size: the field of `config` by which weights grow, and the weight and its dimension that state it; None where a
            layer's own size is the bound.
        divides: the sizes of a layer that the field in `size`, or the given number, must divide.
        factor: regex of the last part of the names of the weights in which the update of a layer's weight is linear, so
            that scaling them scales it; None where it is not linear in any.
    """

    title: str
    config: type[Any]  # Any: each subclass of PeftConfig has other arguments
    prefix: str
    kinds: tuple[Kind, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[str, str, int] | None = None
    divides: tuple[Literal["inputs", "outputs"], ...] = ()
    factor: str | None = None

    def fields(self, options: AdapterOptions) -> dict[str, Any]:
        """The arguments of `config` for these options, besides layers, head and initializer."""
        return {own: getattr(options, ours) for ours, own in self.settings.items()} | dict(self.fixed)

    def misfit(self, options: AdapterOptions) -> Misfit:
        """A function of a layer: why the method can't adapt it, or None."""

        def reason(layer: nn.Module) -> str | None:
            kind = kind_of(layer)
            if kind not in self.kinds:
                return f"a {kind or type(layer).__name__}, expected a {' or '.join(self.kinds)} layer"
            if isinstance(layer, nn.Conv2d) and self.prefix != "lora_":  # peft convolves by itself, with other weights
                if type(layer) is not nn.Conv2d:  # e.g. Conv2dSame of timm, whose padding depends on the image
                    return f"a {type(layer).__name__}, expected a plain convolution"
                if layer.groups > 1:
                    return f"a convolution in {layer.groups} groups, expected one without"
            # MobileNetV2 of ImageNet has such channels; peft's DoRA has 0 / 0 for their magnitude.
            if self.fixed.get("use_dora") and not _norms(layer).all():
                return "with an output channel whose weights are all 0, by whose norm DoRA divides"
            for side in self.divides:
                length = _inputs(layer) if side == "inputs" else _outputs(layer)
                divisor = options.block_size if "block_size" in self.settings else VECTOR_LENGTH
                if length % divisor:
                    return f"of {length} {side}, which {divisor} does not divide"
            return None

        return reason


def _low_rank(field: str = "r", **more: str) -> dict[str, str]:
    return {"lora_rank": field, **more}


_LORA = {"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora"}
_BLOCKS: tuple[Literal["inputs", "outputs"], ...] = ("inputs", "outputs")

METHODS: Mapping[str, PeftMethod] = {
    "lora": PeftMethod(
        "LoRA, arXiv:2106.09685",
        peft.LoraConfig,
        "lora_",
        CONVOLUTION,
        _LORA,
        size=("r", "lora_A.weight", 0),
        factor="lora_B",
    ),
    "dora": PeftMethod(
        "DoRA, arXiv:2402.09353",
        peft.LoraConfig,
        "lora_",
        CONVOLUTION,
        _LORA,
        {"use_dora": True},
        ("r", "lora_A.weight", 0),
    ),
    "loha": PeftMethod(
        "LoHa, arXiv:2108.06098",
        peft.LoHaConfig,
        "hada_",
        CONVOLUTION,
        _low_rank(lora_alpha="alpha"),
        size=("r", "hada_w1_b", 0),
        factor="hada_w1_a",
    ),
    # Of a higher rank than a factor's size, that factor is whole: the layer is the bound.
    "lokr": PeftMethod(
        "LoKr, arXiv:2309.14859",
        peft.LoKrConfig,
        "lokr_",
        CONVOLUTION,
        _low_rank(lora_alpha="alpha"),
        factor="lokr_w1(_a)?",
    ),
    "hira": PeftMethod(
        "HiRA, ICLR 2025",
        peft.HiraConfig,
        "hira_",
        CONVOLUTION,
        _low_rank(lora_dropout="hira_dropout"),
        size=("r", "hira_A", 0),
        factor="hira_B",
    ),
    "hra": PeftMethod(
        "HRA, arXiv:2405.17484", peft.HRAConfig, "hra_", CONVOLUTION, _low_rank(), size=("r", "hra_u", 1)
    ),
    "boft": PeftMethod(
        "BOFT, arXiv:2311.06243",
        peft.BOFTConfig,
        "boft_",
        CONVOLUTION,
        {"block_size": "boft_block_size"},
        size=("boft_block_size", "boft_R", -1),
        divides=("inputs",),
    ),
    # With larger kernels, peft 0.21 counts overlapping patches several times: another function from the start.
    "oft": PeftMethod(
        "OFT, arXiv:2306.07280",
        peft.OFTConfig,
        "oft_",
        POINTWISE,
        {"block_size": "oft_block_size"},
        divides=("inputs",),
    ),
    "ia3": PeftMethod("IA3, arXiv:2205.05638", peft.IA3Config, "ia3_", CONVOLUTION, fixed={"feedforward_modules": []}),
    "ln_tuning": PeftMethod("LN tuning, arXiv:2312.11420", peft.LNTuningConfig, "ln_tuning_", ("norm",)),
    "beft": PeftMethod(
        "BEFT (biases), arXiv:2509.15974",
        peft.BeftConfig,
        "beft_",
        LINEAR,
        factor="beft_bias",
    ),
    "vera": PeftMethod(
        "VeRA, arXiv:2310.11454",
        peft.VeraConfig,
        "vera_",
        LINEAR,
        _low_rank(lora_dropout="vera_dropout"),
        size=("r", "vera_lambda_d", 0),
        factor="vera_lambda_b",
    ),
    "vblora": PeftMethod(
        "VB-LoRA, arXiv:2405.15179",
        peft.VBLoRAConfig,
        "vblora_",
        LINEAR,
        _low_rank(lora_dropout="vblora_dropout"),
        {"vector_length": VECTOR_LENGTH},
        ("r", "vblora_logits_A", 0),
        _BLOCKS,
    ),
    "fourierft": PeftMethod(
        "FourierFT, arXiv:2405.03003",
        peft.FourierFTConfig,
        "fourierft_",
        LINEAR,
        {"num_frequencies": "n_frequency"},
        size=("n_frequency", "fourierft_spectrum", 0),
        factor="fourierft_spectrum",
    ),
    "waveft": PeftMethod(
        "WaveFT, arXiv:2505.12532",
        peft.WaveFTConfig,
        "waveft_",
        LINEAR,
        {"num_frequencies": "n_frequency"},
        size=("n_frequency", "waveft_spectrum", 0),
        factor="waveft_spectrum",
    ),
    "c3a": PeftMethod(
        "C3A, arXiv:2407.19342",
        peft.C3AConfig,
        "c3a_",
        LINEAR,
        {"block_size": "block_size"},
        size=("block_size", "c3a_kernel", -1),
        divides=_BLOCKS,
        factor="c3a_kernel",
    ),
    "road": PeftMethod(
        "RoAd, arXiv:2409.00119",
        peft.RoadConfig,
        "road_",
        LINEAR,
        {"block_size": "group_size"},
        divides=("outputs",),
    ),
    "miss": PeftMethod(
        "MiSS, arXiv:2409.15371",
        peft.MissConfig,
        "miss_",
        LINEAR,
        _low_rank(),
        size=("r", "miss_block", 0),
        factor="miss_block",
    ),
    "delora": PeftMethod(
        "DeLoRA, arXiv:2503.18225",
        peft.DeloraConfig,
        "delora_",
        LINEAR,
        _low_rank(),
        size=("r", "delora_A", 0),
        factor="delora_lambda",
    ),
    "gralora": PeftMethod(
        "GraLoRA, arXiv:2505.20355",
        peft.GraloraConfig,
        "gralora_",
        LINEAR,
        _low_rank(lora_alpha="alpha", lora_dropout="gralora_dropout"),
        size=("r", "gralora_A", -1),
        factor="gralora_B",
    ),
    "glora": PeftMethod(
        "GLoRA, arXiv:2306.07967", peft.GloraConfig, "glora_", LINEAR, _low_rank(), size=("r", "glora_A.Xu", 0)
    ),
    "deft": PeftMethod("DEFT", peft.DeftConfig, "deft_", LINEAR, _low_rank(), size=("r", "deft_R", 0)),
    "peanut": PeftMethod("PEANuT", peft.PeanutConfig, "peanut_", LINEAR, _low_rank(), size=("r", "peanut_A.weight", 0)),
    "tinylora": PeftMethod(
        "TinyLoRA", peft.TinyLoraConfig, "tinylora_", LINEAR, _low_rank(), size=("r", "tinylora_A", 0)
    ),
    "unilora": PeftMethod(
        "UniLoRA",
        peft.UniLoraConfig,
        "unilora_",
        LINEAR,
        _low_rank(lora_dropout="unilora_dropout"),
        {"save_indices": True},
        ("r", "unilora_indices_A", 0),
    ),
}


def of_options(options: AdapterOptions) -> PeftMethod:
    return METHODS[options.adapter]


def recorded(content: Mapping[str, Any]) -> PeftMethod:
    """The method of an `adapter_config.json`. Raises ValueError for one that is not in `METHODS`."""
    kind = content.get("peft_type")
    found = [method for method in METHODS.values() if method.config().peft_type == kind]
    # DoRA before LoRA, which sets no field alone.
    for method in sorted(found, key=lambda method: -len(method.fixed)):
        if all(_listed(content.get(name)) == value for name, value in method.fixed.items()):
            return method
    raise ValueError(f"adapter_config.json: peft_type is {str(kind)[:100]}, expected one of {', '.join(METHODS)}")


def _listed(value: Any) -> Any:
    """A value as JSON holds it, which has no sets."""
    return sorted(value) if isinstance(value, set) else value


def of_config(config: peft.PeftConfig) -> PeftMethod:
    return recorded(config.to_dict())


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer; None where no method adapts it."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.Conv2d):
        is_pointwise = layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "valid")
        return "pointwise convolution" if is_pointwise else "convolution"
    is_norm = isinstance(layer, _BatchNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)
    return "norm" if is_norm and getattr(layer, "weight", None) is not None else None


def layers(model: nn.Module, method: PeftMethod) -> dict[str, nn.Module]:
    """The layers of a model of the kinds that a method adapts, by name."""
    return {name: module for name, module in model.named_modules() if kind_of(module) in method.kinds}


def adapted_layers(weights: Iterable[str], method: PeftMethod) -> set[str]:
    """The names of the layers that are adapted, by the names of an adapter's weights."""
    inside = (name.removeprefix(INSIDE) for name in weights if name.startswith(INSIDE))
    return {name.split(f".{method.prefix}")[0] for name in inside if f".{method.prefix}" in name}


def _norms(layer: nn.Module) -> torch.Tensor:
    """The norm of the weights of each output of a layer, (outputs,)."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    norms: torch.Tensor = layer.weight.detach().flatten(1).norm(dim=1)
    return norms


def _inputs(layer: nn.Module) -> int:
    """The length of a row of a layer's weight."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def _outputs(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
