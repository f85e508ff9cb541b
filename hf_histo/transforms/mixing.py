"""MixUp and CutMix of a training batch, within each center: images, and the share that each keeps of itself.

Zhang et al. 2018, "mixup: Beyond empirical risk minimization"; Yun et al. 2019, "CutMix: Regularization strategy to
train strong classifiers with localizable features". Images of different centers are not mixed, since that would blend
their colors. The parameters of an image depend only on (seed, epoch, sample), but for its partner, which is one of the
others of its center in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv

from hf_histo.transforms.augmentation import uniform

CHANCE_OF_CUTMIX = 0.5  # where both are on, as `switch_prob` of timm


@dataclass(frozen=True)
class Mixing:
    """What is mixed: each share is drawn from Beta(alpha, alpha); 0 is off. With both on, an image gets one of them."""

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    @property
    def is_none(self) -> bool:
        """Whether nothing is mixed."""
        return self == UNMIXED

    def __call__(
        self, views: torch.Tensor, centers: NDArray[np.int64], *, seed: int, epoch: int, index: NDArray[np.int64]
    ) -> tuple[torch.Tensor, NDArray[np.int64], NDArray[np.float32]]:
        """Mix each view of (B, 3, H, W) with one other of its center in the batch, if there is one.

        Args:
            views: the batch, float.
            centers: center of each view, (B,); those of unknown center, -1, are mixed with each other.
            seed, epoch: determine the parameters together with `index`.
            index: index of each sample in the data set, (B,) int64.

        Returns:
            The mixed views, the row of each one's partner (B,), its own without any, and the share in [0, 1] that it
            keeps of itself (B,), which is its label's share as well.
        """
        # Epochs beyond any real one give a random stream that differs from those of augmentation and stain mixing.
        draws = uniform(seed, 2**33 + epoch, index, 5).T
        height, width = views.shape[-2:]
        cuts = draws[0] < (CHANCE_OF_CUTMIX if self.mixup_alpha else 1.0) * (self.cutmix_alpha > 0)
        alpha = np.where(cuts, self.cutmix_alpha, self.mixup_alpha)
        own = betaincinv(alpha, alpha, draws[1])
        # A box whose area is the partner's share, cut at the border: equation 2 of CutMix, and torchvision's rounding.
        radius = 0.5 * np.sqrt(1 - own)
        top, bottom = _span(draws[3], radius, height)
        left, right = _span(draws[4], radius, width)
        own = np.where(cuts, 1 - (bottom - top) * (right - left) / (height * width), own).astype(np.float32)
        across, down = np.arange(width), np.arange(height)
        rows = (down >= top[:, None]) & (down < bottom[:, None]) & cuts[:, None]
        columns = (across >= left[:, None]) & (across < right[:, None])
        of_partner = torch.from_numpy(rows).to(views.device)[:, None, :, None]
        of_partner = of_partner & torch.from_numpy(columns).to(views.device)[:, None, None, :]
        elsewhere = np.where(cuts, 1, own).astype(np.float32)
        kept = torch.from_numpy(elsewhere).to(views)[:, None, None, None] * ~of_partner
        partners = _partners(centers, draws[2])
        mixed = torch.lerp(views[torch.from_numpy(partners).to(views.device)], views, kept)
        return mixed.contiguous(memory_format=torch.channels_last), partners, own


UNMIXED = Mixing()


def _span(draw: NDArray[np.float64], radius: NDArray[np.float64], size: int) -> tuple[NDArray[np.int64], ...]:
    """First and last + 1 of the pixels, of `size`, that are within `radius`, a share of it, of a random one."""
    middle, reach = np.floor(draw * size), np.floor(radius * size)
    return tuple(np.clip(edge, 0, size).astype(np.int64) for edge in (middle - reach, middle + reach))


def _partners(centers: NDArray[np.int64], draw: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each row, a random other row of the same center, or the row itself if there is none."""
    same = (centers[:, None] == centers) & ~np.eye(len(centers), dtype=bool)
    counts = same.sum(1)
    chosen = (np.cumsum(same, axis=1) > np.floor(draw * counts)[:, None]).argmax(1)
    partners: NDArray[np.int64] = np.where(counts > 0, chosen, np.arange(len(centers)))
    return partners
