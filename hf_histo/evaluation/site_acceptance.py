"""Whether a model is fit for use at a new site, from some of its images: shift, predicted accuracy, a few labels.

Without labels, three signs are tested, together at a level of `LEVEL`, which is fixed and tuned on no target: a site
whose images are as those of `val`, with colors of the training images, is refused or sent to be recalibrated with about
this probability at most. The test of what the model gives is exact, the other two are not.

- Color: are more than 2% of the images beyond the limit that 1% of the training images exceed (a binomial test)?
- What the model gives, its log odds of each class, or its features: are they distributed as those of `val` (energy
  distance: Székely & Rizzo 2013, "Energy statistics", Journal of Statistical Planning and Inference 143:1249-1272, with
  a permutation test on one image of each group, since images of a group are alike)? That the output of a classifier
  shows shifts that matter for it, and needs few images for that: Lipton et al. 2018, "Detecting and correcting for
  label shift with black box predictors", ICML; Rabanser et al. 2019, "Failing loudly", NeurIPS. Another share of a
  class is a shift as well.
- Accuracy, predicted from the confidence of the model (`predicted_accuracies`).

With labels of some images, a confidence sequence for the accuracy (`confidence_sequence`) holds at any number of them:
one may look after each, and stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import binomtest
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression

from hf_histo.evaluation.metrics import intervals
from hf_histo.evaluation.predictions import Predictions

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Verdict = Literal["accept", "recalibrate", "refuse"]

LEVEL = 0.05  # probability of an alarm at a site like `val`
COLOR_LEVEL = LEVEL / 4  # of it for the test of color; half of it is for the predicted accuracy
PERMUTATIONS = 999
MOST = 500  # largest number of images of a side in the test of a shift
# Share of a like site's images beyond the color limit: twice that of the training images which the limit was fitted on.
COLOR_SHARE = 0.02
BOOTSTRAPS = 400  # for a standard error, 200 are enough (Efron & Tibshirani 1993, sec. 6.4)
CLIP = 20.0  # largest importance weight, against a few images that decide alone
GRID = 400  # accuracies that a confidence sequence is computed for
LARGEST_BET = 0.75  # share of what could be bet on, c in Waudby-Smith & Ramdas 2024, sec. 4.4: 1/2 or 3/4


@dataclass(frozen=True)
class Shift:
    """Result of a two-sample test.

    Attributes:
        distance: energy distance, at least 0 up to rounding.
        p_value: in (0, 1].
        groups: numbers of groups that were compared, of the reference and of the new images.
    """

    distance: float
    p_value: float
    groups: tuple[int, int]


@dataclass(frozen=True)
class Estimate:
    """A predicted accuracy in [0, 1], and its 95% interval, which covers chance, but not that the method is wrong."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evidence:
    """What is known about a site.

    Attributes:
        accuracy: accuracy on `val`, in [0, 1].
        group_accuracy: the mean over the groups of `val` of the share of their images that are right, in [0, 1].
        tolerance: by how much the accuracy at the site may be lower, in [0, 1].
        shift: test of what the model gives for the site's images, against `val`.
        color_p_value: p-value of the test of color; None where the adapter holds no colors.
        predicted: accuracy at the site, predicted without labels.
        labeled: confidence sequence for the mean over the site's groups, from labeled images; None without.
    """

    accuracy: float
    group_accuracy: float
    tolerance: float
    shift: Shift
    color_p_value: float | None
    predicted: Estimate
    labeled: tuple[float, float] | None = None


