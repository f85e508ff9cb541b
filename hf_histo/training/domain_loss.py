"""Losses over acquisition centers, for a model that does not depend on them: GroupDRO, CORAL and DANN.

Each is a `DomainLoss`, made by `build`, and composes with any loss of `losses.py` and with LoRA; Gulrajani & Lopez-Paz
2021, "In search of lost domain generalization", is the reason to measure them against plain training before trusting
any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_callback import ExportableState

from hf_histo.models import heads
from hf_histo.training.losses import Loss


@dataclass(frozen=True)
class Step:
    """A training step of one batch, as a domain loss sees it.

    Attributes:
        loss: of the batch as plain training takes it, a scalar that is `share` of an update's.
        logits: (B, outputs).
        labels, centers: int64 (B,).
        share: of the update that spans accumulation steps and processes; 1 where it is this batch alone.
        progress: share of training that is done, in [0, 1].
        loss_of: the loss of plain training, as a mean over a batch where it is not given the number of items.
    """

    loss: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    centers: torch.Tensor
    share: torch.Tensor | float
    progress: float
    loss_of: Loss


class DomainLoss(Protocol):
    """Changes the objective of a training step by the centers in its batch.

    Attributes:
        classifier: what it trains beside the model, a part of checkpoints but not of the adapter; or None.
    """

    @property
    def classifier(self) -> nn.Module | None: ...

    def objective(self, step: Step) -> torch.Tensor:
        """The scalar that the step minimizes in place of `step.loss`."""


def build(name: str, weight: float, model: nn.Module, centers: Sequence[int]) -> DomainLoss | None:
    """The domain loss of that name ("group_dro", "coral" or "dann"); None for "none".

    Args:
        name: of the loss.
        weight: of the CORAL or DANN penalty; for GroupDRO, its step size times 100.
        model: that is trained; the input of its head is what CORAL and DANN call features.
        centers: of the training set, one per image.
    """
    if name == "none":
        return None
    if name == "group_dro":
        return GroupDRO(centers, 0.01 * weight)
    head = heads.module_of(model)
    features = HeadInput(head)
    if name == "coral":
        return Coral(features, weight)
    width = next(part.in_features for part in head.modules() if isinstance(part, nn.Linear))
    return DomainAdversarial(features, DomainClassifier(width, centers), weight)


class GroupDRO(TrainerCallback, ExportableState):
    """Weights of the centers in the loss, raised where the loss is high.

    Sagawa et al. 2020, "Distributionally robust neural networks for group shifts", algorithm 1: q_g is multiplied by
    exp(step x loss_g) and normalized, and the objective is the sum of q_g loss_g. A callback, so that the weights are
    part of a checkpoint.

    Args:
        centers: of the training set.
        step: the paper's eta, where it is 0.01.
        weights: of the centers in their order, summing to 1; None is uniform.
    """

    def __init__(self, centers: Sequence[int], step: float = 0.01, weights: Sequence[float] | None = None) -> None:
        self.centers = sorted(set(centers))
        self.step = step
        self.weights = list(weights or [1 / len(self.centers)] * len(self.centers))

    @property
    def classifier(self) -> None:
        """It trains nothing beside the model."""

    def objective(self, step: Step) -> torch.Tensor:
        means = {}
        for center in step.centers.unique().tolist():
            chosen = step.centers == center
            means[center] = step.loss_of(ImageClassifierOutput(logits=step.logits[chosen]), step.labels[chosen])
        return step.share * self(means)

    def state(self) -> dict[str, Any]:  # Any: what transformers writes to trainer_state.json
        return {
            "args": {"centers": self.centers, "step": self.step, "weights": self.weights},
            "attributes": {},
        }

    def __call__(self, losses: dict[int, torch.Tensor]) -> torch.Tensor:
        """The objective of a batch from the mean loss of each center in it; moves the weights.

        The weights follow the mean over the processes of a launch, so that they are the same in each.
        """
        device = next(iter(losses.values())).device
        found = torch.zeros(2, len(self.centers), device=device)
        for place, center in enumerate(self.centers):
            if center in losses:
                found[:, place] = torch.stack([losses[center].detach().float(), torch.ones((), device=device)])
        found = reduce(found, "sum")
        raised = torch.tensor(self.weights, device=device) * torch.exp(self.step * found[0] / found[1].clamp(min=1))
        self.weights = (raised / raised.sum()).tolist()
        # Scaled by their number: with equal weights it is then the mean over centers, as without GroupDRO.
        return torch.stack([self.weights[self.centers.index(c)] * loss for c, loss in losses.items()]).sum() * (
            len(self.centers) / len(losses)
        )


class Coral:
    """The loss plus `weight` times `coral` of the features."""

    classifier = None

    def __init__(self, features: HeadInput, weight: float) -> None:
        self.features = features
        self.weight = weight

    def objective(self, step: Step) -> torch.Tensor:
        return step.loss + step.share * self.weight * coral(self.features.last, step.centers)


def coral(features: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """How far apart the centers are in feature space: features (B, d), centers (B,) int64, to a scalar.

    Mean over pairs of centers with at least two images of the mean squared difference of means plus that of
    covariances: Sun & Saenko 2016, "Deep CORAL", with the means as in Koh et al. 2021, "WILDS". 0 without a pair.
    """
    moments = [
        (part.mean(0), torch.cov(part.T).reshape(-1))
        for part in (features[centers == center].float() for center in centers.unique())
        if len(part) > 1
    ]
    distances = [
        sum(((a - b) ** 2).mean() for a, b in zip(one, other, strict=True)) for one, other in combinations(moments, 2)
    ]
    return torch.stack(distances).mean() if distances else features.sum() * 0  # type: ignore[arg-type]


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -strength."""

    @staticmethod
    def forward(context: Any, features: torch.Tensor, strength: float) -> torch.Tensor:
        context.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -context.strength * gradient, None


