"""Domain generalization losses, with acquisition centers as domains: GroupDRO, CORAL and DANN.

Each is a `DomainLoss`, created by `build`, and can be combined with any loss in `losses.py` and with LoRA. Compare them
with plain training first: Gulrajani & Lopez-Paz 2021, "In search of lost domain generalization", find no consistent
gain.
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
from hf_histo.models.heads import HeadInput
from hf_histo.training.losses import Loss, only


@dataclass(frozen=True)
class Step:
    """Input of a domain loss: a training step on one batch.

    Attributes:
        loss: scalar loss of plain training for this batch; the contribution of `share` to the update's loss.
        logits: (B, outputs).
        labels: int64 (B,), or the share of each class (B, K), see `losses.shares`.
        centers: int64 (B,).
        share: share of this batch in the update, which may span accumulation steps and processes; 1 for a single one.
        progress: share of training that is done, in [0, 1].
        loss_of: loss function of plain training; without the number of items, it is the mean over a batch.
    """

    loss: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    centers: torch.Tensor
    share: torch.Tensor | float
    progress: float
    loss_of: Loss


class DomainLoss(Protocol):
    """A training objective that depends on the centers in a batch.

    Attributes:
        classifier: module that it trains besides the model, saved in checkpoints but not in the adapter; or None.
    """

    @property
    def classifier(self) -> nn.Module | None: ...

    def objective(self, step: Step) -> torch.Tensor:
        """Scalar that is minimized in place of `step.loss`."""


def build(name: str, weight: float, model: nn.Module, centers: Sequence[int]) -> DomainLoss | None:
    """Create a domain loss.

    Args:
        name: "group_dro", "coral", "dann" or "none", which returns None.
        weight: weight of the CORAL or DANN penalty; for GroupDRO, its step size times 100.
        model: the model to train; the input of its head is the features of CORAL and DANN.
        centers: center of each training image.
    """
    if name == "none":
        return None
    if name == "group_dro":
        return GroupDRO(centers, 0.01 * weight)
    head = heads.module_of(model)
    features = HeadInput(head)
    if name == "coral":
        return Coral(features, weight, centers)
    width = next(part.in_features for part in head.modules() if isinstance(part, nn.Linear))
    return DomainAdversarial(features, DomainClassifier(width, centers), weight)


class GroupDRO(TrainerCallback, ExportableState):
    """GroupDRO: weights centers in the loss, and raises the weights of centers with a high loss.

    Sagawa et al. 2020, "Distributionally robust neural networks for group shifts", algorithm 1: the weight q_g is
    multiplied by exp(step x loss_g) and normalized, and the objective is the sum of q_g loss_g. It is a callback so
    that its weights are saved in checkpoints.

    Args:
        centers: center of each training image.
        step: step size, eta in the paper, which uses 0.01.
        weights: initial weights of the sorted centers, summing to 1; None is uniform.
    """

    def __init__(self, centers: Sequence[int], step: float, weights: Sequence[float] | None = None) -> None:
        self.centers = sorted(set(centers))
        self.step = step
        self.weights = torch.tensor(weights or [1 / len(self.centers)] * len(self.centers))

    @property
    def classifier(self) -> None:
        """None: it trains nothing besides the model."""

    def objective(self, step: Step) -> torch.Tensor:
        members = [step.centers == center for center in self.centers]
        outputs = ImageClassifierOutput(logits=step.logits)
        losses = [step.loss_of(outputs, only(step.labels, chosen)) for chosen in members]
        return step.share * self(torch.stack(losses), torch.stack(members).any(1))

    def state(self) -> dict[str, Any]:  # Any: what transformers writes to trainer_state.json
        return {
            "args": {"centers": self.centers, "step": self.step, "weights": self.weights.tolist()},
            "attributes": {},
        }

    def __call__(self, losses: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Objective of a batch; updates the weights.

        The update uses the mean over all processes of a launch, so that weights are the same in each.

        Args:
            losses: mean loss (G,) of each of `centers` in the batch.
            present: bool (G,), the centers that have images in the batch; the losses of others do not count.
        """
        counted = present.to(losses.dtype)
        found = reduce(torch.stack([losses.detach() * counted, counted]).float(), "sum")
        raised = self.weights.to(losses.device) * torch.exp(self.step * found[0] / found[1].clamp(min=1))
        self.weights = raised / raised.sum()
        # Scaled by the number of centers: with equal weights, this is the mean over centers, as without GroupDRO.
        return (self.weights * counted * losses).sum() * (len(self.centers) / counted.sum())


