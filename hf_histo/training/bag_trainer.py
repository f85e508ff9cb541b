"""Training on bags: one loss for all images of a slide or group, and its gradient in constant memory.

The features of a bag are computed chunk by chunk, and the activations are not kept but computed again for the
gradient, chunk by chunk (`torch.utils.checkpoint`; Chen et al. 2016, "Training deep nets with sublinear memory cost").
So the memory for activations is that of one chunk, whatever the size of a bag, and the gradient that of the whole bag.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from numpy.typing import NDArray
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import EvalPrediction

from hf_histo.data.bags import Bags
from hf_histo.errors import HistoError
from hf_histo.models import heads
from hf_histo.training.losses import shares
from hf_histo.training.sampling import BagSampler, bag_starts
from hf_histo.training.trainer import Trainer
from hf_histo.transforms.pipeline import Batch


class BagTrainer(Trainer):
    """A `Trainer` of a model with a `heads.BagHead`: a batch is whole bags, and labels, loss and metrics are theirs.

    Evaluation computes features in batches of images, and `compute_metrics` is called with the logits of bags, and
    label ids (labels, number of the bag).

    Args:
        training_bags, validation_bags: the bags of the two tables.
        bag_size: most images of a bag in a step.
        chunk_size: images whose activations are in memory at a time.
        options: other arguments of `Trainer`.

    Raises `HistoError` in a launch of several processes or devices.
    """

    def __init__(
        self,
        *,
        training_bags: Bags,
        validation_bags: Bags,
        bag_size: int,
        chunk_size: int,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]],
        **options: Any,  # Any: as for `Trainer`
    ) -> None:
        super().__init__(compute_metrics=self._metrics_of_bags, **options)
        if self.args.world_size > 1 or self.args.n_gpu > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise HistoError(
                "--aggregation trains in one process on one device, and this launch has several; launch without"
            )
        self.training_bags, self.validation_bags = training_bags, validation_bags
        self.bag_size, self.chunk_size = bag_size, chunk_size
        self._metrics = compute_metrics

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of whole bags, see `BagSampler`."""
        balanced = [getattr(self.training_bags, name) for name in self.balanced]
        sampler = BagSampler(
            self.training_bags.rows,
            batch_size=self.args.train_batch_size,
            bag_size=self.bag_size,
            seed=self.args.seed,
            balanced=np.stack(balanced, axis=1) if balanced else None,
        )
        loader: DataLoader[Any] = DataLoaderShard(
            self.train_dataset,
            device=None,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return loader

    def _starts(self, batch: Batch) -> NDArray[np.int64]:
        return bag_starts(batch["index"], self.training_bags.of_row)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> int:
        """The bags of all accumulation steps."""
        return sum(len(self._starts(batch)) for batch in batch_samples)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:  # as in `Trainer`
        """The loss of a training batch of bags."""
        starts = self._starts(inputs)
        labels = inputs["labels"][starts]
        if self.label_smoothing:
            labels = shares(labels, self.classes, self.label_smoothing)
        logits = self._logits(self._features(model, inputs), np.diff(starts, append=len(inputs["index"])).tolist())
        outputs = SimpleNamespace(logits=logits)
        loss = self.loss(outputs, labels, num_items_in_batch)
        self._keep_loss(loss, inputs["index"])
        return (loss, outputs) if return_outputs else loss

    def _training_inputs(self, inputs: Batch) -> Batch:
        """Views are drawn in `_features`, chunk by chunk."""
        return inputs

    def _features(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Features (n, d) float32 of a training batch."""
        count = len(batch["index"])
        parts = [slice(first, first + self.chunk_size) for first in range(0, count, self.chunk_size)]
        chunks = [{name: values[part] for name, values in batch.items()} for part in parts]
        if len(chunks) == 1:
            return self._of_chunk(model, chunks[0])
        return torch.cat([checkpoint(self._of_chunk, model, chunk, use_reentrant=False) for chunk in chunks])

    def _of_chunk(self, model: nn.Module, chunk: Batch) -> torch.Tensor:
        features: torch.Tensor = heads.Features(model)(self.views_of(chunk)).logits
        return features.float()

    def _logits(self, features: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Logits (B, num_outputs) of bags by the features of their images, bag by bag."""
        head = heads.bag_head(self.accelerator.unwrap_model(self.model))
        return torch.stack([head.of_bag(part)[0] for part in features.split(sizes)])

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:  # (loss, logits, labels): transformers declares one tensor of labels, and takes a tuple
        """Features of images in place of logits; without a loss, which is that of bags, see `_metrics_of_bags`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            features = heads.Features(model)(inputs["pixel_values"]).logits.float()
        return None, features, (inputs["labels"], inputs["index"])

    def _metrics_of_bags(self, evaluation: EvalPrediction) -> dict[str, float]:
        bags, rows, device = self.validation_bags, self.validation_bags.rows, self.args.device
        index = evaluation.label_ids[-1]
        features = np.empty_like(evaluation.predictions)
        features[index] = evaluation.predictions
        order = np.concatenate(rows)
        with torch.no_grad():
            logits = self._logits(torch.from_numpy(features[order]).to(device), [len(each) for each in rows])
            loss = self.loss(SimpleNamespace(logits=logits), torch.from_numpy(bags.labels).to(device))
        label_ids: Any = (bags.labels, np.arange(len(bags)))
        given = EvalPrediction(logits.cpu().numpy(), label_ids)
        return {"loss": loss.item(), **self._metrics(given)}
