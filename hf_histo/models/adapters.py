"""LoRA on a backbone: which layers, by named regexes, and what can go wrong told before training.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models"; the layers and updates are peft's.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from hf_histo.config import AdapterOptions
from hf_histo.errors import HistoError
from hf_histo.files import read_json
from hf_histo.models import batchnorm, heads, qkv

# Initializers that peft implements for linear layers only.
LINEAR_ONLY_INITIALIZERS = {"pissa", "olora", "eva", "corda", "orthogonal"}
# What this package sets of a `LoraConfig`, beside the layers and the head.
SETTINGS = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "revision"}
SETTINGS |= {"base_model_name_or_path"}
PREFIX = "base_model.model."  # of peft's names


@dataclass(frozen=True)
class Family:
    """Architectures whose layers are named alike, known by a layer name, and the presets that make sense for them.

    Attributes:
        known_by: regex that fully matches the name of at least one layer of each member. The first family that matches
            counts: a ResNet-D has all the names of a ResNet.
        presets: name to regex. A preset takes the convolutions without groups and the linear layers among the modules
            that its regex fully matches, and never the head.
        default: the preset that is used when none is asked for.
    """

    known_by: str
    presets: dict[str, str]
    default: str


# `all-conv` and `all-linear` are presets of every architecture.
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
    # conv3); the squeeze-and-excitation of SE-ResNet is of pointwise convolutions, too
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
    # timm ViT, DeiT, EVA, DINOv2, DINOv3, UNI: q, k and v are one layer, which is taken apart for its slices
    # (`qkv.split`) and adapted as one by -qkv and -qkvo
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
    # open_clip's image tower, its attention taken apart (`clip.SelfAttention`)
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
    # timm ConvNeXt: its MLP is pointwise convolutions or linear layers, by version
    "convnext": Family(
        r".*stages\.0\.blocks\.0\.conv_dw",
        {"mlp": r".*\.stages\.\d\.blocks\.\d+\.mlp\.fc\d"},
        "mlp",
    ),
}


# Where LoRA goes along the depth: from and to, as shares of the blocks; `top3` is the last three. Zanella & Ben Ayed
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
    """The family that a model's layer names show, or one with the presets of every architecture."""
    names = [name for name, _ in model.named_modules()]
    for family in FAMILIES.values():
        if any(re.fullmatch(family.known_by, name) for name in names):
            return Family(family.known_by, {**EVERY, **family.presets}, family.default)
    has_convolutions = any(type(module) is nn.Conv2d and module.groups == 1 for module in _adaptable(model).values())
    return Family("", EVERY, "all-conv" if has_convolutions else "all-linear")


