"""Baseline without gradient training: logistic regression on principal components of a frozen backbone's features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from hf_histo.errors import HistoError

Floats = NDArray[np.float64]

COMPONENTS = (2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Probe:
    """A linear layer on features: logits are x @ weight.T + bias.

    `weight` is (K, d), or (1, d) for two classes, and `bias` (K,) or (1,). They combine whitening by `components`
    principal components with the regression on these. `value` is its score.
    """

    weight: Floats
    bias: Floats
    components: int
    value: float


def fit(
    features: Floats, labels: NDArray[Any], *, classes: int, balanced: bool, score: Callable[[Probe], float]
) -> Probe:
    """Fit regressions on 2, 4, 8, ... components; return the one with the best `score`, on a tie the smallest.

    Of two images there is one component.

    Components and regression (L2, C = 1) are fitted on the same features.

    Args:
        features: features of the training images, (n, d), n and d at least 2.
        labels: class indices, (n,).
        classes: number of classes.
        balanced: weight the classes equally (scikit-learn's "balanced").
        score: score of a probe on other images, those of the validation split; larger is better.

    Raises HistoError if a class has no image, and for features that are all equal.
    """
    require_every_class(labels, classes)
    analysis = PCA(min(COMPONENTS[-1], *features.shape), random_state=0).fit(features)
    variances = analysis.explained_variance_
    real = variances > 1e-9 * variances[0]  # with few images, or copies, the last components are rounding errors
    to_components = analysis.components_[real] / np.sqrt(variances[real])[:, None]
    scores = (features - analysis.mean_) @ to_components.T
    if not len(to_components):
        raise HistoError("the features of all training images are equal, expected different ones; add other images")
    best: Probe | None = None
    for count in [count for count in COMPONENTS if count <= len(to_components)] or [len(to_components)]:
        regression = LogisticRegression(max_iter=5000, class_weight="balanced" if balanced else None)
        regression.fit(scores[:, :count], labels)
        weight = regression.coef_ @ to_components[:count]
        probe = Probe(weight, regression.intercept_ - weight @ analysis.mean_, count, 0.0)
        probe = Probe(probe.weight, probe.bias, count, score(probe))
        if best is None or probe.value > best.value:
            best = probe
    assert best is not None
    return best


def require_every_class(labels: NDArray[Any], classes: int) -> None:
    """Raise `HistoError` unless there are labels (n,) of all classes."""
    present = np.unique(labels)
    if len(present) < classes:
        raise HistoError(f"training labels are {present.tolist()}, expected images of all {classes} classes; add some")
