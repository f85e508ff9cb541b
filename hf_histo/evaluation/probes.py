"""Classifiers on frozen features: the class mean nearest by, the nearest neighbors, and a linear one.

They train in a moment, so that one pass of the backbone over a data set serves every shot and seed. Features are
scaled to length 1, so that distances are angles, as is usual for embeddings.
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
SOFTENED = 0.01  # votes that every class gets, so that the logarithm of none is finite


def prototype(train: Floats, labels: Labels, val: Floats, val_labels: Labels, test: Floats) -> Floats:
    """Scores (n, K) of the images `test`: minus the squared distance to the mean of each class's training features.

    Snell et al. 2017, "Prototypical networks for few-shot learning", eq. 1 and 2. Nothing is chosen on `val`.
    """
    means = np.stack([unit(train)[labels == label].mean(axis=0) for label in np.unique(labels)])
    scores: Floats = -np.square(unit(test)[:, None] - means[None]).sum(axis=-1)
    return scores


def knn(train: Floats, labels: Labels, val: Floats, val_labels: Labels, test: Floats) -> Floats:
    """Scores (n, K): logarithms of the votes of the nearest training images.

    How many vote is chosen on `val`, up to the number of images of the smallest class, the fewest of equals.
    """
    allowed = [count for count in NEIGHBORS if count <= max(1, np.bincount(labels).min())]
    model = _best([KNeighborsClassifier(count).fit(unit(train), labels) for count in allowed], unit(val), val_labels)
    scores: Floats = np.log(model.predict_proba(unit(test)) * model.n_neighbors + SOFTENED)
    return scores


def linear(train: Floats, labels: Labels, val: Floats, val_labels: Labels, test: Floats) -> Floats:
    """Scores (n, K): log-probabilities of a logistic regression, its penalty chosen on `val`, the stronger of equals.

    Classes weigh alike. As CLIP is probed in Radford et al. 2021, sec. A.3, on features of length 1.
    """
    models = [LogisticRegression(C=c, class_weight="balanced", max_iter=2000) for c in INVERSE_PENALTIES]
    model = _best([model.fit(unit(train), labels) for model in models], unit(val), val_labels)
    return np.asarray(model.predict_log_proba(unit(test)))


PROBES: dict[str, Callable[[Floats, Labels, Floats, Labels, Floats], Floats]] = dict(
    zip(NAMES, (prototype, knn, linear), strict=True)
)


def trainable(name: str, width: int, classes: int) -> int:
    """Parameters of a probe on `width` features; only the linear one has any."""
    return (width + 1) * classes if name == "linear" else 0


def unit(features: Floats) -> Floats:
    """Rows (n, d) scaled to length 1."""
    scaled: Floats = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return scaled


def _best(models: list[Any], val: Floats, labels: Labels) -> Any:
    return max(models, key=lambda model: np.mean(model.predict(val) == labels))  # the first of equals
