"""Images before any model: reading, augmentation, and tables that grow."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from torchvision.transforms.functional import to_pil_image

from hf_histo.data import schema
from hf_histo.data.schema import ImageTable
from hf_histo.experiments.benchmark import peers
from hf_histo.experiments.benchmark.bench import Bench
from hf_histo.experiments.benchmark.timing import OURS
from hf_histo.transforms.pipeline import collate

OPENED, PIL = "a file opened for each image", "torchvision on PIL images"
SMALL = 16  # pixels on a side of an image of a growing table


def reading_sides(bench: Bench) -> dict[str, Callable[[], float]]:
    """Seconds for an image in random order, as uint8."""
    return {OURS: partial(reading, bench, True), OPENED: partial(reading, bench, False)}


def augmenting_sides(bench: Bench) -> dict[str, Callable[[], float]]:
    """Seconds for an image on one core, from uint8 to the input of the model."""
    return {OURS: partial(augmenting, bench, True), PIL: partial(augmenting, bench, False)}


def reading(bench: Bench, ours: bool) -> float:
    images, file = ImageTable(bench.data()["train"]), Path(bench.config.data.data) / "train.h5"
    order = random.Random(0).sample(range(len(images)), len(images))
    started = time.perf_counter()
    if ours:
        for start in range(0, len(order), bench.batch):
            images.__getitems__(order[start : start + bench.batch])
    else:
        for row in order:
            with h5py.File(file, "r") as opened:
                torch.from_numpy(opened[f"{row}/img"][()])
    return (time.perf_counter() - started) / len(order)


def augmenting(bench: Bench, ours: bool) -> float:
    rows = min(len(bench.data()["train"]), 4 * bench.batch)
    every = collate(ImageTable(bench.data()["train"]).__getitems__(range(rows)))
    model = bench.backbone(1)
    pipeline, change = bench.pipeline(model, bench.config), peers.pil_transforms(bench, model)
    pictures = [to_pil_image(image) for image in every["image"]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    for start in range(0, rows, bench.batch):
        some = slice(start, start + bench.batch)
        if ours:
            pipeline.train({name: part[some] for name, part in every.items()}, 0)
        else:
            torch.stack([change(picture) for picture in pictures[some]])
    seconds = (time.perf_counter() - started) / rows
    torch.set_num_threads(threads)
    return seconds


def write_table(path: Path, rows: int) -> None:
    """A table of the schema with small images of noise."""
    noise = np.random.default_rng(0)
    images = [schema.encode_ppm(noise.integers(0, 256, (SMALL, SMALL, 3), dtype=np.uint8)) for _ in range(100)]
    with ArrowWriter(path=str(path), features=schema.features(("normal", "tumor"))) as writer:
        for start in range(0, rows, 10_000):
            some = range(start, min(start + 10_000, rows))
            writer.write_batch(
                {
                    "id": [str(row) for row in some],
                    "image": [{"bytes": images[row % 100], "path": None} for row in some],
                    "label": [row % 2 for row in some],
                    "center": [0] * len(some),
                    "group": [""] * len(some),
                }
            )
        writer.finalize()


def epoch(path: Path, images: int = 1000) -> dict[str, Any]:
    """Seconds for an image, in random order, from a mapped table, and the memory that is not the mapped file's own."""
    images_of = ImageTable(datasets.Dataset.from_file(str(path)))
    assert images_of.is_of_one_size()
    order = random.Random(0).sample(range(len(images_of)), min(images, len(images_of)))
    started = time.perf_counter()
    for start in range(0, len(order), 50):
        collate(images_of.__getitems__(order[start : start + 50]))
    return {"rows": len(images_of), "seconds": (time.perf_counter() - started) / len(order), "memory": own_memory()}


def own_memory() -> int | None:
    """Bytes of this process that no file backs; None where the system does not report them."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), None)
