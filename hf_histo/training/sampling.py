"""Sampling of training images that balances labels or centers, and of whole bags of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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


class FollowEpochs(TrainerCallback):
    """Sets the epoch of a sampler: accelerate does not where several processes resume within an epoch."""

    def __init__(self, sampler: BalancedSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))


class BagSampler(Sampler[list[int]]):
    """Batches of rows of whole bags, or of as many rows of each as are drawn; the rows of a bag are in rising order.

    An epoch has each bag once. Order and draws depend on seed, epoch and bag alone, so that a resumed run continues
    them.

    Args:
        rows: the rows of each bag.
        batch_size: bags in a batch.
        bag_size: most rows of a bag, drawn without replacement.
        seed: seed of order and draws.
        balanced: value of each bag, (B,) or (B, k), which are drawn equally often instead, see `BalancedSampler`.
    """

    def __init__(
        self,
        rows: Sequence[NDArray[np.int64]],
        *,
        batch_size: int,
        bag_size: int,
        seed: int,
        balanced: ArrayLike | None = None,
    ) -> None:
        self._rows, self._batch_size, self._bag_size, self._seed = rows, batch_size, bag_size, seed
        self._balanced = None if balanced is None else BalancedSampler(balanced, seed)
        self._epoch = 0

    @property
    def sampler(self) -> BagSampler:
        """Itself, whose epoch accelerate sets, where a resumed run skips batches."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0; called by the Trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self._balanced is None:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._rows)).tolist()
        else:
            self._balanced.set_epoch(self._epoch)
            order = list(self._balanced)
        for first in range(0, len(order), self._batch_size):
            drawn = [self._drawn(bag) for bag in order[first : first + self._batch_size]]
            yield np.concatenate(drawn).tolist()

    def _drawn(self, bag: int) -> NDArray[np.int64]:
        rows = self._rows[bag]
        if len(rows) <= self._bag_size:
            return rows
        return np.sort(np.random.default_rng([self._seed, self._epoch, bag]).choice(rows, self._bag_size, False))


def bag_starts(index: NDArray[np.int64], of_row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places (B,) in a batch of `BagSampler` at which its bags start.

    `index` (n,) are the rows of the batch, and `of_row` is the bag of each row of the table. A bag may be drawn twice
    in a row, and rows rise within one.
    """
    is_start = (np.diff(of_row[index]) != 0) | (np.diff(index) <= 0)
    return np.concatenate([[0], np.flatnonzero(is_start) + 1])
