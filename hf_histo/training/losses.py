"""Losses in the form that `transformers.Trainer` calls: `loss(outputs, labels, num_items_in_batch)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hf_histo.errors import HistoError

Loss = Callable[..., torch.Tensor]


def classification(num_outputs: int, class_weights: Sequence[float] | None = None) -> Loss:
    """Create a loss: binary cross entropy with logits for one output, cross entropy for several.

    Args:
        num_outputs: logits per image, 1 or the number of classes.
        class_weights: factor of each class's loss. Binary: (1, pos_weight), as in `BCEWithLogitsLoss`.

    The returned function takes outputs with `.logits` (B, num_outputs) and labels (B,) int64, of which -1 (hidden) is
    ignored; or `shares` of each class (B, K), K being 2 for one output. The sum over images is divided by
    `num_items_in_batch` (all images of an update, over accumulation steps and processes) or, if that is None, by the
    number of labeled images in the batch.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        if labels.ndim == 2:
            return _of_shares(outputs.logits.float(), labels, class_weights, num_items_in_batch)
        # Hidden labels are weighted, not selected: a selection waits for the device to count them.
        labeled, logits = labels >= 0, outputs.logits.float()
        weights = None if class_weights is None else torch.tensor(class_weights, device=logits.device)
        if num_outputs == 1:
            total = F.binary_cross_entropy_with_logits(
                logits[:, 0],
                labels.clamp(min=0).to(logits),
                weight=labeled.to(logits),
                pos_weight=None if weights is None else weights[1],
                reduction="sum",
            )
        else:
            total = F.cross_entropy(logits, labels, weight=weights, ignore_index=-1, reduction="sum")
        return total / (labeled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    return loss


def _of_shares(
    logits: torch.Tensor,
    shares: torch.Tensor,
    class_weights: Sequence[float] | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """As `classification`, with class shares (B, K): cross entropy as torch's, for one logit as well."""
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)  # the softmax over these is the sigmoid
    weights = None if class_weights is None else torch.tensor(class_weights, device=logits.device)
    total = F.cross_entropy(logits, shares, weight=weights, reduction="sum")
    return total / (shares.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def shares(labels: torch.Tensor, classes: int, smoothing: float = 0.0) -> torch.Tensor:
    """Share of each class (B, K) float32 in labels (B,) int64; for -1 (hidden) all are 0.

    With label smoothing, a share `smoothing` in [0, 1) is spread evenly over all classes: Szegedy et al. 2016,
    "Rethinking the Inception architecture for computer vision", section 7.
    """
    certain = labels[:, None] == torch.arange(classes, device=labels.device)
    return certain * (1 - smoothing) + (labels >= 0)[:, None] * (smoothing / classes)


def only(labels: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Labels (B,), or `shares` (B, K), of the images that are `chosen`, bool (B,); those of the others are hidden."""
    return torch.where(chosen, labels, -1) if labels.ndim == 1 else labels * chosen[:, None]


def balancing_weights(labels: Sequence[int], label_names: Sequence[str]) -> list[float]:
    """Class weights that give every class the same total weight in the training set.

    Binary: (1, negatives / positives), the `pos_weight` of BCE-with-logits. K classes: n / (K n_k), scikit-learn's
    "balanced". Hidden labels (-1) do not count. Raises `HistoError` if a class has no image.
    """
    known = np.asarray(labels)
    counts = np.bincount(known[known >= 0], minlength=len(label_names))
    if not counts.all():
        missing = label_names[int(np.argmin(counts))]
        raise HistoError(f"class {missing!r} has no training image, so it can't be learned; counts: {counts.tolist()}")
    if len(counts) == 2:
        return [1.0, counts[0] / counts[1]]
    weights: list[float] = (counts.sum() / (len(counts) * counts)).tolist()
    return weights
