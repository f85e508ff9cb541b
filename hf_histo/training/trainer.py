"""A `transformers.Trainer` for uint8 batches, which a `Pipeline` turns into views on the training device."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import transformers
from accelerate.data_loader import DataLoaderShard
from numpy.typing import NDArray
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    SchedulerType,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from hf_histo import launch
from hf_histo.config import Config
from hf_histo.data.readers.streaming import Stream
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.files import CHECKSUMS, write_json
from hf_histo.models import adapters, heads
from hf_histo.models.speed.activation_cut import Store
from hf_histo.training import domain_loss as domain_losses
from hf_histo.training import run_folder, trackers
from hf_histo.training.losses import Loss, shares
from hf_histo.training.preemption import StopAtCheckpoint
from hf_histo.training.progress import Progress
from hf_histo.training.sampling import BalancedSampler, FollowEpochs
from hf_histo.training.weight_averaging import WeightAverage
from hf_histo.transforms.pipeline import Batch, Pipeline, collate

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}
# Steps on an accelerator after which losses are checked, at the latest: a check in each step would make it wait.
UNCHECKED = 50
DOMAIN_CLASSIFIER = "domain_classifier.safetensors"  # in a checkpoint, not in an adapter


@dataclass(frozen=True)
class Stored:
    """Cached activations of all training and validation images, which the model takes instead of pixels."""

    training: Store
    validation: Store


class _Loss(NamedTuple):
    """Loss of a batch, with the rows of the batch in the training table, its step from 1, and its epoch."""

    value: torch.Tensor
    rows: NDArray[np.int64]
    step: int
    epoch: float | None


class Trainer(transformers.Trainer):
    """`transformers.Trainer` for the batches of `collate`, which it turns into views on the training device.

    Evaluation returns the label ids as (labels, index), so that predictions can be matched to samples by `index`.

    Args:
        model: the model to train.
        loss: loss of a batch, see `losses.classification`.
        pipeline: from stored pixels to a view; its normalizer has statistics of all training and validation centers.
        domain_loss: name of a domain loss, see `domain_loss.build`, or "none".
        domain_weight: weight of the domain loss, see `domain_loss.build`.
        balanced: columns of the training table, "labels" or "centers" or both, whose values are drawn equally often.
        training_views: number of views of an image, which epochs cycle through; None draws a new one in each epoch.
        batch_norm: "frozen" or "track"; with "track", its statistics are part of a checkpoint.
        label_smoothing: share of each training label that is spread over all classes, in [0, 1).
        lora_plus_ratio: learning rate of LoRA's matrices B over that of its matrices A, at least 1; see
            `create_optimizer`.
        average: average of the trained weights, which is evaluated and saved in their place; None for the last weights.
        options: other arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss: Loss,
        pipeline: Pipeline,
        batch_norm: str,
        domain_loss: str = "none",
        domain_weight: float = 1.0,
        balanced: Sequence[str] = (),
        training_views: int | None = None,
        label_smoothing: float = 0.0,
        lora_plus_ratio: float = 1.0,
        average: WeightAverage | None = None,
        **options: Any,  # Any: whatever transformers takes
    ) -> None:
        super().__init__(model=model, compute_loss_func=loss, **options)
        self.pipeline = pipeline
        self.balanced = balanced
        self.training_views = training_views
        self.label_smoothing = label_smoothing
        self.lora_plus_ratio = lora_plus_ratio
        self.stored: Stored | None = None
        self._unchecked: list[_Loss] = []
        self._checked_after = 1 if self.args.device.type == "cpu" else UNCHECKED
        self.loss = loss
        self.classes = heads.number_of_classes(model)
        self.batch_norm = batch_norm
        self.stop = StopAtCheckpoint(self.accelerator)
        self.add_callback(self.stop)
        if average is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise HistoError(
                    "--weight_averaging needs the whole model in each process, and this launch divides it (FSDP or "
                    "DeepSpeed); leave the option out, or launch without"
                )
            self.add_callback(average)
        self.average = average
        if self.pop_callback(ProgressCallback) is not None:  # neither in a notebook, nor if bars are turned off
            self.add_callback(Progress())
        # FSDP shards a model in place.
        self._unsharded = copy.deepcopy(model) if self.is_fsdp_enabled else None
        # After the base class has set the seed, by which a domain classifier is initialized.
        centers = self._training_table().centers if domain_loss != "none" else []
        self.domain_loss = domain_losses.build(domain_loss, domain_weight, model, centers)
        if isinstance(self.domain_loss, TrainerCallback):  # so that checkpoints hold its state
            self.add_callback(self.domain_loss)
        if self.domain_loss is not None and self.domain_loss.classifier is not None:
            self.domain_loss.classifier.to(self.args.device)

    @property
    def _domain_classifier(self) -> nn.Module | None:
        return None if self.domain_loss is None else self.domain_loss.classifier

    def train(self, *args: Any, **kwargs: Any) -> Any:  # Any: as transformers declares it
        """Train as `transformers.Trainer` does; SIGTERM and Ctrl-C save a checkpoint and raise `Interrupted`.

        Raises `HistoError` if the loss is NaN or infinite, and writes the ids of that batch to `run_folder.NAN_BATCH`;
        and for a checkpoint that holds more than tensors and numbers, which would have to be unpickled.
        """
        try:
            with self.stop.listening():
                return super().train(*args, **kwargs)
        except UnpicklingError as error:
            raise HistoError(
                f"--output_dir {self.args.output_dir}: its last checkpoint holds more than tensors and numbers, or is "
                f"damaged ({' '.join(str(error).split())[:200]}); delete that checkpoint"
            ) from None
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Progress):
                    callback.close()
                elif isinstance(callback, trackers.Tracker):
                    callback.close(self.args, self.state, self.control)

    def _with_average(self) -> AbstractContextManager[None]:
        """Within the block, the model has the average of its weights, if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # Any: as transformers declares it
        """Evaluate as `transformers.Trainer` does, during training with the average of the weights."""
        with self._with_average():
            return super().evaluate(*args, **kwargs)

    def _load_best_model(self) -> None:
        """Load the best checkpoint; transformers would use the last weights if the best ones are missing."""
        best = Path(self._best_checkpoint())
        if not best.is_dir() or (best / CHECKSUMS).is_file():
            run_folder.require_intact(best)
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()
        self.average = None  # training is over, and the weights are an average

    def _best_checkpoint(self) -> str:
        """Its path, by its step: the recorded one is wrong if the folder of the run was moved."""
        return str(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}")

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:  # Any: as transformers declares it
        """An epoch, unless a resumed run had been ended by early stopping, which transformers forgets."""
        stopping = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        if any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in stopping):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_callback_state(self) -> None:
        """Restore the state of callbacks in place; transformers would replace them by new objects."""
        super()._load_callback_state()
        if self.state.best_global_step:  # of a folder that was moved, transformers drops it
            self.state.best_model_checkpoint = self._best_checkpoint()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, domain_losses.GroupDRO):
                self.domain_loss = callback

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        inputs = super()._prepare_inputs(inputs)
        if self.model is not None and self.model.training:
            return self._training_inputs(inputs)
        if self.stored is None:
            pixel_values = self.pixel_values(inputs, None)
        else:
            pixel_values = self.stored.validation.read(0, inputs["index"]).to(self.args.device)
        # Gathered from all processes, as the labels are.
        inputs["index"] = torch.from_numpy(inputs["index"]).to(self.args.device)
        return {"pixel_values": pixel_values, **inputs}

    def _training_inputs(self, inputs: Batch) -> Batch:
        """A training batch with its views, and with smoothed or mixed labels if the options ask for them."""
        pixel_values, labels = self._with_soft_labels(self.views_of(inputs), inputs, int(self.state.epoch or 0))
        return {"pixel_values": pixel_values, **inputs, "labels": labels}

    def views_of(self, batch: Batch) -> torch.Tensor:
        """Training views of a batch in this epoch, or their cached activations."""
        epoch = int(self.state.epoch or 0)
        view = epoch % self.training_views if self.training_views else epoch
        if self.stored is None:
            return self.pixel_values(batch, view)
        store = self.stored.training
        return store.read(view % store.views, batch["index"]).to(self.args.device)

    def _with_soft_labels(
        self, pixel_values: torch.Tensor, batch: Batch, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed training views, and their labels (B,), or the share of each class (B, K) in smoothed or mixed ones."""
        labels, mixing = batch["labels"], self.pipeline.mixing
        if self.label_smoothing or not mixing.is_none:
            labels = shares(labels, self.classes, self.label_smoothing)
        if not mixing.is_none:
            pixel_values, partners, own = self.pipeline.mixed(pixel_values, batch, epoch)
            of_partner = labels[torch.from_numpy(partners).to(labels.device)]
            labels = torch.lerp(of_partner, labels, torch.from_numpy(own).to(labels)[:, None])
        return pixel_values, labels

    def pixel_values(self, batch: Batch, view: int | None) -> torch.Tensor:
        """Input of the model: the training view number `view`, or for None the evaluation view."""
        return self.pipeline.evaluate(batch) if view is None else self.pipeline.train(batch, view)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:  # the loss, or a tuple of loss and outputs, as in transformers
        centers, labels, index = inputs["center"], inputs["labels"], inputs["index"]
        inputs = {name: inputs[name] for name in ("pixel_values", "labels")}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.domain_loss is not None and model.training:
            images = len(labels) * self.accelerator.num_processes
            step = domain_losses.Step(
                loss=loss,
                logits=outputs.logits,
                labels=labels,
                centers=torch.from_numpy(centers).to(self.args.device),
                share=1.0 if num_items_in_batch is None else images / num_items_in_batch,
                progress=self.state.global_step / max(1, self.state.max_steps),
                loss_of=self.loss,
            )
            loss = self.domain_loss.objective(step)
        if model.training:
            self._keep_loss(loss, index)
        return (loss, outputs) if return_outputs else loss

    def _keep_loss(self, loss: torch.Tensor, index: NDArray[np.int64]) -> None:
        """Keep the loss of a batch of rows `index` until it is checked, at once on a CPU."""
        self._unchecked.append(_Loss(loss.detach(), index, self.state.global_step + 1, self.state.epoch))
        if len(self._unchecked) >= self._checked_after:
            self._check_losses()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:  # Any: as declared by transformers
        """Check the losses before anything is logged, evaluated or saved; transformers calls this after each step."""
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._check_losses()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _check_losses(self) -> None:
        """Raise `HistoError` for the first loss since the last check that is NaN or infinite."""
        unchecked, self._unchecked = self._unchecked, []
        if unchecked:
            finite = torch.isfinite(torch.stack([each.value for each in unchecked])).tolist()
            for each in itertools.compress(unchecked, np.logical_not(finite)):
                self._refuse(each)

    def _refuse(self, at: _Loss) -> NoReturn:
        assert isinstance(self.train_dataset, ImageTable | Stream)
        file, loss, step = Path(str(self.args.output_dir)) / run_folder.NAN_BATCH, at.value.item(), at.step
        ids = self.train_dataset.ids(at.rows.tolist())
        found = {"loss": str(loss), "step": step, "epoch": at.epoch, "process": self.args.process_index}
        write_json(file, found | {"ids": ids})
        raise HistoError(
            f"the loss is {loss} at step {step}, expected a finite number; look at the {len(ids)} images with the ids "
            f"in {file}, or lower --learning_rate from {self.args.learning_rate:g}"
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in transformers; a `Stream` is not distributed again, since it yields the part of this process."""
        if not isinstance(self.train_dataset, Stream):
            loader: DataLoader[Any] = super().get_train_dataloader()
        else:
            loader = DataLoaderShard(
                self.train_dataset,
                device=self.args.device,
                batch_size=self.args.per_device_train_batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )
        return loader

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        if not self.balanced:
            return super()._get_train_sampler(train_dataset)
        values = np.stack([getattr(self._training_table(), name) for name in self.balanced], axis=1)
        sampler = BalancedSampler(values, self.args.seed)
        self.add_callback(FollowEpochs(sampler))
        return sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers, or LoRA+ if `lora_plus_ratio` is above 1.

        Hayou et al. 2024, "LoRA+: Efficient low rank adaptation of large models". As in the authors' code and peft's,
        parameters with one dimension, such as the bias of the head, learn as fast as the matrices B.
        """
        if self.optimizer is None and self.lora_plus_ratio > 1:
            assert self.optimizer_cls_and_kwargs is not None
            kind, settings = self.optimizer_cls_and_kwargs
            adapted: Any = self.model if model is None else model  # FSDP wraps what peft declares
            self.optimizer = create_loraplus_optimizer(
                adapted,
                kind,
                loraplus_lr_ratio=self.lora_plus_ratio,
                loraplus_weight_decay=settings["weight_decay"],
                **{name: value for name, value in settings.items() if name != "weight_decay"},
            )
        optimizer = super().create_optimizer(model)
        if self._domain_classifier is not None:
            optimizer.add_param_group({"params": list(self._domain_classifier.parameters())})
        return optimizer

    def _training_table(self) -> ImageTable:
        assert isinstance(self.train_dataset, ImageTable)
        return self.train_dataset

    def whole_model(self) -> nn.Module:
        """The trained model, unwrapped and not sharded. Each process must call it; training can't continue after."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return model if self._unsharded is None else adapters.gathered(model, self._unsharded)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter. If the model is sharded, each process calls this, else only the one that writes."""
        folder = Path(output_dir or str(self.args.output_dir))
        with self._with_average():
            if isinstance(self.model, PeftModel):
                adapters.save(self.model, folder, batch_norm=self.batch_norm, writes=self.args.should_save)
            else:
                super()._save(output_dir, state_dict)
        if self.average is not None and self.args.should_save:
            self.average.save(folder)
        if self._domain_classifier is not None and self.args.should_save:
            save_model(self._domain_classifier, str(folder / DOMAIN_CLASSIFIER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.resume(Path(resume_from_checkpoint))
        if self._domain_classifier is not None:
            load_model(self._domain_classifier, Path(resume_from_checkpoint) / DOMAIN_CLASSIFIER)


def require_scheduler(name: str) -> None:
    """Raise `HistoError` for a learning-rate scheduler that transformers does not have, or that needs arguments."""
    fits = []
    for scheduler in SchedulerType:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        try:
            get_scheduler(scheduler, optimizer, num_warmup_steps=1, num_training_steps=2)
            fits.append(scheduler.value)
        except (ValueError, TypeError):  # arguments are missing
            continue
    if name not in fits:
        raise HistoError(f"--lr_scheduler_type is {name!r}, expected one of {', '.join(fits)}")


def training_arguments(config: Config, folder: Path) -> TrainingArguments:
    """`TrainingArguments` for the options: evaluate and save at intervals, keep the last and the best checkpoint.

    Mixed precision and the number of accumulation steps come from the options, or from `accelerate launch`, through
    environment variables. Raises `HistoError` for options that transformers refuses in combination.
    """
    options = config.training
    precision = launch.mixed_precision(config.speed.mixed_precision)
    launch.set_mixed_precision(precision)
    steps = options.gradient_accumulation_steps or launch.gradient_accumulation_steps()
    grows = options.metric_for_best_model != "loss"
    plateau = options.lr_scheduler_type == "reduce_lr_on_plateau"
    updates = options.max_steps
    if config.protocol.shots and config.protocol.iterations_per_shot:
        warmup = int(options.warmup_steps)  # 0 if it is a share
        updates = warmup + config.protocol.shots * config.protocol.iterations_per_shot
    often = "steps" if options.eval_steps else "epoch"
    try:
        return trackers.Arguments(
            output_dir=str(folder),
            seed=options.seed,
            num_train_epochs=options.num_train_epochs,
            max_steps=updates or -1,
            per_device_train_batch_size=options.per_device_train_batch_size,
            per_device_eval_batch_size=options.per_device_eval_batch_size,
            gradient_accumulation_steps=steps,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            lr_scheduler_type=options.lr_scheduler_type,
            lr_scheduler_kwargs={"mode": "max" if grows else "min", "patience": options.lr_scheduler_patience}
            if plateau
            else {},
            warmup_steps=options.warmup_steps,
            eval_strategy=often,
            save_strategy=often,
            eval_steps=options.eval_steps,
            save_steps=options.eval_steps or 500,
            save_total_limit=2,
            load_best_model_at_end=True,
            restore_callback_states_from_checkpoint=True,
            metric_for_best_model=options.metric_for_best_model,
            greater_is_better=grows,
            logging_steps=options.logging_steps,
            logging_nan_inf_filter=False,
            label_names=["labels", "index"],
            remove_unused_columns=False,
            dataloader_num_workers=config.data.num_workers,
            dataloader_persistent_workers=config.data.num_workers > 0,
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            use_cpu=launch.use_cpu(),
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            torch_compile=config.speed.torch_compile,
            accelerator_config={"non_blocking": torch.cuda.is_available()},
            report_to="none",  # `build` adds the trackers
            run_name=trackers.run_name(config),
            described=trackers.described(config),
        )
    except ValueError as error:
        raise HistoError(f"these training options can't be combined: {' '.join(str(error).split())}") from None


def build(
    config: Config,
    folder: Path,
    *,
    model: nn.Module,
    train: ImageTable | Stream,
    validation: ImageTable,
    pipeline: Pipeline,
    loss: Loss,
    compute_metrics: Callable[..., dict[str, float]],
    callbacks: Sequence[TrainerCallback] = (),
    kind: Callable[..., Trainer] = Trainer,
) -> Trainer:
    """Create a `Trainer` of `model` from the options, or another `kind` of it, with checkpoints in `folder`."""
    options = config.training
    optimizer, settings = OPTIMIZERS[options.optimizer]
    settings = {**settings, "lr": options.learning_rate, "weight_decay": options.weight_decay}
    if not launch.use_cpu():  # on a CPU, the update takes 1% of a step, and fused it would round differently
        settings["fused"] = True
    if config.speed.activation_checkpointing:
        _checkpoint_activations(model)
    balanced = {"labels": options.class_balance == "sampling", "centers": config.centers.balance_centers}
    patience = options.early_stopping_patience
    stopping = [EarlyStoppingCallback(patience)] if patience else []
    return kind(
        model=adapters.channels_last(model),
        loss=loss,
        args=training_arguments(config, folder),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        compute_metrics=compute_metrics,
        optimizer_cls_and_kwargs=(optimizer, settings),
        callbacks=[*stopping, *trackers.create(config), *callbacks],
        pipeline=pipeline,
        domain_loss=config.centers.domain_loss,
        domain_weight=config.centers.domain_weight,
        balanced=[column for column, wanted in balanced.items() if wanted],
        training_views=config.augmentation.training_views,
        batch_norm=config.model.batch_norm,
        label_smoothing=options.label_smoothing,
        lora_plus_ratio=options.lora_plus_ratio,
        average=WeightAverage.of(options, model, config.model.batch_norm),
    )


def _checkpoint_activations(model: nn.Module) -> None:
    # Newer versions of transformers renamed the latter to the former.
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable()
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise HistoError(f"--activation_checkpointing: this backbone can't do it ({reason}); leave it out") from None
