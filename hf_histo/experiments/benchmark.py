"""This package beside other practice, beside the limit, and without each of its pieces, on this machine."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import timm
import torch
import transformers
from accelerate.state import AcceleratorState
from tqdm import tqdm

from hf_histo import launch
from hf_histo.config import AdapterOptions, AugmentationOptions, Config
from hf_histo.config.experiments import BenchmarkOptions
from hf_histo.data.protocol import refuse
from hf_histo.errors import HistoError
from hf_histo.evaluation.figures.style import COLORS, GRAY, drawing
from hf_histo.evaluation.reporting.report import table
from hf_histo.experiments import grid
from hf_histo.experiments.benchmark_sides import EPOCHS, Bench, epoch, steps, write_images, write_table

# The options that act: all of these groups, and some of others.
MEASURED = (AdapterOptions, AugmentationOptions)
TAKEN = {"backbone", "revision", "random_weights", "image_size", "resize_size", "batch_norm", "mixed_precision"}
TAKEN |= {"activation_checkpointing", "torch_compile", "per_device_train_batch_size", "gradient_accumulation_steps"}
TAKEN |= {"optimizer", "learning_rate", "weight_decay", "seed", "num_workers", "output_dir"}

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


def benchmark(config: Config, options: BenchmarkOptions) -> None:
    """Measure everything; print tables, and write benchmark.md, .json and .png.

    Raises HistoError for options that can't act here.
    """
    folder = config.parent_folder()
    measured = {f.name for group in MEASURED for f in dataclasses.fields(group)} | TAKEN
    idle = config.flat().keys() - measured | {"init_adapter"}
    refuse(config, dict.fromkeys(idle, "it changes nothing that is measured"))
    if config.adapter.method == "pca":
        refuse(config, {"method": "it trains in no steps"})
    if options.repetitions < 1 or options.steps < 1 or min(options.rows) < 1:
        raise HistoError("--repetitions, --steps and --rows: expected numbers from 1 on")
    config = replace(config, training=replace(config.training, early_stopping_patience=0))
    if options.quick:
        refuse(config, {"per_device_train_batch_size": "--quick takes batches of 4"})
        options = replace(options, repetitions=1, steps=1, images=32, rows=[100, 1000])
        config = replace(config, training=replace(config.training, per_device_train_batch_size=4))
    with tempfile.TemporaryDirectory() as temporary:
        config = replace(config, data=replace(config.data, cache_dir=str(Path(temporary) / "cache")))
        bench = Bench(config, options, Path(temporary))
        write_images(bench.folder / "data", {"train": options.images, "val": options.images // 4})
        found = measure(bench)
    write(folder, found | described(bench))


def in_turn(sides: Mapping[str, Callable[[], float]], repetitions: int, title: str) -> dict[str, list[float]]:
    """Seconds of each side in each repetition."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in tqdm(range(repetitions), desc=title):
        for name, measure in sides.items():
            AcceleratorState._reset_state()  # or the first side's precision would be everybody's
            found[name].append(measure())
    return found


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
    grid.write(folder, "benchmark", found, text)
    print(f"\nwrote benchmark.md, .json and .png in {folder}")
