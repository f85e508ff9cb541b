"""How fast is this package on this machine: beside other practice, beside the limit, and without each of its pieces?

    python recipes/benchmark.py --backbone resnet50.a1_in1k --random_weights --image_size 224 \\
        --per_device_train_batch_size 16 --mixed_precision bf16 --output_dir OUT
    python recipes/benchmark.py --quick --output_dir OUT         # the built-in backbone; to see that it runs

Takes the options of a run: of the backbone, the adapter, the augmentation, the batch, the precision. Stock is the
guide to image classification in PEFT's documentation: torchvision's transforms on PIL images in `set_transform`,
`LoraConfig`, `Trainer`, with the same layers, rank and augmentation, in float32 and in the precision of the others.
The tuned peer is what a careful user makes of it: that precision, channels-last, frozen batch norm, and torchvision's
transforms on uint8 tensors. Images are generated. All is measured in one run, the sides in turn, and the median over
the repetitions counts: on a busy machine, ratios are worth more than seconds. Into OUT go benchmark.md, .json and .png.
"""

import dataclasses
import multiprocessing
import os
import platform
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import datasets
import h5py
import numpy as np
import peft
import timm
import torch
import transformers
from accelerate.state import AcceleratorState
from datasets.arrow_writer import ArrowWriter
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from hf_histo import launch
from hf_histo.config import AdapterOptions, AugmentationOptions, Config, option, parse_with
from hf_histo.data import schema
from hf_histo.data.load import load
from hf_histo.data.protocol import refuse
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.evaluation.figures.style import COLORS, GRAY, drawing
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.reporting.report import table
from hf_histo.files import atomic_file, write_json
from hf_histo.launch import run
from hf_histo.models import adapters, backbones, batchnorm, heads, lora_targets
from hf_histo.models.speed import folding
from hf_histo.training import feature_cache, losses, trainer
from hf_histo.transforms import augmentation, preprocessing

# The options that act: all of these groups, and some of others.
MEASURED = (AdapterOptions, AugmentationOptions)
TAKEN = {"backbone", "revision", "random_weights", "image_size", "resize_size", "batch_norm", "mixed_precision"}
TAKEN |= {"activation_checkpointing", "torch_compile", "per_device_train_batch_size", "gradient_accumulation_steps"}
TAKEN |= {"optimizer", "learning_rate", "weight_decay", "seed", "num_workers", "output_dir"}

PATCH = 96  # pixels on a side of a generated image, as in Camelyon17
EPOCHS = 10  # of the linear probe
AIMS: dict[str, float | None] = {
    "step, images/s against the tuned peer": None,
    "step, images/s against stock in the same precision": None,
    "step, images/s against stock in float32": 2.5,
    "step, seconds against the floor": 1.5,
    "reading, images/s against a file opened for each image": 5.0,
    "augmenting, images/s against PIL on one core": 5.0,
    f"linear probe of {EPOCHS} epochs, seconds against a forward pass": 1.3,
    "device memory against full fine-tuning": 0.5,
}


