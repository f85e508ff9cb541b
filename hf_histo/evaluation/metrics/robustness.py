"""Do features know the center rather than the class, and what does a classifier lose by that?

The robustness index and the average performance drop of Kömen et al. 2025, "Towards robust foundation models for
digital pathology" (PathoROB, arXiv 2507.17845), on a run's own images instead of the article's benchmark, and how well
the center is found from the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations, product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from hf_histo.evaluation.metrics.two_sample_test import FOLDS, cross_validated
from hf_histo.evaluation.predictions import independent_groups

FEWEST = 20  # images of a class at a center, for the two to take part
MOST = 250  # of more, a random sample is used
NEIGHBORS = (1, 3, 5, 7, 9, 11, 21, 31, 41, 51)  # the start of the article's list, which is for larger sets
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of Cramér's V between class and center in training
REPETITIONS = 5
INVERSE_PENALTIES = (1e-4, 1e-2, 1.0)

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """The robustness index of two centers.

    Attributes:
        centers: their numbers.
        classes: numbers of the classes with `FEWEST` images or more at both, at least two; the most frequent first.
        images: number of images: as many of each class at each center.
        neighbors: number of nearest neighbors that are counted.
        index: the index, in [0, 1]; None if no neighbor counts.
    """

    centers: tuple[int, int]
    classes: tuple[int, ...]
    images: int
    neighbors: int
    index: float | None


@dataclass(frozen=True)
class Drop:
    """What a classifier loses where class and center go together in its training images.

    Attributes:
        centers: numbers of the two centers.
        classes: numbers of the two classes.
        levels: Cramér's V between class and center in training, from 0 to 1.
        balanced_accuracy: its mean at each level, on images where class and center are independent.
        average_performance_drop: mean, over the levels above 0 and the repetitions, of the accuracy there divided by
            that at 0, minus 1: 0 for features that don't know the center, negative for others.
    """

    centers: tuple[int, int]
    classes: tuple[int, int]
    levels: tuple[float, ...]
    balanced_accuracy: tuple[float, ...]
    average_performance_drop: float


@dataclass(frozen=True)
class _Rows:
    """Standardized features (n, d) of images, with label, center and group of each, (n,)."""

    features: NDArray[np.float64]
    labels: NDArray[np.int64]
    centers: NDArray[np.int64]
    groups: NDArray[np.str_]

    def at(self, places: Places) -> _Rows:
        return _Rows(self.features[places], self.labels[places], self.centers[places], self.groups[places])

    def cell(self, label: int, center: int) -> Places:
        """Places of the images of a class at a center."""
        return np.flatnonzero((self.labels == label) & (self.centers == center))


def known(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Which of n rows, (n,), have a label and a center (-1: hidden, unknown)."""
    return ((table["label"] >= 0) & (table["center"] >= 0)).to_numpy()


def robustness(features: NDArray[np.float64], table: pd.DataFrame, *, seed: int = 0) -> dict[str, Any]:  # Any: JSON
    """Robustness of features to the center, as metrics.json holds it.

    Args:
        features: (n, d), finite.
        table: n rows with `label`, `center` and `group` ("": its own group), all `known`.
        seed: of samples and folds.

    Returns:
        "index": mean of `Pair.index` over "pairs" of centers. "center": "value", "low" and "high" of the balanced
        accuracy with which a classifier finds the center, as `cross_validated` has them, and that by "chance". "drop":
        a `Drop`, of the centers and classes with the most images. What can't be measured is None; if that is all,
        "reason" states why.
    """
    table = table.reset_index(drop=True)
    rows = _Rows(
        StandardScaler().fit_transform(features) if len(features) else features,
        table["label"].to_numpy(),
        table["center"].to_numpy(),
        independent_groups(table["group"], table.index.to_series().astype(str)).to_numpy(dtype=str),
    )
    random = np.random.default_rng(seed)
    shared = {pair: _shared(rows, pair) for pair in combinations(np.unique(rows.centers).tolist(), 2)}
    shared = {pair: counts for pair, counts in shared.items() if len(counts) > 1}
    if not shared:
        reason = f"expected two centers with at least {FEWEST} labeled images of two classes each"
        return {"reason": reason, "index": None, "pairs": [], "center": None, "drop": None}
    pairs = [_pair(rows, pair, tuple(counts), random) for pair, counts in shared.items()]
    indices = [pair.index for pair in pairs if pair.index is not None]
    largest = max(pairs, key=lambda pair: shared[pair.centers][pair.classes[1]])
    drop = _drop(rows, largest.centers, largest.classes[:2], random)
    return {
        "reason": None,
        "index": float(np.mean(indices)) if indices else None,
        "pairs": [asdict(pair) for pair in pairs],
        "center": _center(rows, sorted({center for pair in shared for center in pair}), random, seed),
        "drop": None if drop is None else asdict(drop),
    }


def robustness_index(
    neighbors: Sequence[Places], labels: NDArray[np.int64], centers: NDArray[np.int64]
) -> float | None:
    """Robustness index: whether neighbors share the class (1) or the center (0).

    Of the neighbors that share exactly one of the two, the share that has the class: ΣSO / (ΣSO + ΣOS), where S is the
    same and O another one, of the class and then of the center (Kömen et al. 2025, "Robustness index").

    Args:
        neighbors: for each of n images, places of its nearest neighbors.
        labels: (n,) classes.
        centers: (n,) centers.

    Returns None if no neighbor shares exactly one.
    """
    class_alone = center_alone = 0
    for place, near in enumerate(neighbors):
        same_class, same_center = labels[near] == labels[place], centers[near] == centers[place]
        class_alone += int((same_class & ~same_center).sum())
        center_alone += int((~same_class & same_center).sum())
    counted = class_alone + center_alone
    return class_alone / counted if counted else None


