"""Simulated sites: the confidence of a model on images in groups, whether it is right, and what ATC predicts there.

The confidence of an image is |x|, x normal with mean 0; its deviation differs between groups by a log-normal factor.
The model is right with the probability that its confidence states, 1 / (1 + exp(-|x|)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_histo.evaluation.site_acceptance import predicted_accuracies

Floats = NDArray[np.float64]
LARGE = 400_000  # images of what stands for the whole population


@dataclass(frozen=True)
class SimulatedSite:
    """Groups of `images` images each; `sharpness` scales the confidence, `spread` is its log-deviation over groups."""

    groups: int
    images: int
    sharpness: float = 3.0
    spread: float = 0.3

    def draw(self, random: np.random.Generator) -> tuple[Floats, NDArray[np.bool_], NDArray[np.int64]]:
        """Confidence, whether it is right, and group of each image."""
        groups = np.repeat(np.arange(self.groups), self.images)
        deviations = self.sharpness * np.exp(self.spread * random.normal(size=self.groups))
        sure = np.abs(random.normal(size=len(groups)) * deviations[groups])
        return sure, random.random(len(groups)) < _right(sure), groups

    def population(self, random: np.random.Generator) -> Floats:
        return SimulatedSite(LARGE, 1, self.sharpness, self.spread).draw(random)[0]


def atc_coverage(validation: SimulatedSite, new: SimulatedSite, *, draws: int) -> tuple[float, float]:
    """How often ATC's interval has what ATC predicts from both populations, and its width over ±1.96 deviations."""
    random = np.random.default_rng(0)
    known = validation.population(random)
    truth = (new.population(random) >= np.quantile(known, 1 - _right(known).mean())).mean()
    found = []
    for _ in range(draws):
        of_new, _, new_groups = new.draw(random)
        found.append(predicted_accuracies(*validation.draw(random), of_new, new_groups)["atc"])
    inside = [estimate.low <= truth <= estimate.high for estimate in found]
    width = np.mean([estimate.high - estimate.low for estimate in found])
    return float(np.mean(inside)), float(width / (2 * 1.96 * np.std([estimate.value for estimate in found])))


def _right(sure: Floats) -> Floats:
    probability: Floats = 1 / (1 + np.exp(-sure))
    return probability
