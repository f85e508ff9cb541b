"""What a run leaves, for Python: its folder, metrics, predictions and classifier, and how a notebook shows it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from hf_histo.errors import printable
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import documents, summary
from hf_histo.training import run_folder

if TYPE_CHECKING:
    from hf_histo.inference import Classifier  # imports torch

CURVE = "training_curve.png"  # the figure that a notebook shows


@dataclass(frozen=True, repr=False)
class Result:
    """Result of a run.

    Attributes:
        folder: folder of the run.
        record: content of metrics.json in the adapter folder.
        seconds: duration of the run; None if it was finished before.
        address: URL of the upload, if any, in the process that did it.
    """

    folder: Path
    record: Mapping[str, Any] = field(hash=False)  # Any: JSON
    seconds: float | None
    address: str | None = None

    @property
    def adapter(self) -> Path:
        """Path of the adapter folder, which `Classifier.from_pretrained` and `hf_histo predict` take."""
        return self.folder / run_folder.ADAPTER

    @property
    def metrics(self) -> pd.DataFrame:
        """A row for each evaluated split and center; see `summary.frame`."""
        return summary.frame(self.record["splits"])

    @cached_property
    def predictions(self) -> dict[str, Predictions]:
        """The predictions table of each evaluated split; see `hf_histo.evaluation.predictions`."""
        place = self.adapter / run_folder.PREDICTIONS
        return {split: Predictions.read(place / f"{split}.parquet") for split in self.record["splits"]}

    @cached_property
    def classifier(self) -> Classifier:
        """The trained model, loaded from the adapter folder. Raises `HistoError` if its backbone is gone."""
        from hf_histo.inference import Classifier

        return Classifier.from_pretrained(self.adapter)

    def summary(self) -> str:
        """A text: a short table of the evaluated splits, then sizes, seconds and the folder."""
        return summary.of_run(self.record, self.adapter, self.seconds, self.address)

    def __repr__(self) -> str:
        return printable(f"Result({str(self.folder)!r}: {self._scores()})")

    def _scores(self) -> str:
        """Accuracy and AUROC of each split, e.g. "val accuracy 0.818, AUROC 0.892"."""
        shown = []
        for split, report in self.record["splits"].items():
            values = {title: report["overall"][name]["value"] for name, title in summary.HEADLINE.items()}
            known = ", ".join(f"{title} {value:.3f}" for title, value in values.items() if value is not None)
            shown.append(f"{split} {known or 'without labels'}")
        return "; ".join(shown)

    def _repr_html_(self) -> str:
        """The metrics, the training curve where it was drawn, the folder, and the commands that come next."""
        adapter = shlex.quote(str(self.adapter))
        commands = {
            "predict new images": f"hf_histo predict --adapter {adapter} --data IMAGES --output predictions.csv",
            "see single images in the browser": f"hf_histo app --adapter {adapter}",
            "put it on the Hub": f"hf_histo push --adapter {adapter} --hub_model_id OWNER/NAME",
        }
        curve, report = self.adapter / run_folder.FIGURES / CURVE, self.adapter / "report.html"
        return documents.render(
            "result.html",
            rows=summary.rows(self.record["splits"]),
            splits=self.record["splits"],
            curve=curve if curve.is_file() else None,
            report=report if report.is_file() else None,
            folder=self.folder,
            address=self.address,
            seconds=self.seconds,
            commands=commands,
        )
