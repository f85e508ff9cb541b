"""Simulated coverage: how often the 95% intervals of `classification.report` contain the true value.

The score of an image is ± d / 2 by class, plus a term shared by images of a class in a group, plus noise; the last two
are normal and independent with variances r and 1 - r, so r is the intraclass correlation of the scores (on the probit
scale of the decision). With equal classes and the threshold in the middle, the true recall, accuracy and balanced
accuracy are Φ(d / 2), and the true AUROC is Φ(d / √2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Distribution of simulated prediction tables.

    Attributes:
        groups: number of groups.
        accuracy: true accuracy, which is also the true recall and balanced accuracy.
        correlation: r in the module's docstring.
        mixed: whether groups hold images of both classes, else of alternating single classes.
        shared: correlation, from -1 to 1, of the shared terms of the two classes in a mixed group; at 1, groups differ
            by a shift of all scores.
        images: mean number of images per group.
        uneven: standard deviation of the logarithm of a group's number of images.
        positive: share of images of class 1.
    """

    groups: int
    accuracy: float
    correlation: float
    mixed: bool = False
    shared: float = 0.0
    images: int = 20
    uneven: float = 0.0
    positive: float = 0.5

    @property
    def truth(self) -> dict[str, float]:
        distance = 2 * norm.ppf(self.accuracy)
        auroc = float(norm.cdf(distance / np.sqrt(2)))
        return {
            **dict.fromkeys(("accuracy", "balanced_accuracy", "recall"), self.accuracy),
            "auroc": auroc,
            "sensitivity_at_0.9": float(norm.cdf(distance - norm.ppf(0.9))),
        }

    def table(self, random: np.random.Generator) -> pd.DataFrame:
        sizes = np.full(self.groups, self.images)
        if self.uneven:
            drawn = self.images * np.exp(self.uneven * random.normal(size=self.groups) - self.uneven**2 / 2)
            sizes = np.maximum(1, drawn.round().astype(int))
        group = np.repeat(np.arange(self.groups), sizes)
        if self.mixed:
            labels = (random.random(len(group)) < self.positive).astype(int)
        else:
            labels = (group < round(self.positive * self.groups)).astype(int)
        first, second = random.normal(size=(2, self.groups))
        shared = np.stack([first, self.shared * first + np.sqrt(1 - self.shared**2) * second])[labels, group]
        noise = random.normal(size=len(group))
        scores = (2 * labels - 1) * norm.ppf(self.accuracy)
        scores = scores + np.sqrt(self.correlation) * shared + np.sqrt(1 - self.correlation) * noise
        names = [f"g{i}" for i in group]
        return Predictions.make(range(len(group)), np.full(len(group), -1), names, labels, scores)


@dataclass(frozen=True)
class Coverage:
    """Share of intervals that contain the true value, their mean width, and the share of tables without interval."""

    share: float
    width: float
    withheld: float


def coverage(source: Source, *, tables: int, seed: int = 0, grouped: bool = True) -> dict[str, Coverage]:
    """Return the coverage of each metric with a known true value, over `tables` tables of a source.

    Without `grouped`, groups are hidden from the intervals, as if all images were independent.
    """
    random = np.random.default_rng(seed)
    intervals: dict[str, list[tuple[float, float]]] = {name: [] for name in source.truth}
    for _ in range(tables):
        table = source.table(random)
        found = classification.report(table if grouped else table.assign(group=""))["overall"]
        for name, given in intervals.items():
            if found[name]["low"] is not None:
                given.append((found[name]["low"], found[name]["high"]))
    result = {}
    for name, true in source.truth.items():
        low, high = np.array(intervals[name]).reshape(-1, 2).T
        share = float(np.mean((low <= true) & (true <= high))) if len(low) else float("nan")
        width = float(np.mean(high - low)) if len(low) else float("nan")
        result[name] = Coverage(share, width, 1 - len(low) / tables)
    return result