def decide(evidence: Evidence) -> tuple[Verdict, list[str]]:
    """The verdict on a site, and the reasons for it, a sentence each.

    Labels decide where they suffice: "accept" if the accuracy, as a mean over groups, is at least that of `val` minus
    the tolerance, "refuse" if it is not. Else: "refuse" if the predicted accuracy is lower, "recalibrate" (label some
    images of the site, set a new threshold or calibrate prediction sets there) if the images differ from those of
    `val`, or if there are too few groups to find a difference, "accept" otherwise.
    """
    below = f"{evidence.tolerance:g} below that of val"
    signs = []
    if evidence.labeled is not None:
        (low, high), least = evidence.labeled, evidence.group_accuracy - evidence.tolerance
        found = f"by its labels, the accuracy, a mean over groups, is between {low:.3f} and {high:.3f}"
        needed = f"{least:.3f}, which is {below}"
        if high < least:
            return "refuse", [f"{found}, below {needed}"]
        if low >= least:
            return "accept", [f"{found}, at least {needed}"]
        signs.append(f"{found}, which does not decide about {needed}: label more")
    least = evidence.accuracy - evidence.tolerance
    if evidence.predicted.high < least:
        found = f"{evidence.predicted.value:.3f} ({evidence.predicted.low:.3f}–{evidence.predicted.high:.3f})"
        because = f"the accuracy predicted without labels is {found}, below {least:.3f}, which is {below}"
        return "refuse", [*signs, because]
    alarms = differences(evidence) or too_few_groups(evidence)
    if alarms:
        return "recalibrate", [*signs, *alarms]
    return "accept", [*signs, "no difference from val was found in these images"]


def differences(evidence: Evidence) -> list[str]:
    """The tested differences from training and `val` that were found, a clause each.

    Where there is one, confidence need not mean the same as on `val`, so that the intervals of the predicted accuracy
    are to be withheld: at a center of other colors, most of them missed the truth (docs/results/unseen_center.md).
    """
    found = []
    if evidence.color_p_value is not None and evidence.color_p_value <= COLOR_LEVEL:
        found.append(f"the colors differ from those of training ({p_value(evidence.color_p_value)})")
    if evidence.shift.p_value <= _shift_level(evidence):
        found.append(f"what the model gives differs from what it gives for val ({p_value(evidence.shift.p_value)})")
    return found


def too_few_groups(evidence: Evidence) -> list[str]:
    """The tests that have too few groups to find any difference, a clause each.

    Of n and m groups, a permutation test has no p-value below one in the number of ways to divide them, or two where
    both are as many, since the distance is the same when the sides are exchanged. That of color has none below
    `COLOR_SHARE` to the power of m.
    """
    ours, theirs = evidence.shift.groups
    ways = math.comb(ours + theirs, theirs)
    counted = f"{theirs} groups (slides or patients), and {ours} to compare with, are too few to find a difference"
    found = []
    if evidence.color_p_value is not None and COLOR_SHARE**theirs > COLOR_LEVEL:
        found.append(f"{counted} of color: give images of more groups, or --labels")
    if (2 if ours == theirs else 1) > _shift_level(evidence) * ways:
        found.append(f"{counted} in what the model gives: give images of more groups, or --labels")
    return found


def _shift_level(evidence: Evidence) -> float:
    """The level of the test of a shift: half of all, of which that of color has its part where it is made."""
    return LEVEL / 2 - (0 if evidence.color_p_value is None else COLOR_LEVEL)


def p_value(value: float) -> str:
    """A p-value as text, with four digits: never "p = 0.0000"."""
    return f"p = {value:.4f}" if value >= 0.0001 else "p < 0.0001"


def color_p_value(distances: Floats, limit: float, groups: Rows) -> float:
    """p-value of the hypothesis that `COLOR_SHARE` of the images are beyond the color limit, against more of them.

    Args:
        distances: of each image from the training colors, (n,), see `ColorRange.distance`.
        limit: that 1% of the training images exceed.
        groups: number of each image's group, (n,); the first image of each is counted, since the others are like it.
    """
    first = np.unique(groups, return_index=True)[1]
    return float(binomtest(int((distances[first] > limit).sum()), len(first), COLOR_SHARE, "greater").pvalue)


