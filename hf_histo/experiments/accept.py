"""The command that asks whether an adapter is fit for use at a new site."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import columns_of
from hf_histo.config.commands import AcceptOptions
from hf_histo.data.load import fingerprint, load
from hf_histo.data.reading import Reading
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.evaluation import site_acceptance
from hf_histo.evaluation.figures import embedding
from hf_histo.evaluation.prediction_sets import group_numbers
from hf_histo.evaluation.predictions import Predictions, independent_groups
from hf_histo.evaluation.reporting import documents
from hf_histo.evaluation.site_acceptance import Estimate, Evidence, Shift
from hf_histo.files import atomic_file, require_output, write_json
from hf_histo.inference import Classifier, Ensemble

LEAST = 10  # images of a site
RECORD = "acceptance.json"
ADVICE = {
    "accept": "Use it, and look at some of its calls: label a few images of each week and give them as --labels.",
    "recalibrate": "Label some random images of this site (50 are a good start) and give them as --labels; calibrate "
    "prediction sets on them (hf_histo predict --coverage 0.9 --calibration FILE), and choose a threshold there.",
    "refuse": "Do not use it here. Train on images of this site as well, or with --config histo_ood.",
}


def accept(options: AcceptOptions) -> str:
    """Write acceptance.json and acceptance.html; return the verdict and its reasons as text.

    Column names are those of the tables of the site, `--data` and `--labels`; that of labels is of `--labels` where it
    is given.

    Raises HistoError for fewer than `LEAST` images, an adapter without predictions of `val`, labels that are unknown,
    a reference that is the site's own images, or for an ensemble, and outputs among the inputs.
    """
    output = options.output_dir
    require_output(
        output, [options.data, options.adapter, options.backbone, options.labels, options.reference], folder=True
    )
    if (output / RECORD).exists() and not options.overwrite:
        raise HistoError(f"--output_dir {output} already holds {RECORD}: pass another folder or --overwrite")
    classifier = Classifier.from_pretrained(options.adapter, revision=options.revision, backbone=options.backbone)
    classifier.sidecar.require_images(f"--adapter {options.adapter}", "accept compares images")
    sidecar, validation = classifier.sidecar, classifier.validation().labeled
    reading = sidecar.preprocessing.reading
    if options.reference is not None and isinstance(classifier, Ensemble):
        found = "an ensemble has those of each member"
        raise HistoError(f"--reference compares the features of one adapter, and {found}; leave it out")
    columns = columns_of(options)
    of_data = columns if options.labels is None else columns | {"label_column": None}
    images = _images("data", options.data, options, reading, **of_data)
    if len(images) < LEAST:
        raise HistoError(f"--data {options.data}: {len(images)} images, expected at least {LEAST}; give more")
    reference = None
    if options.reference is not None:
        reference = _images("reference", options.reference, options, reading, prefer="val")
        if fingerprint(reference) == fingerprint(images):
            raise HistoError(f"--reference {options.reference}: these are the images of --data; give others, like val")
    new = classifier.predict(images, batch_size=options.batch_size)
    few = None
    if options.labels is not None:
        few = classifier.predict(
            _images("labels", options.labels, options, reading, **columns), batch_size=options.batch_size
        ).labeled
        if few.empty:
            raise HistoError(f"--labels {options.labels}: no label is known, expected some; give a column of labels")
    evidence, predicted = weighed(
        validation,
        new,
        threshold=sidecar.threshold,
        tolerance=options.tolerance,
        labeled=few,
        color_p_value=_color(sidecar, images, group_numbers(new)),
        shift=None if reference is None else _features(classifier, reference, images, group_numbers(new)),
    )
    verdict, reasons = site_acceptance.decide(evidence)
    compared = "log odds" if reference is None else "features"
    place = Path(options.adapter).resolve()
    title = (place.parent if place.name == "adapter" else place).name if place.exists() else options.adapter
    withheld = bool(site_acceptance.differences(evidence))
    write_json(
        output / RECORD,
        {
            "verdict": verdict,
            "reasons": reasons,
            "adapter": title,
            "data": fingerprint(images),
            "images": len(new),
            "groups": len(set(group_numbers(new))),
            "labeled": 0 if few is None else len(few),
            "compared": compared,
            "evidence": {
                **dataclasses.asdict(evidence),
                "predicted": _recorded(evidence.predicted, withheld=withheld),
            },
            "predicted": {name: _recorded(estimate, withheld=withheld) for name, estimate in predicted.items()},
            "transductive": new.transductive,
        },
    )
    page = documents.render(
        "accept.html",
        title=f"Is it fit for use at {Path(options.data).name}?",
        adapter=title,
        images=len(new),
        groups=len(set(group_numbers(new))),
        labeled=0 if few is None else len(few),
        verdict=verdict,
        reasons=reasons,
        advice=ADVICE[verdict],
        evidence=evidence,
        interval=_interval(evidence.predicted, withheld=withheld),
        transductive=new.transductive,
        rows=_rows(evidence, predicted, compared, withheld=withheld),
    )
    with atomic_file(output / "acceptance.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return "\n".join([f"{verdict}: {'; '.join(reasons)}", ADVICE[verdict], f"wrote {output / 'acceptance.html'}"])


def weighed(
    validation: Predictions,
    new: Predictions,
    *,
    threshold: float = 0.5,
    tolerance: float = 0.05,
    labeled: Predictions | None = None,
    color_p_value: float | None = None,
    shift: Shift | None = None,
    seed: int = 0,
) -> tuple[Evidence, dict[str, Estimate]]:
    """The evidence about a site, and its accuracy as predicted in several ways.

    Args:
        validation: labeled predictions of `val`.
        new: predictions of the site's images, whose labels are not used.
        threshold: of the adapter.
        tolerance: by how much the accuracy may be lower than on `val`.
        labeled: labeled predictions of some of the site's images, if any.
        color_p_value: see `site_acceptance.color_p_value`.
        shift: a test on features; by default one on the log odds of both tables.
        seed: of the permutations.
    """
    groups, new_groups = group_numbers(validation), group_numbers(new)
    right = validation.predicted_classes(threshold) == validation.labels
    predicted = site_acceptance.predicted_accuracies(
        site_acceptance.confidence(validation, threshold),
        right,
        groups,
        site_acceptance.confidence(new, threshold),
        new_groups,
    )
    if shift is None:
        ranked = list(validation.ranked_classes)
        odds, new_odds = (table.class_log_odds[:, ranked] for table in (validation, new))
        shift = site_acceptance.shift(odds, new_odds, groups, new_groups, seed=seed)
    sequence = None
    if labeled is not None:
        is_right = labeled.predicted_classes(threshold) == labeled.labels
        shares = site_acceptance.shares_by_group(is_right, group_numbers(labeled))
        sequence = site_acceptance.confidence_sequence(shares)
    evidence = Evidence(
        accuracy=float(right.mean()),
        group_accuracy=float(site_acceptance.shares_by_group(right, groups).mean()),
        tolerance=tolerance,
        shift=shift,
        color_p_value=color_p_value,
        predicted=predicted["atc"],
        labeled=sequence,
    )
    return evidence, predicted


def _images(
    name: str, source: str, options: AcceptOptions, reading: Reading, *, prefer: str | None = None, **columns: Any
) -> datasets.Dataset:
    """The images of a source: of the split `prefer`, else of `--split`, else those of its one split.

    Raises HistoError for several other splits.
    """
    data = load(source, cache_dir=options.cache_dir, reading=reading, **columns)
    for split in (prefer, options.split):
        if split in data:
            return data[split]
    if len(data) > 1:
        found = f"has the splits {', '.join(data)}, expected one, or {options.split} among them"
        raise HistoError(f"--{name} {source}: {found}; give --split")
    return next(iter(data.values()))


def _color(sidecar: Sidecar, images: datasets.Dataset, groups: site_acceptance.Rows) -> float | None:
    """p-value of the test of color; None where the adapter holds no colors of its training images."""
    if sidecar.colors is None:
        return None
    table = ImageTable(images)
    distances = np.array([sidecar.colors.distance(table[row]["image"]) for row in range(len(images))])
    return site_acceptance.color_p_value(distances, sidecar.colors.limit, groups)


def _features(
    classifier: Classifier, reference: datasets.Dataset, images: datasets.Dataset, new_groups: site_acceptance.Rows
) -> Shift:
    """The test of a shift on the features of the adapter: those of the images against those of the reference."""
    sidecar = classifier.sidecar
    pipeline = sidecar.pipeline.single_view
    vectors = [
        embedding.features(classifier.model, sidecar.with_known_centers(rows), pipeline) for rows in (reference, images)
    ]
    names = independent_groups(pd.Series(reference["group"], dtype=str), pd.Series(reference["id"], dtype=str))
    groups = np.unique(names.to_numpy(str), return_inverse=True)[1]
    return site_acceptance.shift(vectors[0], vectors[1], groups, new_groups)


def _recorded(estimate: Estimate, *, withheld: bool) -> dict[str, float | None]:
    """A predicted accuracy as the record holds it: without its interval where that is withheld."""
    return dataclasses.asdict(estimate) | ({"low": None, "high": None} if withheld else {})


def _interval(estimate: Estimate, *, withheld: bool) -> str:
    return "withheld: the site differs" if withheld else f"{estimate.low:.3f}–{estimate.high:.3f}"


def _rows(evidence: Evidence, predicted: dict[str, Estimate], compared: str, *, withheld: bool) -> list[list[object]]:
    """What was measured: a header, and a row for each test and estimate."""
    titles = {
        "atc": "accuracy, predicted by average thresholded confidence",
        "importance": "accuracy, predicted by importance weighting",
    }
    rows: list[list[object]] = [["", "value", "p-value or 95% interval"]]
    if evidence.color_p_value is not None:
        rows.append(["color, against training", None, site_acceptance.p_value(evidence.color_p_value)])
    rows.append(
        [
            f"{compared}, against val: energy distance",
            evidence.shift.distance,
            site_acceptance.p_value(evidence.shift.p_value),
        ]
    )
    rows += [[titles[name], of.value, _interval(of, withheld=withheld)] for name, of in predicted.items()]
    rows.append(["accuracy on val", evidence.accuracy, None])
    if evidence.labeled is not None:
        rows.append(["accuracy on val, mean over groups", evidence.group_accuracy, None])
        low, high = evidence.labeled
        rows.append(["accuracy by labels, mean over groups", None, f"{low:.3f}–{high:.3f}"])
    return rows
