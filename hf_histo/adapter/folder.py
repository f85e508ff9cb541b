"""Adapter folders: written whole or not at all, verified against their checksums, and loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_histo.adapter import model_card
from hf_histo.adapter.model_card import CARD
from hf_histo.adapter.sidecar import SIDECAR, Sidecar
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import documents
from hf_histo.files import CHECKSUMS, atomic_folder, read_checksums, read_json, write_checksums, write_json
from hf_histo.models import adapters, backbones
from hf_histo.training.run_folder import FIGURES, PREDICTIONS

METRICS = "metrics.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # peft's; of a "full" run, there is MODEL instead
MODEL = ("config.json", "model.safetensors")
# What this package writes into an adapter folder. Whatever else lies there is neither read nor uploaded.
FILES = (
    *(SIDECAR, CARD, CHECKSUMS, *ADAPTER, *MODEL, "preprocessor_config.json", METRICS, "report.html"),
    *(f"{PREDICTIONS}/*.parquet", f"{FIGURES}/*.png"),
)


def save(
    folder: str | Path,
    model: nn.Module,
    sidecar: Sidecar,
    *,
    metrics: Mapping[str, Any],
    tables: Mapping[str, Predictions],
    figures: Mapping[str, Path] | None = None,
    cost: str = "",
) -> None:
    """Write the adapter folder whole or not at all; an older one of that name is replaced in the end.

    Args:
        folder: to write, e.g. runs/NAME/adapter.
        model: a `PeftModel`, or the whole `PreTrainedModel` of a "full" run.
        sidecar: see `Sidecar`.
        metrics: goes into metrics.json, the model card and the report; its "splits" maps each to a `metrics.report`,
            its "options" are those that decided the result.
        tables: predictions by split.
        figures: PNG files by what they show; one of a single split is named ..._SPLIT.png.
        cost: what the training took, as a sentence for the model card. It is in no other file: all others are the same
            when the run is repeated.
    """
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        if isinstance(model, PeftModel):
            config = model.peft_config["default"]
            config.base_model_name_or_path = sidecar.backbone.name
            config.revision = sidecar.backbone.revision
            adapters.save(model, temporary, batch_norm=sidecar.batch_norm)
        else:
            assert isinstance(model, PreTrainedModel)
            model.save_pretrained(temporary)
        if processor := sidecar.preprocessing.image_processor():
            processor.save_pretrained(temporary)
        sidecar.write(temporary)
        write_json(temporary / METRICS, metrics)
        for split, table in tables.items():
            table.write(temporary / PREDICTIONS / f"{split}.parquet")
        (temporary / FIGURES).mkdir()
        for figure in (figures or {}).values():
            shutil.copy(figure, temporary / FIGURES)
        page = documents.render("report.html", **model_card.facts(sidecar, metrics, figures or {}))
        (temporary / "report.html").write_text(page, encoding="utf-8")
        model_args = getattr(model.config, "model_args", None)
        card = model_card.card(sidecar, metrics, figures=figures or {}, cost=cost, model_args=model_args)
        card.save(temporary / CARD)
        write_checksums(temporary, hashed(files_of(temporary)))
        verify(temporary)
        if folder.exists():
            shutil.rmtree(folder)


def files_of(folder: Path) -> dict[str, Path]:
    """The files of an adapter folder that this package writes (`FILES`), by their names in it.

    Raises `HistoError` for one that is not a regular file in the folder: a link out of it (but for those of the Hub's
    cache to its own files), a FIFO, a device.
    """
    roots = [folder.resolve()]
    if roots[0].is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
        roots.append(roots[0].parents[1] / "blobs")  # to which the files of a snapshot are links
    found = {}
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise HistoError(f"{path}: is a link to a file outside the folder, expected a file; put the file there")
        if not path.is_file():
            raise HistoError(f"{path}: is not a regular file, expected what a run wrote; copy the folder again")
        found[path.relative_to(folder).as_posix()] = path
    return found


def verify(folder: Path) -> Sidecar:
    """Check that an adapter folder has all that a prediction needs, as it was written, and return its sidecar.

    Each of `FILES` that is there must have the checksum by which it was written, but for the card, which people edit.
    Predictions, figures and reports may be missing. A folder that is older than checksums has none, and passes.

    Raises `HistoError` for a file that is missing, damaged, of another run or outside the folder.
    """
    files = files_of(folder)
    if SIDECAR not in files:
        raise HistoError(f"{folder}: holds no {SIDECAR}; expected the adapter folder of a finished run")
    if CHECKSUMS in files:
        try:
            read_checksums(folder, hashed(files))
        except (OSError, ValueError) as error:
            raise HistoError(
                f"{folder}: {error}, expected the files of one run, unchanged; copy or download the folder again"
            ) from None
    sidecar = Sidecar.read(folder)
    if CHECKSUMS not in files and sidecar.backbone.configuration is not None:  # without, it is older than checksums
        raise HistoError(f"{folder}: holds no {CHECKSUMS}, expected it beside {SIDECAR}; copy or download it again")
    for name in MODEL if sidecar.method == "full" else ADAPTER:
        if name not in files:
            raise HistoError(
                f"{folder}: holds no {name}, expected it in the adapter folder of a finished run; copy or download the "
                "folder again"
            )
    return sidecar


def hashed(files: Iterable[str]) -> list[str]:
    """Those of the files whose checksums are recorded: all but the list itself, and the card, which people edit."""
    return [name for name in files if name not in (CARD, CHECKSUMS)]


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of an adapter folder. Raises `HistoError` if it can't be read."""
    try:
        content: dict[str, Any] = read_json(folder / METRICS)
    except (OSError, ValueError) as error:
        raise HistoError(f"{folder / 'metrics.json'}: can't be read ({error}); the adapter folder is damaged") from None
    return content


