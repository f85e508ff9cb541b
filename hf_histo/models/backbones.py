"""Pretrained backbones with a fresh classifier: from the package, a local folder, timm, open_clip or the Hub."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import xxhash
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.utils import logging as transformers_logging

from hf_histo.errors import HistoError
from hf_histo.models import clip, heads, registry
from hf_histo.transforms.preprocessing import MAX_SIZE, MIN_SIZE

# Keys of config.json that name code to run or download, or files to read.
REFUSED = (
    *("auto_map", "quantization_config", "_attn_implementation", "attn_implementation", "use_pretrained_backbone"),
    *("transformers_weights", "checkpoint_path", "cache_dir"),
)
MAX_NUMBER, MAX_LAYERS = 1_000_000, 1000  # bounds of numbers in config.json; the first must allow vocabulary sizes
SPARE = 2**24  # number of weights that may be missing from a file: those of the output layer
# Settings of a model's configuration that do not change its function: classes, library versions, preprocessing.
IRRELEVANT_SETTINGS = {
    *("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "initializer_range"),
    *("id2label", "label2id", "label_names", "num_labels", "num_classes", "problem_type", "pretrained_cfg"),
}
BUILTIN = Path(__file__).parent / "builtin"


def locate(name: str) -> str:
    """Resolve a backbone's `name` for `from_pretrained`: a folder's absolute path, or a Hub name (owner/name).

    "builtin" is the backbone in this package. A name is first looked up as a folder; one without an owner then in the
    registry, and then in timm. Raises `HistoError` for a folder without config.json or open_clip_config.json, and for
    an unknown name.
    """
    if name == "builtin":
        return str(BUILTIN)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", clip.CONFIG)):
            raise HistoError(f"--backbone {name}: the folder holds no config.json; expected a saved timm or HF model")
        return str(folder.resolve())
    if entry := registry.find(name):
        return entry.source
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        return name
    if timm.is_model(name.split(".")[0]):
        return f"timm/{name}"
    near = difflib.get_close_matches(name.split(".")[0], [*registry.ENTRIES, *timm.list_models()], n=3)
    raise HistoError(
        f"--backbone {name}: no such folder, and no timm model of that name"
        + (f" (near: {', '.join(near)})" if near else "")
        + f"; expected 'builtin', a folder with config.json, a timm name, or owner/name on the Hub, or one of "
        f"{', '.join(registry.ENTRIES)}"
    )


def load(
    name: str,
    num_outputs: int,
    *,
    revision: str | None = None,
    random_weights: bool = False,
    image_size: int | None = None,
    head: heads.HeadConfig | None = None,
    head_dropout: float = 0.0,
    keep_head: bool = False,
) -> PreTrainedModel:
    """A float32 image classifier of `num_outputs` logits whose head is new and whose other weights are pretrained.

    Args:
        name: see `locate`.
        num_outputs: number of logits; 1 for a binary task.
        revision: branch, tag or commit on the Hub.
        random_weights: build the model from the configuration only. For a timm name, this needs no network.
        image_size: side of the input in pixels, `MIN_SIZE` to `MAX_SIZE`; the position embeddings of a vision
            transformer are resampled to it. None keeps the declared size.
        head: configuration of the classifier; by default one linear layer.
        head_dropout: probability of dropout before the head's linear layers, in training mode.
        keep_head: load the head's weights as well, for a model that was trained by full fine-tuning.

    Raises `HistoError` if the backbone can't be loaded, weights other than the head's are missing, or it does not take
    images of that size.
    """
    source = locate(name)
    head = head or heads.HeadConfig()
    on_logits = head.on == "logits"
    folder = None if random_weights else _open_clip_folder(name, source, revision)
    config = _config(name, source, None if on_logits else num_outputs, revision, random_weights, folder)
    resized = _allow_image_size(name, config, image_size)
    if Path(source).is_dir() and not (random_weights or folder):
        _check_size(name, Path(source), config)
    model: PreTrainedModel
    try:
        with _quiet():
            if random_weights:
                model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
            elif folder:
                model = clip.load(folder, config)
            else:
                model, loaded = AutoModelForImageClassification.from_pretrained(
                    source,
                    config=config,
                    revision=revision or "main",
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
                new = None if keep_head or on_logits else heads.name_of(model)
                _check_complete(name, loaded, new, "; --head_on logits needs its output layer" if on_logits else "")
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise HistoError(unavailable(name, source, error)) from None
    if resized:
        _try_image_size(name, model, image_size)
    if not keep_head:
        heads.attach(model, head, num_outputs)
    if head_dropout:
        heads.add_dropout(model, head_dropout)
    return model


def add_patch_dropout(name: str, model: PreTrainedModel, rate: float) -> None:
    """Let a vision transformer drop a share `rate` of its patches, drawn anew for each image, in training mode.

    Liu et al. 2023, "PatchDropout: Economizing vision transformers using patch dropout", as in timm. Raises
    `HistoError` for a model that can't do it.
    """
    network = getattr(model, "timm_model", None)
    if not isinstance(network, VisionTransformer):
        expected = "a vision transformer of timm (vit_..., deit_..., vit_..._dinov2)"
        raise HistoError(f"--patch_dropout is {rate}, found the backbone {name}, expected {expected}; leave it out")
    network.patch_drop = PatchDropout(rate, num_prefix_tokens=network.num_prefix_tokens).train(network.training)


def is_bare(name: str) -> bool:
    """Whether transformers can load a backbone from its folder or from the Hub without this package."""
    source = locate(name)
    entry = registry.find(source)
    return not (Path(source) / clip.CONFIG).is_file() and (entry is None or entry.library == "transformers")


def text_embeddings(name: str, names: Sequence[str], prompt: str, revision: str | None = None) -> torch.Tensor:
    """`clip.text_embeddings` of the CLIP model `name`. Raises `HistoError` for a backbone without a text tower."""
    folder = _open_clip_folder(name, locate(name), revision)
    if folder is None:
        known = ", ".join(key for key, entry in registry.ENTRIES.items() if entry.library == "open_clip")
        raise HistoError(f"--text_prompt: {name} has no text tower, expected a folder of open_clip or one of {known}")
    return clip.text_embeddings(folder, names, prompt)


def fingerprint(model: PreTrainedModel) -> str:
    """Content hash (xxh3, 128 bits) of all weights and buffers, except those of the trained head, in name order."""
    trained = tuple(f"{name}." for name in heads.trained(model))
    digest = xxhash.xxh3_128()
    for key, tensor in sorted(model.state_dict().items()):
        if not key.startswith(trained):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def configuration(model: PreTrainedModel) -> dict[str, Any]:
    """Settings of a backbone's configuration that affect its output, as JSON values (see `IRRELEVANT_SETTINGS`).

    timm's `dynamic_img_size` is left out, since it follows from the image size.
    """
    declared = json.loads(json.dumps(model.config.to_diff_dict(), default=str))
    declared["model_args"] = {k: v for k, v in (declared.get("model_args") or {}).items() if k != "dynamic_img_size"}
    return {key: value for key, value in declared.items() if key not in IRRELEVANT_SETTINGS}


class Identity(NamedTuple):
    """Identity of a backbone, independent of its location: `fingerprint` of its weights, and its `configuration`.

    `configuration` is None for adapters of versions that did not record it.
    """

    fingerprint: str
    configuration: dict[str, Any] | None


def identity(model: PreTrainedModel) -> Identity:
    return Identity(fingerprint(model), configuration(model))


def difference(one: Identity, other: Identity) -> str | None:
    """How `other` (found) differs from `one` (expected), as text; None if they are the same backbone.

    Configurations are compared in the settings that both have: older adapters have none, and newer versions of
    transformers add some.
    """
    if one.fingerprint != other.fingerprint:
        return f"other weights (fingerprint {one.fingerprint}, found {other.fingerprint})"
    ours, theirs = one.configuration or {}, other.configuration or {}
    for key in sorted(ours.keys() & theirs.keys()):
        if ours[key] != theirs[key]:
            return f"{key} in its configuration is {str(ours[key])[:100]}, found {str(theirs[key])[:100]}"
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report about newly initialized head weights, and its progress bar."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _open_clip_folder(name: str, source: str, revision: str | None) -> Path | None:
    """Local folder of a backbone in open_clip's format, downloaded if needed; None for another format."""
    entry = registry.find(source)
    if Path(source).is_dir():
        return Path(source) if (Path(source) / clip.CONFIG).is_file() else None
    if entry is None or entry.library != "open_clip":
        return None
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.txt", clip.WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise HistoError(unavailable(name, source, error)) from None


