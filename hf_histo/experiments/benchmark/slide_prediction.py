"""Prediction of a slide, which is read, decoded and scaled meanwhile, beside the same model that is fed from memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hf_histo import launch
from hf_histo.data.readers import slides
from hf_histo.data.synthetic import slides as synthetic
from hf_histo.data.synthetic import tissue
from hf_histo.errors import HistoError
from hf_histo.evaluation.forward import forward
from hf_histo.experiments import predict_slides
from hf_histo.experiments.benchmark import prediction
from hf_histo.experiments.benchmark.bench import Bench
from hf_histo.experiments.benchmark.timing import Unavailable

LEVEL, FINER = "a level of the slide has the resolution", "the slide has twice the resolution, and is scaled"
READ, READ_FINER = "reading alone in one process", "reading alone in one process, and scaling"


def sides(bench: Bench) -> dict[str, Callable[[], float]]:
    """Seconds for a tile, in float32, of as many tiles as there are images for training.

    A tile is as large as the model's input. The slide is tiled JPEG, as scanners write it, of synthetic tissue.
    """
    return {
        LEVEL: partial(ours, bench, 1),
        FINER: partial(ours, bench, 2),
        prediction.MERGED: partial(prediction.merged, bench, 1),
        READ: partial(read, bench, 1),
        READ_FINER: partial(read, bench, 2),
    }


def ours(bench: Bench, zoom: int) -> float:
    """As `hf_histo predict` does, from the opened slide to logits."""
    model, pixels = prediction.ready(bench)
    path, grid = _grid(bench, model, zoom)
    listed = predict_slides.Listed("slide", path)
    rows = predict_slides.table_of(listed, grid, grid.corners, ["normal", "tumor"])
    with torch.no_grad():
        model(pixel_values=pixels)
    started = time.perf_counter()
    pipeline = bench.pipeline(model, bench.config)
    forward(model, rows, pipeline, batch_size=bench.batch, num_workers=launch.reading_processes(), is_shared=False)
    return (time.perf_counter() - started) / len(rows)


def read(bench: Bench, zoom: int) -> float:
    path, grid = _grid(bench, bench.backbone(1), zoom)
    slide = slides.open_slide(path)
    started = time.perf_counter()
    for x, y in grid.corners:
        slides.read_patch(slide, x, y, grid.size, grid.pixels)
    return (time.perf_counter() - started) / len(grid.corners)


def _grid(bench: Bench, model: nn.Module, zoom: int) -> tuple[Path, slides.Grid]:
    """A slide of `zoom` times the resolution of the tiles, without smaller levels, and the tiles."""
    path, count = bench.folder / f"slide{zoom}.tif", bench.options.images
    side = bench.preprocessing(model).image_size
    if not path.exists():
        rng, number = np.random.default_rng(0), 3 * synthetic.TILE // tissue.SIZE
        source = tissue.slide(rng, 0)
        patches = [patch for _ in range(number**2 // 2) for patch in tissue.pair(rng, source)]
        rows = [np.concatenate(patches[first : first + number], axis=2) for first in range(0, number**2, number)]
        block = np.concatenate(rows, axis=1).transpose(1, 2, 0)  # repeats over the slide, all in whole tiles

        def tile_at(level: int, row: int, column: int) -> synthetic.Image:
            top, left = (synthetic.TILE * (place % 3) for place in (row, column))
            return block[top : top + synthetic.TILE, left : left + synthetic.TILE]

        length = zoom * side * math.ceil(math.sqrt(count))
        resolution = synthetic.MPP / zoom
        synthetic.write_tiles(path, [(length, length)], tile_at, mpp=resolution, quality=synthetic.QUALITY)
    try:
        grid = slides.grid(slides.open_slide(path), mpp=synthetic.MPP, patch_size=side, min_tissue=0)
    except HistoError as error:  # OpenSlide is not installed
        raise Unavailable(str(error)) from None
    return path, replace(grid, corners=grid.corners[:count])
