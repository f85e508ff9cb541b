"""The command that predicts a data set with an adapter, and writes a CSV, e.g. for a challenge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import numpy as np

from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import columns_of
from hf_histo.config.commands import PredictOptions
from hf_histo.data.load import load
from hf_histo.data.protocol import complete
from hf_histo.data.reading import Reading
from hf_histo.errors import HistoError
from hf_histo.evaluation import thresholds
from hf_histo.evaluation.prediction_sets import PredictionSets
from hf_histo.evaluation.predictions import Predictions
from hf_histo.files import require_output
from hf_histo.inference import Classifier

# Options by which predictions are made otherwise than those of `val` in the adapter folder were.
OTHERWISE = ("test_time_views", "test_time_augmentation", "adapt_batch_norm", "mixed_precision", "token_merging")
COMPARED = 200  # images, evenly spread over the table, that are predicted as exactly as in training; of bags, all


def predict(options: PredictOptions) -> str:
    """Predict one split, and write the table and, on request, explanations.

    If `test_time_views`, `test_time_augmentation` or `adapt_batch_norm` is None, the value of the adapter is used.
    Returns a summary as text: number of predictions, threshold and its origin, and whether and how the prediction was
    transductive. Raises HistoError for options that don't fit the adapter or the data, and outputs among the inputs.
    """
    for output in filter(None, (options.output, options.explain)):
        require_output(output, [options.data, options.adapter, options.backbone])

    classifier = Classifier.from_pretrained(options.adapter, revision=options.revision, backbone=options.backbone)
    sidecar, is_of_bags = classifier.sidecar, classifier.sidecar.head.is_of_bags
    if options.explain:
        sidecar.require_images("--explain: the adapter", "leave it out; of slides, predict draws the attention")
    for name in ("threshold", "balanced"):
        if getattr(options, name) is not None and sidecar.num_outputs > 1:
            found = f"found {len(sidecar.label_names)}, of which the most probable is predicted"
            raise HistoError(f"--{name} is for two classes, {found}")
    _refuse_uncalibrated(options)
    images = _split(options, sidecar.preprocessing.reading)
    count = sidecar.views.count if options.test_time_views is None else options.test_time_views
    if options.test_time_augmentation is not None and count == 1:
        raise HistoError(
            f"--test_time_augmentation is {options.test_time_augmentation!r}, which can't act on one view; "
            "give --test_time_views 8, or leave it out"
        )
    views: dict[str, Any] = {"count": options.test_time_views, "augmentation": options.test_time_augmentation}
    given = {key: value for key, value in views.items() if value is not None}
    predicted = partial(
        classifier.predict,
        test_time_views=replace(sidecar.views, **given) if given else None,
        adapt_batch_norm=options.adapt_batch_norm,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    fast = partial(predicted, mixed_precision=options.mixed_precision, token_merging=options.token_merging)
    predictions = fast(images)
    threshold, origin = _threshold(options, sidecar, predictions)
    predictions["predicted"] = np.array(sidecar.label_names)[predictions.predicted_classes(threshold)]
    rule = None if options.coverage is None else _prediction_sets(options, classifier, fast)
    if rule:
        predictions = rule.apply(predictions)
    predictions.write_submission(options.output, threshold, details=options.details)
    if options.explain:
        classifier.draw(images, predictions, options.explain)

    decision = f" at threshold {threshold:.4f} ({origin})" if sidecar.num_outputs == 1 else ""
    summary = f"{len(predictions)} predictions{decision}: {options.output}"
    if rule:
        summary += f"\n{_described(rule, predictions, options.calibration)}"
    if measured := predictions.attrs["transductive"]:
        summary += f"\ntransductive: used the images of {options.data} as a whole, for {', '.join(measured)}"
    chosen = {"mixed_precision": options.mixed_precision, "token_merging": options.token_merging}
    if used := [f"--{name} {value}" for name, value in chosen.items() if value not in ("no", 0)]:
        some = (
            images
            if is_of_bags
            else images.select(np.linspace(0, len(images) - 1, min(COMPARED, len(images))).round().astype(int))
        )
        changed = _changed(predicted(some), fast(some), threshold)
        summary += f"\n{' and '.join(used)} changed {changed}"
    return summary


def _refuse_uncalibrated(options: PredictOptions) -> None:
    """Raise HistoError for sets that are calibrated on `val`, which was predicted otherwise than these images."""
    if options.coverage is None or options.calibration is not None:
        return
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if option.name in OTHERWISE and value != option.default:
            raise HistoError(
                f"--{option.name} is {value!r}, but --coverage is calibrated on predictions of val that were made "
                "without it; leave it out, or give --calibration"
            )


def _prediction_sets(
    options: PredictOptions, classifier: Classifier, predicted: Callable[[datasets.Dataset], Predictions]
) -> PredictionSets:
    """The rule for prediction sets, calibrated on `--calibration` or the adapter's `val`."""
    assert options.coverage is not None
    if options.calibration is None:
        return classifier.prediction_sets(options.coverage)
    reading = classifier.sidecar.preprocessing.reading
    splits = load(options.calibration, cache_dir=options.cache_dir, reading=reading)
    if len(splits) > 1:
        raise HistoError(
            f"--calibration {options.calibration}: has the splits {', '.join(splits)}, expected one; give a table or "
            "folder of labeled images of the new center alone"
        )
    labeled = predicted(next(iter(splits.values())))
    if labeled.labeled.empty:
        raise HistoError(
            f"--calibration {options.calibration}: no label is known, expected images of each class; give a column of "
            "labels, or a folder for each class"
        )
    return classifier.prediction_sets(options.coverage, calibration=labeled)


