"""Choice of the threshold on the probability of class 1.

A threshold is valid for the probabilities that it was chosen on: calibrate first. Candidates are midway between two
consecutive distinct probabilities of the table, including 0 and 1, so that a rounding difference in a later prediction
changes no decision. Images of equal probability are always on the same side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_histo.config.commands import Criterion
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Threshold:
    """A threshold and how it was chosen.

    Attributes:
        value: the smallest probability in [0, 1] at which class 1 is predicted.
        criterion: "share", or a `Criterion`.
        achieved: value of the criterion on the table, in [0, 1].
        n: number of images that were used.
    """

    value: float
    criterion: str
    achieved: float
    n: int


def for_share(predictions: Predictions, share: float = 0.5) -> Threshold:
    """Return the threshold at which class 1 is predicted for a given share of the images, labeled or not.

    Use it if the share of class 1 is known, as in a balanced test set, and the probabilities of a new center are
    shifted. Labels are not used, but the threshold is transductive: it depends on these images and is not valid for
    others. If ties or the number of images don't allow the exact share, the nearest possible share is taken, and of
    two equally near ones the smaller. `achieved` is the resulting share.

    Args:
        predictions: a table of two classes with at least one image.
        share: share of images to predict as class 1, in [0, 1].

    Raises:
        HistoError: `share` is outside [0, 1], the table is empty, or it is of more than two classes.
    """
    if not 0 <= share <= 1:
        raise HistoError(f"share is {share}, expected a share of the images: pass a number from 0 to 1, e.g. 0.5")
    probability = predictions.positive_probability
    if not len(probability):
        raise HistoError("the predictions hold no image, expected at least 1: pass the table of the target center")
    cuts = _cuts(probability)
    above = _at_least(probability, cuts)
    distance = np.abs(above - share * len(probability))
    best = np.flatnonzero(distance == distance.min())[-1]
    return Threshold(float(cuts[best]), "share", float(above[best] / len(probability)), len(probability))


def choose(
    predictions: Predictions, criterion: Criterion = "balanced_accuracy", *, specificity: float = 0.95
) -> Threshold:
    """Return the threshold that is best on a labeled table, usually that of a validation split.

    On a tie, it is the threshold nearest to 0.5; for "sensitivity", the most specific one.

    Args:
        predictions: a table of two classes with labels of both; rows with a hidden label are left out.
        criterion: what to maximize: "balanced_accuracy", "f1" or "accuracy", as defined in
            `metrics.classification`, or "sensitivity", which is the recall of class 1 at a specificity (recall of
            class 0) of at least `specificity`.
        specificity: smallest specificity in [0, 1]; only used for "sensitivity".

    Raises:
        HistoError: the criterion is unknown, the table has more than two classes or labels of only one class, or
            `specificity` is outside [0, 1] or can't be reached.
    """
    probability, positive = predictions.positive_probability, predictions.labels == 1
    labeled = predictions.labels >= 0
    probability, positive = probability[labeled], positive[labeled]
    if positive.all() or not positive.any():
        names = predictions.label_names
        found = f"only {names[int(positive[0])]!r}" if len(positive) else "no class"
        raise HistoError(f"{found} is labeled in the predictions, expected {names}: choose on a validation table")
    cuts = _cuts(probability)
    hits, rest = _at_least(probability[positive], cuts), _at_least(probability[~positive], cuts)
    negatives = (~positive).sum()
    recall, spared = hits / positive.sum(), (negatives - rest) / negatives
    if criterion == "balanced_accuracy":
        values = (recall + spared) / 2
    elif criterion == "accuracy":
        values = (hits + negatives - rest) / len(positive)
    elif criterion == "f1":
        values = 2 * hits / (hits + rest + positive.sum())
    elif criterion == "sensitivity":
        values = np.where(spared >= _checked(specificity), recall, -1.0)
    else:
        known = "'balanced_accuracy', 'f1', 'accuracy' or 'sensitivity'"
        raise HistoError(f"criterion is {criterion!r}, expected {known}")
    if values.max() < 0:
        raise HistoError(
            f"specificity is {specificity}, but no threshold reaches more than {spared.max():.3f}, since negative "
            "images have probability 1: ask for less, or calibrate the predictions first"
        )
    equal = np.flatnonzero(values == values.max())
    best = equal[-1] if criterion == "sensitivity" else equal[np.abs(cuts[equal] - 0.5).argmin()]
    return Threshold(float(cuts[best]), criterion, float(values[best]), len(positive))


def _cuts(probability: Floats) -> Floats:
    """Return thresholds, in rising order, that divide probabilities (n,) in each possible way once."""
    values = np.unique(np.concatenate([probability, [0.0, 1.0]]))
    below, above = values[:-1], values[1:]
    middle = (below + above) / 2
    middle = np.where(middle > below, middle, above)  # between adjacent floats, the midpoint is the lower one
    return np.concatenate([[0.0], middle]) if (probability == 0).any() else middle


def _at_least(scores: Floats, cuts: Floats) -> NDArray[np.int64]:
    """Return, for each of the cuts (m,), the number of scores (n,) that are at least as large."""
    return len(scores) - np.searchsorted(np.sort(scores), cuts).astype(np.int64)


def _checked(specificity: float) -> float:
    if not 0 <= specificity <= 1:
        raise HistoError(f"specificity is {specificity}, expected a number from 0 to 1, e.g. 0.95")
    return specificity


def named(validation: Predictions) -> dict[str, float]:
    """Thresholds for new images by name, chosen on labeled images of `val` alone; none if these are of one class."""
    labels = validation["label"]
    return {"validation": choose(validation).value} if labels[labels >= 0].nunique() > 1 else {}