def shift(reference: Floats, new: Floats, reference_groups: Rows, new_groups: Rows, *, seed: int = 0) -> Shift:
    """Test whether two sets of vectors, (n, d) and (m, d), are of one distribution; groups (n,) and (m,) are numbers.

    Of each group one image is taken at random, up to `MOST` of a side: groups differ in their number of images, by
    which sides that are alike would differ as well, if whole groups were exchanged. Each coordinate is divided by its
    deviation in both together.
    """
    random = np.random.default_rng(seed)
    rows = [_one_of_each(groups, random)[:MOST] for groups in (reference_groups, new_groups)]
    vectors = np.concatenate([reference[rows[0]], new[rows[1]]])
    vectors = vectors / np.maximum(vectors.std(axis=0), 1e-12)
    side = np.concatenate([np.zeros(len(rows[0])), np.ones(len(rows[1]))])
    sides = np.stack([side, *(random.permutation(side) for _ in range(PERMUTATIONS))], axis=1)
    distances = _energy(cdist(vectors, vectors), sides)
    p_value = float((distances >= distances[0] - 1e-12).mean())
    return Shift(float(distances[0]), p_value, (len(rows[0]), len(rows[1])))


def confidence(predictions: Predictions, threshold: float = 0.5) -> Floats:
    """How sure the model is of the class that it predicts, (n,): the log odds of it, from the threshold on for two."""
    odds = predictions.class_log_odds
    if odds.shape[1] > 2:
        return odds.max(axis=1)  # type: ignore[no-any-return]
    inner = np.clip(threshold, 1e-9, 1 - 1e-9)
    found: Floats = np.abs(odds[:, 1] - np.log(inner / (1 - inner)))
    return found


def predicted_accuracies(
    sure: Floats, right: NDArray[np.bool_], groups: Rows, new_sure: Floats, new_groups: Rows
) -> dict[str, Estimate]:
    """The accuracy on unlabeled images, predicted from confidence in two ways.

    - "atc": average thresholded confidence: the share of images above the confidence that on `val` as many images
      exceed as are right (Garg et al. 2022, "Leveraging unlabeled data to predict out-of-distribution performance",
      ICLR, eq. 1 and 2).
    - "importance": the share of right ones on `val`, each weighted by how much more frequent its confidence is among
      the new images, by a logistic regression between both (Shimodaira 2000, "Improving predictive inference under
      covariate shift", Journal of Statistical Planning and Inference 90:227-244), up to a weight of `CLIP`.

    Both assume that the confidence means the same there. The interval is Wilson's, with the variance of a bootstrap of
    the groups of both sides (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", sec. 6.4 and 8.3) and the
    quantile of Student's t, see `intervals`; the jackknife is not consistent for a threshold, which is a quantile (Shao
    & Wu 1989, "A general theory for jackknife variance estimation", Annals of Statistics 17:1176-1197). The weights of
    "importance" are not estimated anew in each draw, so that its interval leaves out the chance in the new images. With
    one group on a side, the interval is [0, 1].

    Args:
        sure: confidence on `val`, (n,).
        right: whether `val` was predicted right, (n,).
        groups: groups of `val`, (n,).
        new_sure: confidence on the unlabeled images, (m,).
        new_groups: their groups, (m,).
    """
    order = np.argsort(-sure, kind="stable")
    sure, right, groups = sure[order], right[order], groups[order]
    weights = _importance(sure, new_sure)

    def thresholded(times: Rows, new_times: Rows) -> float:
        at_least_as_sure, rights = np.cumsum(times), times @ right
        cut = sure[np.searchsorted(at_least_as_sure, rights)] if rights else np.inf
        return float(np.average(new_sure >= cut, weights=new_times))

    def weighted(times: Rows, new_times: Rows) -> float:
        return float(np.average(right, weights=weights * times))

    once, new_once = np.ones(len(sure), int), np.ones(len(new_sure), int)
    found = {}
    for name, method in (("atc", thresholded), ("importance", weighted)):
        value = method(once, new_once)
        found[name] = Estimate(value, *_interval(value, method, groups, new_groups))
    return found


