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
from hf_histo.evaluation.predictions import Predictions

FOLDS = 5
MOST = 2000  # images of a side, drawn where there are more
EVERY = "(all)"  # stands for all classes together


@dataclass(frozen=True)
class Separation:
    """AUROC, with its 95% interval, that separates images of `split` from `train` images, both of class `label`.

    None where a side has less than `FOLDS` groups; the interval alone, where `classification.report` has none.
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
    """For each split beside `train`, and each class in it: how well its images are separated from those of `train`.

    A classifier two-sample test (Lopez-Paz & Oquab 2017, "Revisiting classifier two-sample tests", sec. 3; the proxy
    A-distance of Ben-David et al. 2010, "A theory of learning from different domains", is made of the same error): if
    both sides came from one source, no classifier could separate them and its AUROC would be 0.5. Here, logistic
    regression on standardized features, in 5 folds of whole groups, so that it can't know an image by its copy or its
    patient. Groups on both sides are left out. The interval is that of `classification.report`, wider by the square
    root of 1 + k / (k - 1) for k folds, since other training images would give other classifiers (Nadeau & Bengio 2003,
    "Inference for the generalization error", Machine Learning 52:239-281, sec. 3). Over all classes, a difference may
    also be that of their shares.

    Args:
        features: (n, d), of a model that was trained on neither side.
        table: n rows with `split`, `id`, `label` (-1: hidden) and `group` ("": alone).
        classes: their names.
        seed: of the folds, and of the draw where a side has more than `MOST` images.
    """
    own = "\0" + table["split"] + "/" + table["id"]
    groups = table["group"].where(table["group"] != "", own).to_numpy()
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
            auroc = _told_apart(features[rows], splits[rows] == split, groups[rows], seed)
            found.append(Separation(split, label, train, images, auroc["value"], auroc["low"], auroc["high"]))
    return found


def _told_apart(
    features: NDArray[np.float64], side: NDArray[np.bool_], groups: NDArray[np.str_], seed: int
) -> dict[str, float | None]:
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    scores = cross_val_predict(model, features, side, groups=groups, cv=folds, method="decision_function")
    rows = Predictions.make(range(len(side)), np.full(len(side), -1), groups, side.astype(int), scores)
    auroc = classification.report(rows)["overall"]["auroc"]
    value, low, high = (auroc[key] for key in ("value", "low", "high"))
    if low is None:
        return {"value": value, "low": None, "high": None}
    widening = math.sqrt(1 + FOLDS / (FOLDS - 1))
    return {
        "value": value,
        "low": max(0.0, value - widening * (value - low)),
        "high": min(1.0, value + widening * (high - value)),
    }
