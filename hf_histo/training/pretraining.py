"""Pretraining of the packaged backbone on procedural patterns."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import timm
import torch
import transformers
from tqdm import tqdm
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    TimmWrapperConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_histo.config.commands import PretrainBackboneOptions
from hf_histo.data.synthetic.patterns import CLASSES, PROCESSES, pattern
from hf_histo.errors import HistoError
from hf_histo.files import atomic_folder

SIZE, BATCH = 96, 128


def pretrain(options: PretrainBackboneOptions) -> None:
    """Draw patterns, train the backbone on them, and write its folder. Raises HistoError if the folder exists."""
    if options.output_dir.exists():
        raise HistoError(
            f"--output_dir={options.output_dir}: exists, expected a new folder; remove it or choose another"
        )

    set_seed(options.seed)
    model = AutoModelForImageClassification.from_config(config())
    model.to(memory_format=torch.channels_last)
    patterns = draw(options.seed, options.images + options.images // 10)
    with atomic_folder(options.output_dir) as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder),
                max_steps=options.steps,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                learning_rate=options.learning_rate,
                weight_decay=0.02,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                bf16=True,
                use_cpu=not torch.cuda.is_available(),  # required for bf16 on a CPU
                seed=options.seed,
                logging_steps=100,
                save_strategy="no",
                remove_unused_columns=False,
            ),
            data_collator=colored,
            train_dataset=patterns[: options.images],
            eval_dataset=patterns[options.images :],
            compute_metrics=accuracy,
        )
        trainer.train()
        estimate_batch_norm(model, trainer)
        measured = trainer.evaluate()["eval_accuracy"]
        model.config.pretrained_cfg["made_by"] = {
            "command": f"python recipes/pretrain_backbone.py --steps {options.steps} --images {options.images} "
            f"--learning_rate {options.learning_rate} --seed {options.seed}",
            "pretext": f"{CLASSES} classes of procedural patterns",
            "pretext_accuracy": round(measured, 4),
            "versions": {
                "python": platform.python_version(),
                **{m.__name__: m.__version__ for m in (torch, timm, transformers, np)},
            },
        }
        model.config.problem_type = None  # the inferred type would not allow num_labels=1 on loading
        model.half().save_pretrained(folder)
    print(f"held-out accuracy {measured:.3f} on {CLASSES} classes (chance {1 / CLASSES:.3f}): {options.output_dir}")


def config() -> TimmWrapperConfig:
    """Configuration of the backbone: its architecture, classes and preprocessing."""
    names = [f"{process.__name__[1:]}_{level}" for process in PROCESSES for level in range(4)]
    declared: TimmWrapperConfig = TimmWrapperConfig.from_dict(
        {
            "architecture": "resnet10t",
            "model_args": {"channels": [32, 64, 128, 256]},
            "num_classes": CLASSES,
            "label_names": names,
            "num_features": 256,
            "pretrained_cfg": {
                "tag": "procedural",
                "input_size": [3, SIZE, SIZE],
                "fixed_input_size": False,
                "interpolation": "bilinear",
                "crop_pct": 1.0,
                "crop_mode": "center",
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
                "pool_size": [3, 3],
                "first_conv": "conv1.0",
                "classifier": "fc",
                "license": "apache-2.0",
            },
        }
    )
    return declared


def draw(seed: int, count: int) -> list[dict[str, Any]]:
    """Draw `count` gray patterns, uint8 (112, 112), cycling through the classes."""
    return [
        {
            "gray": torch.from_numpy(pattern(np.random.default_rng([seed, index]), index % CLASSES)),
            "labels": index % CLASSES,
        }
        for index in tqdm(range(count), desc="patterns", unit="image")
    ]


def colored(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Batch of randomly cropped, flipped and colored rows: `pixel_values` float32 (n, 3, 96, 96) in -1..1, `labels`."""
    gray = torch.stack([crop(row["gray"]) for row in rows]).unsqueeze(1) / 255
    dark, middle, bright = torch.rand(3, len(rows), 3, 1, 1)
    image = dark * (1 - gray) ** 2 + middle * 2 * gray * (1 - gray) + bright * gray**2
    image += 0.03 * torch.rand(len(rows), 1, 1, 1) * torch.randn_like(image)
    return {
        "pixel_values": (2 * image.clamp(0, 1) - 1).contiguous(memory_format=torch.channels_last),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def crop(gray: torch.Tensor) -> torch.Tensor:
    top, left = torch.randint(gray.shape[-1] - SIZE + 1, (2,)).tolist()
    turned = torch.rot90(gray[top : top + SIZE, left : left + SIZE], int(torch.randint(4, ())))
    return turned.T if torch.rand(()) < 0.5 else turned


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


@torch.no_grad()
def estimate_batch_norm(model: torch.nn.Module, trainer: Trainer, batches: int = 50) -> None:
    """Replace the running statistics, which lag behind the weights, by means over `batches` batches, in float32."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative average
    model.train()
    for _, batch in zip(range(batches), trainer.get_train_dataloader(), strict=False):
        model(batch["pixel_values"])
