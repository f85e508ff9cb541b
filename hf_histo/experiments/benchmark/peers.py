"""The practice that this package is compared to: PEFT's guide to image classification, and a tuned form of it.

The guide uses torchvision's transforms on PIL images in `set_transform`, `LoraConfig` and `Trainer`:
https://huggingface.co/docs/peft/main/en/task_guides/image_classification_lora
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2
from transformers import TrainingArguments

from hf_histo import launch
from hf_histo.experiments.benchmark.bench import Bench
from hf_histo.experiments.benchmark.timing import median_step, quiet
from hf_histo.models import batchnorm, heads, lora_targets


def training_step(bench: Bench, precision: str, *, tuned: bool = False) -> float:
    """Seconds for a training step as the guide writes it, in a mixed precision.

    `tuned` is what a careful user makes of it: channels-last, frozen batch norm, and transforms on uint8 tensors.
    """
    launch.set_mixed_precision(precision)
    model = bench.backbone(2)
    transform = (tensor_transforms if tuned else pil_transforms)(bench, model)
    if tuned:
        batchnorm.freeze(model)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # transformers wraps it
    arguments = TrainingArguments(
        output_dir=str(bench.folder / "peer"),
        remove_unused_columns=False,
        per_device_train_batch_size=bench.batch,
        learning_rate=bench.config.training.learning_rate,
        dataloader_num_workers=bench.config.data.num_workers,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=launch.use_cpu(),
        report_to="none",
    )
    session = transformers.Trainer(
        model=with_lora(bench, model),
        args=arguments,
        train_dataset=_transformed(bench, "train", transform),
        data_collator=_collate_channels_last if tuned else _collate,
    )
    return median_step(session, bench.options.steps)


def prediction(bench: Bench) -> float:
    """Seconds for an image by `Trainer.predict` in float32, from images that PIL resizes, crops and normalizes."""
    launch.set_mixed_precision("no")
    model = bench.backbone(2)
    views = bench.preprocessing(model)
    transform = transforms.Compose(
        [
            transforms.Resize(views.resize_size),
            transforms.CenterCrop(views.image_size),
            transforms.ToTensor(),
            transforms.Normalize(views.mean, views.std),
        ]
    )
    arguments = TrainingArguments(
        output_dir=str(bench.folder / "peer"),
        remove_unused_columns=False,
        per_device_eval_batch_size=bench.batch,
        dataloader_num_workers=bench.config.data.num_workers,
        use_cpu=launch.use_cpu(),
        report_to="none",
    )
    session = transformers.Trainer(model=with_lora(bench, model), args=arguments, data_collator=_collate)
    quiet(session)
    rows = _transformed(bench, "val", transform)
    session.predict(rows.select(range(min(len(rows), bench.batch))))  # does not count
    started = time.perf_counter()
    session.predict(rows)
    return (time.perf_counter() - started) / len(rows)


def with_lora(bench: Bench, model: Any) -> peft.PeftModel:
    """`model` with the layers and the rank of the options."""
    o = bench.config.adapter
    lora = peft.LoraConfig(
        r=o.lora_rank,
        lora_alpha=o.lora_alpha,  # type: ignore[arg-type]
        target_modules=lora_targets.targets(model, o.target_modules, o.lora_rank, o.lora_blocks),
        lora_dropout=o.lora_dropout,
        bias="none",
        modules_to_save=[heads.name_of(model)],
    )
    return peft.get_peft_model(model, lora)


def pil_transforms(bench: Bench, model: nn.Module) -> transforms.Compose:
    """The augmentation of the options as far as torchvision has it, from PIL images to the input of `model`."""
    a, views = bench.changes, bench.preprocessing(model)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(views.image_size, a.scale, a.ratio),
            transforms.RandomHorizontalFlip(a.horizontal_flip),
            transforms.RandomVerticalFlip(a.vertical_flip),
            transforms.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue),
            transforms.ToTensor(),
            transforms.Normalize(views.mean, views.std),
        ]
    )


def tensor_transforms(bench: Bench, model: nn.Module) -> v2.Compose:
    """The same, from uint8 tensors."""
    a, views = bench.changes, bench.preprocessing(model)
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(views.image_size, a.scale, a.ratio, antialias=True),
            v2.RandomHorizontalFlip(a.horizontal_flip),
            v2.RandomVerticalFlip(a.vertical_flip),
            v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(views.mean, views.std),
        ]
    )


def _transformed(bench: Bench, split: str, transform: Callable[[Any], torch.Tensor]) -> Any:  # a datasets.Dataset
    def apply(examples: dict[str, Any]) -> dict[str, Any]:
        examples["pixel_values"] = [transform(image.convert("RGB")) for image in examples["image"]]
        return examples

    rows = bench.data()[split]
    rows.set_transform(apply)
    return rows


def _collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}


def _collate_channels_last(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = _collate(examples)
    return batch | {"pixel_values": batch["pixel_values"].contiguous(memory_format=torch.channels_last)}
