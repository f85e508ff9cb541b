"""PatchCamelyon in HDF5: one array of patches per split."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from hf_histo.data.readers import hdf5
from hf_histo.data.readers.builder import FolderBuilder, split_generator
from hf_histo.data.reading import MAX_PIXELS
from hf_histo.data.schema import encode_ppm
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)

MAX_ROWS = 100_000_000


class PatchCamelyon(FolderBuilder):
    """PatchCamelyon as published (https://github.com/basveeling/pcam), with the .gz files decompressed.

    Each split (train, valid, test) has a file `..._x.h5` with `x`, uint8 (N, H, W, 3); a file `..._y.h5` with `y`, N
    labels 0 or 1 (optional for test); and optionally `..._meta.csv`, whose column `wsi` is the group. `id` is the row
    number. The center is unknown.

    Raises HistoError, naming the file, for different numbers of rows, other shapes, types or labels, and a patch that
    can't be read (unless `--on_bad_image skip` leaves it out).
    """

    LAYOUT = "patch_camelyon"
    OPTIONS = ("on_bad_image",)
    EXPECTED = "camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, unpacked, and perhaps ..._meta.csv"
    LABELS = ("normal", "tumor")

    @classmethod
    def matches(cls, directory: Path) -> bool:
        return any(directory.glob("camelyonpatch_level_2_split_*_[xy].h5"))

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        names = [
            _file_name(split, part) for split in ("train", "valid", "test") for part in ("x.h5", "y.h5", "meta.csv")
        ]
        optional = [name for name in names if name.endswith(".csv") or "_test_" in name]
        return [name for name in names if name not in optional or (directory / name).is_file()]

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        directory = self.config.directory
        sources = self.sources(directory)
        generators, described = [], []
        for name, split in (("train", "train"), ("val", "valid"), ("test", "test")):
            images, labels, meta = (_file_name(split, part) for part in ("x.h5", "y.h5", "meta.csv"))
            if images not in sources:
                continue
            with hdf5.open_file(directory / images) as file:
                shape = _patches(file).shape
            generators.append(
                split_generator(
                    name,
                    shape[0],
                    path=directory / images,
                    labels=_labels(directory / labels, shape[0]) if labels in sources else [-1] * shape[0],
                    slides=_slides(directory / meta, shape[0]) if meta in sources else [""] * shape[0],
                )
            )
            described.append(
                f"{images}: uint8 HWC {shape[1]}x{shape[2]}, group: {'wsi' if meta in sources else 'unknown'}"
            )
        self.info.description = "; ".join(described)
        logger.info("%s: %s", directory, self.info.description)
        return generators

    def _generate_examples(
        self, path: Path, labels: list[int], slides: list[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        with hdf5.open_file(path) as file:
            patches = _patches(file)
            # Many rows at a time: reading row by row would decompress a chunk again for each of its rows.
            step = min(512, max(1, hdf5.MAX_BYTES // math.prod(patches.shape[1:])))
            step = step - step % (patches.chunks or (1,))[0] or step
            for start in range(0, patches.shape[0], step):
                rows = range(start, min(start + step, patches.shape[0]))
                for row, patch in zip(rows, self._block(patches, rows), strict=True):
                    with self.skipping():
                        image = hdf5.read(patches, row) if patch is None else patch
                        yield (
                            row,
                            {
                                "id": str(row),
                                "image": {"bytes": encode_ppm(image), "path": None},
                                "label": labels[row],
                                "center": -1,
                                "group": slides[row],
                            },
                        )

    def _block(self, patches: hdf5.Array, rows: range) -> Sequence[np.ndarray | None]:
        """The patches of `rows`; None for each one that can't be read and is to be left out."""
        try:
            return list(hdf5.read(patches, slice(rows.start, rows.stop)))
        except HistoError:
            if self.config.options.on_bad_image == "error":
                raise
            return [None] * len(rows)


def _file_name(split: str, part: str) -> str:
    return f"camelyonpatch_level_2_split_{split}_{part}"


def _patches(file: hdf5.Item) -> hdf5.Array:
    dataset = hdf5.array(file, "x", "u")
    if dataset is None:
        raise HistoError(f"{file.file}: no x, expected the patches there; download the file again")
    shape = dataset.shape
    fits = len(shape) == 4 and 0 < shape[0] <= MAX_ROWS and shape[3] == 3 and 0 < math.prod(shape[1:]) <= hdf5.MAX_BYTES
    if dataset.dtype != np.uint8 or not fits:
        raise HistoError(
            f"{hdf5.where(dataset)}: {dataset.dtype} {shape}, expected uint8 (N, H, W, 3) with N from 1 to {MAX_ROWS} "
            f"and at most {MAX_PIXELS} pixels; download the file again"
        )
    return dataset


def _labels(path: Path, count: int) -> list[int]:
    with hdf5.open_file(path) as file:
        dataset = hdf5.array(file, "y", "biu")
        if dataset is None or dataset.size != count:
            found = "no y" if dataset is None else f"y of shape {dataset.shape}"
            raise HistoError(f"{path}: {found}, expected {count} labels, one for each row of x; download both again")
        labels = hdf5.read(dataset).reshape(-1)
    for row in np.flatnonzero((labels != 0) & (labels != 1))[:1]:
        raise HistoError(f"{path}: y: {labels[row]} in row {row}, expected 0 or 1; download the file again")
    return labels.astype(int).tolist()


def _slides(path: Path, count: int) -> list[str]:
    try:
        slides = pd.read_csv(path, usecols=["wsi"], dtype=str)["wsi"].fillna("").tolist()
    except ValueError as error:
        raise HistoError(f"{path}: {error}, expected a CSV table with a column wsi; download it again") from error
    if len(slides) != count:
        raise HistoError(f"{path}: {len(slides)} rows, expected {count}, one for each row of x; download it again")
    return slides