def _shared(rows: _Rows, pair: tuple[int, int]) -> dict[int, int]:
    """The classes with enough images at both centers, with the smaller of the two numbers; the most frequent first."""
    counts = {int(label): min(len(rows.cell(label, at)) for at in pair) for label in np.unique(rows.labels)}
    return {
        label: counts[label] for label in sorted(counts, key=lambda label: -counts[label]) if counts[label] >= FEWEST
    }


def _sample(cells: Sequence[Places], random: np.random.Generator) -> Places:
    """As many places of each cell, drawn, at most `MOST`; sorted."""
    size = min(MOST, *map(len, cells))
    return np.sort(np.concatenate([random.permutation(cell)[:size] for cell in cells]))


def _pair(rows: _Rows, pair: tuple[int, int], classes: tuple[int, ...], random: np.random.Generator) -> Pair:
    """The index over the number of neighbors by which the class is found best, as in the article.

    Neighbors of the image's own group do not count.
    """
    rows = rows.at(_sample([rows.cell(label, at) for label, at in product(classes, pair)], random))
    nearest = NearestNeighbors(n_neighbors=len(rows.labels) - 1).fit(rows.features).kneighbors(return_distance=False)
    neighbors = [near[rows.groups[near] != group] for near, group in zip(nearest, rows.groups, strict=True)]
    accuracies = {}
    for count in [count for count in NEIGHBORS if count <= max(1, min(map(len, neighbors)))]:
        votes = np.array([[(rows.labels[near[:count]] == label).sum() for label in classes] for near in neighbors])
        found = np.array(classes)[votes.argmax(axis=1)]
        accuracies[count] = balanced_accuracy_score(rows.labels, found)
    best = max(accuracies, key=lambda count: accuracies[count])  # the first of equals
    index = robustness_index([near[:best] for near in neighbors], rows.labels, rows.centers)
    return Pair(pair, classes, len(rows.labels), best, index)


def _center(rows: _Rows, centers: Sequence[int], random: np.random.Generator, seed: int) -> dict[str, float | None]:
    """How well the center is found, on as many images of each class at each center: the class is no help."""
    cells = [[rows.cell(label, at) for at in centers] for label in np.unique(rows.labels)]
    rows = rows.at(np.concatenate([_sample(of_class, random) for of_class in cells]))
    chance: dict[str, float | None] = {"chance": 1 / len(centers)}
    if any(len(set(rows.groups[rows.centers == at])) < FOLDS for at in centers):
        return {"value": None, "low": None, "high": None} | chance
    numbers = np.searchsorted(centers, rows.centers)
    return cross_validated(rows.features, numbers, rows.groups, metric="balanced_accuracy", seed=seed) | chance


def _drop(rows: _Rows, pair: tuple[int, int], classes: tuple[int, ...], random: np.random.Generator) -> Drop | None:
    """The average performance drop (Kömen et al. 2025, "Average performance drop"); None with too few groups."""
    first, second = classes
    accuracies = []
    for _ in range(REPETITIONS):
        train, validation, test = (
            [
                random.permutation(np.flatnonzero(part & (rows.labels == label) & (rows.centers == at)))
                for label, at in product((first, second), pair)
            ]
            for part in _parts(rows, pair, random)
        )
        if not all(map(len, (*train, *validation, *test))):
            return None
        tested = _correlated(test, 0.0)
        accuracies.append(
            [_accuracy(rows, _correlated(train, level), _correlated(validation, level), tested) for level in LEVELS]
        )
    found = np.array(accuracies)  # (repetitions, levels)
    drop = float((found[:, 1:] / found[:, :1]).mean() - 1)
    return Drop(pair, (first, second), LEVELS, tuple(found.mean(axis=0).tolist()), drop)


def _parts(rows: _Rows, pair: tuple[int, int], random: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Half of the groups of each center to train on, a quarter to choose the penalty on, and a quarter to test on.

    A group of both centers is in one part, with the images of both.
    """
    chosen: tuple[list[str], list[str], list[str]] = ([], [], [])
    for at in pair:
        names = random.permutation(np.setdiff1d(rows.groups[rows.centers == at], [*chain(*chosen)]))
        for part, some in zip(chosen, np.split(names, [len(names) // 2, 3 * len(names) // 4]), strict=True):
            part.extend(some)
    return [np.isin(rows.groups, part) for part in chosen]


def _correlated(cells: Sequence[Places], level: float) -> Places:
    """Images of two classes at two centers with a Cramér's V of `level` between class and center.

    Each class has the share (1 + V) / 2 of its images at its own center, and the number of images is that of level 0.

    Args:
        cells: the first class at its own center and at the other, the second class at the other and at its own.
        level: V, in [0, 1].
    """
    size = min(MOST, *map(len, cells))
    own = round(size * (1 + level) / 2)
    return np.concatenate([cell[:count] for cell, count in zip(cells, (own, size - own, size - own, own), strict=True)])


def _accuracy(rows: _Rows, train: Places, validation: Places, test: Places) -> float:
    """Balanced accuracy on `test` of a logistic regression, its penalty chosen on `validation`, as in the article."""

    def score(model: LogisticRegression, places: Places) -> float:
        return float(balanced_accuracy_score(rows.labels[places], model.predict(rows.features[places])))

    models = [
        LogisticRegression(C=penalty, max_iter=1000).fit(rows.features[train], rows.labels[train])
        for penalty in INVERSE_PENALTIES
    ]
    return score(max(models, key=lambda model: score(model, validation)), test)
