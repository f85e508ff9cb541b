"""Pretrained backbones with a fresh classifier: from the package, a local folder, timm or the Hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import xxhash
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.utils import logging as transformers_logging

from hf_histo.errors import HistoError
from hf_histo.models import heads

BUILTIN = Path(__file__).parent / "builtin"


def locate(name: str) -> str:
    """Where `from_pretrained` finds the backbone `name`: a folder's absolute path, or a Hub name (owner/name).

    'builtin' is the one in this package. An existing folder is taken before a name; a name without an owner is looked
    up among timm's. Raises `HistoError` for a folder without config.json and for a name that timm does not know.
    """
    if name == "builtin":
        return str(BUILTIN)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise HistoError(f"--backbone {name}: the folder holds no config.json; expected a saved timm or HF model")
        return str(folder.resolve())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        return name
    if timm.is_model(name.split(".")[0]):
        return f"timm/{name}"
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
    raise HistoError(
        f"--backbone {name}: no such folder, and no timm model of that name"
        + (f" (near: {', '.join(near)})" if near else "")
        + "; expected 'builtin', a folder with config.json, a timm name, or owner/name on the Hub"
    )


def load(
    name: str,
    num_outputs: int,
    *,
    revision: str | None = None,
    random_weights: bool = False,
    image_size: int | None = None,
    head: heads.Design | None = None,
    head_dropout: float = 0.0,
    keep_head: bool = False,
) -> PreTrainedModel:
    """A float32 image classifier of `num_outputs` logits whose head is new and whose other weights are pretrained.

    Args:
        name: see `locate`.
        num_outputs: logits; 1 for a binary task.
        revision: branch, tag or commit on the Hub.
        random_weights: build from the configuration alone. A timm name then needs no network.
        image_size: pixels on a side; a vision transformer resamples its position embeddings to it.
        head: what the classifier is made of, by default one linear layer.
        head_dropout: probability of dropout before the head's linear layers while training.
        keep_head: take the head's weights as well, for a model that was trained whole.

    Raises `HistoError` if the backbone can't be had, or if weights other than the head's are missing from it.
    """
    source = locate(name)
    design = head or heads.Design()
    on_logits = design.on == "logits"
    config = _config(name, source, None if on_logits else num_outputs, revision, random_weights)
    _allow_image_size(config, image_size)
    try:
        with _quiet():
            if random_weights:
                model = AutoModelForImageClassification.from_config(config)
            else:
                model, loaded = AutoModelForImageClassification.from_pretrained(
                    source,
                    config=config,
                    revision=revision or "main",
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    use_safetensors=True,
                )
                new = None if keep_head or on_logits else heads.name_of(model)
                _check_complete(name, loaded, new, "; --head_on logits needs its output layer" if on_logits else "")
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise HistoError(_unavailable(name, source, error)) from None
    if not keep_head:
        heads.attach(model, design, num_outputs)
    if head_dropout:
        heads.add_dropout(model, head_dropout)
    return model


def fingerprint(model: PreTrainedModel) -> str:
    """Content hash (xxh3, 128 bits) of all weights and buffers but the trained head's, in the order of their names."""
    trained = tuple(f"{name}." for name in heads.trained(model))
    digest = xxhash.xxh3_128()
    for key, tensor in sorted(model.state_dict().items()):
        if not key.startswith(trained):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the report on the head, which is meant to be new, and without the bar."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _config(
    name: str, source: str, num_outputs: int | None, revision: str | None, random_weights: bool
) -> PreTrainedConfig:
    """The backbone's configuration with an output layer of `num_outputs`, or with its own one."""
    architecture = source.removeprefix("timm/").split(".")[0]
    if random_weights and source.startswith("timm/") and timm.is_model(architecture):
        try:
            declared = timm.get_pretrained_cfg(source.removeprefix("timm/"))
        except RuntimeError:
            declared = None
        if declared is None:
            raise HistoError(f"--backbone {name}: timm knows no such weights of {architecture}")
        declaration = {"architecture": architecture, "pretrained_cfg": declared.to_dict()}
        return TimmWrapperConfig.from_dict(declaration, num_labels=num_outputs or declared.num_classes)
    own = {} if num_outputs is None else {"num_labels": num_outputs}
    try:
        return AutoConfig.from_pretrained(source, revision=revision or "main", **own)
    except (OSError, ValueError) as error:
        raise HistoError(_unavailable(name, source, error)) from None


def _allow_image_size(config: PreTrainedConfig, image_size: int | None) -> None:
    """timm's vision transformers assert on another input size unless they are built to resample positions."""
    declared: dict[str, Any] = getattr(config, "pretrained_cfg", None) or {}
    if image_size and declared.get("fixed_input_size") and declared["input_size"][-1] != image_size:
        config.model_args = {**(config.model_args or {}), "dynamic_img_size": True}


def _check_complete(name: str, loaded: dict[str, Any], except_for: str | None, remedy: str) -> None:
    changed = [*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])]
    absent = sorted(key for key in changed if not (except_for and key.startswith(except_for + ".")))
    if absent:
        raise HistoError(
            f"--backbone {name}: {len(absent)} of its weights are missing or of another shape than config.json says, "
            f"the first {absent[0]}{remedy}"
        )


def _unavailable(name: str, source: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    if Path(source).is_dir():
        return f"--backbone {name}: the folder can't be loaded as an image classifier ({reason})"
    return (
        f"--backbone {name}: {source} can't be had from the Hub ({reason}); where there is a network, "
        f"`hf download {source} --local-dir DIR` and pass --backbone DIR; a gated model needs its terms accepted on "
        f"https://huggingface.co/{source} and `hf auth login`; --random_weights builds it untrained"
    )
