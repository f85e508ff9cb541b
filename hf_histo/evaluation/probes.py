"""Probes, i.e. classifiers on frozen features: nearest class mean, k nearest neighbors, and logistic regression.

They are fitted quickly, so the features of a data set are computed once for all numbers of shots and seeds. Features
are scaled to length 1, so that distances depend on angles only, as is usual for embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hf_histo.config.experiments import PROBES as NAMES

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

NEIGHBORS = (1, 3, 5, 9, 15)
INVERSE_PENALTIES = tuple(10.0**power for power in range(-2, 6))
SOFTENED = 0.01  # pseudo-votes added to each class, so that its logarithm is finite without votes


def prototype(train: Floats, labels: Labels, val: Floats, val_labels: Labels, test: Floats) -> Floats:
    """Scores (n, K) of the features `test`: minus the squared distance to the mean of each class's training features.

    Snell et al. 2017, "Prototypical networks for few-shot learning", eq. 1 and 2. `val` is not used.
    """
    means = np.stack([unit(train)[labels == label].mean(axis=0) for label in np.unique(labels)])
    scores: Floats = -np.square(unit(test)[:, None] - means[None]).sum(axis=-1)
    return scores


def knn(train: Floats, labels: Labels, val: Floats, val_labels: Labels, test: Floats) -> Floats:
    """Scores (n, K) of the features `test`: logarithms of the votes of the k nearest training images.

    k is chosen on `val` (the smallest on a tie), up to the number of training images of the smallest class.
    """
    allowed = [count for count in NEIGHBORS if count <= max(1, np.bincount(labels).min())]
    model = _best([KNeighborsClassifier(count).fit(unit(train), labels) for count in allowed], unit(val), val_labels)
    scores: Floats = np.log(model.predict_proba(unit(test)) * model.n_neighbors + SOFTENED)
    return scores


def linear(train: Floats, labels: Labels, val: Floats, val_labels: Labels, test: Floats) -> Floats:
    """Scores (n, K) of the features `test`: log-probabilities of a logistic regression with equal class weights.

    Its penalty is chosen on `val` (the stronger on a tie). As in the linear probes of Radford et al. 2021, sec. A.3,
    but on features of length 1.
    """
    models = [LogisticRegression(C=c, class_weight="balanced", max_iter=2000) for c in INVERSE_PENALTIES]
    model = _best([model.fit(unit(train), labels) for model in models], unit(val), val_labels)
    return np.asarray(model.predict_log_proba(unit(test)))


PROBES: dict[str, Callable[[Floats, Labels, Floats, Labels, Floats], Floats]] = dict(
    zip(NAMES, (prototype, knn, linear), strict=True)
)


def trainable(name: str, width: int, classes: int) -> int:
    """Number of trainable parameters of a probe on `width` features; 0 except for the linear one."""
    return (width + 1) * classes if name == "linear" else 0


def unit(features: Floats) -> Floats:
    """Rows (n, d) scaled to length 1."""
    scaled: Floats = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return scaled


def _best(models: list[Any], val: Floats, labels: Labels) -> Any:
    return max(models, key=lambda model: np.mean(model.predict(val) == labels))  # the first of equals