def confidence_sequence(values: Floats, level: float = LEVEL) -> tuple[float, float]:
    """An interval for the mean of independent values in [0, 1], in their order, that holds at any number of them.

    With a probability of 1 - `level`, the mean is in the intervals after each of the values, so that one may look after
    each and stop: the hedged capital of bets against each possible mean (Waudby-Smith & Ramdas 2024, "Estimating means
    of bounded random variables by betting", Journal of the Royal Statistical Society B 86:1-27, theorem 3 and eq. 26).

    Args:
        values: (t,): of each group in turn, the share of its images that are right; images of a group are alike.
        level: in (0, 1).
    """
    means = (np.arange(GRID) + 0.5) / GRID
    capital = np.zeros((2, GRID))  # logarithms of the capital of bets that the mean is higher, and lower
    held = np.ones(GRID, bool)
    total, squares = 0.5, 0.25  # one prior value of 1/2 with a variance of 1/4
    for number, value in enumerate(values, start=1):
        variance = squares / number
        bet = np.sqrt(2 * np.log(2 / level) / (variance * number * np.log(1 + number)))
        capital[0] += np.log1p(np.minimum(bet, LARGEST_BET / means) * (value - means))
        capital[1] += np.log1p(-np.minimum(bet, LARGEST_BET / (1 - means)) * (value - means))
        held &= capital.max(axis=0) + np.log(0.5) < np.log(1 / level)
        total += value
        squares += (value - total / (number + 1)) ** 2
    if not held.any():  # a mean between two of the grid
        return float(np.mean(values)), float(np.mean(values))
    return max(0.0, float(means[held][0]) - 0.5 / GRID), min(1.0, float(means[held][-1]) + 0.5 / GRID)


def shares_by_group(right: NDArray[np.bool_], groups: Rows) -> Floats:
    """The share of right images in each group, in the order in which the groups come first."""
    _, first, place = np.unique(groups, return_index=True, return_inverse=True)
    shares: Floats = np.bincount(place, weights=right) / np.bincount(place)
    return shares[np.argsort(first)]


def _energy(distances: Floats, of_new: Floats) -> Floats:
    """Energy distance for each column of `of_new` (n, p), which is 1 for the images of one side and 0 for the other."""
    other = 1 - of_new
    counts, others = of_new.sum(axis=0), other.sum(axis=0)
    by_new = distances @ of_new
    between = (other * by_new).sum(axis=0) / (counts * others)
    within = (of_new * by_new).sum(axis=0) / counts**2
    within_others = (other * (distances @ other)).sum(axis=0) / others**2
    found: Floats = 2 * between - within - within_others
    return found


def _one_of_each(groups: Rows, random: np.random.Generator) -> Rows:
    """A random row of each group, in random order."""
    rows: Rows = random.permutation(len(groups))
    chosen: Rows = rows[random.permutation(np.unique(groups[rows], return_index=True)[1])]
    return chosen


def _interval(
    value: float, method: Callable[[Rows, Rows], float], groups: Rows, new_groups: Rows
) -> tuple[float, float]:
    """95% interval of a share that `method` finds from how often each image of both sides counts, (n,) and (m,)."""
    sides = [np.unique(each, return_inverse=True, return_counts=True)[1:] for each in (groups, new_groups)]
    if min(len(sizes) for _, sizes in sides) < 2:
        return 0.0, 1.0

    random = np.random.default_rng(0)
    draws = [random.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), BOOTSTRAPS) for _, sizes in sides]
    values = [
        method(*(times[place] for times, (place, _) in zip(of_draw, sides, strict=True)))
        for of_draw in zip(*draws, strict=True)
    ]
    freedom = min(intervals.Evidence.of("", sizes.astype(float)).effective_groups for _, sizes in sides) - 1
    most = 1 / (1 / len(groups) + 1 / len(new_groups))
    return intervals.wilson(value, float(np.var(values, ddof=1)), most, float(student.ppf(1 - LEVEL / 2, freedom)))


def _importance(sure: Floats, new_sure: Floats) -> Floats:
    """How much more frequent each confidence of `val` (n,) is among the new images: weights (n,) up to `CLIP`."""
    both = np.concatenate([sure, new_sure])
    both = (both - both.mean()) / max(float(both.std()), 1e-12)
    powers = np.stack([both, both**2], axis=1)
    side = np.concatenate([np.zeros(len(sure)), np.ones(len(new_sure))])
    model = LogisticRegression().fit(powers, side)
    ratio = np.exp(model.decision_function(powers[: len(sure)])) * len(sure) / len(new_sure)
    found: Floats = np.clip(ratio, 1 / CLIP, CLIP)
    return found