def targets(model: PreTrainedModel, target_modules: str | None, rank: int, blocks: str = "all") -> str | list[str]:
    """What peft's `target_modules` must be: a regex where it says exactly what is adapted, else a list of names.

    Where slices of a fused layer are asked for, `model` gets that layer taken apart (`qkv.split`).

    Args:
        model: a backbone with its head.
        target_modules: a preset's name, a regex that is matched against full layer names (as by `re.fullmatch`, which
            is also peft's rule), or None for the default preset of the architecture.
        rank: of the update; a grouped convolution takes only a multiple of its groups.
        blocks: of a transformer, a key of `BLOCKS` or "top3".

    Raises `HistoError` for a regex that does not compile, that matches nothing, the head, or a module that LoRA does
    not fit, and for blocks of a model that has none.
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
    adaptable = _adaptable(model)
    matches = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    if is_preset:
        kinds = {"all-conv": nn.Conv2d, "all-linear": nn.Linear}
        chosen = [
            name
            for name in matches
            if name in adaptable
            and not _is_within(name, head)
            and getattr(adaptable[name], "groups", 1) == 1
            and isinstance(adaptable[name], kinds.get(wanted, nn.Module))
        ]
    else:
        chosen = matches
        _check(wanted, chosen, adaptable, head, rank)
    if not chosen:
        raise HistoError(
            f"--target_modules {wanted!r} matches no layer; presets here: {', '.join(family.presets)}; layers: "
            f"{_examples(name for name in adaptable if not _is_within(name, head))}"
        )
    chosen = _within_blocks(chosen, adaptable, blocks)
    return regex if chosen == matches else chosen


def add(model: PreTrainedModel, options: AdapterOptions) -> PeftModel:
    """Wrap `model` for training: base frozen, head trainable, and LoRA where `options.method` is 'lora'.

    Raises `HistoError` as `targets` does, and for an initializer that the targeted layers do not have.
    """
    lora = options.method == "lora"
    modules: str | list[str] = DUMMY_TARGET_MODULES
    if lora:
        modules = targets(model, options.target_modules, options.lora_rank, options.lora_blocks)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # peft's division takes a float as well
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        init_lora_weights=_initializer(model, modules, options.init_lora_weights) if lora else True,  # type: ignore[arg-type]
        target_modules=modules,
        modules_to_save=heads.trained(model),
    )
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise HistoError(f"LoRA does not fit {type(model).__name__} with these options: {reason}") from None


def weights(model: PeftModel, *, batch_norm: str) -> dict[str, torch.Tensor]:
    """What `adapter_model.safetensors` holds: LoRA and head, and batch-norm statistics if they are 'track'ed.

    Of a model whose weights are divided among processes (FSDP2), every process calls it and gets the whole.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    if batch_norm == "track":
        state |= batchnorm.statistics(model)
    return {key: whole(tensor.detach()).cpu().contiguous() for key, tensor in state.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered if processes hold a part of it each."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(model: nn.Module, into: nn.Module) -> nn.Module:
    """`into` with the weights of a model of the same kind that is divided among processes, which all call it."""
    into.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    return into


def save(model: PeftModel, folder: Path, *, batch_norm: str, writes: bool = True) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as `PeftModel.from_pretrained` reads them.

    Of a model that is divided among processes, all call it, and one `writes`.
    """
    held = weights(model, batch_norm=batch_norm)
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def restore(model: PreTrainedModel, folder: Path, *, batch_norm: str) -> PeftModel:
    """Put the adapter in `folder` on `model`, for prediction.

    Of `adapter_config.json` only the plain numbers of LoRA count: which layers it is on and its rank are what the
    weights say, so that nothing in that file can run a regex, import a module or make a layer of another size.

    Raises `HistoError` for files that are missing or unreadable, settings that this package never writes, weights that
    are not finite, and weights that do not fit the model to the last key and shape.
    """
    try:
        saved = load_file(folder / "adapter_model.safetensors")  # before peft, which would unpickle another file
        _check_names(saved)
        config = _saved_config(model, folder, saved)
        adapted = PeftModel.from_pretrained(model, str(folder), config=config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HistoError(f"{folder}: the adapter can't be put on {type(model).__name__} ({reason})") from None
    expected = weights(adapted, batch_norm=batch_norm)
    strange = sorted(expected.keys() ^ saved.keys())
    if strange:
        raise HistoError(f"{folder}: {len(strange)} weights are missing or unknown to the model, first {strange[0]}")
    for key, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            raise HistoError(f"{folder}: {key} holds NaN or infinite values; the training that made it diverged")
    return adapted


def _check_names(weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for a name that a layer can't have: transformers compiles each as a regex."""
    for name in weights:
        if not re.fullmatch(r"[\w.-]{1,500}", name):
            raise ValueError(f"a weight is called {name[:100]!r}, expected layers' names, joined by dots")


def start_from(model: PeftModel, folder: Path) -> None:
    """Load the LoRA matrices of the adapter in `folder`, and nothing else, into a model that has such ones.

    Raises `HistoError` unless both have LoRA on the same layers and of the same shapes and scale.
    """
    try:
        saved = load_file(folder / "adapter_model.safetensors")
        given, own = read_json(folder / "adapter_config.json"), model.peft_config["default"]
    except (OSError, ValueError, SafetensorError) as error:
        raise HistoError(f"--init_adapter {folder}: can't be read ({' '.join(str(error).split())[:200]})") from None
    lora = {key: tensor for key, tensor in saved.items() if ".lora_" in key}
    present = weights(model, batch_norm="frozen")
    expected = {key: value.shape for key, value in present.items() if ".lora_" in key}
    strange = sorted(expected.items() ^ {key: tensor.shape for key, tensor in lora.items()}.items())
    if strange or not lora:
        raise HistoError(
            f"--init_adapter {folder}: its {len(lora)} LoRA matrices differ from those to be trained in {len(strange)} "
            f"names or shapes, first {strange[0][0] if strange else 'none'}; expected its own --target_modules, "
            "--lora_blocks and --lora_rank"
        )
    for name in ("lora_alpha", "use_rslora", "use_dora"):
        if given.get(name) != getattr(own, name):
            raise HistoError(
                f"--init_adapter {folder}: its {name} is {str(given.get(name))[:20]}, here {getattr(own, name)}, "
                "expected the same"
            )
    set_peft_model_state_dict(model, present | lora)  # peft wants the head, too


def join(model: PeftModel, other: PeftModel, name: str) -> None:
    """Put the adapter of `other`, which is of the same backbone, on `model` as well, and let it act there.

    Raises `HistoError` if it is on layers that `model` does not have.
    """
    config = other.peft_config["default"]
    assert isinstance(config, LoraConfig)
    _put(model, name, config, get_peft_model_state_dict(other, save_embedding_layers=False))


def average(model: PeftModel, names: Sequence[str], name: str) -> None:
    """Add the mean of adapters that are on `model`, and let it act: of their updates, and of their heads.

    It is exact: the model is the one whose weights are the mean of the merged models'. The updates B A are put side by
    side, as peft's `add_weighted_adapter(combination_type="cat")` does, which takes no adapters with a head; the rank
    is the sum of theirs. Means of A and of B ("linear") would not give the mean of the products.

    Raises `HistoError` for DoRA, whose magnitudes have no such mean, and for adapters on different layers.
    """
    configs = [config for each in names if isinstance(config := model.peft_config[each], LoraConfig)]
    states = [get_peft_model_state_dict(model, adapter_name=each, save_embedding_layers=False) for each in names]
    if any(config.use_dora for config in configs):
        raise HistoError(f"adapters {', '.join(names)}: DoRA among them, whose mean is not exact; expected plain LoRA")
    for each, state in zip(names, states, strict=True):
        if strange := sorted(state.keys() ^ states[0].keys()):
            raise HistoError(f"adapters {names[0]} and {each} are on different layers, first {strange[0]}; no mean")
    scales = [config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r) for config in configs]
    mean = {}
    for key in states[0]:
        parts = [state[key] for state in states]
        if ".lora_A." in key:
            mean[key] = torch.cat([part * scale / len(parts) for part, scale in zip(parts, scales, strict=True)])
        elif ".lora_B." in key:
            mean[key] = torch.cat(parts, dim=1)
        else:
            mean[key] = torch.stack(parts).mean(0)
    rank = sum(config.r for config in configs)
    _put(model, name, replace(configs[0], r=rank, lora_alpha=rank, use_rslora=False), mean)


