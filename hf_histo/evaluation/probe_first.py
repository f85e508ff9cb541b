"""`--probe_first`: the head starts from a linear probe of the backbone's features, then all is trained (LP-FT)."""

from __future__ import annotations

import datasets
import numpy as np
from torch import nn

from hf_histo.evaluation.figures.embedding import features
from hf_histo.evaluation.pca_baseline import score_on, set_head
from hf_histo.training import linear_probe
from hf_histo.transforms.pipeline import Pipeline


def start(
    model: nn.Module,
    data: datasets.DatasetDict,
    pipeline: Pipeline,
    *,
    balanced: bool,
) -> linear_probe.Probe:
    """Set the head of a model, before its training, to a regression on the evaluation views of `train`; return that.

    A new LoRA adapter changes nothing, so that the features are the frozen backbone's; those of `--init_adapter` are
    that adapter's. They are the same in every process of a launch, each of which must call this.

    Args:
        model: has a plain linear head, whose weights are replaced.
        data: schema tables `train` and `val`, whose loss chooses the penalty.
        pipeline: from stored pixels to model input.
        balanced: weight the classes equally.

    Raises HistoError if a class has no training image.
    """
    found = {split: features(model, data[split], pipeline.single_view) for split in ("train", "val")}
    # Whatever chooses the checkpoint: where classes are separated, other metrics are the same for every penalty, and
    # the loss finds the scale of the logits as well.
    score = score_on(found["val"], data["val"]["label"][:], "loss", negative=None)
    probe = linear_probe.fit(
        found["train"],
        np.array(data["train"]["label"][:]),
        classes=len(data["train"].features["label"].names),
        balanced=balanced,
        score=score,
    )
    set_head(model, probe.weight, probe.bias)
    return probe
