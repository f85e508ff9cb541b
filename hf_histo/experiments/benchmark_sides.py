"""What the benchmark times: training steps, reading, augmentation and a linear probe, of this package and of others."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import peft
import torch
import transformers
from datasets.arrow_writer import ArrowWriter
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from hf_histo import launch
from hf_histo.config import Config
from hf_histo.config.experiments import BenchmarkOptions
from hf_histo.data import schema
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.evaluation.metrics import classification
from hf_histo.models import adapters, backbones, batchnorm, heads, lora_targets
from hf_histo.models.speed import folding
from hf_histo.training import feature_cache, losses, trainer
from hf_histo.transforms import augmentation, preprocessing
from hf_histo.transforms.pipeline import Pipeline, collate

PATCH = 96  # pixels on a side of a generated image, as in Camelyon17
EPOCHS = 10  # of the linear probe


class Clock(TrainerCallback):
    """When each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


@dataclass(frozen=True)
class Bench:
    """A backbone, a batch, a precision, some images, and what can be timed on them."""

    config: Config
    options: BenchmarkOptions
    folder: Path

    @property
    def batch(self) -> int:
        return self.config.training.per_device_train_batch_size

    @property
    def changes(self) -> augmentation.Augmentation:
        return augmentation.preset(self.config.augmentation.augmentation)

    def data(self) -> datasets.DatasetDict:
        return load(self.folder / "data", cache_dir=self.folder / "cache")

    def backbone(self, outputs: int) -> transformers.PreTrainedModel:
        o = self.config.model
        size, weights = o.image_size, o.random_weights
        return backbones.load(o.backbone, outputs, revision=o.revision, random_weights=weights, image_size=size)

    def views(self, model: transformers.PreTrainedModel) -> preprocessing.Preprocessing:
        return self.pipeline(model, self.config).preprocessing

    def pipeline(self, model: transformers.PreTrainedModel, config: Config) -> Pipeline:
        return Pipeline.of(config, model.config, backbones.locate(config.model.backbone))

    def stock_transforms(self, views: preprocessing.Preprocessing) -> transforms.Compose:
        a = self.changes
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

    def tensor_transforms(self, views: preprocessing.Preprocessing) -> v2.Compose:
        """The same, from uint8 tensors."""
        a = self.changes
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

    def peer(self, precision: str, *, tuned: bool = False) -> float:
        """Seconds for a step as PEFT's guide writes it, in a mixed precision; or `tuned`."""
        launch.set_mixed_precision(precision)
        model = self.backbone(2)
        views = self.views(model)
        train_transforms = self.tensor_transforms(views) if tuned else self.stock_transforms(views)
        if tuned:
            batchnorm.freeze(model)
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # transformers wraps it
        o = self.config.adapter
        lora = peft.LoraConfig(
            r=o.lora_rank,
            lora_alpha=o.lora_alpha,  # type: ignore[arg-type]
            target_modules=lora_targets.targets(model, o.target_modules, o.lora_rank, o.lora_blocks),
            lora_dropout=o.lora_dropout,
            bias="none",
            modules_to_save=[heads.name_of(model)],
        )

        def preprocess_train(example_batch: dict[str, Any]) -> dict[str, Any]:
            example_batch["pixel_values"] = [train_transforms(image.convert("RGB")) for image in example_batch["image"]]
            return example_batch

        def collate_fn(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            pixel_values = torch.stack([example["pixel_values"] for example in examples])
            if tuned:
                pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
            return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

        train = self.data()["train"]
        train.set_transform(preprocess_train)
        arguments = TrainingArguments(
            output_dir=str(self.folder / "peer"),
            remove_unused_columns=False,
            per_device_train_batch_size=self.batch,
            learning_rate=self.config.training.learning_rate,
            dataloader_num_workers=self.config.data.num_workers,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=launch.use_cpu(),
            report_to="none",
        )
        model = peft.get_peft_model(model, lora)  # type: ignore[assignment]
        return self.seconds(
            transformers.Trainer(model=model, args=arguments, train_dataset=train, data_collator=collate_fn)
        )

    def session(self, config: Config) -> trainer.Trainer:
        """What `hf_histo.finetune` trains."""
        model: Any = self.backbone(1)
        pipeline = self.pipeline(model, config)
        if config.model.batch_norm == "frozen":
            batchnorm.freeze(model)
        data = self.data()
        return trainer.build(
            config,
            self.folder / "ours",
            model=model if config.adapter.method == "full" else adapters.add(model, config.adapter),
            train=pipeline.read(data["train"]),
            validation=pipeline.read(data["val"]),
            pipeline=pipeline,
            loss=losses.classification(1),
            compute_metrics=classification.for_trainer(),
        )

    def ours(
        self,
        *,
        config: Config | None = None,
        fold: bool = True,
        channels_last: bool = True,
        pil: bool = False,
        resident: bool = False,
    ) -> float:
        """Seconds for a step of this package, with or without each of its pieces."""
        session = self.session(config or self.config)
        pixel_values: Callable[..., torch.Tensor] = session.pixel_values
        if resident:
            size = session.pipeline.preprocessing.image_size
            batch = torch.randn(self.batch, 3, size, size, device=session.args.device)
            pixel_values = lambda inputs, view: batch.contiguous(memory_format=torch.channels_last)  # noqa: E731
        elif pil:
            change = self.stock_transforms(session.pipeline.preprocessing)

            def pixel_values(inputs: dict[str, Any], view: int | None) -> torch.Tensor:
                images = torch.stack([change(to_pil_image(image)) for image in inputs["image"].cpu()])
                return images.to(inputs["image"].device).contiguous(memory_format=torch.channels_last)

        if not channels_last:
            assert session.model is not None
            session.model.to(memory_format=torch.contiguous_format)
            before = pixel_values
            pixel_values = lambda inputs, view: before(inputs, view).contiguous()  # noqa: E731
        session.pixel_values = pixel_values  # type: ignore[method-assign]
        with feature_cache.folded_layers(session) if fold else nullcontext():
            return self.seconds(session)

    def seconds(self, session: transformers.Trainer) -> float:
        """The median step of a short training, from the end of the step before to its own: reading is part of it."""
        clock = Clock()
        session.add_callback(clock)
        quiet(session)
        session.args.max_steps = self.options.steps + 1
        for strategy in ("eval_strategy", "save_strategy", "logging_strategy"):
            setattr(session.args, strategy, "no")
        session.args.load_best_model_at_end = False
        session.train()
        return statistics.median(np.diff(clock.times))

    def floor(self, gradient: bool) -> float:
        """Seconds for a forward pass, and for the gradient to its input: what no training of lower layers can avoid."""
        device = torch.device("cpu" if launch.use_cpu() else "cuda")
        model: Any = self.backbone(1)
        batchnorm.freeze(model)
        model.requires_grad_(False).to(device, memory_format=torch.channels_last)
        size = self.views(model).image_size
        pixels = torch.randn(self.batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        precision = launch.mixed_precision(self.config.speed.mixed_precision)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        times = []
        with folding.folded(model, pixels[:2]), torch.set_grad_enabled(gradient):
            for _ in range(self.options.steps + 1):
                started = time.perf_counter()
                with torch.autocast(device.type, half, enabled=half is not None):
                    logits = model(pixel_values=pixels.requires_grad_(gradient)).logits
                if gradient:
                    logits.float().sum().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def reading(self, ours: bool) -> float:
        """Seconds for an image in random order, as uint8: from its own opening of the file, or from the table."""
        images, file = ImageTable(self.data()["train"]), self.folder / "data" / "train.h5"
        order = random.Random(0).sample(range(len(images)), len(images))
        started = time.perf_counter()
        if ours:
            for start in range(0, len(order), self.batch):
                images.__getitems__(order[start : start + self.batch])
        else:
            for row in order:
                with h5py.File(file, "r") as opened:
                    torch.from_numpy(opened[f"{row}/img"][()])
        return (time.perf_counter() - started) / len(order)

    def augmenting(self, ours: bool) -> float:
        """Seconds for an image on one core, from uint8 to what the model takes."""
        rows = min(len(self.data()["train"]), 4 * self.batch)
        samples = ImageTable(self.data()["train"]).__getitems__(range(rows))
        pipeline, every = self.pipeline(self.backbone(1), self.config), collate(samples)
        change = self.stock_transforms(pipeline.preprocessing)
        pictures = [to_pil_image(image) for image in every["image"]]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        started = time.perf_counter()
        for some in torch.arange(rows).split(self.batch):
            if ours:
                pipeline.train({name: part[some] for name, part in every.items()}, 0)
            else:
                torch.stack([change(pictures[row]) for row in some.tolist()])
        seconds = (time.perf_counter() - started) / rows
        torch.set_num_threads(threads)
        return seconds

    def probe(self, ours: bool) -> float:
        """Seconds for a linear probe of ten epochs with nothing stored yet, or for a forward pass over its images."""
        adapter = replace(self.config.adapter, method="linear")
        training = replace(self.config.training, num_train_epochs=float(EPOCHS), per_device_eval_batch_size=self.batch)
        changes = replace(self.config.augmentation, augmentation="none")
        speed = replace(self.config.speed, cache_features="on")
        config = replace(self.config, adapter=adapter, training=training, augmentation=changes, speed=speed)
        session = self.session(config)
        quiet(session)
        started = time.perf_counter()
        if ours:
            shutil.rmtree(self.folder / "cache" / "hf_histo_features", ignore_errors=True)
            caching = feature_cache.cached_prefix(session, speed.cache_features, config.data.cache_dir)
            with feature_cache.folded_layers(session), caching:
                session.train()
        else:
            with feature_cache.folded_layers(session), torch.no_grad(), session.accelerator.autocast():
                assert session.model is not None
                for rows in (session.train_dataset, session.eval_dataset):
                    assert isinstance(rows, ImageTable)
                    loader = torch.utils.data.DataLoader(rows, batch_size=self.batch, collate_fn=collate)
                    for batch in loader:
                        batch = {name: part.to(session.args.device) for name, part in batch.items()}
                        session.model.eval()(pixel_values=session.pixel_values(batch, None))
        return time.perf_counter() - started


def quiet(session: transformers.Trainer) -> None:
    """Without a bar, and without a line for each logged loss."""
    for callback in (ProgressCallback, PrinterCallback):
        session.remove_callback(callback)


def write_images(folder: Path, counts: Mapping[str, int]) -> None:
    """Files of the challenge, one group for each image of noise."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for split, count in counts.items():
        with h5py.File(folder / f"{split}.h5", "w") as file:
            for row in range(count):
                file[f"{row}/img"] = noise.integers(0, 256, (3, PATCH, PATCH), dtype=np.uint8)
                file[f"{row}/label"] = row % 2
                file[f"{row}/metadata"] = [0, row // 8, row % 2]


def write_table(path: Path, rows: int) -> None:
    """A table of the schema with small images of noise."""
    noise = np.random.default_rng(0)
    images = [schema.encode_ppm(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(100)]
    with ArrowWriter(path=str(path), features=schema.features(("normal", "tumor"))) as writer:
        for row in range(rows):
            image = {"bytes": images[row % 100], "path": None}
            writer.write({"id": str(row), "image": image, "label": row % 2, "center": 0, "group": ""})
        writer.finalize()


def epoch(path: Path, images: int = 1000) -> dict[str, Any]:
    """Seconds for an image, in random order, from a mapped table, and the memory that is not the mapped file's own."""
    images_of = ImageTable(datasets.Dataset.from_file(str(path)))
    assert images_of.is_of_one_size()
    order = torch.randperm(len(images_of), generator=torch.Generator().manual_seed(0))[:images]
    started = time.perf_counter()
    for some in order.split(50):
        collate(images_of.__getitems__(some.tolist()))
    return {"rows": len(images_of), "seconds": (time.perf_counter() - started) / len(order), "memory": own_memory()}


def own_memory() -> int | None:
    """Bytes of this process that no file backs; None where the system does not report them."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), None)


def steps(bench: Bench) -> dict[str, Callable[[], float]]:
    """The sides of a training step."""
    config = bench.config
    track = replace(config, model=replace(config.model, batch_norm="track"))
    single = replace(config, speed=replace(config.speed, mixed_precision="no"))
    full = replace(config, adapter=replace(config.adapter, method="full"))
    precision = launch.mixed_precision(config.speed.mixed_precision)
    return {
        "stock, float32": partial(bench.peer, "no"),
        "stock": partial(bench.peer, precision),
        "tuned peer": partial(bench.peer, precision, tuned=True),
        "this package": bench.ours,
        "data on the device": partial(bench.ours, resident=True),
        "without mixed precision": partial(bench.ours, config=single),
        "without channels-last": partial(bench.ours, channels_last=False),
        "without freezing batch norm": partial(bench.ours, config=track, fold=False),
        "without folding batch norm and LoRA": partial(bench.ours, fold=False),
        "without batched augmentation": partial(bench.ours, pil=True),
        "full fine-tuning": partial(bench.ours, config=full),
        "floor: forward, gradient to the input": partial(bench.floor, True),
        "forward": partial(bench.floor, False),
    }
