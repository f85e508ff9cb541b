"""Multi-center data in HDF5: one group per image, with the acquisition center in its metadata."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_histo.data.readers import hdf5
from hf_histo.data.readers.builder import EXPANSION, SMALL, FolderBuilder, parts, split_generator
from hf_histo.data.schema import encode_ppm
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)

PROBES = 64  # images that the pixel format of a file is detected from
# Below this maximum, values above 1 could be dark images in [0, 255] or images in an unknown range.
DARKEST_PEAK = 16


class MulticenterHdf5(FolderBuilder):
    """`train.h5`, `val.h5`, `test.h5` with one group per image: `img`, `label` and `metadata`.

    `img` is (3, H, W) or (H, W, 3) in uint8, float16, float32 or float64, with values in [0, 1] or [0, 255]. The format
    is detected in each file, recorded in `info.description`, and required of every image; in a file of floats up to
    255, an image that is not black and has no value above 1 is refused. `label` is 0 or 1, and may be absent or -1 in
    `test.h5`. `metadata` is optional. Its entry 0 is the center; entry 1 may be the slide, which becomes the group;
    others are not read, since one may be the label. `id` is the key; rows are in the text order of keys (0, 1, 10, 2).

    Raises HistoError, naming file and key, for anything else, such as data that was declared but never written. A
    faulty `img` can be left out (`--on_bad_image skip`), a faulty label can't.
    """

    LAYOUT = "challenge"
    OPTIONS = ("on_bad_image",)
    EXPECTED = "train.h5, val.h5 and perhaps test.h5, with one HDF5 group per image"
    LABELS = ("normal", "tumor")

    @classmethod
    def matches(cls, directory: Path) -> bool:
        return any((directory / f"{split}.h5").is_file() for split in ("train", "val", "test"))

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        return ["train.h5", "val.h5", *(["test.h5"] if (directory / "test.h5").is_file() else [])]

    def _files(self) -> dict[str, Path]:
        """The file of each split."""
        names = self.sources(self.config.directory)
        return {name.removesuffix(".h5"): self.config.directory / name for name in names}

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        formats, counts, slides_known = {}, {}, True
        skip = self.config.options.on_bad_image == "skip"
        for split, path in self._files().items():
            with hdf5.open_file(path) as file:
                keys = _keys(file)
                formats[path], counts[path] = _detect(file, keys, skip), len(keys)
                if math.prod(formats[path].shape) * len(keys) > SMALL + EXPANSION * path.stat().st_size:
                    raise HistoError(
                        f"{path}: {len(keys)} images of {formats[path].size} in {path.stat().st_size} bytes, expected "
                        "data for each; several names are links to the same data: export the file again"
                    )
                if split != "test":
                    slides_known = slides_known and _names_slides(file, keys)
        first, *others = formats
        for path in others:
            if formats[path].size != formats[first].size:
                raise HistoError(
                    f"{path}: images of {formats[path].size}, but {formats[first].size} in {first.name}; "
                    "resize one of them"
                )
        found = ", ".join(f"{path.name}: {pixels}" for path, pixels in formats.items())
        self.info.description = f"{found}; group: {'slide (metadata[1])' if slides_known else 'unknown'}"
        logger.info("%s: %s", self.config.directory, self.info.description)
        return [
            split_generator(
                split,
                counts[path],
                path=path,
                parts=parts(counts[path]),
                pixels=formats[path],
                slides_known=slides_known,
                labels_hidden=split == "test",
            )
            for split, path in self._files().items()
        ]

    def _generate_examples(
        self, path: Path, parts: list[range], pixels: PixelFormat, slides_known: bool, labels_hidden: bool
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        with hdf5.open_file(path) as file:
            keys = _keys(file)
            for key in (keys[row] for part in parts for row in part):
                group = _image_group(file, key)
                center, slide = _metadata(group)
                row = {
                    "id": key,
                    "label": _label(group, hidden=labels_hidden),
                    "center": center,
                    # Without the center as a prefix: a slide number is expected at one center only. If a number did
                    # repeat, two slides would share a group, which can't leak images between splits.
                    "group": f"slide_{slide}" if slides_known and slide >= 0 else "",
                }
                with self.skipping():
                    yield key, {**row, "image": {"bytes": encode_ppm(pixels.read(_image(group))), "path": None}}


class MulticenterHdf5File(MulticenterHdf5):
    """A single file of any name in the layout of `MulticenterHdf5`'s `test.h5`, as the split `test`."""

    LAYOUT = "challenge-file"
    EXPECTED = "an HDF5 file with one group per image"

    @classmethod
    def matches(cls, directory: Path) -> bool:
        return directory.is_file()

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        return [""]  # the path itself

    def _files(self) -> dict[str, Path]:
        return {"test": self.config.directory}


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """How a file stores its images: array `shape`, `dtype`, and values in [0, `maximum`], which is 1 or 255."""

    shape: tuple[int, ...]
    dtype: np.dtype
    maximum: int

    @property
    def channels_first(self) -> bool:
        return self.shape[0] == 3

    @property
    def size(self) -> str:
        height, width = self.shape[1:] if self.channels_first else self.shape[:2]
        return f"{height}x{width}"

    def __str__(self) -> str:
        return f"{self.dtype} {'CHW' if self.channels_first else 'HWC'} {self.size} in [0, {self.maximum}]"

    def read(self, dataset: hdf5.Array) -> np.ndarray:
        """Read one image as uint8 (H, W, 3). Raises HistoError if it isn't in this format."""
        image = self.read_raw(dataset)
        if self.dtype != np.uint8:
            if self.maximum == 255 and 0 < image.max() <= 1:
                found = f"values reach only {image.max():.7g}, as of [0, 1]"
                raise HistoError(
                    f"{hdf5.where(dataset)}: {found}, expected [0, 255] as in the rest; scale or remove it"
                )
            image = np.rint(image.astype(np.float32) * (255 // self.maximum)).astype(np.uint8)
        return image.transpose(1, 2, 0) if self.channels_first else image

    def read_raw(self, dataset: hdf5.Array) -> np.ndarray:
        """Read one image as it is stored. Raises HistoError as `read` does."""
        if (dataset.shape, dataset.dtype) != (self.shape, self.dtype):
            found, expected = f"{dataset.dtype} {dataset.shape}", f"{self.dtype} {self.shape}"
            raise HistoError(
                f"{hdf5.where(dataset)}: {found}, expected {expected} as in the rest; convert it like the rest"
            )
        image = hdf5.read(dataset)
        if self.dtype != np.uint8:
            _check_range(dataset, image, self.maximum)
        return image


def _detect(file: hdf5.Item, keys: list[str], skip: bool) -> PixelFormat:
    """Pixel format of a file, detected from up to `PROBES` images spread evenly over it.

    With `skip`, unreadable images are ignored.
    """
    pixels, peak = None, 0.0
    for key in keys[:: -(-len(keys) // PROBES)]:
        try:
            image = _image(_image_group(file, key))
            found = pixels or PixelFormat(image.shape, image.dtype, maximum=255)
            peak = max(peak, float(found.read_raw(image).max()))
            pixels = found
        except HistoError as error:
            if not skip:
                raise
            reason = error
    if pixels is None:
        raise reason
    if 1 < peak < DARKEST_PEAK or (peak <= 1 and pixels.dtype == np.uint8):
        raise HistoError(
            f"{file.file}: {pixels.dtype} values of {keys[0]}/img and others reach only {peak:.7g}, expected "
            "floats in [0, 1] or any type in [0, 255]; scale img to one of the two"
        )
    return dataclasses.replace(pixels, maximum=1 if peak <= 1 else 255)


def _names_slides(file: hdf5.Item, keys: list[str]) -> bool:
    """Whether `metadata[1]` is the slide: in a labeled file, it is not unless it differs from the label somewhere."""
    groups = (_image_group(file, key) for key in keys)
    return any(_metadata(group)[1] not in (-1, _label(group, hidden=False)) for group in groups)


def _keys(file: hdf5.Item) -> list[str]:
    """Names of the groups in the file, in text order."""
    keys = []
    for key in hdf5.names(file):
        if not (isinstance(key, str) and key.isprintable()):  # e.g. bytes that are not UTF-8, which a table can't hold
            raise HistoError(f"{file.file}: a group is named {key!r}, expected printable text; rename it")
        keys.append(key)
    if not keys:
        raise HistoError(f"{file.file}: no images, expected one group per image; export the file again")
    return sorted(keys)


def _image_group(file: hdf5.Item, key: str) -> hdf5.Item:
    group = hdf5.member(file, key)
    if group is None or not group.is_group:
        raise HistoError(f"{file.file}: {key}: not a group, expected one with img for each image; export again")
    return group


def _image(group: hdf5.Item) -> hdf5.Array:
    """The dataset `img`, not yet read, after checking its shape and dtype."""
    dataset = hdf5.array(group, "img", "uf")
    if dataset is None:
        raise HistoError(f"{hdf5.where(group)}: no img, expected the image there; add it or remove the group")
    shape, dtype = dataset.shape, dataset.dtype
    if len(shape) != 3 or 0 in shape or (shape[0] == 3) == (shape[2] == 3):
        raise HistoError(
            f"{hdf5.where(dataset)}: shape {shape}, expected (3, H, W) or (H, W, 3) with neither H nor W equal to 3; "
            "convert it to RGB"
        )
    if dataset.nbytes > hdf5.MAX_BYTES:
        raise HistoError(
            f"{hdf5.where(dataset)}: {dtype} of shape {shape}, expected at most {hdf5.MAX_BYTES} bytes; "
            "cut it into patches"
        )
    if dtype != np.uint8 and (dtype.kind != "f" or dtype.itemsize > 8):
        raise HistoError(f"{hdf5.where(dataset)}: {dtype}, expected uint8, float16, float32 or float64; convert it")
    return dataset


def _label(group: hdf5.Item, hidden: bool) -> int:
    """The label, 0 or 1; -1 if it is absent or -1, which is an error unless `hidden`."""
    dataset = hdf5.array(group, "label", "biuf")
    if dataset is None and hidden:
        return -1
    if dataset is None:
        raise HistoError(f"{hdf5.where(group)}: no label, expected 0 or 1; only test.h5 may go without labels")
    value = hdf5.read(dataset).item() if dataset.size == 1 else f"an array of shape {dataset.shape}"
    if value not in ((-1, 0, 1) if hidden else (0, 1)):
        raise HistoError(f"{hdf5.where(dataset)}: {value}, expected 0 or 1; correct it or remove the group")
    return int(value)


def _metadata(group: hdf5.Item) -> tuple[int, int]:
    """Acquisition center, and the candidate for the slide, each -1 where unknown.

    Entry 1 is used only if there are at least three entries: with two, it is more likely the label.
    """
    dataset = hdf5.array(group, "metadata", "iuf")
    if dataset is None:
        return -1, -1
    if len(dataset.shape) != 1 or not 0 < dataset.size <= 1000:
        raise HistoError(
            f"{hdf5.where(dataset)}: shape {dataset.shape}, expected (n,) starting with the center; correct it"
        )
    values = hdf5.read(dataset)[: 2 if dataset.size >= 3 else 1].tolist()
    if not all(float(value).is_integer() for value in values):
        raise HistoError(
            f"{hdf5.where(dataset)}: {values}, expected whole numbers starting with the center; correct it"
        )
    center, slide = (max(-1, int(value)) for value in [*values, -1][:2])
    if center >= 2**63:
        raise HistoError(f"{hdf5.where(dataset)}: center {center}, expected one below 2^63; correct it")
    return center, slide


def _check_range(dataset: hdf5.Array, image: np.ndarray, maximum: int) -> None:
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= maximum):  # also true of NaN
        raise HistoError(
            f"{hdf5.where(dataset)}: values from {low:g} to {high:g}, expected [0, {maximum}]"
            f"{' as in the rest' if maximum == 1 else ' or [0, 1]'}; undo any normalization of img"
        )
