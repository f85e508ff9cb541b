"""Where to put the threshold on the probability of class 1, and what it then achieves.

A threshold belongs to the probabilities that it was chosen on: calibrate first. Thresholds stand midway between two
neighboring distinct probabilities of the table, with 0 and 1 as the outermost neighbors, so that a rounding difference
in a later prediction turns no image over. Images of equal probability always fall on the same side.
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
    """A threshold and where it comes from.

    Attributes:
        value: the probability in [0, 1] from which on class 1 is predicted.
        criterion: what was asked for: "share", or a `Criterion`.
        achieved: the criterion's value on the table, in [0, 1].
        n: images of the table that counted.
    """

    value: float
    criterion: str
    achieved: float
    n: int


def for_share(predictions: Predictions, share: float = 0.5) -> Threshold:
    """Return the threshold at which class 1 is predicted for a given share of the images, labeled or not.

    It fits where the share of class 1 is known beforehand, as in a balanced test set, and the probabilities of a new
    center are shifted. No label is looked at, but the threshold is transductive: it is made of these very images, and
    is none for others. Where ties or the number of images don't allow the share, the nearest
    possible one is taken, and of two equally near ones the smaller. `achieved` is the share that came out.

    Args:
        predictions: a table of two classes, of one image at least.
        share: of images to be predicted as class 1, in [0, 1].

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
    """Return the threshold that is best on a labeled table, which should be that of a validation split.

    Of thresholds that are equally good, it is the one nearest to 0.5; for "sensitivity", the most specific one.

    Args:
        predictions: a table of two classes, in which both are labeled; rows with a hidden label are left out.
        criterion: what to maximize: "balanced_accuracy", "f1" or "accuracy", as defined in
            `metrics.classification`, or "sensitivity", which is the recall of class 1 at a specificity (recall of
            class 0) of at least `specificity`.
        specificity: in [0, 1]; of effect for "sensitivity" only.

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
    """Return the rising thresholds that part probabilities, (n,), in every possible way, each way once."""
    values = np.unique(np.concatenate([probability, [0.0, 1.0]]))
    below, above = values[:-1], values[1:]
    middle = (below + above) / 2
    middle = np.where(middle > below, middle, above)  # of two floats without one between, the middle is the lower
    return np.concatenate([[0.0], middle]) if (probability == 0).any() else middle


def _at_least(scores: Floats, cuts: Floats) -> NDArray[np.int64]:
    """Return how many of the scores, (n,), reach each of the cuts, (m,)."""
    return len(scores) - np.searchsorted(np.sort(scores), cuts).astype(np.int64)


def _checked(specificity: float) -> float:
    if not 0 <= specificity <= 1:
        raise HistoError(f"specificity is {specificity}, expected a number from 0 to 1, e.g. 0.95")
    return specificity
