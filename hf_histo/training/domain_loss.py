"""Training that treats acquisition centers as what must not matter: GroupDRO, CORAL and DANN.

Each composes with any loss of `losses.py` and with LoRA; Gulrajani & Lopez-Paz 2021, "In search of lost domain
generalization", is the reason to measure them against plain training before trusting any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


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

    def state(self) -> dict[str, Any]:
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


class DomainClassifier(nn.Module):
    """Learns to tell centers from features, while features learn to leave it no way.

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
    """Keeps what went into the classifier in the last forward pass, (B, d)."""

    def __init__(self, head: nn.Module) -> None:
        self.value: torch.Tensor | None = None
        head.register_forward_pre_hook(self._keep)

    def _keep(self, head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.value = inputs[0]
