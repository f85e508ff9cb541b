"""Difference in accuracy between two ways to train, on the same images, centers and seeds, with a 95% interval.

Every image is predicted by both sides for every seed. An image's difference is 1 where only the first side is right, -1
where only the second is, and else 0. The estimate is the mean over images of a held-out center, then over centers, then
over seeds. Chance enters twice: other slides (groups) of these centers, and other seeds. The variance is the sum of

- that of other groups, by the jackknife that leaves out one group at a time (`intervals`), of the mean over seeds, and
- that of other seeds, s² / n of the n seeds' estimates,

which is no less than that of both at once, since the two share a part (Cameron, Gelbach & Miller 2011, "Robust
inference with multiway clustering", Journal of Business & Economic Statistics 29:238-249, where it is subtracted). The
quantile is the mean of Student's t for each part, weighted by the parts (Cochran & Cox 1957, "Experimental Designs",
2nd ed., sec. 4.14); Satterthwaite's degrees of freedom gave a coverage of 0.88 with two seeds.
`tests/evaluation/metrics/test_paired.py` simulates the coverage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import intervals
from hf_histo.evaluation.predictions import Predictions, independent_groups


@dataclass(frozen=True)
class Difference:
    """A difference in accuracy, in [-1, 1]; `str` formats it with its sign and interval.

    Attributes:
        value: the estimate.
        low, high: the bounds of its 95% interval; None where a center has fewer than `intervals.MIN_GROUPS` groups, or
            the sides agree on every image.
        seeds: number of seeds; with one, the interval is that of other groups alone, for these two trainings.
    """

    value: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:+.3f}" + ("" if self.low is None else f" ({self.low:+.3f} to {self.high:+.3f})")


def outcomes(predictions: Predictions, threshold: float = 0.5) -> pd.DataFrame:
    """Which labeled images are predicted right: `right` (bool) and `group` (str), by `id`.

    Args:
        predictions: of any number of classes.
        threshold: of the positive probability, in [0, 1], where there are two classes.
    """
    labeled = predictions.labeled
    right = labeled.predicted_classes(threshold) == labeled.labels
    groups = independent_groups(labeled["group"], labeled["id"])
    return pd.DataFrame({"right": right, "group": groups}).set_index(labeled["id"])


def difference(
    ours: Mapping[str, Mapping[int, pd.DataFrame]], theirs: Mapping[str, Mapping[int, pd.DataFrame]]
) -> Difference:
    """Return the accuracy of `ours` minus that of `theirs`; each holds `outcomes` by held-out center, then by seed.

    Raises HistoError where they are not of the same centers, seeds and images, which are the same for every seed.
    """
    if ours.keys() != theirs.keys() or any(ours[center].keys() != theirs[center].keys() for center in ours):
        raise HistoError(
            f"the sides have {_described(ours)} and {_described(theirs)}, expected the same centers and seeds"
        )
    by_image = []  # of each center: a column for each seed
    for center in ours:
        columns: dict[int, pd.Series] = {}
        first = next(iter(ours[center].values()))
        images = first.index.sort_values()
        for seed, table in ours[center].items():
            other = theirs[center][seed]
            found = table.index.sort_values()
            if not found.equals(other.index.sort_values()):
                raise HistoError(f"center {center}, seed {seed}: the sides predict different images, expected the same")
            if not found.equals(images):
                raise HistoError(f"center {center}: seed {seed} has other images than the first, expected the same")
            columns[seed] = table["right"].astype(float) - other["right"].reindex(table.index).astype(float)
        by_image.append(pd.DataFrame(columns).assign(group=first["group"]))
    seeds = list(next(iter(ours.values())))
    by_seed = np.mean([table[seeds].mean() for table in by_image], axis=0)
    value = float(np.mean(by_seed))

    parts, freedoms = [], []
    for table in by_image:
        means = table[seeds].mean(axis=1)
        sums, counts = means.groupby(table["group"]).sum(), means.groupby(table["group"]).size()
        if len(sums) < intervals.MIN_GROUPS:
            return Difference(value, None, None, len(seeds))
        without = (sums.sum() - sums) / (counts.sum() - counts)
        parts.append(intervals.variance(without.to_numpy()) / len(by_image) ** 2)
        freedoms.append(len(sums) - 1)
    if len(seeds) > 1:
        parts.append(float(np.var(by_seed, ddof=1) / len(seeds)))
        freedoms.append(len(seeds) - 1)
    total = sum(parts)
    if not total:
        return Difference(value, None, None, len(seeds))
    quantiles = student.ppf((1 + intervals.CONFIDENCE) / 2, freedoms)
    half = float(np.average(quantiles, weights=parts)) * total**0.5
    return Difference(value, value - half, value + half, len(seeds))


def _described(side: Mapping[str, Mapping[int, pd.DataFrame]]) -> str:
    return ", ".join(f"{center} (seeds {', '.join(map(str, of))})" for center, of in side.items()) or "no center"
