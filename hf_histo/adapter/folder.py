"""Adapter folders: written atomically, verified by checksums, and loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_histo.adapter import checklist, model_card
from hf_histo.adapter.model_card import CARD
from hf_histo.adapter.sidecar import SIDECAR, Sidecar
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import documents, report
from hf_histo.files import CHECKSUMS, atomic_folder, read_checksums, read_json, write_checksums, write_json
from hf_histo.models import adapters, backbones
from hf_histo.training.run_folder import FIGURES, PREDICTIONS

METRICS = "metrics.json"
ENSEMBLE = "ensemble.json"  # in a folder of several adapters, see `hf_histo.adapter.ensemble`
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # peft's files; a "full" run has MODEL instead
MODEL = ("config.json", "model.safetensors")
# The files that this package writes into an adapter folder. Other files in it are neither read nor uploaded.
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
    """Write an adapter folder atomically; an existing one is replaced at the end.

    Args:
        folder: path of the folder, e.g. runs/NAME/adapter.
        model: a `PeftModel`, or the whole `PreTrainedModel` of a "full" run.
        sidecar: content of `hf_histo.json`.
        metrics: content of metrics.json, also shown in the model card and the report; "splits" holds a
            `classification.report` for each split, "options" those with an effect on the result.
        tables: predictions by split.
        figures: PNG files by title; a figure of a single split is named ..._SPLIT.png.
        cost: a sentence on the cost of training, for the model card only, so that all other files are the same when the
            run is repeated.
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
        known = model_card.facts(sidecar, metrics, figures or {})
        errors = report.error_tables(tables, sidecar.threshold)
        page = documents.render(
            "report.html",
            **known,
            errors=errors,
            checklists=checklist.items(known, errors),
            calibration={split: report.calibration_rows(tables[split], sidecar.temperature) for split in errors},
        )
        (temporary / "report.html").write_text(page, encoding="utf-8")
        model_args = getattr(model.config, "model_args", None)
        card = model_card.card(sidecar, metrics, figures=figures or {}, cost=cost, model_args=model_args)
        card.save(temporary / CARD)
        write_checksums(temporary, hashed(files_of(temporary)))
        verify(temporary)
        if folder.exists():
            shutil.rmtree(folder)


def files_of(folder: Path, patterns: Iterable[str] = FILES) -> dict[str, Path]:
    """The files in an adapter folder that this package writes (`patterns`), by relative name.

    Raises `HistoError` for one that is not a regular file in the folder, such as a pipe, a device or a link to another
    place; links within the Hub's cache are allowed.
    """
    roots, cache = [folder.resolve()], Path(constants.HF_HUB_CACHE).resolve()
    if roots[0].is_relative_to(cache) and roots[0] != cache:
        # Where the links of a snapshot in the Hub's cache lead.
        roots.append(cache / roots[0].relative_to(cache).parts[0] / "blobs")
    found = {}
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise HistoError(f"{path}: is a link to a file outside the folder, expected a file; put the file there")
        if not path.is_file():
            raise HistoError(f"{path}: is not a regular file, expected what a run wrote; copy the folder again")
        found[path.relative_to(folder).as_posix()] = path
    return found


def verify(folder: Path) -> Sidecar:
    """Check that an adapter folder holds unchanged all files that a prediction needs, and return its sidecar.

    Each existing file of `FILES` must match its recorded checksum, except the card, which people edit. Predictions,
    figures and reports may be missing. A folder from a version without checksums is not checked for changes.

    Raises `HistoError` for a file that is missing, damaged, from another run, or outside the folder.
    """
    files = files_of(folder)
    if (folder / ENSEMBLE).is_file():
        raise HistoError(
            f"{folder}: is an ensemble of several adapters, expected one; give one of its members, e.g. "
            f"{folder / 'members' / '0'}"
        )
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
    if CHECKSUMS not in files and sidecar.backbone.configuration is not None:  # None: from a version without checksums
        raise HistoError(f"{folder}: holds no {CHECKSUMS}, expected it beside {SIDECAR}; copy or download it again")
    for name in MODEL if sidecar.method == "full" else ADAPTER:
        if name not in files:
            raise HistoError(
                f"{folder}: holds no {name}, expected it in the adapter folder of a finished run; copy or download the "
                "folder again"
            )
    return sidecar


def hashed(files: Iterable[str]) -> list[str]:
    """The files whose checksums are recorded: all except the list itself, and the card, which people edit."""
    return [name for name in files if name not in (CARD, CHECKSUMS)]


def read_metrics(folder: Path) -> dict[str, Any]:
    """Content of metrics.json of an adapter folder. Raises `HistoError` if it can't be read."""
    try:
        content: dict[str, Any] = read_json(folder / METRICS)
    except (OSError, ValueError) as error:
        raise HistoError(f"{folder / 'metrics.json'}: can't be read ({error}); the adapter folder is damaged") from None
    return content


def load(folder: Path, *, backbone: str | None = None) -> tuple[nn.Module, Sidecar]:
    """Load the model, in evaluation mode, and the sidecar of a local adapter folder.

    Args:
        folder: path of the folder; for one on the Hub, see `hf_histo.hub.fetch`.
        backbone: name or folder of the base model, if it differs from that of the run; its weights must be the same.

    Raises `HistoError` as `verify` does, and if the backbone is missing or differs from that of the run.
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
    """Load an adapter folder, without its head, into a model that is about to be trained.

    Raises `HistoError` unless the adapter is of the same method on the same layers of the same backbone and ranks.
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
