"""Sampling of training images that balances labels or centers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler


class BalancedSampler(Sampler[int]):
    """Draws n of n samples with replacement, so that all values are equally likely.

    The order depends only on seed and epoch, so that a resumed run continues it.

    Args:
        values: value of each sample, (n,) integers such as labels or centers; or (n, k), where each row that occurs is
            a value.
        seed: seed of the order.
    """

    def __init__(self, values: ArrayLike, seed: int) -> None:
        _, place, counts = np.unique(values, axis=0, return_inverse=True, return_counts=True)
        self._probabilities = 1 / counts[place] / len(counts)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0; called by the Trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._probabilities)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self._epoch])
        return iter(random.choice(len(self), len(self), p=self._probabilities).tolist())
