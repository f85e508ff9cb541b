"""Download of foundation models from the Hub, and their conversion to folders with safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_histo.config.commands import ImportBackboneOptions
from hf_histo.errors import HistoError
from hf_histo.files import atomic_folder
from hf_histo.models import backbones, clip, heads, registry

PATTERNS = ["*.json", "*.txt", "*.safetensors", "pytorch_model*.bin", "open_clip_pytorch_model.bin"]


def listing() -> str:
    """A table of the registered models, as text."""
    columns = ["name", "source", "library", "image_size", "license", "gated"]
    rows = [
        [name, entry.source, entry.library, entry.image_size, entry.license, "yes" if entry.terms else ""]
        for name, entry in registry.ENTRIES.items()
    ]
    return pd.DataFrame(rows, columns=columns).to_string(index=False)


def weights(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """Weights in a snapshot's safetensors files whose names start with `stem`.

    Raises HistoError if there are none, with the command that converts pickled weights, or they can't be read.
    """
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if not files:
        pickles = sorted(folder.glob(f"*{stem}*.bin"))
        remedy = "download them again"
        if pickles:
            remedy = (
                f"{pickles[0].name} is a pickle, which can run code. If you trust its source, convert it and pass "
                f'--snapshot {folder}: python -c "import torch; from safetensors.torch import save_file; '
                f"state = torch.load('{pickles[0]}', map_location='cpu', weights_only=True); "
                f"save_file({{k: v.contiguous().clone() for k, v in state.items()}}, '{folder / stem}.safetensors')\""
            )
        raise HistoError(f"{folder}: holds no {stem}*.safetensors, expected the model's weights; {remedy}")
    try:
        return {key: tensor for file in files for key, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise HistoError(f"{files[0].parent}: weights can't be read ({' '.join(str(error).split())[:200]})") from None


def convert(name: str, snapshot: Path, folder: Path) -> None:
    """Write the registered model `name`, whose downloaded files are in `snapshot`, into the empty `folder`.

    Raises HistoError if the weights don't fit the registered architecture.
    """
    entry = registry.ENTRIES[name]
    if entry.library == "open_clip":
        for file in [*snapshot.glob("*.json"), *snapshot.glob("*.txt")]:
            shutil.copy(file, folder / file.name)
        save_file(weights(snapshot, "open_clip"), folder / clip.WEIGHTS, metadata={"format": "pt"})
        backbones.load(str(folder), 1)  # raises if weights are missing
        return
    if entry.library == "transformers":
        model = backbones.load(str(snapshot), 1)
        model.config.pretrained_cfg = entry.preprocessing
    else:
        model = backbones.load(name, 1, random_weights=True)
        own, head = model.state_dict(), f"{heads.name_of(model)}."
        found = {f"timm_model.{key}": tensor for key, tensor in weights(snapshot, "model").items()}
        for key in own.keys() - {key for key in own if key.startswith(head)}:
            if key not in found or found[key].shape != own[key].shape:
                raise HistoError(f"--backbone {name}: {snapshot} lacks {key} or has it in another shape")
        model.load_state_dict({key: found[key] for key in own if not key.startswith(head)}, strict=False)
    model.save_pretrained(folder)


def import_backbone(options: ImportBackboneOptions) -> str:
    """List the registered models, or download and convert one; returns the text to print.

    Raises HistoError for a name that is not registered, an output folder that exists, and weights that can't be
    downloaded or converted.
    """
    if options.list:
        return listing()
    if not options.backbone or not options.output_dir:
        raise HistoError("--backbone and --output_dir are not both given, expected a short name and a new folder")
    if options.output_dir.exists():
        raise HistoError(f"--output_dir={options.output_dir}: exists, expected a new folder; choose another")
    if options.backbone not in registry.ENTRIES:
        raise HistoError(f"--backbone is {options.backbone!r}, expected one of {', '.join(registry.ENTRIES)}")
    source = registry.ENTRIES[options.backbone].source
    try:
        snapshot = options.snapshot or Path(
            snapshot_download(source, revision=options.revision, allow_patterns=PATTERNS)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise HistoError(backbones.unavailable(options.backbone, source, error)) from None
    with atomic_folder(options.output_dir) as folder:
        convert(options.backbone, snapshot, folder)
    return f"{options.backbone}: {options.output_dir}"
