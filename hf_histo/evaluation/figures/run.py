"""The figures of a run: its training curve, and figures of its predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import datasets

from hf_histo.evaluation import calibration
from hf_histo.evaluation.figures.audit import image_reader
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import report


def draw(
    folder: Path,
    history: Sequence[Mapping[str, float]],
    tables: Mapping[str, Predictions],
    validation: datasets.Dataset | None,
) -> dict[str, Path]:
    """Draw all figures as PNGs, plots also as SVGs beside them; return the paths of the PNGs by title, in order.

    Args:
        folder: folder of the PNGs.
        history: `trainer.state.log_history`.
        tables: predictions by split, including "val".
        validation: schema table of the split `val`; None where predictions are not of single images.
    """
    labeled = {split: table for split, table in tables.items() if (table["label"] >= 0).any()}
    report.training_curve(history, folder / "training_curve.png")
    report.roc_curve(labeled, folder / "roc.png", vector=True)
    figures = {"Training: loss, validation metric and learning rate": folder / "training_curve.png"}
    figures |= {"ROC curves": folder / "roc.png"}
    for split, table in labeled.items():
        confusion, reliability = folder / f"confusion_{split}.png", folder / f"reliability_{split}.png"
        report.confusion_matrix(table, confusion, vector=True)
        calibration.reliability_diagram(table, reliability, vector=True)
        figures |= {f"Confusion matrix of {split}": confusion, f"Reliability of {split}": reliability}
    if validation is None:
        return figures
    image_of = image_reader(datasets.DatasetDict(val=validation))
    report.worst_errors(tables["val"], partial(image_of, "val"), folder / "worst_errors.png")
    return figures | {"The worst errors of val": folder / "worst_errors.png"}
