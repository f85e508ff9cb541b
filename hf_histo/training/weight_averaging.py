"""Averages of the trained weights over the updates of a run, which are validated and saved in place of the last ones.

They cost nothing at prediction time. Training continues with the last weights, which a checkpoint keeps beside the
average. With tracked batch norm, the running statistics are averaged as well, as by
`torch.optim.swa_utils.AveragedModel(use_buffers=True)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_histo.config import TrainingOptions
from hf_histo.models import batchnorm

LAST = "last_weights.safetensors"  # in a checkpoint whose weights are an average: those that training continues with


class WeightAverage(TrainerCallback):
    """The average of the trained weights after each update, however many steps an update accumulates.

    Args:
        model: the model to train, not sharded.
        decay: of an exponential moving average (EMA), in [0, 1); None is the mean of all updates, the dense average of
            Cha et al. 2021, "SWAD: Domain generalization by seeking flat minima", section 3.2. (SWAD finds start and
            end from the validation loss; here `start` is given, and the choice of the checkpoint is the end.)
        start: share of the updates before the first one that counts, in [0, 1).
        batch_norm: "frozen" or "track"; with "track", its statistics are averaged as well.

    The decay of early updates is lower, at most n / (9 + n) for the n-th, as in TensorFlow's
    `ExponentialMovingAverage(num_updates=...)`: else the first weights would count for as many updates as 1 / (1 -
    decay).
    """

    def __init__(self, model: nn.Module, *, decay: float | None, start: float, batch_norm: str) -> None:
        self.model = model
        self.decay = decay
        self.start = start
        self.batch_norm = batch_norm
        self.average: dict[str, torch.Tensor] | None = None

    @classmethod
    def of(cls, options: TrainingOptions, model: nn.Module, batch_norm: str) -> WeightAverage | None:
        """The average that the options ask for, or None."""
        kinds = {"ema": (options.ema_decay, 0.0), "dense": (None, options.averaging_start)}
        if options.weight_averaging not in kinds:
            return None
        decay, start = kinds[options.weight_averaging]
        return cls(model, decay=decay, start=start, batch_norm=batch_norm)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the weights after an update; transformers calls this once per update, before it evaluates or saves."""
        count = state.global_step - int(self.start * state.max_steps)
        if count > 0:
            self.add(count)

    def add(self, count: int) -> None:
        """Count the present weights as the `count`-th of the average, from 1."""
        weights = self._weights()
        if self.average is None:
            self.average = _copies(weights)
            return
        decay = 1 - 1 / count if self.decay is None else min(self.decay, count / (9 + count))
        get_ema_multi_avg_fn(decay)(list(self.average.values()), list(weights.values()), count)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the model has the average, if there is one yet; afterwards the last weights, unchanged."""
        if self.average is None:
            yield
            return
        last = _copies(self._weights())
        self._set(self.average)
        try:
            yield
        finally:
            self._set(last)

    def save(self, checkpoint: Path) -> None:
        """Write the last weights into a checkpoint, which holds the average, if there is one yet."""
        if self.average is not None:
            last = {name: weight.cpu().contiguous() for name, weight in _copies(self._weights()).items()}
            save_file(last, checkpoint / LAST)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint whose weights were loaded into the model."""
        if (checkpoint / LAST).is_file():
            self.average = _copies(self._weights())
            self._set(load_file(checkpoint / LAST))

    def _weights(self) -> dict[str, torch.Tensor]:
        """Trained parameters and batch-norm statistics of the model by name: not copies."""
        weights = {name: weight.detach() for name, weight in self.model.named_parameters() if weight.requires_grad}
        if self.batch_norm == "track":
            for name, layer in batchnorm.layers(self.model).items():
                for buffer in ("running_mean", "running_var"):
                    weights[f"{name}.{buffer}"] = getattr(layer, buffer)
        return weights

    def _set(self, weights: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self._weights().items():
                weight.copy_(weights[name])


def _copies(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}