def _config(
    name: str,
    source: str,
    num_outputs: int | None,
    revision: str | None,
    random_weights: bool,
    open_clip_folder: Path | None,
) -> PreTrainedConfig:
    """The backbone's configuration with an output layer of `num_outputs`; None keeps its own output layer."""
    entry = registry.find(source)
    bare = open_clip_folder or (entry and (random_weights or entry.library != "transformers"))
    if num_outputs is None and bare:
        raise HistoError(f"--head_on logits: {name} has no output layer of its own, expected features")
    if open_clip_folder:
        try:
            return clip.config_of(open_clip_folder, entry.preprocessing if entry else None, num_outputs or 0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HistoError(unavailable(name, source, error)) from None
    if entry and bare:
        return entry.config(num_outputs or 0)
    config: PreTrainedConfig
    architecture = source.removeprefix("timm/").split(".")[0]
    if random_weights and source.startswith("timm/") and timm.is_model(architecture):
        try:
            declared = timm.get_pretrained_cfg(source.removeprefix("timm/"))
        except RuntimeError:
            declared = None
        if declared is None:
            raise HistoError(f"--backbone {name}: timm knows no such weights of {architecture}")
        declaration = {"architecture": architecture, "pretrained_cfg": declared.to_dict()}
        config = TimmWrapperConfig.from_dict(declaration, num_labels=num_outputs or declared.num_classes)
        return config
    own = {} if num_outputs is None else {"num_labels": num_outputs}
    try:
        declaration, _ = PreTrainedConfig.get_config_dict(source, revision=revision or "main")
        _check_declaration(name, declaration)
        config = AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False, **own)
    except HistoError:
        raise
    # transformers validates configurations with exceptions of many types.
    except Exception as error:
        raise HistoError(unavailable(name, source, error)) from None
    if entry:
        config.pretrained_cfg = entry.preprocessing
    return config