class DomainAdversarial:
    """The loss plus `weight` times that of a `DomainClassifier` on the features."""

    def __init__(self, features: HeadInput, classifier: DomainClassifier, weight: float) -> None:
        self.features = features
        self.classifier = classifier
        self.weight = weight

    def objective(self, step: Step) -> torch.Tensor:
        penalty: torch.Tensor = self.classifier(self.features.last, step.centers, step.progress)
        return step.loss + step.share * self.weight * penalty


class DomainClassifier(nn.Module):
    """Learns to distinguish centers by their features, while the features learn to make that impossible.

    Ganin et al. 2016, "Domain-adversarial training of neural networks", JMLR 17(59): a gradient that is reversed below
    this classifier, by a strength of 2 / (1 + exp(-10 p)) - 1 at the share p of training (section 5.2.2). The hidden
    layer has 100 units, as in the paper's network for MNIST. It belongs to training, not to the model.

    Args:
        width: of the features.
        centers: of the training set.
    """

    centers: torch.Tensor

    def __init__(self, width: int, centers: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 100), nn.ReLU(), nn.Linear(100, len(set(centers))))
        self.register_buffer("centers", torch.tensor(sorted(set(centers))))
        for parameter in self.parameters():  # no part of what is wrapped for several processes, so it averages itself
            parameter.register_hook(lambda gradient: reduce(gradient, "mean"))

    def forward(self, features: torch.Tensor, centers: torch.Tensor, progress: float) -> torch.Tensor:
        """Mean cross entropy of the centers (B,) int64 given features (B, width), at a share in [0, 1] of training."""
        strength = 2 / (1 + math.exp(-10 * progress)) - 1
        logits = self.layers(_Reverse.apply(features.float(), strength))
        return F.cross_entropy(logits, torch.searchsorted(self.centers, centers))


class HeadInput:
    """Keeps the input of a head, the features (B, d), as `last` in every forward pass."""

    last: torch.Tensor

    def __init__(self, head: nn.Module) -> None:
        head.register_forward_pre_hook(self._keep)

    def _keep(self, head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.last = inputs[0]
