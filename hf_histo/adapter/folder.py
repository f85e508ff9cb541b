"""Adapter folders: written atomically, verified by checksums, and loaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_histo.adapter import checklist, model_card
from hf_histo.adapter.files import ADAPTER, CARD, METRICS, MODEL, SIDECAR, check, files_of, hashed
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import documents, report
from hf_histo.files import CHECKSUMS, atomic_folder, write_checksums, write_json
from hf_histo.models import adapters, backbones
from hf_histo.training.run_folder import FIGURES, PREDICTIONS


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


def verify(folder: Path) -> Sidecar:
    """Check that an adapter folder holds unchanged all files that a prediction needs, and return its sidecar.

    Each existing file is checked as `files.check` does. Predictions, figures and reports may be missing.

    Raises `HistoError` for a file that is missing, damaged, from another run, or outside the folder.
    """
    files = check(folder)
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
