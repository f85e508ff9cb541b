"""Baseline without gradient training: `--method pca` sets the head to a regression on principal components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_histo.data.splits import leakage
from hf_histo.evaluation.figures.embedding import embedding_map, features
from hf_histo.evaluation.metrics import classification
from hf_histo.models import heads
from hf_histo.training import pca_probe
from hf_histo.transforms.pipeline import Pipeline


def fit(
    model: nn.Module,
    data: datasets.DatasetDict,
    pipeline: Pipeline,
    *,
    metric: str,
    negative: int | None,
    balanced: bool,
    figure: Path,
) -> dict[str, Any]:
    """Set the head to the regression that is best on `val`, and draw the features of all splits.

    Args:
        model: has a plain linear head, whose weights are replaced.
        data: schema tables by split; the regression is fitted on `train`.
        pipeline: from stored pixels to model input.
        metric: metric of `classification.of_logits` that selects the number of components on `val`; it must be defined
            there.
        negative: see `classification.of_logits`.
        balanced: weight the classes equally.
        figure: path of the PNG, which shows the first two components.

    Returns "selection" of metrics.json: the "value" of the metric, "step" None, and the number of "components".
    """
    found = {split: features(model, data[split], pipeline.single_view) for split in leakage.whole(data)}

    score = score_on(found["val"], data["val"]["label"][:], metric, negative)
    names = data["train"].features["label"].names
    labels = np.array(data["train"]["label"][:])
    probe = pca_probe.fit(
        found["train"],
        labels,
        classes=len(names),
        balanced=balanced,
        score=lambda probe: score(probe.weight, probe.bias),
    )
    set_head(model, probe.weight, probe.bias)
    every = [(split, [*names, "hidden"][label]) for split in found for label in data[split]["label"][:]]
    splits, classes = zip(*every, strict=True)
    embedding_map(
        {"frozen backbone": np.concatenate(list(found.values()))}, {"class": classes, "split": splits}, figure
    )
    return {"value": abs(probe.value), "step": None, "components": probe.components}


def score_on(
    features: NDArray[np.float64], labels: Sequence[int], metric: str, negative: int | None
) -> Callable[[NDArray[np.float64], NDArray[np.float64]], float]:
    """A score of a linear layer, by weight and bias: a metric of its logits on `features` (n, d); larger is better.

    `metric` is one of `classification.of_logits`, defined for these labels; of the loss, it is the negative.
    """

    def score(weight: NDArray[np.float64], bias: NDArray[np.float64]) -> float:
        value = classification.of_logits(features @ weight.T + bias, labels, negative=negative)[metric]
        assert value is not None
        return -value if metric == "loss" else value

    return score


def set_head(model: nn.Module, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
    """Give the trained linear head of a model another weight and bias."""
    parts = heads.module_of(model).modules()  # the frozen original and the copy that is saved
    (head,) = (part for part in parts if isinstance(part, nn.Linear) and part.weight.requires_grad)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
