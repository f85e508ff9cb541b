"""Classifier two-sample test: how well a classifier separates another split from the training images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions, independent_groups

FOLDS = 5
MOST = 2000  # largest number of images of a side; of more, a random sample is used
EVERY = "(all)"  # label that means all classes together


@dataclass(frozen=True)
class Separation:
    """AUROC with which a classifier separates images of `split` from those of `train`, and its 95% interval.

    `label` is the class of the images on both sides, `train` and `images` are their numbers. All three values are None
    if a side has fewer than `FOLDS` groups; `low` and `high` also if `classification.report` gives no interval.
    """

    split: str
    label: str
    train: int
    images: int
    auroc: float | None
    low: float | None
    high: float | None


def separations(
    features: NDArray[np.float64], table: pd.DataFrame, classes: Sequence[str], *, seed: int = 0
) -> list[Separation]:
    """For each split other than `train` and each of its classes, how well its images can be separated from `train`.

    A classifier two-sample test (Lopez-Paz & Oquab 2017, "Revisiting classifier two-sample tests", sec. 3; the proxy
    A-distance of Ben-David et al. 2010, "A theory of learning from different domains", uses the same error): if both
    sides have the same distribution, no classifier can separate them, and the AUROC is 0.5. The classifier is a
    logistic regression on standardized features, cross-validated in 5 folds of whole groups, so that it can't recognize
    an image by its copy or patient. Groups on both sides are left out. The interval is that of `classification.report`,
    widened by the square root of 1 + k / (k - 1) for k folds, since other training images would give other classifiers
    (Nadeau & Bengio 2003, "Inference for the generalization error", Machine Learning 52:239-281, sec. 3). With all
    classes together, a difference may also be one of class shares.

    Args:
        features: (n, d), of a model that was trained on neither side.
        table: n rows with `split`, `id`, `label` (-1: hidden) and `group` ("": its own group).
        classes: class names.
        seed: seed of the folds, and of the sample if a side has more than `MOST` images.
    """
    groups = independent_groups(table["group"], table["split"] + "/" + table["id"]).to_numpy()
    splits, labels = table["split"].to_numpy(), table["label"].to_numpy()
    random = np.random.default_rng(seed)
    found = []
    for split in [name for name in dict.fromkeys(splits) if name != "train" and "train" in splits]:
        shared = set(groups[splits == "train"]) & set(groups[splits == split])
        free = ~np.isin(groups, list(shared))
        for place, label in enumerate([EVERY, *classes], start=-1):
            of_class = free & ((labels == place) | (label == EVERY))
            sides = [np.flatnonzero(of_class & (splits == side)) for side in ("train", split)]
            if not len(sides[1]):
                continue
            train, images = map(len, sides)
            if min(len(set(groups[rows])) for rows in sides) < FOLDS:
                found.append(Separation(split, label, train, images, None, None, None))
                continue
            rows = np.concatenate([np.sort(random.permutation(side)[:MOST]) for side in sides])
            auroc = cross_validated(features[rows], (splits[rows] == split).astype(int), groups[rows], seed=seed)
            found.append(Separation(split, label, train, images, auroc["value"], auroc["low"], auroc["high"]))
    return found


def cross_validated(
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    groups: NDArray[np.str_],
    *,
    metric: str = "auroc",
    seed: int = 0,
) -> dict[str, float | None]:
    """The "value" of a metric of a logistic regression, with the interval from "low" to "high", as in `separations`.

    Args:
        features: (n, d).
        labels: (n,) classes from 0 to K - 1, each in `FOLDS` groups or more.
        groups: (n,).
        metric: one in [0, 1] of `classification.report`.
        seed: of the folds.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    scores = cross_val_predict(model, features, labels, groups=groups, cv=folds, method="decision_function")
    rows = Predictions.make(range(len(labels)), np.full(len(labels), -1), groups, labels, scores)
    found = classification.report(rows)["overall"][metric]
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if low is None:
        return {"value": value, "low": None, "high": None}
    widening = math.sqrt(1 + FOLDS / (FOLDS - 1))
    return {
        "value": value,
        "low": max(0.0, value - widening * (value - low)),
        "high": min(1.0, value + widening * (high - value)),
    }
