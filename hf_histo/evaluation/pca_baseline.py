"""Baseline without gradient training: `--method pca` sets the head to a regression on principal components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

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
    found = {
        split: features(model, rows, pipeline.single_view)
        for split, rows in data.items()
        if not split.endswith("_clean")
    }

    def score(probe: pca_probe.Probe) -> float:
        logits = found["val"] @ probe.weight.T + probe.bias
        value = classification.of_logits(logits, data["val"]["label"], negative=negative)[metric]
        assert value is not None
        return -value if metric == "loss" else value

    names = data["train"].features["label"].names
    labels = np.array(data["train"]["label"])
    probe = pca_probe.fit(found["train"], labels, classes=len(names), balanced=balanced, score=score)
    parts = heads.module_of(model).modules()  # the frozen original and the copy that is saved
    (head,) = (part for part in parts if isinstance(part, nn.Linear) and part.weight.requires_grad)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(probe.weight))
        head.bias.copy_(torch.from_numpy(probe.bias))
    every = [(split, [*names, "hidden"][label]) for split in found for label in data[split]["label"]]
    splits, classes = zip(*every, strict=True)
    embedding_map(
        {"frozen backbone": np.concatenate(list(found.values()))}, {"class": classes, "split": splits}, figure
    )
    return {"value": abs(probe.value), "step": None, "components": probe.components}
