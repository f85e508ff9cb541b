"""HF `Trainer` fed with uint8 batches that are augmented and normalized on the training device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from accelerate.data_loader import DataLoaderShard
from peft import PeftModel
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EarlyStoppingCallback, SchedulerType, TrainerCallback, TrainingArguments, get_scheduler
from transformers.modeling_outputs import ImageClassifierOutput

from hf_histo import launch
from hf_histo.config import CenterOptions, Config
from hf_histo.data.readers.streaming import Stream
from hf_histo.data.schema import ImageTable, Sample
from hf_histo.errors import HistoError
from hf_histo.files import CHECKSUMS, write_json
from hf_histo.models import adapters, heads
from hf_histo.models.speed.activation_cut import Store
from hf_histo.training import domain_loss, run_folder
from hf_histo.training.losses import Loss
from hf_histo.training.preemption import StopAtCheckpoint
from hf_histo.training.sampling import BalancedSampler
from hf_histo.transforms.augmentation import Augmentation, augment, uniform
from hf_histo.transforms.preprocessing import Preprocessing
from hf_histo.transforms.stain import CenterNormalizer

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}
DOMAIN_CLASSIFIER = "domain_classifier.safetensors"  # in a checkpoint, not in an adapter


@dataclass(frozen=True)
class Stored:
    """Activations that the model takes instead of pixels, of all training and validation images."""

    training: Store
    validation: Store


class Trainer(transformers.Trainer):
    """`transformers.Trainer` for the batches of `collate`, which it turns into views on the training device.

    Evaluation returns the label ids as (labels, index), so that a prediction is matched to its sample by `index`.

    Args:
        preprocessing: of an evaluation view.
        augmentation: of a training view.
        normalizer: of the centers' color, knowing those of training and validation; None leaves color as it is.
        options: of stain mixing and the loss over centers.
        balanced: "labels" or "centers" of the training table, or both, whose values are drawn equally often.
        views: of a training image, which the epochs take in turn; None draws a new one in every epoch.
        batch_norm: "frozen" or "track"; a tracked one is part of a checkpoint.
    """

    def __init__(
        self,
        *args: Any,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        batch_norm: str,
        options: CenterOptions,
        normalizer: CenterNormalizer | None = None,
        balanced: Sequence[str] = (),
        views: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.normalizer = normalizer
        self.options = options
        self.balanced = balanced
        self.views = views
        self.stored: Stored | None = None
        self.loss: Loss = kwargs["compute_loss_func"]
        self.batch_norm = batch_norm
        self.stop = StopAtCheckpoint(self.accelerator)
        self.add_callback(self.stop)
        if options.domain_loss == "group_dro":
            self.add_callback(domain_loss.GroupDRO(self._training_table().centers, 0.01 * options.domain_weight))
        if options.domain_loss in ("coral", "dann"):
            head = heads.module_of(kwargs["model"])
            self.features = domain_loss.HeadInput(head)
        # FSDP divides a model in place.
        self._unsharded = copy.deepcopy(kwargs["model"]) if self.is_fsdp_enabled else None
        self.domain_classifier: domain_loss.DomainClassifier | None = None
        if options.domain_loss == "dann":
            width = next(part.in_features for part in head.modules() if isinstance(part, nn.Linear))
            classifier = domain_loss.DomainClassifier(width, self._training_table().centers)
            self.domain_classifier = classifier.to(self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of transformers; SIGTERM and Ctrl-C end it at a checkpoint, as `Interrupted`.

        Raises `HistoError` where the loss is NaN or infinite, with the ids of that batch in `run_folder.NAN_BATCH`, and
        for a checkpoint that holds other things than tensors and numbers: those are not unpickled.
        """
        try:
            with self.stop.listening():
                return super().train(*args, **kwargs)
        except UnpicklingError as error:
            raise HistoError(
                f"--output_dir {self.args.output_dir}: its last checkpoint holds more than tensors and numbers, or is "
                f"damaged ({' '.join(str(error).split())[:200]}); delete that checkpoint"
            ) from None

    def _load_best_model(self) -> None:
        """As of transformers, which would go on with the last weights where the best ones are gone."""
        # By its step: the recorded path is another one where the folder of the run was moved.
        best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        if not best.is_dir() or (best / CHECKSUMS).is_file():
            run_folder.require_intact(best)
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        epoch = int(self.state.epoch or 0)
        view = epoch % self.views if self.views else epoch
        training = self.model is not None and self.model.training
        if self.stored is None:
            return {"pixel_values": self.pixel_values(inputs, view if training else None), **inputs}
        store = self.stored.training if training else self.stored.validation
        return {"pixel_values": store.read(view % store.views, inputs["index"]), **inputs}

    def pixel_values(self, inputs: dict[str, Any], view: int | None) -> torch.Tensor:
        """What the model sees of a batch of `collate`, in the training view of that number or the evaluation view."""
        images, centers = inputs["image"], inputs["center"]
        if view is not None:
            return self.training_views(images, centers, inputs["index"], view, self.preprocessing.normalize)
        return self.preprocessing(images if self.normalizer is None else self.normalizer(images, centers))

    def training_views(
        self,
        images: torch.Tensor,
        centers: torch.Tensor,
        index: torch.Tensor,
        epoch: int,
        normalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What training makes of uint8 (B, 3, H, W) in an epoch: float32 (B, 3, image_size, image_size).

        In [0, 1], or normalized.
        """
        if self.normalizer is not None:
            images = self.normalizer(images, centers, self._stains(index, epoch) if self.options.stain_mixing else None)
        size = self.preprocessing.image_size
        return augment(
            images, self.augmentation, size, seed=self.args.seed, epoch=epoch, index=index, normalize=normalize
        )

    def _stains(self, index: torch.Tensor, epoch: int) -> torch.Tensor:
        """Where the color of each training view goes: the reference, or a mixture of the training centers."""
        assert self.normalizer is not None
        # Epochs beyond any real one: a stream of its own beside the other parameters'.
        draws = torch.from_numpy(uniform(self.args.seed, 2**32 + epoch, index, 1 + len(self.normalizer.training)))
        return self.normalizer.targets(mixed=draws[:, 0] < self.options.stain_mixing, draws=draws[:, 1:])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        centers, labels, index = inputs["center"], inputs["labels"], inputs["index"]
        inputs = {name: inputs[name] for name in ("pixel_values", "labels")}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.options.domain_loss != "none" and model.training:
            # Scaled as the loss is: its batch's share of an update that spans steps and processes.
            share: Any = 1.0
            if num_items_in_batch is not None:
                share = len(labels) * self.accelerator.num_processes / num_items_in_batch
            if self.options.domain_loss == "coral":
                assert self.features.value is not None
                loss = loss + share * self.options.domain_weight * domain_loss.coral(self.features.value, centers)
            elif self.domain_classifier is not None:
                progress = self.state.global_step / self.state.max_steps
                told = self.domain_classifier(self.features.value, centers, progress)
                loss = loss + share * self.options.domain_weight * told
            else:
                (weights,) = (c for c in self.callback_handler.callbacks if isinstance(c, domain_loss.GroupDRO))
                means = {}
                for center in centers.unique().tolist():
                    part = ImageClassifierOutput(logits=outputs.logits[centers == center])
                    means[center] = self.loss(part, labels[centers == center])
                loss = share * weights(means)
        if model.training and not torch.isfinite(loss):
            self._refuse(loss.item(), index)
        return (loss, outputs) if return_outputs else loss

    def _refuse(self, loss: float, index: torch.Tensor) -> NoReturn:
        assert isinstance(self.train_dataset, ImageTable | Stream)
        file, step = Path(str(self.args.output_dir)) / run_folder.NAN_BATCH, self.state.global_step + 1
        ids = self.train_dataset.ids(index.tolist())
        found = {"loss": str(loss), "step": step, "epoch": self.state.epoch, "process": self.args.process_index}
        write_json(file, found | {"ids": ids})
        raise HistoError(
            f"the loss is {loss} at step {step}, expected a finite number; look at the {len(ids)} images with the ids "
            f"in {file}, or lower --learning_rate from {self.args.learning_rate:g}"
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As of transformers; a stream is this process's part already."""
        if not isinstance(self.train_dataset, Stream):
            return super().get_train_dataloader()
        return DataLoaderShard(
            self.train_dataset,
            device=self.args.device,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        if not self.balanced:
            return super()._get_train_sampler(train_dataset)
        values = np.stack([getattr(self._training_table(), name) for name in self.balanced], axis=1)
        return BalancedSampler(values, self.args.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.domain_classifier is not None:
            optimizer.add_param_group({"params": list(self.domain_classifier.parameters())})
        return optimizer

    def _training_table(self) -> ImageTable:
        assert isinstance(self.train_dataset, ImageTable)
        return self.train_dataset

    def whole_model(self) -> nn.Module:
        """The model as it was given, with what it learned; every process calls it, and none trains after it."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return model if self._unsharded is None else adapters.gathered(model, self._unsharded)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Called by every process where the model is divided among them, else by the one that writes."""
        folder = Path(output_dir or str(self.args.output_dir))
        if isinstance(self.model, PeftModel):
            adapters.save(self.model, folder, batch_norm=self.batch_norm, writes=self.args.should_save)
        else:
            super()._save(output_dir, state_dict)
        if self.domain_classifier is not None and self.args.should_save:
            save_model(self.domain_classifier, str(folder / DOMAIN_CLASSIFIER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.domain_classifier is not None:
            load_model(self.domain_classifier, Path(resume_from_checkpoint) / DOMAIN_CLASSIFIER)


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Samples of an `ImageTable` to {"image": uint8 (B, 3, H, W), "labels", "center", "index": int64 (B,)}.

    Images must share one size; without images there is no "image".
    """
    images = [sample["image"] for sample in samples if "image" in sample]
    return {
        **({"image": torch.stack(images)} if images else {}),
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "center": torch.tensor([sample["center"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }


def require_scheduler(name: str) -> None:
    """Raise `HistoError` for a learning-rate scheduler that transformers lacks, or that needs settings of its own."""
    fits = []
    for scheduler in SchedulerType:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        try:
            get_scheduler(scheduler, optimizer, num_warmup_steps=1, num_training_steps=2)
            fits.append(scheduler.value)
        except (ValueError, TypeError):  # for want of settings
            continue
    if name not in fits:
        raise HistoError(f"--lr_scheduler_type is {name!r}, expected one of {', '.join(fits)}")


def training_arguments(config: Config, folder: Path) -> TrainingArguments:
    """`TrainingArguments` for `config`: evaluate and save now and then, keep the last and the best checkpoint.

    Mixed precision and the number of accumulation steps come from the launcher (`accelerate launch`), whose settings
    are in the environment, or from options.
    """
    options = config.training
    precision = launch.mixed_precision(config.speed.mixed_precision)
    launch.set_mixed_precision(precision)
    steps = options.gradient_accumulation_steps or launch.gradient_accumulation_steps()
    grows = options.metric_for_best_model != "loss"
    plateau = options.lr_scheduler_type == "reduce_lr_on_plateau"
    updates = options.max_steps
    if config.protocol.shots and config.protocol.iterations_per_shot:
        warmup = int(options.warmup_steps)  # 0 for a share
        updates = warmup + config.protocol.shots * config.protocol.iterations_per_shot
    often = "steps" if options.eval_steps else "epoch"
    try:
        return TrainingArguments(
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
            report_to="none",
        )
    except ValueError as error:
        raise HistoError(f"these training options do not go together: {' '.join(str(error).split())}") from None


def build(
    config: Config,
    folder: Path,
    *,
    model: nn.Module,
    train: Dataset[Any],
    validation: Dataset[Any],
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    normalizer: CenterNormalizer | None,
    loss: Loss,
    compute_metrics: Callable[..., dict[str, float]],
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """A `Trainer` that trains `model` as `config` says, with checkpoints under `folder`."""
    options = config.training
    optimizer, settings = OPTIMIZERS[options.optimizer]
    settings = {**settings, "lr": options.learning_rate, "weight_decay": options.weight_decay}
    if not launch.use_cpu():  # on a CPU, the update is a hundredth of a step, and fused it would round otherwise
        settings["fused"] = True
    if config.speed.activation_checkpointing:
        _checkpoint_activations(model)
    balanced = {"labels": options.class_balance == "sampling", "centers": config.centers.balance_centers}
    patience = options.early_stopping_patience
    stopping = [EarlyStoppingCallback(patience)] if patience else []
    return Trainer(
        model=model.to(memory_format=torch.channels_last),
        args=training_arguments(config, folder),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        compute_loss_func=loss,
        compute_metrics=compute_metrics,
        optimizer_cls_and_kwargs=(optimizer, settings),
        callbacks=[*stopping, *callbacks],
        preprocessing=preprocessing,
        augmentation=augmentation,
        normalizer=normalizer,
        options=config.centers,
        balanced=[column for column, wanted in balanced.items() if wanted],
        views=config.augmentation.training_views,
        batch_norm=config.model.batch_norm,
    )


def _checkpoint_activations(model: nn.Module) -> None:
    # The former is the name of the latter in newer versions of transformers.
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable()
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise HistoError(f"--activation_checkpointing: this backbone can't do it ({reason}); leave it out") from None
