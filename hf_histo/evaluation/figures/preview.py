"""Preview of training: some images as stored, and the training views of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_histo.data.schema import ImageTable
from hf_histo.evaluation.figures.style import drawing
from hf_histo.transforms.pipeline import Pipeline, collate


def preview(pipeline: Pipeline, rows: datasets.Dataset, path: str | Path, count: int = 8, epochs: int = 7) -> None:
    """Draw training images of each center as stored, as prepared, and as in the first epochs of training, as a PNG.

    Args:
        pipeline: pipeline of the run; its normalizer must have statistics of the centers in `rows`.
        rows: schema table of the training images.
        path: path of the PNG.
        count: number of images, rounded up to the same number for each center.
        epochs: number of epochs of which a view is drawn.
    """
    stored, images = ImageTable(rows), pipeline.read_training(rows)
    centers = np.array(images.centers)
    places = [np.flatnonzero(centers == center) for center in np.unique(centers)]
    each = -(-count // len(places))
    chosen = np.concatenate([found[np.linspace(0, len(found) - 1, each).astype(int)] for found in places]).tolist()
    batch = collate(images.__getitems__(chosen))
    columns = [[sample["image"] for sample in stored.__getitems__(chosen)]]
    preparation = pipeline.preprocessing.preparation
    if not preparation.is_none:
        columns.append([preparation(image) for image in columns[0]])
    columns = [[image / 255 for image in column] for column in columns]
    for epoch in range(epochs):
        views = pipeline.train(batch, epoch, normalize=False)
        columns.append(list(views if pipeline.mixing.is_none else pipeline.mixed(views, batch, epoch)[0]))
    sheet(
        {
            f"{rows[row]['id']}, center {images.center_name(centers[row])}": [
                column[place].permute(1, 2, 0).numpy() for column in columns
            ]
            for place, row in enumerate(chosen)
        },
        path,
    )


def sheet(rows: Mapping[str, Sequence[NDArray[np.float32]]], path: str | Path) -> None:
    """Draw rows of images, each with its name above the first image, as a PNG.

    Args:
        rows: images (H, W, 3) in [0, 1] by name of the row; all rows have the same number of images.
        path: path of the PNG.
    """
    columns = max(map(len, rows.values()))
    with drawing(path, 1.4 * columns, 0.5 + 1.4 * len(rows)) as figure:
        panels = figure.subplots(len(rows), columns, squeeze=False)
        for line, (name, images) in zip(panels, rows.items(), strict=True):
            for place, (axes, image) in enumerate(zip(line, images, strict=True)):
                axes.imshow(image)
                axes.set_axis_off()
                axes.set_title(name if place == 0 else "", fontsize=8)