def _put(model: PeftModel, name: str, config: LoraConfig, state: dict[str, torch.Tensor]) -> None:
    if "." in name or name in model.peft_config:
        raise HistoError(f"adapter name {name!r}: expected one without dots, and not {', '.join(model.peft_config)}")
    try:
        model.add_adapter(name, config)
        set_peft_model_state_dict(model, state, adapter_name=name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise HistoError(f"adapter {name} does not fit: {' '.join(str(error).split())[:300]}") from None
    model.set_adapter(name)
    model.requires_grad_(False)


def merged(model: PeftModel) -> PreTrainedModel:
    """The backbone with LoRA added into its weights, of the architecture that it was loaded as, and the trained head.

    `model` is used up. Raises `HistoError` if a layer's update can't be merged.
    """
    try:
        whole = model.merge_and_unload()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise HistoError(
            f"the adapter can't be merged into its backbone: {reason}; expected LoRA on linear layers and on "
            "convolutions without groups"
        ) from None
    qkv.fuse(whole)
    assert isinstance(whole, PreTrainedModel)
    return whole


def _saved_config(model: PreTrainedModel, folder: Path, saved: dict[str, torch.Tensor]) -> LoraConfig:
    """What the adapter in `folder` needs; fused layers of `model` are taken apart for it."""
    content, default = read_json(folder / "adapter_config.json"), LoraConfig().to_dict()
    for key in default.keys() & content.keys() - {*SETTINGS, "target_modules", "modules_to_save", "peft_version"}:
        if content[key] != default[key] and key != "inference_mode":
            raise ValueError(f"adapter_config.json: {key} is {str(content[key])[:100]}, expected {default[key]}")
    found = {key.removeprefix(PREFIX).split(".lora_A.")[0]: len(saved[key]) for key in saved if ".lora_A." in key}
    qkv.split(model, found)
    if set(found.values()) - {content["r"]} or found.keys() - _adaptable(model).keys():
        raise ValueError(f"adapter_config.json: r is {str(content['r'])[:100]}, or the layers are not of this model")
    return LoraConfig(
        **{key: content[key] for key in SETTINGS & content.keys()},
        target_modules=sorted(found) or DUMMY_TARGET_MODULES,
        modules_to_save=heads.trained(model),
        inference_mode=True,
    )


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """{'trainable': ..., 'total': ...}: parameters that training moves, and all that a prediction uses."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    unused = sum(p.numel() for name, p in model.named_parameters() if ".original_module." in name)
    return {"trainable": trainable, "total": sum(p.numel() for p in model.parameters()) - unused}


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


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
                f"{rank} is no multiple of {groups}; leave it out; these fit: {_examples(fitting)}"
            )


def _within_blocks(chosen: list[str], adaptable: dict[str, nn.Module], blocks: str) -> list[str]:
    """Those of the layers that lie in the blocks that are asked for."""
    if blocks == "all":
        return chosen
    index = {name: int(match["index"]) for name in adaptable if (match := BLOCK.fullmatch(name))}
    if not index:
        raise HistoError(f"--lora_blocks is {blocks}, expected all: the backbone is no sequence of transformer blocks")
    depth = max(index.values()) + 1
    start, end = (max(0, 1 - 3 / depth), 1) if blocks == "top3" else BLOCKS[blocks]
    wanted = range(round(start * depth), round(end * depth))
    kept = [name for name in chosen if index.get(name) in wanted]
    if not kept:
        raise HistoError(f"--lora_blocks {blocks}: none of the {len(chosen)} targets is in blocks {list(wanted)}")
    return kept


def _is_within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def _initializer(model: nn.Module, modules: str | list[str], name: str) -> bool | str:
    if name == "default":
        return True
    convolution = next(
        (
            layer
            for layer, module in _adaptable(model).items()
            if isinstance(module, nn.Conv2d)
            and (re.fullmatch(modules, layer) if isinstance(modules, str) else layer in modules)
        ),
        None,
    )
    if convolution and name.split("_niter")[0] in LINEAR_ONLY_INITIALIZERS:
        raise HistoError(
            f"--init_lora_weights {name} is for linear layers, and {convolution} is a convolution; expected default "
            "or gaussian"
        )
    return name


def _examples(names: Iterable[str], count: int = 8) -> str:
    """The first names, with numbers folded into N so that a deep network takes one line."""
    folded = dict.fromkeys(re.sub(r"\d+", "N", name) for name in names)
    return ", ".join(list(folded)[:count]) + (", ..." if len(folded) > count else "") if folded else "none"