@dataclass
class Options:
    _argument_group_name = "benchmark"

    quick: bool = option(False, "few images, steps and repetitions: to see that it runs, not to measure")
    repetitions: int = option(5, "of each measurement")
    steps: int = option(3, "training steps in each, after one that does not count")
    images: int = option(512, "that are generated for training")
    rows: list[int] = field(default_factory=lambda: [1_000, 10_000, 100_000], metadata={"help": "of growing tables"})


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
    options: Options
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
        o = self.config.model
        return preprocessing.resolve(model.config, backbones.locate(o.backbone), o.image_size, o.resize_size)

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
            target_modules=lora_targets.targets(model, o.target_modules, o.lora_rank),
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
        views = self.views(model)
        if config.model.batch_norm == "frozen":
            batchnorm.freeze(model)
        data = self.data()
        return trainer.build(
            config,
            self.folder / "ours",
            model=model if config.adapter.method == "full" else adapters.add(model, config.adapter),
            train=views.read(data["train"]),
            validation=views.read(data["val"]),
            preprocessing=views,
            augmentation=augmentation.preset(config.augmentation.augmentation),
            normalizer=None,
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
            size = session.preprocessing.image_size
            batch = torch.randn(self.batch, 3, size, size, device=session.args.device)
            pixel_values = lambda inputs, view: batch.contiguous(memory_format=torch.channels_last)  # noqa: E731
        elif pil:
            change = self.stock_transforms(session.preprocessing)

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
        views = self.views(self.backbone(1))
        images, index = torch.stack([sample["image"] for sample in samples]), torch.arange(rows)
        pictures, change = [to_pil_image(image) for image in images], self.stock_transforms(views)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        started = time.perf_counter()
        for some in index.split(self.batch):
            if ours:
                size, normalize = views.image_size, views.normalize
                augmentation.augment(images[some], self.changes, size, seed=0, epoch=0, index=some, normalize=normalize)
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
            with feature_cache.folded_layers(session), feature_cache.cached_prefix(session, config):
                session.train()
        else:
            with feature_cache.folded_layers(session), torch.no_grad(), session.accelerator.autocast():
                assert session.model is not None
                for rows in (session.train_dataset, session.eval_dataset):
                    assert isinstance(rows, ImageTable)
                    loader = torch.utils.data.DataLoader(rows, batch_size=self.batch, collate_fn=trainer.collate)
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
        trainer.collate(images_of.__getitems__(some.tolist()))
    return {"rows": len(images_of), "seconds": (time.perf_counter() - started) / len(order), "memory": own_memory()}


def own_memory() -> int | None:
    """Bytes of this process that no file backs; None where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), None)


def in_turn(sides: Mapping[str, Callable[[], float]], repetitions: int, title: str) -> dict[str, list[float]]:
    """Seconds of each side in each repetition."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in tqdm(range(repetitions), desc=title):
        for name, measure in sides.items():
            AcceleratorState._reset_state()  # or the first side's precision would be everybody's
            found[name].append(measure())
    return found


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


def main() -> None:
    config, options = parse_with(Options, __doc__)
    folder = config.parent_folder()
    measured = {f.name for group in MEASURED for f in dataclasses.fields(group)} | TAKEN
    refuse(config, dict.fromkeys(config.flat().keys() - measured, "it changes nothing that is measured"))
    if options.repetitions < 1 or options.steps < 1 or min(options.rows) < 1:
        raise HistoError("--repetitions, --steps and --rows: expected numbers from 1 on")
    config = replace(config, training=replace(config.training, early_stopping_patience=0))
    if options.quick:
        options = replace(options, repetitions=1, steps=1, images=32, rows=[100, 1000])
        config = replace(config, training=replace(config.training, per_device_train_batch_size=4))
    with tempfile.TemporaryDirectory() as temporary:
        config = replace(config, data=replace(config.data, cache_dir=str(Path(temporary) / "cache")))
        bench = Bench(config, options, Path(temporary))
        write_images(bench.folder / "data", {"train": options.images, "val": options.images // 4})
        found = measure(bench)
    write(folder, found | described(bench))


def peaks(bench: Bench, name: str) -> dict[str, int | None]:
    """Bytes that this process came to hold, at most, in the steps of a side."""
    steps(bench)[name]()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"host": host, "device": None if launch.use_cpu() else torch.cuda.max_memory_allocated()}


def measure(bench: Bench) -> dict[str, Any]:
    both = ("this package", True), ("stock", False)
    count = bench.options.repetitions
    for rows in bench.options.rows:
        write_table(bench.folder / f"{rows}.arrow", rows)
    # Memory is that of a new process, from one that has imported everything and done nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_histo.finetune"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return {
            "step": in_turn(steps(bench), count, "training step"),
            "reading": in_turn({name: partial(bench.reading, ours) for name, ours in both}, count, "reading"),
            "augmenting": in_turn({name: partial(bench.augmenting, ours) for name, ours in both}, count, "augmenting"),
            "probe": in_turn(
                {"linear probe": partial(bench.probe, True), "forward pass": partial(bench.probe, False)},
                count,
                "probe",
            ),
            "memory": {
                name: pool.submit(peaks, bench, name).result()
                for name in tqdm(("stock", "tuned peer", "this package", "full fine-tuning"), desc="memory")
            },
            "growth": [
                pool.submit(epoch, bench.folder / f"{rows}.arrow").result()
                for rows in tqdm(bench.options.rows, desc="growth")
            ],
        }


def described(bench: Bench) -> dict[str, Any]:
    modules = (torch, transformers, peft, timm, datasets, accelerate)
    device = "CPU" if launch.use_cpu() else torch.cuda.get_device_name()
    return {
        "date": date.today().isoformat(),
        "machine": f"{device}, {os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "precision": launch.mixed_precision(bench.config.speed.mixed_precision),
        "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}},
        "batch": bench.batch,
        "quick": bench.options.quick,
        "options": bench.config.flat(),
    }


def ratios(found: dict[str, Any]) -> dict[str, float | None]:
    """What the aims are about, in the order of `AIMS`; None where there is no device."""
    step, reading, augmenting, probe = (
        {name: statistics.median(seconds) for name, seconds in found[part].items()}
        for part in ("step", "reading", "augmenting", "probe")
    )
    ours, full = (found["memory"][name]["device"] for name in ("this package", "full fine-tuning"))
    values = (
        step["tuned peer"] / step["this package"],
        step["stock"] / step["this package"],
        step["stock, float32"] / step["this package"],
        step["this package"] / step["floor: forward, gradient to the input"],
        reading["stock"] / reading["this package"],
        augmenting["stock"] / augmenting["this package"],
        probe["linear probe"] / probe["forward pass"],
        ours / full if ours else None,
    )
    return dict(zip(AIMS, values, strict=True))


def _aim(value: float | None) -> str | None:
    """In words; a ratio above 2 is one of speeds, the others are of times and bytes."""
    return None if value is None else f"at {'least' if value > 2 else 'most'} {value}"


def write(folder: Path, found: dict[str, Any]) -> None:
    found["ratios"] = ratios(found)
    step = {name: statistics.median(seconds) for name, seconds in found["step"].items()}
    speed = {name: found["batch"] / seconds for name, seconds in step.items()}
    memory = {name: found["memory"].get(name, {}) for name in step}
    rows: list[list[object]] = [["training step", "seconds", "images/s", "host MiB", "device MiB"]]
    for name in step:
        peaks = (memory[name].get(where) for where in ("host", "device"))
        rows.append([name, step[name], speed[name], *(peak and round(peak / 2**20) for peak in peaks)])
    aims: list[list[object]] = [["ratio", "measured", "aim"]]
    aims += [[name, value, _aim(AIMS[name])] for name, value in found["ratios"].items()]
    growth: list[list[object]] = [["rows", "images/s", "own memory, MiB"]]
    growth += [[g["rows"], 1 / g["seconds"], g["memory"] and g["memory"] / 2**20] for g in found["growth"]]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    machine = f"{found['date']}, {found['machine']}, {found['threads']} threads"
    about = f"{machine}, mixed precision {found['precision']}, batches of {found['batch']}"
    text = "\n\n".join([about, versions, table(rows), table(aims), table(growth)])
    print("\n" + text)
    with atomic_file(folder / "benchmark.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(folder / "benchmark.json", found)
    with drawing(folder / "benchmark.png", 8, 4.5) as figure:
        axes = figure.subplots()
        names = list(reversed(speed))
        colors = [
            {"stock, float32": GRAY, "stock": GRAY, "tuned peer": GRAY, "this package": COLORS[1]}.get(name, COLORS[0])
            for name in names
        ]
        bars = axes.barh(names, [speed[name] for name in names], color=colors)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.set(xlabel="images per second in a training step")
        figure.suptitle(about, fontsize="small")
    print(f"\nwrote benchmark.md, .json and .png in {folder}")


if __name__ == "__main__":
    run(main)
