"""Conformal prediction sets: the classes that an image may have, so that its own is among them with a chosen coverage.

An image's set has class y if its log odds of y are at least a limit, which is chosen on labeled images of class y that
the model was not trained on. So the coverage holds for the images of each class, not only on average over classes
(label-conditional, or Mondrian, conformal prediction: Vovk 2012, "Conditional validity of inductive conformal
predictors", ACML, sec. 3; sets of probable classes: Sadinle et al. 2019, "Least ambiguous set-valued classifiers with
bounded error levels", Journal of the American Statistical Association 114:223-234).

Images of a slide or patient are alike, so groups are exchangeable, and images are not. The limit of class y is a
quantile of weighted scores, in which each of the G groups with images of class y has a weight of 1 / (G + 1), divided
evenly among these images, and the rest, 1 / (G + 1), is the finite-sample correction: a score beyond all others
(hierarchical conformal prediction: Lee, Barber & Willett 2023, "Distribution-free inference with hierarchical data",
arXiv 2306.06342, sec. 3; Dunn, Wasserman & Ramdas 2022, "Distribution-free prediction sets for two-layer hierarchical
models", Journal of the American Statistical Association 118:2491-2502, who draw one image of each group instead). Then
the set of an image of a new group of the same kind holds its class with a probability of at least the coverage. A
coverage c needs c / (1 - c) groups of each class, 9 for 90%; with fewer no set is claimed: it has all classes.

Nothing is promised for images of another kind, such as those of a center that the calibration images are not from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions, independent_groups

REFER = "refer to a pathologist"  # the decision where a set has no class or several
ROUNDING = 1e-9  # of sums of weights, which are compared with the coverage


@dataclass(frozen=True)
class Limits:
    """From which log odds on a class is in a set, for images of one kind.

    Attributes:
        log_odds: the least log odds of each of K classes; minus infinity for all if no set can be claimed.
        groups: number of groups with calibration images of each class.
        reason: why no set can be claimed, as a sentence; None if sets can be.
    """

    log_odds: tuple[float, ...]
    groups: tuple[int, ...]
    reason: str | None = None


@dataclass(frozen=True)
class PredictionSets:
    """A rule that gives each image its set of classes.

    Attributes:
        coverage: in (0, 1), of the images of each class.
        every: limits from the calibration images of all centers together.
        centers: limits from those of one center alone, for the centers with enough of them, by name, or number as text.
        label_names: class names.
    """

    coverage: float
    every: Limits
    centers: Mapping[str, Limits]
    label_names: tuple[str, ...]

    def members(self, predictions: Predictions) -> NDArray[np.bool_]:
        """Which classes are in the set of each image, (n, K).

        An image of a center with limits of its own gets those, and another one the limits of all centers together.
        """
        least = np.tile(self.every.log_odds, (len(predictions), 1))
        for center, rows in predictions.assign(row=np.arange(len(predictions))).known_centers.items():
            if center in self.centers:
                least[rows["row"]] = self.centers[center].log_odds
        members: NDArray[np.bool_] = predictions.class_log_odds >= least
        return members

    def apply(self, predictions: Predictions) -> Predictions:
        """The table with two more columns: `set`, a list of class names, and `decision`, its only one, or `REFER`."""
        names = np.array(self.label_names)
        sets = [names[row].tolist() for row in self.members(predictions)]
        decisions = [classes[0] if len(classes) == 1 else REFER for classes in sets]
        return predictions.assign(set=sets, decision=decisions)


def calibrate(predictions: Predictions, coverage: float) -> PredictionSets:
    """Choose the limits on labeled predictions for images that the model was not trained on.

    Args:
        predictions: a table with `group`, as a run stores for `val`; rows with a hidden label are left out, and images
            of unknown group are their own.
        coverage: in (0, 1).

    Raises:
        HistoError: no image is labeled, or `coverage` is out of bounds.
    """
    if not 0 < coverage < 1:
        raise HistoError(f"coverage is {coverage}, expected a share above 0 and below 1, e.g. 0.9")
    labeled = predictions.labeled
    if labeled.empty:
        raise HistoError("no image to calibrate on is labeled, expected some of each class; give a column of labels")
    names = labeled.label_names
    by_center = {center: _limits(rows, coverage, names) for center, rows in labeled.known_centers.items()}
    claimed = {center: limits for center, limits in by_center.items() if limits.reason is None}
    return PredictionSets(coverage, _limits(labeled, coverage, names), claimed, tuple(names))


def least_groups(coverage: float) -> int:
    """Number of groups that a class needs at this coverage: the least G with G / (G + 1) at least the coverage."""
    return math.ceil(coverage / (1 - coverage) - ROUNDING)


def limits(
    log_odds: NDArray[np.float64], labels: NDArray[np.int64], groups: NDArray[np.int64], coverage: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The least log odds of each class, (K,), minus infinity where groups are too few, and its groups, (K,).

    Args:
        log_odds: of each class, (n, K).
        labels: (n,) in [0, K).
        groups: number of each image's group, (n,).
        coverage: in (0, 1).
    """
    classes = log_odds.shape[1]
    least, counts = np.full(classes, -np.inf), np.zeros(classes, np.int64)
    for label in range(classes):
        of_class = labels == label
        _, place, sizes = np.unique(groups[of_class], return_inverse=True, return_counts=True)
        counts[label] = len(sizes)
        order = np.argsort(-log_odds[of_class, label], kind="stable")
        weights = np.cumsum(1 / ((len(sizes) + 1) * sizes[place[order]]))
        if len(weights) and weights[-1] >= coverage - ROUNDING:
            chosen = order[np.argmax(weights >= coverage - ROUNDING)]
            least[label] = log_odds[of_class, label][chosen]
    return least, counts


def group_numbers(predictions: Predictions) -> NDArray[np.int64]:
    """Number of the group of each row, (n,); an image of unknown group has one of its own."""
    names = independent_groups(predictions["group"], predictions["id"])
    numbers: NDArray[np.int64] = np.unique(names.to_numpy(str), return_inverse=True)[1]
    return numbers


def _limits(labeled: Predictions, coverage: float, names: list[str]) -> Limits:
    least, counts = limits(labeled.class_log_odds, labeled.labels, group_numbers(labeled), coverage)
    groups = tuple(counts.tolist())
    needed = least_groups(coverage)
    lacking = [f"{count} of {name}" for name, count in zip(names, groups, strict=True) if count < needed]
    if not lacking:
        return Limits(tuple(least.tolist()), groups)
    reason = (
        f"a coverage of {coverage:g} needs {needed} groups (slides or patients) with each class, "
        f"found {', '.join(lacking)}"
    )
    return Limits((-math.inf,) * len(names), groups, reason)
