"""The prediction of a data set with an adapter, as a table for a challenge."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import DataOptions
from hf_histo.data.load import load
from hf_histo.data.protocol import complete
from hf_histo.errors import HistoError
from hf_histo.evaluation import thresholds
from hf_histo.evaluation.predictions import Predictions
from hf_histo.files import require_output
from hf_histo.inference import Classifier


@dataclass(frozen=True)
class Options:
    """What is predicted, with which adapter, and where the table goes.

    `threshold` and `balanced` exclude each other; without either, the adapter's own threshold decides. An option of
    the adapter (`test_time_views`, `test_time_augmentation`, `adapt_batch_norm`) holds where its value here is None.
    """

    adapter: str
    data: str
    output: Path
    revision: str | None = None
    backbone: str | None = None
    split: str = "test"
    details: bool = False
    threshold: str | None = None
    balanced: float | None = None
    test_time_views: int | None = None
    test_time_augmentation: str | None = None
    adapt_batch_norm: bool | None = None
    explain: Path | None = None
    batch_size: int = 64
    cache_dir: str | None = None


def parse(usage: str | None) -> Options:
    """Parse the command line; `usage` is the recipe's docstring."""
    parser = ArgumentParser(description=usage, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="adapter folder, or its name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of an adapter on the Hub")
    parser.add_argument("--backbone", help="the base model, where it is no longer where the adapter was trained")
    parser.add_argument("--data", required=True, help="HDF5 file or folder")
    parser.add_argument("--split", default="test", help="part of a folder to predict (default: test)")
    parser.add_argument("--output", required=True, type=Path, help="CSV file to write")
    parser.add_argument("--details", action="store_true", help="also the class's name and the calibrated probability")
    decision = parser.add_mutually_exclusive_group()
    decision.add_argument("--threshold", help="a probability, or a name that the adapter holds, e.g. validation")
    help = "call this share of the images 1 (0.5)"
    decision.add_argument("--balanced", type=float, nargs="?", const=0.5, metavar="SHARE", help=help)
    help = "mean logit of 1 or 8 views of the square, or any drawn ones"
    parser.add_argument("--test_time_views", type=int, help=help)
    parser.add_argument("--test_time_augmentation", help="square, or a preset of --augmentation to draw views from")
    help = "take batch-norm statistics from these images"
    parser.add_argument("--adapt_batch_norm", action=BooleanOptionalAction, help=help)
    parser.add_argument("--explain", type=Path, metavar="PNG", help="draw where the model sees the predicted class")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--cache_dir", help="folder of the converted data (default: the datasets library's cache)")
    return Options(**vars(parser.parse_args()))


def predict(options: Options) -> str:
    """Predict one split and write the table, and the explanations where they are asked for.

    Returns a summary: the number of predictions, the threshold with its origin, and what was measured on the images as
    a whole. Raises HistoError for options that the adapter or the data cannot serve, and for outputs among the inputs.
    """
    if options.batch_size < 1:
        raise HistoError(f"--batch_size is {options.batch_size}, expected at least 1")
    for output in filter(None, (options.output, options.explain)):
        require_output(output, [options.data, options.adapter, options.backbone])

    classifier = Classifier.from_pretrained(options.adapter, revision=options.revision, backbone=options.backbone)
    sidecar = classifier.sidecar
    if options.threshold is not None and sidecar.num_outputs > 1:
        found = f"found {len(sidecar.label_names)}, of which the most probable is predicted"
        raise HistoError(f"--threshold is for two classes, {found}")
    images = _split(options, sidecar.preprocessing.gray_bits)
    views: dict[str, Any] = {"count": options.test_time_views, "augmentation": options.test_time_augmentation}
    predictions = classifier.predict(
        images,
        test_time_views=replace(sidecar.views, **{key: value for key, value in views.items() if value is not None}),
        adapt_batch_norm=options.adapt_batch_norm,
        batch_size=options.batch_size,
    )
    threshold, origin = _threshold(options, sidecar, predictions)
    predictions["predicted"] = np.array(sidecar.label_names)[predictions.predicted_classes(threshold)]
    predictions.write_submission(options.output, threshold, details=options.details)
    if options.explain:
        classifier.draw(images, predictions, options.explain)

    decision = f" at threshold {threshold:.4f} ({origin})" if sidecar.num_outputs == 1 else ""
    summary = f"{len(predictions)} predictions{decision}: {options.output}"
    if measured := predictions.attrs["transductive"]:
        summary += f"\ntransductive: used the images of {options.data} as a whole, for {', '.join(measured)}"
    return summary


def _split(options: Options, gray_bits: int | None) -> datasets.Dataset:
    """The table of the one schema to predict, 16-bit gray images read as in training."""
    data = load(DataOptions(data=options.data, cache_dir=options.cache_dir, gray_bits=gray_bits))
    if options.split not in data:
        data = complete(data)
    if options.split not in data:
        raise HistoError(f"--split {options.split}: {options.data} has {', '.join(data)}")
    return data[options.split]


def _threshold(options: Options, sidecar: Sidecar, predictions: Predictions) -> tuple[float, str]:
    """The threshold of class 1 and its origin; one from these very images is recorded as transductive."""
    if options.balanced is not None:
        predictions.attrs["transductive"].append("threshold")
        origin = f"transductive: it calls {options.balanced:.0%} of these images 1, and is none for others"
        return thresholds.for_share(predictions, options.balanced).value, origin
    origin = "the adapter's own" if options.threshold is None else f"--threshold {options.threshold}"
    return sidecar.threshold_named(options.threshold), origin
