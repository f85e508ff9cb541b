"""Several adapters of one backbone, measured on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.reporting.report import overall_table
from hf_histo.inference import Classifier


def compare_adapters(
    adapters: Sequence[str],
    data: str,
    *,
    split: str = "val",
    average: bool = False,
    backbone: str | None = None,
    batch_size: int = 64,
    cache_dir: str | None = None,
) -> str:
    """A table (markdown) of the metrics of each adapter, with 95% intervals over groups; the backbone is loaded once.

    Args:
        adapters: folders or names on the Hub.
        data: HDF5 file or folder, with labels.
        split: part of `data` to predict.
        average: add the mean of the adapters as one more row.
        backbone: the base model, where it is no longer where the adapters were trained.
        batch_size: images at a time.
        cache_dir: folder of the converted data, by default the cache of `datasets`.

    Raises `HistoError` for the mean of one adapter, a split that `data` lacks or in which no label is known, and as
    `Classifier.load_adapter` and `Classifier.average` do.
    """
    if average and len(adapters) < 2:
        raise HistoError(f"--average is for several adapters, found {adapters[0]} alone; give more, or leave it out")
    splits = load(data, cache_dir=cache_dir)
    if split not in splits:
        raise HistoError(f"--split {split}: {data} has {', '.join(splits)}")
    rows = splits[split]
    if set(rows["label"]) == {-1}:
        raise HistoError(f"--data {data}: no label is known in {split}, expected some to compare by")
    first, *others = adapters
    classifier = Classifier.from_pretrained(first, backbone=backbone)
    for place, adapter in enumerate(others):
        classifier.load_adapter(adapter, f"other{place}", backbone=backbone)
    shown = dict(zip(classifier.sidecars, adapters, strict=True))
    if average:
        classifier.average(list(shown))
        shown["average"] = f"mean of the {len(shown)}"
    reports: dict[str, Any] = {}
    for name, title in shown.items():
        classifier.set_adapter(name)
        predictions = classifier.predict(rows, batch_size=batch_size, description=f"Predicting with {title}")
        reports[title] = classification.report(predictions)
    return overall_table(reports)
