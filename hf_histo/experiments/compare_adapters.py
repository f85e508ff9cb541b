"""Comparison of several adapters of one backbone on the same images."""

from __future__ import annotations

import logging
from typing import Any

from hf_histo.config import columns_of
from hf_histo.config.commands import CompareAdaptersOptions
from hf_histo.data.load import fingerprint, load
from hf_histo.data.protocol import complete
from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.reporting.report import overall_table
from hf_histo.inference import Classifier

logger = logging.getLogger(__name__)


def compare_adapters(options: CompareAdaptersOptions) -> str:
    """Return a Markdown table of the metrics of each adapter, with 95% intervals; the backbone is loaded once.

    Adapters of other data, or other splits of them, may have been trained on these images; a warning names them.

    Raises `HistoError` for `--average` with a single adapter, a split that does not exist or has no labels, and as
    `Classifier.load_adapter` and `Classifier.average` do.
    """
    adapters, split = options.adapters, options.split
    if options.average and len(adapters) < 2:
        raise HistoError(f"--average is for several adapters, found {adapters[0]} alone; give more, or leave it out")
    first, *others = adapters
    classifier = Classifier.from_pretrained(first, backbone=options.backbone)
    reading = classifier.sidecar.preprocessing.reading
    data = complete(load(options.data, cache_dir=options.cache_dir, reading=reading, **columns_of(options)))
    if split not in data:
        raise HistoError(f"--split {split}: {options.data} has {', '.join(data)}")
    rows = data[split]
    if set(rows["label"][:]) == {-1}:
        raise HistoError(f"--data {options.data}: no label is known in {split}, expected some to compare by")
    for place, adapter in enumerate(others):
        classifier.load_adapter(adapter, f"other{place}", backbone=options.backbone)
    shown = dict(zip(classifier.sidecars, adapters, strict=True))
    content = fingerprint(data)
    if of_others := [shown[name] for name, of in classifier.sidecars.items() if of.data.fingerprint != content]:
        logger.warning(
            "--data %s: other splits or images than those that %s had (fingerprint %s); make sure that none of these "
            "images was trained on",
            options.data,
            ", ".join(of_others),
            content,
        )
    if options.average:
        classifier.average(list(shown))
        shown["average"] = f"mean of the {len(shown)}"
    reports: dict[str, Any] = {}
    for name, title in shown.items():
        classifier.set_adapter(name)
        predictions = classifier.predict(rows, batch_size=options.batch_size, description=f"Predicting with {title}")
        reports[title] = classification.report(predictions)
    return overall_table(reports)
