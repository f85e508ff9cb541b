"""The layers that LoRA adapts: named regexes for each architecture family, and checks of the choice."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_histo.errors import HistoError
from hf_histo.models import heads, qkv

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """Architectures with the same layer names, and their presets.

    Attributes:
        known_by: regex that fully matches the name of at least one layer of each member. The first matching family is
            used, since a ResNet-D has all layer names of a ResNet.
        presets: regex by name. A preset selects the linear layers and the convolutions without groups whose name its
            regex fully matches, but never the head.
        default: the preset that is used by default.
    """

    known_by: str
    presets: dict[str, str]
    default: str


# Presets of all architectures.
EVERY = {"all-conv": r".*", "all-linear": r".*"}

FAMILIES = {
    # timm ResNet-D, -T, -RS: a deep stem (conv1.0, conv1.3, conv1.6; for -RS maxpool.0 is a convolution), downsample
    # with a pooling before its convolution
    "resnet-d": Family(
        r".*layer2\.0\.downsample\.2",
        {
            "all-conv": r".*\.(conv1\.[036]|maxpool\.0|layer\d\.\d+\.(conv\d|downsample\.1|se\.fc\d))",
            "last-conv": r".*\.layer4\.\d+\.(conv\d|downsample\.1)",
        },
        "all-conv",
    ),
    # timm ResNet, ResNeXt, Wide ResNet, SE-ResNet: stem conv1, stages layer1 to layer4 of blocks with conv1, conv2(,
    # conv3); the squeeze-and-excitation of SE-ResNet consists of pointwise convolutions, too
    "resnet": Family(
        r".*layer1\.0\.conv1",
        {
            "all-conv": r".*\.(conv\d|downsample\.0|se\.fc\d)",
            "last-conv": r".*\.layer4\.\d+\.(conv\d|downsample\.0)",
        },
        "all-conv",
    ),
    # transformers ResNet
    "hf-resnet": Family(
        r"resnet\.embedder\.embedder\.convolution",
        {"all-conv": r"resnet\..*\.convolution", "last-conv": r"resnet\.encoder\.stages\.3\..*\.convolution"},
        "all-conv",
    ),
    # timm MobileNet, EfficientNet: pointwise convolutions conv_pw (expand) and conv_pwl (project), depthwise conv_dw;
    # conv_exp where the two former are fused (EfficientNetV2)
    "mobilenet": Family(
        r".*blocks\.\d\.\d\.conv_pw",
        {
            "all-conv": r".*\.(conv_stem|conv_head|conv_pwl?|conv|conv_exp|conv_reduce|conv_expand)",
            "pointwise": r".*\.blocks\.\d+\.\d+\.conv_pwl?",
            "last-conv": r".*\.(blocks\.[56]\.\d+\.conv_pwl?|conv_head)",
        },
        "all-conv",
    ),
    # timm VGG: its "fully connected" layers are the convolutions pre_logits.fc1 and fc2
    "vgg": Family(
        r".*pre_logits\.fc1",
        {"fc": r".*\.pre_logits\.fc[12]", "all-conv": r".*\.(features\.\d+|pre_logits\.fc[12])"},
        "fc",
    ),
    # timm DenseNet
    "densenet": Family(
        r".*denseblock1\.denselayer1\.conv1",
        {
            "all-conv": r".*\.features\.(conv0|denseblock\d\.denselayer\d+\.conv\d|transition\d\.conv)",
            "last-conv": r".*\.features\.denseblock4\.denselayer\d+\.conv\d",
        },
        "all-conv",
    ),
    # timm ViT, DeiT, EVA, DINOv2, DINOv3, UNI: q, k and v are one fused layer, which `qkv.split` splits if only some
    # of them are targets; -qkv and -qkvo adapt it as a whole
    "timm-vit": Family(
        r".*blocks\.0\.attn\.qkv",
        {
            "attention-qv": r".*\.blocks\.\d+\.attn\.qkv\.[qv]",
            "attention-q-k-v-o": r".*\.blocks\.\d+\.attn\.(qkv\.[qkv]|proj)",
            "attention-qkv": r".*\.blocks\.\d+\.attn\.qkv",
            "attention-qkvo": r".*\.blocks\.\d+\.attn\.(qkv|proj)",
            "mlp": r".*\.blocks\.\d+\.mlp\.fc\d",
            "attention-mlp": r".*\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)",
        },
        "attention-qkvo",
    ),
    # transformers ViT, DINOv2 (with and without registers); the longer names are DINOv2's in older versions
    "hf-vit": Family(
        r".*layers?\.0\.attention\.(q_proj|attention\.query)",
        {
            "attention-qv": r".*\.attention\.([qv]_proj|attention\.(query|value))",
            "attention-q-k-v-o": r".*\.attention\.([qkvo]_proj|attention\.(query|key|value)|output\.dense)",
            "attention-qkvo": r".*\.attention\.([qkvo]_proj|attention\.(query|key|value)|output\.dense)",
            "mlp": r".*\.mlp\.fc\d",
            "attention-mlp": r".*\.(attention\.([qkvo]_proj|attention\.(query|key|value)|output\.dense)|mlp\.fc\d)",
        },
        "attention-qkvo",
    ),
    # transformers CLIP, SigLIP
    "hf-clip": Family(
        r".*vision_model\.encoder\.layers\.0\.self_attn\.q_proj",
        {
            "attention-qv": r".*vision_model\..*\.self_attn\.[qv]_proj",
            "attention-q-k-v-o": r".*vision_model\..*\.self_attn\.([qkv]|out)_proj",
            "attention-qkvo": r".*vision_model\..*\.self_attn\.([qkv]|out)_proj",
            "mlp": r".*vision_model\..*\.mlp\.fc\d",
        },
        "attention-qkvo",
    ),
    # open_clip's image tower, its attention split (`clip.SelfAttention`)
    "open-clip": Family(
        r".*resblocks\.0\.attn\.q_proj",
        {
            "attention-qv": r".*\.resblocks\.\d+\.attn\.[qv]_proj",
            "attention-q-k-v-o": r".*\.resblocks\.\d+\.attn\.([qkv]|out)_proj",
            "attention-qkvo": r".*\.resblocks\.\d+\.attn\.([qkv]|out)_proj",
            "mlp": r".*\.resblocks\.\d+\.mlp\.c_(fc|proj)",
        },
        "attention-qkvo",
    ),
    # timm ConvNeXt: its MLP has pointwise convolutions or linear layers, depending on the version
    "convnext": Family(
        r".*stages\.0\.blocks\.0\.conv_dw",
        {"mlp": r".*\.stages\.\d\.blocks\.\d+\.mlp\.fc\d"},
        "mlp",
    ),
}

# Range of transformer blocks that LoRA adapts, as shares of the depth; `top3` is the last three. Zanella & Ben Ayed
# 2024, "Low-rank few-shot adaptation of vision-language models", whose code lists the blocks for depths 12 and 24.
BLOCKS = {
    "all": (0, 1),
    "bottom": (0, 1 / 3),
    "mid": (1 / 3, 2 / 3),
    "up": (2 / 3, 1),
    "half-bottom": (0, 1 / 2),
    "half-up": (1 / 2, 1),
}
BLOCK = re.compile(r"(.*\.)?(blocks|layers?|resblocks)\.(?P<index>\d+)\.(?!\d).*")


def family_of(model: nn.Module) -> Family:
    """The family of a model, by its layer names; for an unknown one, a family with only the presets in `EVERY`."""
    names = [name for name, _ in model.named_modules()]
    for family in FAMILIES.values():
        if any(re.fullmatch(family.known_by, name) for name in names):
            return Family(family.known_by, {**EVERY, **family.presets}, family.default)
    has_convolutions = any(
        type(module) is nn.Conv2d and module.groups == 1 for module in adaptable_layers(model).values()
    )
    return Family("", EVERY, "all-conv" if has_convolutions else "all-linear")


def targets(
    model: PreTrainedModel,
    target_modules: str | None,
    rank: int,
    blocks: str = "all",
    misfit: Callable[[nn.Module], str | None] | None = None,
) -> str | list[str]:
    """`target_modules` of a `LoraConfig`: a regex if it matches exactly the adapted layers, else a list of their names.

    If q, k or v of a fused layer is a target, that layer of `model` is split in place (`qkv.split`).

    Args:
        model: a backbone with its head.
        target_modules: name of a preset, a regex for full layer names (matched by `re.fullmatch`, as peft does), or
            None for the default preset of the architecture.
        rank: rank of the update; a grouped convolution requires a multiple of its number of groups.
        blocks: transformer blocks to adapt, a key of `BLOCKS` or "top3".
        misfit: why the method can't adapt a layer, or None; by default, LoRA, which can. A preset leaves such layers
            out, which is logged.

    Raises `HistoError` for a regex that does not compile, matches nothing, or matches the head or a module that LoRA
    can't adapt; and for `blocks` other than "all" if the model has no transformer blocks, or no target is in them.
    """
    family = family_of(model)
    wanted = target_modules or family.default
    is_preset = wanted in family.presets
    regex = family.presets[wanted] if is_preset else wanted
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise HistoError(f"--target_modules {wanted!r} is not a regex ({error})") from None
    qkv.split(model, regex)
    head = heads.name_of(model)
    adaptable = adaptable_layers(model)
    matches = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    if is_preset:
        kinds = {"all-conv": nn.Conv2d, "all-linear": nn.Linear}
        offered = [
            name
            for name in matches
            if name in adaptable
            and not _is_within(name, head)
            and getattr(adaptable[name], "groups", 1) == 1
            and isinstance(adaptable[name], kinds.get(wanted, nn.Module))
        ]
        reasons = {name: misfit(adaptable[name]) if misfit else None for name in offered}
        chosen = [name for name in offered if not reasons[name]]
        if offered and not chosen:
            raise HistoError(
                f"--target_modules {wanted!r}: the adapter fits none of its {len(offered)} layers: {offered[0]} is "
                f"{reasons[offered[0]]}"
            )
        if left_out := len(offered) - len(chosen):
            first = next(name for name in offered if reasons[name])
            logger.warning("%d of %d layers are not adapted: %s is %s", left_out, len(offered), first, reasons[first])
    else:
        chosen = matches
        _check(wanted, chosen, adaptable, head, rank)
        for name in chosen:
            if misfit and (reason := misfit(adaptable[name])):
                raise HistoError(f"--target_modules {wanted!r} matches {name}, {reason}; leave it out")
    if not chosen:
        raise HistoError(
            f"--target_modules {wanted!r} matches no layer; presets here: {', '.join(family.presets)}; layers: "
            f"{_examples(name for name in adaptable if not _is_within(name, head))}"
        )
    chosen = _within_blocks(chosen, adaptable, blocks)
    return regex if chosen == matches else chosen


def _check(wanted: str, chosen: list[str], adaptable: dict[str, nn.Module], head: str, rank: int) -> None:
    if any(_is_within(name, head) for name in chosen):
        raise HistoError(
            f"--target_modules {wanted!r} matches the head, {head}, which is trained whole; it would also match: "
            f"{_examples(name for name in chosen if not _is_within(name, head))}"
        )
    for name in chosen:
        if name not in adaptable:
            raise HistoError(
                f"--target_modules {wanted!r} matches {name}, which is neither Conv2d nor Linear; those below it: "
                f"{_examples(other for other in adaptable if other.startswith(name + '.'))}"
            )
        groups = getattr(adaptable[name], "groups", 1)
        if rank % groups:
            fitting = (other for other in chosen if rank % getattr(adaptable.get(other), "groups", 1) == 0)
            raise HistoError(
                f"--target_modules {wanted!r} matches {name}, a convolution in {groups} groups, and --lora_rank "
                f"{rank} is not a multiple of {groups}; leave it out; these fit: {_examples(fitting)}"
            )


def _within_blocks(chosen: list[str], adaptable: dict[str, nn.Module], blocks: str) -> list[str]:
    """The `chosen` layers that are in the requested blocks."""
    if blocks == "all":
        return chosen
    found = {name: match for name in adaptable if (match := BLOCK.fullmatch(name))}
    index = {name: int(match["index"]) for name, match in found.items()}
    sequences = {match.string[: match.start("index")] for name, match in found.items() if name in chosen}
    if len(sequences) != 1:
        number = f"{len(sequences)} sequences" if sequences else "no sequence"
        raise HistoError(f"--lora_blocks is {blocks}, expected all: the targets are in {number} of transformer blocks")
    depth = max(index.values()) + 1
    start, end = (max(0, 1 - 3 / depth), 1) if blocks == "top3" else BLOCKS[blocks]
    wanted = range(round(start * depth), round(end * depth))
    kept = [name for name in chosen if index.get(name) in wanted]
    if not kept:
        raise HistoError(f"--lora_blocks {blocks}: none of the {len(chosen)} targets is in blocks {list(wanted)}")
    return kept


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that LoRA can adapt, by name: convolutions and linear layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def _is_within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def _examples(names: Iterable[str], count: int = 8) -> str:
    """The first `count` different names, with numbers replaced by N so that a deep network fits into one line."""
    folded = dict.fromkeys(re.sub(r"\d+", "N", name) for name in names)
    return ", ".join(list(folded)[:count]) + (", ..." if len(folded) > count else "") if folded else "none"
