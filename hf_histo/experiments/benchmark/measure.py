"""Run the parts of the benchmark: for each backbone, and once for what depends on none."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import timm
import torch
import transformers
from tqdm import tqdm

from hf_histo import launch
from hf_histo.config import AdapterOptions, AugmentationOptions, Config
from hf_histo.config.experiments import BENCHMARK_PARTS, BenchmarkOptions
from hf_histo.data.protocol import refuse
from hf_histo.errors import HistoError
from hf_histo.experiments.benchmark import features, jobs, prediction, reading, report, slide_prediction, steps
from hf_histo.experiments.benchmark.bench import Bench, with_saved_weights, write_images
from hf_histo.experiments.benchmark.timing import OURS, STOCK, STOCK_FLOAT32, TUNED, in_turn

# The options that act: all of these groups, and some of others.
MEASURED = (AdapterOptions, AugmentationOptions)
TAKEN = {"backbone", "revision", "random_weights", "image_size", "resize_size", "batch_norm", "mixed_precision"}
TAKEN |= {"activation_checkpointing", "torch_compile", "per_device_train_batch_size", "gradient_accumulation_steps"}
TAKEN |= {"optimizer", "learning_rate", "weight_decay", "seed", "num_workers", "output_dir"}

WITHOUT_BACKBONE = "images"  # the block of parts that depend on no backbone
LEAST = 32  # images to predict: a few more than those for which nothing is merged


def benchmark(config: Config, options: BenchmarkOptions) -> None:
    """Measure the parts for each backbone; after each, print tables, and write benchmark.md, .json and .png.

    Raises HistoError for options that can't act here, and for a command among the jobs that fails.
    """
    folder = config.parent_folder()
    parts, names = _checked(config, options)
    config = replace(config, training=replace(config.training, early_stopping_patience=0))
    if options.quick:
        refuse(config, {"per_device_train_batch_size": "--quick takes batches of 4"})
        options = replace(options, repetitions=1, steps=1, images=32, rows=[100, 1000])
        config = replace(config, training=replace(config.training, per_device_train_batch_size=4))
    before = _load()
    blocks: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        images, cache = Path(temporary) / "data", Path(temporary) / "cache"
        write_images(images, {"train": options.images, "val": max(LEAST, options.images // 4)})
        config = replace(config, data=replace(config.data, data=str(images), cache_dir=str(cache)))
        for place, name in enumerate(names):
            own = Path(temporary) / str(place)
            own.mkdir()
            bench = Bench(replace(config, model=replace(config.model, backbone=name)), options, own)
            blocks[name] = measure(bench, parts)
            if place < len(names) - 1:  # hours may have passed: what was measured is not lost with the next backbone
                _write(folder, bench, parts, before, blocks)
        blocks[WITHOUT_BACKBONE] = measure_images(bench, parts)
        _write(folder, bench, parts, before, blocks)


def _write(
    folder: Path, bench: Bench, parts: Collection[str], before: float | None, blocks: dict[str, dict[str, Any]]
) -> None:
    about = described(bench) | {"load": {"before": before, "after": _load()}, "parts": list(parts)}
    report.write(folder, about | {"blocks": {name: block for name, block in blocks.items() if block}})


def _checked(config: Config, options: BenchmarkOptions) -> tuple[list[str], list[str]]:
    """The parts and the backbones to measure."""
    acting = {f.name for group in MEASURED for f in dataclasses.fields(group)} | TAKEN
    idle = config.flat().keys() - acting | {"init_adapter", "aggregation"}
    refuse(config, dict.fromkeys(sorted(idle), "it changes nothing that is measured"))
    if config.adapter.method == "pca":
        refuse(config, {"method": "it trains in no steps"})
    if options.backbones:
        refuse(config, {"backbone": "--backbones gives the backbones"})
    names = options.backbones or [config.model.backbone]
    if len(set(names)) < len(names):
        raise HistoError(f"--backbones {' '.join(names)}: expected each once; leave the other out")
    if unknown := [part for part in options.parts if part not in BENCHMARK_PARTS]:
        raise HistoError(f"--parts {unknown[0]}: expected some of {', '.join(BENCHMARK_PARTS)}")
    return [part for part in BENCHMARK_PARTS if part in options.parts], names


def measure(bench: Bench, parts: Collection[str]) -> dict[str, Any]:
    """What was found of a backbone: seconds of each side in each repetition, by part, and bytes by side."""
    bench, count = with_saved_weights(bench), bench.options.repetitions
    found: dict[str, Any] = {}
    training: dict[str, Callable[[], float]] = {}
    training |= steps.sides(bench) if "training" in parts else {}
    training |= steps.pieces(bench) if "pieces" in parts else {}
    if training:
        found["training"] = in_turn(training, count, "training")
    for part, sides in (
        ("prediction", prediction.sides),
        ("slides", slide_prediction.sides),
        ("features", features.sides),
    ):
        if part in parts:
            found[part] = in_turn(sides(bench), count, part)
    if "jobs" in parts:
        found["jobs"] = jobs.jobs(bench)
    if "scaling" in parts:
        found["scaling"] = jobs.scaling(bench)
    if "memory" in parts:
        names = (TUNED, OURS, STOCK, STOCK_FLOAT32, steps.FULL)
        with _new_processes() as pool:
            found["memory"] = {name: pool.submit(peaks, bench, name).result() for name in tqdm(names, desc="memory")}
    return found


def measure_images(bench: Bench, parts: Collection[str]) -> dict[str, Any]:
    """What was found of images alone; a view has the size that the backbone takes."""
    found: dict[str, Any] = {}
    if "reading" in parts:
        for part, sides in (("reading", reading.reading_sides), ("augmenting", reading.augmenting_sides)):
            found[part] = in_turn(sides(bench), bench.options.repetitions, part)
    if "growth" in parts:
        with _new_processes() as pool:
            found["growth"] = []
            for rows in tqdm(bench.options.rows, desc="growth"):
                path = bench.folder / "growth.arrow"
                reading.write_table(path, rows)
                found["growth"].append(pool.submit(reading.epoch, path).result())
                path.unlink()
    return found


def peaks(bench: Bench, name: str) -> dict[str, int | None]:
    """Bytes that this process came to hold, at most, in the steps of a side."""
    (steps.sides(bench) | steps.pieces(bench))[name]()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"host": host, "device": None if launch.use_cpu() else torch.cuda.max_memory_allocated()}


def _new_processes() -> ProcessPoolExecutor:
    """A process for each task, from one that has imported everything and done nothing: its memory is the task's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_histo.stages"])
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)


def _load() -> float | None:
    """Processes that ran or waited, in the mean of the last minute; None where the system does not report them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def described(bench: Bench) -> dict[str, Any]:
    """The machine, the versions and the settings of a benchmark."""
    modules = (torch, transformers, peft, timm, datasets, accelerate)
    device = "CPU" if launch.use_cpu() else torch.cuda.get_device_name()
    return {
        "date": date.today().isoformat(),
        "machine": f"{device}, {os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "threads": torch.get_num_threads(),
        "precision": bench.precision,
        "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}},
        "batch": bench.batch,
        "repetitions": bench.options.repetitions,
        "quick": bench.options.quick,
        "options": bench.config.flat(),
    }