def _described(rule: PredictionSets, predictions: Predictions, calibration: str | None) -> str:
    """How many images have which sets, and what that is worth, as text."""
    used = calibration or "val of the adapter, by which its checkpoint was chosen as well"
    if rule.every.reason:
        return f"no prediction set is claimed, every image has all classes: {rule.every.reason} in {used}"
    sizes = predictions["set"].map(len)
    one, none = int((sizes == 1).sum()), int((sizes == 0).sum())
    groups = ", ".join(f"{count} of {name}" for count, name in zip(rule.every.groups, rule.label_names, strict=True))
    text = (
        f"prediction sets at {rule.coverage:g} coverage of each class: {one} of {len(sizes)} images have one class; "
        f"{len(sizes) - one - none} with several and {none} with none are referred to a pathologist; calibrated on "
        f"{used} (groups: {groups})"
    )
    own = sum(len(rows) for name, rows in predictions.known_centers.items() if name in rule.centers)
    others = len(predictions) - own
    if calibration is None and others:
        text += (
            f"\n{others} images are of no center that val has enough groups of: at a center unlike those of val, the "
            "coverage is not promised; --calibration takes some of its labeled images"
        )
    return text


def _changed(exact: Predictions, fast: Predictions, threshold: float) -> str:
    """How predictions that are made faster differ from those in float32 of all patches, as text."""
    changed = int((exact.predicted_classes(threshold) != fast.predicted_classes(threshold)).sum())
    most = np.abs(exact.class_probabilities - fast.class_probabilities).max()
    share = f"{changed} of {len(exact)} decisions ({changed / len(exact):.1%})"
    return f"{share} on images also predicted without; probabilities differ by at most {most:.4f}"


def _split(options: PredictOptions, reading: Reading) -> datasets.Dataset:
    """The split to predict, its image files read as in training."""
    data = load(options.data, cache_dir=options.cache_dir, reading=reading, **columns_of(options))
    if options.split not in data:
        data = complete(data)
    if options.split not in data:
        raise HistoError(f"--split {options.split}: {options.data} has {', '.join(data)}")
    return data[options.split]


def _threshold(options: PredictOptions, sidecar: Sidecar, predictions: Predictions) -> tuple[float, str]:
    """The threshold of class 1 and its origin; one chosen on these images is recorded in `predictions.transductive`."""
    if options.balanced is not None:
        predictions.attrs["transductive"].append("threshold")
        origin = f"transductive: class 1 for {options.balanced:.0%} of these images, not valid for others"
        return thresholds.for_share(predictions, options.balanced).value, origin
    origin = "the adapter's own" if options.threshold is None else f"--threshold {options.threshold}"
    return sidecar.threshold_named(options.threshold), origin
