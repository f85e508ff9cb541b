"""A logistic regression on the features of a backbone, from which the head starts with `--probe_first` (LP-FT)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from hf_histo.training.pca_probe import require_every_class

Floats = NDArray[np.float64]

INVERSE_PENALTIES = tuple(10.0**power for power in range(-4, 2))


@dataclass(frozen=True)
class Probe:
    """A linear layer on features: logits are x @ weight.T + bias.

    `weight` is (K, d), or (1, d) for two classes, and `bias` (K,) or (1,). `inverse_penalty` is scikit-learn's C, on
    standardized features, and `value` its score.
    """

    weight: Floats
    bias: Floats
    inverse_penalty: float
    value: float


def fit(
    features: Floats, labels: NDArray[Any], *, classes: int, balanced: bool, score: Callable[[Floats, Floats], float]
) -> Probe:
    """Fit a regression for each of `INVERSE_PENALTIES`; return the one with the best score, on a tie the simplest.

    Kumar et al. 2022, "Fine-tuning can distort pretrained features and underperform out-of-distribution", section 4,
    choose the penalty of the probe on validation images, too.

    Args:
        features: features of the training images, (n, d).
        labels: class indices, (n,).
        classes: number of classes.
        balanced: weight the classes equally (scikit-learn's "balanced").
        score: score of a weight and a bias, as in `Probe`, on other images, those of `val`; larger is better.

    Raises HistoError if a class has no image.
    """
    require_every_class(labels, classes)
    mean, deviation = features.mean(0), features.std(0)
    deviation[deviation < 1e-9 * max(deviation.max(), 1e-30)] = np.inf  # constant features get no weight
    standardized = (features - mean) / deviation
    best: Probe | None = None
    for inverse in INVERSE_PENALTIES:
        regression = LogisticRegression(C=inverse, max_iter=5000, class_weight="balanced" if balanced else None)
        regression.fit(standardized, labels)
        weight = regression.coef_ / deviation
        bias = regression.intercept_ - weight @ mean
        value = score(weight, bias)
        if best is None or value > best.value:
            best = Probe(weight, bias, inverse, value)
    assert best is not None
    return best