def load(folder: Path, *, backbone: str | None = None) -> tuple[nn.Module, Sidecar]:
    """The model in evaluation mode and its sidecar, from a local adapter folder.

    Args:
        folder: see `hf_histo.hub.fetch` for one on the Hub.
        backbone: name of the base model where it is no longer where the run had it; its weights must be the same.

    Raises `HistoError` as `verify` does, and if the backbone is missing or is another one.
    """
    sidecar = verify(folder)
    is_full = sidecar.method == "full"
    name = str(folder) if is_full else backbone or sidecar.backbone.name
    model: nn.Module = backbones.load(
        name,
        sidecar.num_outputs,
        revision=None if is_full else sidecar.backbone.revision,
        image_size=sidecar.preprocessing.image_size,
        head=sidecar.head,
        keep_head=is_full,
    )
    if not is_full:
        assert isinstance(model, PreTrainedModel)
        if difference := backbones.difference(sidecar.backbone.identity, backbones.identity(model)):
            raise HistoError(
                f"{folder}: was trained on another backbone than {name}: {difference}; pass the original one as "
                "--backbone"
            )
        model = adapters.restore(model, folder, batch_norm=sidecar.batch_norm)
    return model.eval(), sidecar


def start_from(model: nn.Module, folder: Path, sidecar: Sidecar) -> None:
    """Load the LoRA weights of an adapter folder, and none of its head, into a model that is about to be trained.

    Raises `HistoError` unless the adapter has LoRA on the same layers, with the same ranks, of the same backbone.
    """
    given = verify(folder)
    if difference := backbones.difference(given.backbone.identity, sidecar.backbone.identity):
        raise HistoError(
            f"--init_adapter {folder}: is for the backbone {given.backbone.name}, not {sidecar.backbone.name}: "
            f"{difference}; expected an adapter of the same one"
        )
    if sidecar.method != "lora":
        raise HistoError(f"--init_adapter {folder}: --method is {sidecar.method!r}, expected lora; leave it out")
    assert isinstance(model, PeftModel)
    adapters.start_from(model, folder)
