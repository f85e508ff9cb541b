"""Adapters of a backbone: add, save, restore, average and merge.

All by peft: `peft_methods` lists its methods, and `lora_targets` chooses the layers.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from hf_histo.config import AdapterOptions
from hf_histo.errors import HistoError
from hf_histo.files import read_json
from hf_histo.models import batchnorm, heads, lora_targets, peft_methods, qkv
from hf_histo.models.peft_methods import PeftMethod

# Initializers that peft implements for linear layers only.
LINEAR_ONLY_INITIALIZERS = {"pissa", "olora", "eva", "corda", "orthogonal"}
# Fields of each configuration of peft that this package sets, besides the layers, the head and a method's own.
SETTINGS = {"revision", "base_model_name_or_path"}
MAX_SETTING = 1_000_000  # of numbers in adapter_config.json


def add(model: PreTrainedModel, options: AdapterOptions) -> PeftModel:
    """Wrap `model` for training: base frozen, head trainable, and the adapter if `options.method` is "lora".

    Raises `HistoError` as `lora_targets.targets` does, for layers that the method does not fit, and for an initializer
    that the target layers don't support.
    """
    method = peft_methods.of_options(options) if options.method == "lora" else peft_methods.METHODS["lora"]
    settings = method.fields(options)
    modules: str | list[str] = DUMMY_TARGET_MODULES
    if options.method == "lora":
        modules = _targets(model, options, method)
    if method.config is LoraConfig:
        settings["init_lora_weights"] = True
        if options.method == "lora":
            settings["init_lora_weights"] = _initializer(model, modules, options.init_lora_weights)
    try:
        config: PeftConfig = method.config(**settings, target_modules=modules, modules_to_save=heads.trained(model))
        return get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise HistoError(
            f"--adapter {options.adapter} does not fit {type(model).__name__} with these options: {reason}"
        ) from None


def _targets(model: PreTrainedModel, options: AdapterOptions, method: PeftMethod) -> str | list[str]:
    if method.kinds == ("norm",):
        head = heads.name_of(model)
        norms = [name for name in peft_methods.layers(model, method) if not f"{name}.".startswith(f"{head}.")]
        if not norms:
            raise HistoError(f"--adapter {options.adapter}: {type(model).__name__} has no norm with a scale")
        return norms
    return lora_targets.targets(
        model, options.target_modules, options.lora_rank, options.lora_blocks, method.misfit(options)
    )


def channels_last(model: nn.Module) -> nn.Module:
    """Convert the weights of `model`, in place, to the memory format channels last, in which convolutions are fastest.

    With DoRA, LoRA weights are not converted, since peft takes a `view` of them; with methods other than LoRA, nothing
    is, since peft takes views of the layers' weights as well.
    """
    config = model.peft_config["default"] if isinstance(model, PeftModel) else None
    if config is not None and not isinstance(config, LoraConfig):
        return model
    model = model.to(memory_format=torch.channels_last)
    if any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.data = weight.data.contiguous()
    return model


def weights(model: PeftModel, *, batch_norm: str) -> dict[str, torch.Tensor]:
    """Content of `adapter_model.safetensors`: adapter and head, and with `batch_norm` "track" batch-norm statistics.

    If the model is sharded over processes (FSDP2), each process must call this, and gets all weights.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    if batch_norm == "track":
        state |= batchnorm.statistics(model)
    return {key: whole(tensor.detach()).cpu().contiguous() for key, tensor in state.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, gathered if it is sharded over processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(model: nn.Module, into: nn.Module) -> nn.Module:
    """Load the weights of `model`, which is sharded over processes, into `into`, an unsharded copy; all call it."""
    into.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    return into


def save(model: PeftModel, folder: Path, *, batch_norm: str, writes: bool = True) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as `PeftModel.from_pretrained` reads them.

    If the model is sharded over processes, all must call this, but only one with `writes`.
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
    """Load the adapter in `folder` onto `model`, for prediction.

    Only the scalar settings of `adapter_config.json` are used; layers and ranks are taken from the weights, so that
    nothing in that file can run a regex, import a module or create a layer of another size.

    Raises `HistoError` for missing or unreadable files, settings that this package never writes, weights that are not
    finite, and weights whose names or shapes differ from those of the model.
    """
    try:
        saved = load_file(folder / "adapter_model.safetensors")  # first, since peft would unpickle adapter_model.bin
        _check_names(saved)
        config = _saved_config(model, folder, saved)
        adapted = PeftModel.from_pretrained(model, str(folder), config=config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HistoError(f"{folder}: the adapter can't be put on {type(model).__name__} ({reason})") from None
    expected = weights(adapted, batch_norm=batch_norm)
    differing = sorted(expected.keys() ^ saved.keys())
    if differing:
        raise HistoError(
            f"{folder}: {len(differing)} weights are missing or unknown to the model, first {differing[0]}"
        )
    for key, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            raise HistoError(f"{folder}: {key} holds NaN or infinite values; the training that made it diverged")
    return adapted


def _check_names(weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for an invalid layer name: transformers compiles names as regexes."""
    for name in weights:
        if not re.fullmatch(r"[\w.-]{1,500}", name):
            raise ValueError(f"a weight is called {name[:100]!r}, expected layers' names, joined by dots")


def start_from(model: PeftModel, folder: Path) -> None:
    """Load the adapter in `folder`, without its head, into a model with one of the same method on the same layers.

    Raises `HistoError` unless method, layers, shapes and scales are the same.
    """
    try:
        saved = load_file(folder / "adapter_model.safetensors")
        given, own = read_json(folder / "adapter_config.json"), model.peft_config["default"]
    except (OSError, ValueError, SafetensorError) as error:
        raise HistoError(f"--init_adapter {folder}: can't be read ({' '.join(str(error).split())[:200]})") from None
    method = peft_methods.of_config(own)
    update = {key: tensor for key, tensor in saved.items() if f".{method.prefix}" in key}
    present = weights(model, batch_norm="frozen")
    expected = {key: value.shape for key, value in present.items() if f".{method.prefix}" in key}
    differing = sorted(expected.items() ^ {key: tensor.shape for key, tensor in update.items()}.items())
    if differing or not update:
        raise HistoError(
            f"--init_adapter {folder}: its {len(update)} {method.title.split(',')[0]} matrices differ from those to be "
            f"trained in {len(differing)} names or shapes, first {differing[0][0] if differing else 'none'}; expected "
            "its own --adapter, --target_modules, --lora_blocks and --lora_rank"
        )
    for name in {"lora_alpha", "use_rslora", "use_dora", *method.settings.values(), *method.fixed}:
        here = getattr(own, name, None)
        if given.get(name) != here and "dropout" not in name:
            raise HistoError(
                f"--init_adapter {folder}: its {name} is {str(given.get(name))[:20]}, here {here}, expected the same"
            )
    set_peft_model_state_dict(model, present | update)  # peft requires the head as well


def scale_update(model: PeftModel, scale: float, trained: dict[str, torch.Tensor] | None = None) -> None:
    """Multiply the update of each adapted weight by `scale`, in place, with one weight of the adapter.

    W + scale * ΔW, as between a model before and after fine-tuning: Wortsman et al. 2022, "Robust fine-tuning of
    zero-shot models" (WiSE-FT), eq. 1, without the head. The adapter that is saved afterwards holds the scaled update.

    Args:
        model: with an adapter whose method has a `PeftMethod.factor`.
        scale: in [0, 1].
        trained: `update_factors` of the model before it was scaled; by default, as they are now.
    """
    factors = update_factors(model) if trained is None else trained
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in factors:
                parameter.copy_(factors[name] * scale)


def update_factors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of the weights in which the update is linear, by name."""
    method = peft_methods.of_config(model.peft_config["default"])
    assert method.factor is not None
    pattern = re.compile(rf".*\.{method.factor}\.default(\.weight)?")
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if pattern.fullmatch(name)}


def join(model: PeftModel, other: PeftModel, name: str) -> None:
    """Add the adapter of `other`, a model with the same backbone, to `model` under `name`, and activate it.

    Raises `HistoError` for an invalid `name`, and an adapter on layers that `model` does not have.
    """
    config = other.peft_config["default"]
    _put(model, name, config, get_peft_model_state_dict(other, save_embedding_layers=False))


def average(model: PeftModel, names: Sequence[str], name: str) -> None:
    """Add the mean of the adapters `names` of `model` under `name`, and activate it: mean updates and mean head.

    The mean is exact: merging it gives the mean of the weights of the merged models. The matrices A and B are
    concatenated, as by peft's `add_weighted_adapter(combination_type="cat")`, which does not support adapters with a
    head; the rank is the sum of the ranks. (Averaging A and B would not give the mean of the products B A.)

    Raises `HistoError` for other methods than LoRA, DoRA among them, whose parameters have no such mean, and for
    adapters on different layers, or on convolutions in groups.
    """
    configs = [config for each in names if isinstance(config := model.peft_config[each], LoraConfig)]
    if len(configs) < len(names):
        raise HistoError(f"adapters {', '.join(names)}: not all are LoRA, and no other has an exact mean; use LoRA")
    if any(getattr(of.get_base_layer(), "groups", 1) > 1 for of in model.modules() if isinstance(of, LoraLayer)):
        raise HistoError(
            f"adapters {', '.join(names)}: on a convolution in groups, whose mean is not exact; use layers without"
        )
    states = [get_peft_model_state_dict(model, adapter_name=each, save_embedding_layers=False) for each in names]
    if any(config.use_dora for config in configs):
        raise HistoError(f"adapters {', '.join(names)}: DoRA among them, whose mean is not exact; expected plain LoRA")
    for each, state in zip(names, states, strict=True):
        if differing := sorted(state.keys() ^ states[0].keys()):
            raise HistoError(f"adapters {names[0]} and {each} are on different layers, first {differing[0]}; no mean")
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


def alone(model: PeftModel, name: str) -> PeftModel:
    """The adapter `name` of `model` as the only one, under peft's own name "default"; `model` can't be used afterwards.

    It is in evaluation mode, and nothing of it can train.
    """
    config = copy.copy(model.peft_config[name])
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state = {key: tensor.detach().clone() for key, tensor in state.items()}
    base: Any = model.unload()
    adapted = get_peft_model(base, config)
    set_peft_model_state_dict(adapted, state)
    adapted.requires_grad_(False)
    return adapted.eval()


def _put(model: PeftModel, name: str, config: PeftConfig, state: dict[str, torch.Tensor]) -> None:
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
    """Merge the adapter into the weights: the backbone in its original architecture, with the trained head.

    `model` can't be used afterwards. Raises `HistoError` if the update of a layer can't be merged.
    """
    try:
        whole = model.merge_and_unload()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise HistoError(
            f"the adapter can't be merged into its backbone: {reason}; expected one on linear layers and on "
            "convolutions without groups"
        ) from None
    qkv.fuse(whole)
    assert isinstance(whole, PreTrainedModel)
    return whole


def _saved_config(model: PreTrainedModel, folder: Path, saved: dict[str, torch.Tensor]) -> PeftConfig:
    """peft's configuration of the adapter in `folder`; splits fused layers of `model`, in place, as it requires."""
    content = read_json(folder / "adapter_config.json")
    method = peft_methods.recorded(content)
    default = method.config().to_dict()
    own = {*method.settings.values(), *({"init_lora_weights"} if method.config is LoraConfig else {})}
    ignored = {*own, *method.fixed, *SETTINGS, "target_modules", "modules_to_save", "peft_version", "inference_mode"}
    for key in default.keys() & content.keys() - ignored:
        if content[key] != default[key]:
            raise ValueError(f"adapter_config.json: {key} is {str(content[key])[:100]}, expected {default[key]}")
    for key in own & content.keys():
        value, is_number = content[key], type(default[key]) in (int, float)
        if is_number and not (type(value) in (int, float) and 0 <= value <= MAX_SETTING):
            raise ValueError(f"adapter_config.json: {key} is {str(value)[:100]}, expected a number")
    found = peft_methods.adapted_layers(saved, method)
    qkv.split(model, found)
    if unknown := found - peft_methods.layers(model, method).keys():
        raise ValueError(f"{min(unknown)} is adapted, which is no layer of this model that the method fits")
    if method.size is not None:
        name, weight, axis = method.size
        sizes = {tensor.shape[axis] for key, tensor in saved.items() if key.endswith(f".{weight}")}
        if sizes - {content[name]}:
            raise ValueError(f"adapter_config.json: {name} is {str(content[name])[:100]}, or the layers are not of it")
    config: PeftConfig = method.config(
        **{key: content[key] for key in (own | SETTINGS) & content.keys()},
        **method.fixed,
        target_modules=sorted(found) or DUMMY_TARGET_MODULES,
        modules_to_save=heads.trained(model),
        inference_mode=True,
    )
    return config


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """{"trainable": ..., "total": ...}: number of parameters that are trained, and of all that a prediction uses."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    unused = sum(p.numel() for name, p in model.named_parameters() if ".original_module." in name)
    unused += sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, LNTuningLayer)
        for parameter in module.get_base_layer().parameters()
    )
    return {"trainable": trainable, "total": sum(p.numel() for p in model.parameters()) - unused}


def _initializer(model: nn.Module, modules: str | list[str], name: str) -> bool | str:
    if name == "default":
        return True
    convolution = next(
        (
            layer
            for layer, module in lora_targets.adaptable_layers(model).items()
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