def _check_declaration(name: str, declaration: dict[str, Any]) -> None:
    """Raise `HistoError` for a config.json with settings that are unsafe.

    These would read other files, download or run code, or build more layers than memory holds.
    """
    architecture = str(declaration.get("architecture", ""))
    if "architecture" in declaration and not timm.is_model(architecture.split(".")[0]):  # timm also accepts a path
        raise HistoError(f"--backbone {name}: timm has no {architecture[:100]!r}, the architecture in its config.json")
    parts: list[tuple[str, Any]] = [("", declaration)]
    while parts:
        key, value = parts.pop()
        if value and key in REFUSED:
            found = f"{key}: {str(value)[:100]}"
            raise HistoError(f"--backbone {name}: its config.json sets {found}, expected none of {', '.join(REFUSED)}")
        limit = MAX_LAYERS if re.search("layer|depth|block|stage", key) else MAX_NUMBER
        if isinstance(value, int) and abs(value) > limit:
            raise HistoError(f"--backbone {name}: its config.json sets {key}: {value}, expected at most {limit}")
        if isinstance(value, dict):
            parts += [(str(inner), part) for inner, part in value.items()]
        if isinstance(value, list):
            parts += [(key, part) for part in value]


def _check_size(name: str, folder: Path, config: PreTrainedConfig) -> None:
    """Raise `HistoError` if `folder` holds too few weights for the model, before memory is allocated for it."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        with _quiet(), torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise HistoError(unavailable(name, str(folder), error)) from None
    declared = sum(tensor.numel() for tensor in itertools.chain(model.parameters(), model.buffers()))
    if declared > stored + SPARE:  # a weight takes a byte at least
        raise HistoError(
            f"--backbone {name}: its config.json describes {declared:,} weights, its model.safetensors has {stored:,} "
            "bytes, expected at least one for each; copy or download it again"
        )


def _allow_image_size(name: str, config: PreTrainedConfig, image_size: int | None) -> bool:
    """Set the input size in `config`, if it can be set there; return whether it differs from the declared size.

    timm's vision transformers accept other sizes only if they are built to resample position embeddings. Raises
    `HistoError` for a size out of bounds, or one that the backbone can't take.
    """
    if image_size is None:
        return False
    if not MIN_SIZE <= image_size <= MAX_SIZE:
        bounds = f"{MIN_SIZE} to {MAX_SIZE} pixels"
        raise HistoError(f"--image_size is {image_size}, expected {bounds}; choose one between them")
    declared: dict[str, Any] = getattr(config, "pretrained_cfg", None) or {}
    if isinstance(config, clip.OpenClipConfig):
        own = (config.vision_cfg or {}).get("image_size")
        if image_size != own:
            raise HistoError(f"--image_size is {image_size}, expected {own}: {name} takes images of no other size")
        return False
    own = declared["input_size"][-1] if declared.get("input_size") else getattr(config, "image_size", None)
    if declared.get("fixed_input_size") and own != image_size:
        config.model_args = {**(config.model_args or {}), "dynamic_img_size": True}
    return bool(own != image_size)


def _try_image_size(name: str, model: PreTrainedModel, image_size: int | None) -> None:
    """Raise `HistoError` unless a forward pass with a black image of that size succeeds."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, 3, image_size or 1, image_size or 1))
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HistoError(
            f"--image_size is {image_size}, expected one that {name} takes ({reason}); leave it out"
        ) from None
    model.train(training)


def _check_complete(name: str, loaded: dict[str, Any], except_for: str | None, remedy: str) -> None:
    changed = [*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])]
    absent = sorted(key for key in changed if not (except_for and key.startswith(except_for + ".")))
    if absent:
        raise HistoError(
            f"--backbone {name}: {len(absent)} of its weights are missing or of another shape than in "
            f"config.json, the first {absent[0]}{remedy}"
        )


def unavailable(name: str, source: str, error: Exception) -> str:
    """Error message for a backbone that can't be loaded, with the commands that get it."""
    reason = " ".join(str(error).split())[:300]
    if Path(source).is_dir():
        return f"--backbone {name}: the folder can't be loaded as an image classifier ({reason})"
    entry = registry.find(source)
    gate = f"accept its terms on https://huggingface.co/{source} and log in with `hf auth login`"
    if entry and entry.terms:
        return (
            f"--backbone {name}: {source} can't be loaded from the Hub ({reason}); it is gated ({entry.license}): "
            f"{gate}, then `hf_histo backbones --backbone {name} --output_dir DIR` and pass "
            "--backbone DIR; --random_weights builds it untrained"
        )
    return (
        f"--backbone {name}: {source} can't be loaded from the Hub ({reason}); where there is a network, "
        f"`hf download {source} --local-dir DIR` and pass --backbone DIR (hf_histo backbones for one "
        f"with pickled weights only); for a gated model, {gate}; --random_weights builds it untrained"
    )