class Coral:
    """Deep CORAL: the loss plus `weight` times `coral` of the features."""

    classifier = None

    def __init__(self, features: HeadInput, weight: float, centers: Sequence[int]) -> None:
        self.features = features
        self.weight = weight
        self.centers = sorted(set(centers))

    def objective(self, step: Step) -> torch.Tensor:
        members = torch.stack([step.centers == center for center in self.centers])
        return step.loss + step.share * self.weight * coral(self.features.last, members)


def coral(features: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Scalar distance between centers in feature space.

    The mean squared difference of feature means plus that of covariances, averaged over pairs of centers with at least
    two images each; 0 without such a pair. Sun & Saenko 2016, "Deep CORAL"; the difference of means is added as in Koh
    et al. 2021, "WILDS".

    Args:
        features: (B, d) of a batch.
        members: bool (G, B), the images of each center.
    """
    features, counts = features.float(), members.sum(1)
    moments = []
    for chosen, count in zip(members.to(features), counts, strict=True):
        mean = chosen @ features / count.clamp(min=1)
        deviations = (features - mean) * chosen[:, None]
        moments.append((mean, deviations.T @ deviations / (count - 1).clamp(min=1)))
    distances, pairs = features.sum() * 0, features.new_zeros(())
    for one, other in combinations(range(len(members)), 2):
        distance = sum(((a - b) ** 2).mean() for a, b in zip(moments[one], moments[other], strict=True))
        counted = ((counts[one] > 1) & (counts[other] > 1)).to(features)
        distances, pairs = distances + counted * distance, pairs + counted
    return distances / pairs.clamp(min=1)


class _Reverse(torch.autograd.Function):
    """Gradient reversal: the identity, whose gradient is multiplied by -strength."""

    @staticmethod
    def forward(context: Any, features: torch.Tensor, strength: float) -> torch.Tensor:
        context.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -context.strength * gradient, None


class DomainAdversarial:
    """DANN: the loss plus `weight` times the loss of a `DomainClassifier` on the features."""

    def __init__(self, features: HeadInput, classifier: DomainClassifier, weight: float) -> None:
        self.features = features
        self.classifier = classifier
        self.weight = weight

    def objective(self, step: Step) -> torch.Tensor:
        penalty: torch.Tensor = self.classifier(self.features.last, step.centers, step.progress)
        return step.loss + step.share * self.weight * penalty


class DomainClassifier(nn.Module):
    """Classifier of centers from features, with gradient reversal: the features learn not to identify the center.

    Ganin et al. 2016, "Domain-adversarial training of neural networks", JMLR 17(59). The gradient to the features is
    multiplied by -(2 / (1 + exp(-10 p)) - 1), where p is the share of training that is done (section 5.2.2). The hidden
    layer has 100 units, as in the paper's network for MNIST. It is used in training only.

    Args:
        width: number of features.
        centers: center of each training image.
    """

    centers: torch.Tensor

    def __init__(self, width: int, centers: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 100), nn.ReLU(), nn.Linear(100, len(set(centers))))
        self.register_buffer("centers", torch.tensor(sorted(set(centers))))
        for parameter in self.parameters():  # not wrapped by DDP, so it averages its gradients itself
            parameter.register_hook(lambda gradient: reduce(gradient, "mean"))

    def forward(self, features: torch.Tensor, centers: torch.Tensor, progress: float) -> torch.Tensor:
        """Mean cross entropy of centers (B,) int64 from features (B, width); `progress` of training is in [0, 1]."""
        strength = 2 / (1 + math.exp(-10 * progress)) - 1
        logits = self.layers(_Reverse.apply(features.float(), strength))
        return F.cross_entropy(logits, torch.searchsorted(self.centers, centers))
