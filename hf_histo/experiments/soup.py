"""Greedy soups: the mean of those adapters of one backbone that together predict `val` best, as one adapter.

Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time", recipe 1: from the best on, each adapter in turn stays if the mean with it is at least as good.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel

from hf_histo import hub
from hf_histo.adapter import folder as adapter_folder
from hf_histo.adapter.ensemble import agreeing
from hf_histo.adapter.files import read_metrics
from hf_histo.config import columns_of
from hf_histo.config.commands import SoupOptions
from hf_histo.data.load import fingerprint, load
from hf_histo.data.protocol import complete
from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration, thresholds
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting.report import overall_table
from hf_histo.files import require_new, require_output
from hf_histo.inference import Classifier
from hf_histo.models import adapters
from hf_histo.models.model_size import account
from hf_histo.training.run_folder import PREDICTIONS

logger = logging.getLogger(__name__)


def make_soup(options: SoupOptions) -> str:
    """Choose the adapters on `val`, write their mean as an adapter folder, and return tables of choice and metrics.

    Raises `HistoError` for fewer than two adapters; adapters of other data, chosen by other metrics, or whose `val` is
    not that of `--data`; an output that exists; and as `Classifier.load_adapter` and `Classifier.average` do.
    """
    require_output(options.output_dir, [*options.adapters, options.data], folder=True)
    require_new("--output_dir", options.output_dir)
    if len(options.adapters) < 2:
        raise HistoError(f"--adapters: found {len(options.adapters)}, expected two or more to average")
    folders = [hub.fetch(adapter) for adapter in options.adapters]
    sidecars = agreeing({str(folder): adapter_folder.verify(folder) for folder in folders})
    of_members = [read_metrics(folder) for folder in folders]
    metric, negative = of_members[0]["selection"]["metric"], of_members[0]["splits"]["val"]["negative"]
    own = []
    for folder, found in zip(folders, of_members, strict=True):
        if found["selection"]["metric"] != metric:
            raise HistoError(f"{folder}: was chosen by {found['selection']['metric']}, expected {metric} as the first")
        own.append(_value(_validation(folder), metric, negative))
    reading = sidecars[0].preprocessing.reading
    data = complete(load(options.data, cache_dir=options.cache_dir, reading=reading, **columns_of(options)))
    _require_val(data, options.data, folders)
    content, expected = fingerprint(data), sidecars[0].data.fingerprint
    if content != expected:
        logger.warning(
            "--data %s: val has the images and labels of the runs by their ids, but its content is not theirs "
            "(fingerprint %s, expected %s); metrics of the mean are of these images",
            options.data,
            content,
            expected,
        )

    order = sorted(range(len(folders)), key=lambda place: -own[place])
    classifier = Classifier.from_pretrained(folders[order[0]], backbone=options.backbone)
    kept, best, tried = ["default"], own[order[0]], {order[0]: own[order[0]]}
    chosen = "default"
    for place in order[1:]:
        name = f"member{place}"
        classifier.load_adapter(folders[place], name, backbone=options.backbone)
        classifier.average([*kept, name], f"with_{name}")
        table = classifier.predict(data["val"], batch_size=options.batch_size, description=f"val, mean with {place}")
        tried[place] = _value(table, metric, negative)
        if tried[place] >= best:
            kept, best, chosen = [*kept, name], tried[place], f"with_{name}"
    places = [order[0], *(int(name.removeprefix("member")) for name in kept[1:])]
    sign = -1 if metric == "loss" else 1
    rows = [
        {"adapter": _public(folders[place]), "own": sign * own[place], "mean": sign * tried[place]}
        | {"kept": place in places}
        for place in order
    ]
    classifier.set_adapter(chosen)
    reports = _write(classifier, chosen, data, rows, of_members[order[0]], options, negative)
    listed = [f"{'kept' if row['kept'] else 'left out'}: {row['adapter']}, {metric} on val {row['own']:.4f} alone, "
              f"{row['mean']:.4f} in the mean" for row in rows]  # fmt: skip
    return "\n".join([*listed, overall_table(reports), f"adapter folder: {options.output_dir}"])


def _write(
    classifier: Classifier,
    chosen: str,
    data: datasets.DatasetDict,
    rows: list[dict[str, Any]],
    first: dict[str, Any],
    options: SoupOptions,
    negative: int | None,
) -> dict[str, Any]:
    """Write the adapter folder of the mean; return a `classification.report` of each split but `train`."""
    tables = {
        split: classifier.predict(rows, batch_size=options.batch_size, description=f"Predicting {split}")
        for split, rows in data.items()
        if split != "train"
    }
    temperature = calibration.fit_temperature(tables["val"])
    sidecar = dataclasses.replace(
        classifier.sidecar,
        thresholds=thresholds.named(tables["val"]) if classifier.sidecar.num_outputs == 1 else {},
        temperature=temperature.value,
    )
    assert isinstance(classifier.model, PeftModel)
    model = adapters.alone(classifier.model, chosen)
    reports = {split: classification.report(table, negative=negative) for split, table in tables.items()}
    metrics = {
        "selection": first["selection"] | {"value": [row["mean"] for row in rows if row["kept"]][-1]},
        "soup": rows,
        "calibration": {"split": "val", **dataclasses.asdict(temperature)},
        "splits": reports,
        **account(model, batch_norm=sidecar.batch_norm),
        "options": first["options"],
    }
    adapter_folder.save(options.output_dir, model, sidecar, metrics=metrics, tables=tables)
    return reports


def _validation(folder: Path) -> Predictions:
    file = folder / PREDICTIONS / "val.parquet"
    if not file.is_file():
        raise HistoError(f"{folder}: holds no {PREDICTIONS}/val.parquet, expected it; copy the whole folder")
    return Predictions.read(file)


def _require_val(data: datasets.DatasetDict, name: str, folders: list[Path]) -> None:
    """Raise `HistoError` unless `val` of the data are the images, and labels, that each run was validated on."""

    def labels(ids: Iterable[str], numbers: Iterable[int], names: Sequence[str]) -> set[tuple[str, str | None]]:
        return {(one, names[label] if label >= 0 else None) for one, label in zip(ids, numbers, strict=True)}

    val = data.get("val")
    here = set() if val is None else labels(val["id"][:], val["label"][:], val.features["label"].names)
    for folder in folders:
        table = _validation(folder)
        differing = {one for one, _ in here ^ labels(table["id"], table["label"], table.label_names)}
        if differing or not here:
            raise HistoError(
                f"--data {name}: its val differs in {len(differing)} images, or their labels, from that of {folder}, "
                "expected the same, since another run may have been trained on them; give the data of the runs"
            )


def _value(table: Predictions, metric: str, negative: int | None) -> float:
    """A metric, larger where it is better."""
    value = classification.compute(table, negative=negative)[metric]
    return float("-inf") if value is None else -value if metric == "loss" else value


def _public(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:])  # RUN/adapter
