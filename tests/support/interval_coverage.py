"""How often the 95% intervals of `classification.report` hold the true value, by simulation.

A score is ± d / 2 by class, plus what images of a class in a group share, plus noise of its own; the two are normal
and independent, of variance r and 1 - r, so r is the intraclass correlation of the scores (on the probit scale of the
decision). With equal classes, recall, accuracy and balanced accuracy at the threshold midway are then Φ(d / 2), and
the AUROC is Φ(d / √2), exactly, over all groups there could be.
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
    """Of tables of predictions.

    Attributes:
        groups: in a table.
        accuracy: the true one, also the true recall and balanced accuracy.
        correlation: r of the module's text.
        mixed: groups hold images of both classes, else of one, in turn.
        shared: correlation, from -1 to 1, of what a mixed group's images of one and of the other class share; at 1
            groups differ by a shift of all scores.
        images: of a group, on average.
        uneven: deviation of the logarithm of a group's number of images.
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
    """Attributes: `share` of the intervals that hold the true value, their mean `width`, `withheld` share of tables."""

    share: float
    width: float
    withheld: float


def coverage(source: Source, *, tables: int, seed: int = 0, grouped: bool = True) -> dict[str, Coverage]:
    """Return the coverage of each metric whose true value is known, over so many tables of a source.

    Without `grouped`, groups are kept from the intervals, as if each image were independent of all others.
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
