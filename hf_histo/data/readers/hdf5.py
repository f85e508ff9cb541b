"""Patches in HDF5 files: the multi-center challenge (one group per image) and PatchCamelyon (one array per file)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import pandas as pd

from hf_histo.data.readers.builder import EXPANSION, SMALL, FolderBuilder, split_generator
from hf_histo.data.schema import MAX_PIXELS, encode_ppm
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)

MAX_BYTES = 3 * MAX_PIXELS  # of an image, and of a chunk, which HDF5 reads whole; looked at before anything is read
MAX_ROWS = 100_000_000
PROBES = 64  # images that tell the pixel format of a file
# Below this, an image that exceeds 1 may be a dark one in [0, 255] as well as one in an unknown range.
DARKEST_PEAK = 16

# What h5py raises for objects that are damaged, cut off or of a type that NumPy lacks.
UNREADABLE = (OSError, KeyError, RuntimeError, TypeError, ValueError)


class Challenge(FolderBuilder):
    """`train.h5`, `val.h5`, `test.h5` with one group per image: `img`, `label` and `metadata`.

    `img` is (3, H, W) or (H, W, 3) in uint8 or float16, 32 or 64, with values in [0, 1] or [0, 255]: read from each
    file, recorded in `info.description`, and demanded of every image: in floats up to 255, one that is not black and
    does not exceed 1 is refused, and so is what was declared and never written. `label` is 0 or 1, and may be absent or
    -1 in `test.h5`. `metadata` is optional; its entry 0 is the center and the only one fit for a model, since a later
    one may be the label. Rows keep the text order of the keys (0, 1, 10, 2), and `id` is the key.

    Raises HistoError, naming file and key, for everything else; an `img` that is at fault can be left out
    (`--on_bad_image skip`), a label can't.
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
        """The file of every split."""
        names = self.sources(self.config.directory)
        return {name.removesuffix(".h5"): self.config.directory / name for name in names}

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        formats, counts, slides_known = {}, {}, True
        skip = self.config.options.on_bad_image == "skip"
        for split, path in self._files().items():
            with _open(path) as file:
                keys = _keys(file)
                formats[path], counts[path] = _detect(file, keys, skip), len(keys)
                if math.prod(formats[path].shape) * len(keys) > SMALL + EXPANSION * path.stat().st_size:
                    raise HistoError(
                        f"{path}: {len(keys)} images of {formats[path].size} in {path.stat().st_size} bytes, expected "
                        "data for each; they are links to one another: export the file again"
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
                pixels=formats[path],
                slides_known=slides_known,
                labels_hidden=split == "test",
            )
            for split, path in self._files().items()
        ]

    def _generate_examples(
        self, path: Path, pixels: PixelFormat, slides_known: bool, labels_hidden: bool
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        with _open(path) as file:
            for key in _keys(file):
                group = _image_group(file, key)
                center, slide = _metadata(group)
                row = {
                    "id": key,
                    "label": _label(group, hidden=labels_hidden),
                    "center": center,
                    # Without the center as a prefix: in the published files a slide number belongs to one center, and
                    # where numbers did repeat, two slides sharing a group is the mistake that can't leak.
                    "group": f"slide_{slide}" if slides_known and slide >= 0 else "",
                }
                with self.skipping():
                    yield key, {**row, "image": {"bytes": encode_ppm(pixels.read(_image(group))), "path": None}}


class ChallengeFile(Challenge):
    """One file in the layout of `Challenge`'s test.h5, whatever its name, as the split `test`."""

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


class PatchCamelyon(FolderBuilder):
    """PatchCamelyon as published (https://github.com/basveeling/pcam), unpacked.

    Per split (train, valid, test) a file `..._x.h5` with `x`, uint8 (N, H, W, 3), one `..._y.h5` with `y`, N labels 0
    or 1 (optional for test), and perhaps `..._meta.csv`, whose column `wsi` is the group. `id` is the row number.
    The center is unknown.

    Raises HistoError, naming the file, where these disagree, and for a patch that can't be read (unless such are left
    out: `--on_bad_image skip`).
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
        names = [_pcam(split, part) for split in ("train", "valid", "test") for part in ("x.h5", "y.h5", "meta.csv")]
        optional = [name for name in names if name.endswith(".csv") or "_test_" in name]
        return [name for name in names if name not in optional or (directory / name).is_file()]

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        directory = self.config.directory
        sources = self.sources(directory)
        generators, described = [], []
        for name, split in (("train", "train"), ("val", "valid"), ("test", "test")):
            images, labels, meta = (_pcam(split, part) for part in ("x.h5", "y.h5", "meta.csv"))
            if images not in sources:
                continue
            with _open(directory / images) as file:
                shape = _patches(file).shape
            generators.append(
                split_generator(
                    name,
                    shape[0],
                    path=directory / images,
                    labels=_pcam_labels(directory / labels, shape[0]) if labels in sources else [-1] * shape[0],
                    slides=_pcam_slides(directory / meta, shape[0]) if meta in sources else [""] * shape[0],
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
        with _open(path) as file:
            patches = _patches(file)
            # Whole chunks at a time: reading by row would decompress a chunk again for each of its rows.
            step = min(512, max(1, MAX_BYTES // math.prod(patches.shape[1:])))
            step = step - step % (patches.chunks or (1,))[0] or step
            for start in range(0, len(patches), step):
                rows = range(start, min(start + step, len(patches)))
                for row, patch in zip(rows, self._block(patches, rows), strict=True):
                    with self.skipping():
                        image = _read(patches, row) if patch is None else patch
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

    def _block(self, patches: h5py.Dataset, rows: range) -> Sequence[np.ndarray | None]:
        """The patches, or None for each where one can't be read and is to be left out."""
        try:
            return list(_read(patches, slice(rows.start, rows.stop)))
        except HistoError:
            if self.config.options.on_bad_image == "error":
                raise
            return [None] * len(rows)


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """How a file stores its images: array `shape`, `dtype`, and values in [0, `maximum`], which is 1 or 255."""

    shape: tuple[int, int, int]
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

    def read(self, dataset: h5py.Dataset) -> np.ndarray:
        """Read one image as uint8 (H, W, 3). Raises HistoError where it isn't as this format says."""
        image = self.read_raw(dataset)
        if self.dtype != np.uint8:
            if self.maximum == 255 and 0 < image.max() <= 1:
                found = f"values reach only {image.max():.7g}, as of [0, 1]"
                raise HistoError(f"{_where(dataset)}: {found}, expected [0, 255] as in the rest; scale or remove it")
            image = np.rint(image.astype(np.float32) * (255 // self.maximum)).astype(np.uint8)
        return image.transpose(1, 2, 0) if self.channels_first else image

    def read_raw(self, dataset: h5py.Dataset) -> np.ndarray:
        """Read one image as it is stored. Raises HistoError as `read` does."""
        if (dataset.shape, dataset.dtype) != (self.shape, self.dtype):
            found, expected = f"{dataset.dtype} {dataset.shape}", f"{self.dtype} {self.shape}"
            raise HistoError(
                f"{_where(dataset)}: {found}, expected {expected} as in the rest; convert it like the rest"
            )
        image = _read(dataset)
        if self.dtype != np.uint8:
            _check_range(dataset, image, self.maximum)
        return image


def _detect(file: h5py.File, keys: list[str], skip: bool) -> PixelFormat:
    """The pixel format of a challenge file, from up to `PROBES` images spread evenly over it.

    With `skip`, those that can't be read tell nothing.
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
            f"{file.filename}: {pixels.dtype} values of {keys[0]}/img and others reach only {peak:.7g}, expected "
            "floats in [0, 1] or any type in [0, 255]; scale img to one of the two"
        )
    return dataclasses.replace(pixels, maximum=1 if peak <= 1 else 255)


def _names_slides(file: h5py.File, keys: list[str]) -> bool:
    """Whether `metadata[1]` names slides, in that it isn't the label all over a labeled file."""
    groups = (_image_group(file, key) for key in keys)
    return any(_metadata(group)[1] not in (-1, _label(group, hidden=False)) for group in groups)


def _image_group(file: h5py.File, key: str) -> h5py.Group:
    group = _member(file, key)
    if not isinstance(group, h5py.Group):
        raise HistoError(f"{file.filename}: {key}: not a group, expected one with img for each image; export again")
    return group


def _image(group: h5py.Group) -> h5py.Dataset:
    """The dataset `img`, with a shape and dtype that an image can have; nothing is read yet."""
    dataset = _dataset(group, "img", "uf")
    if dataset is None:
        raise HistoError(f"{_where(group)}: no img, expected the image there; add it or remove the group")
    shape, dtype = dataset.shape, dataset.dtype
    if len(shape) != 3 or 0 in shape or (shape[0] == 3) == (shape[2] == 3):
        raise HistoError(
            f"{_where(dataset)}: shape {shape}, expected (3, H, W) or (H, W, 3) with neither H nor W equal to 3; "
            "convert it to RGB"
        )
    if dataset.nbytes > MAX_BYTES:
        raise HistoError(
            f"{_where(dataset)}: {dtype} of shape {shape}, expected at most {MAX_BYTES} bytes; cut it into patches"
        )
    if dtype != np.uint8 and (dtype.kind != "f" or dtype.itemsize > 8):
        raise HistoError(f"{_where(dataset)}: {dtype}, expected uint8, float16, float32 or float64; convert it")
    return dataset


def _label(group: h5py.Group, hidden: bool) -> int:
    """0 or 1, or -1 where it is absent or -1 and may be `hidden`."""
    dataset = _dataset(group, "label", "biuf")
    if dataset is None and hidden:
        return -1
    if dataset is None:
        raise HistoError(f"{_where(group)}: no label, expected 0 or 1; only test.h5 may go without labels")
    value = _read(dataset).item() if dataset.size == 1 else f"an array of shape {dataset.shape}"
    if value not in ((-1, 0, 1) if hidden else (0, 1)):
        raise HistoError(f"{_where(dataset)}: {value}, expected 0 or 1; correct it or remove the group")
    return int(value)


def _metadata(group: h5py.Group) -> tuple[int, int]:
    """The center, and what may be the slide, each -1 where unknown.

    Entry 1 is looked at only where there are at least three entries: of two, it is likelier the label.
    """
    dataset = _dataset(group, "metadata", "iuf")
    if dataset is None:
        return -1, -1
    if dataset.ndim != 1 or not 0 < dataset.size <= 1000:
        raise HistoError(
            f"{_where(dataset)}: shape {dataset.shape}, expected (n,) starting with the center; correct it"
        )
    values = _read(dataset)[: 2 if dataset.size >= 3 else 1].tolist()
    if not all(float(value).is_integer() for value in values):
        raise HistoError(f"{_where(dataset)}: {values}, expected whole numbers starting with the center; correct it")
    center, slide = (max(-1, int(value)) for value in [*values, -1][:2])
    if center >= 2**63:
        raise HistoError(f"{_where(dataset)}: center {center}, expected one below 2^63; correct it")
    return center, slide


def _check_range(dataset: h5py.Dataset, image: np.ndarray, maximum: int) -> None:
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= maximum):  # also true of NaN
        raise HistoError(
            f"{_where(dataset)}: values from {low:g} to {high:g}, expected [0, {maximum}]"
            f"{' as in the rest' if maximum == 1 else ' or [0, 1]'}; undo any normalization of img"
        )


def _pcam(split: str, part: str) -> str:
    return f"camelyonpatch_level_2_split_{split}_{part}"


def _patches(file: h5py.File) -> h5py.Dataset:
    dataset = _dataset(file, "x", "u")
    if dataset is None:
        raise HistoError(f"{file.filename}: no x, expected the patches there; download the file again")
    shape = dataset.shape
    fits = len(shape) == 4 and 0 < shape[0] <= MAX_ROWS and shape[3] == 3 and 0 < math.prod(shape[1:]) <= MAX_BYTES
    if dataset.dtype != np.uint8 or not fits:
        raise HistoError(
            f"{_where(dataset)}: {dataset.dtype} {shape}, expected uint8 (N, H, W, 3) with N from 1 to {MAX_ROWS} and "
            f"at most {MAX_PIXELS} pixels; download the file again"
        )
    return dataset


def _pcam_labels(path: Path, count: int) -> list[int]:
    with _open(path) as file:
        dataset = _dataset(file, "y", "biu")
        if dataset is None or dataset.size != count:
            found = "no y" if dataset is None else f"y of shape {dataset.shape}"
            raise HistoError(f"{path}: {found}, expected {count} labels, one for each row of x; download both again")
        labels = _read(dataset).reshape(-1)
    for row in np.flatnonzero((labels != 0) & (labels != 1))[:1]:
        raise HistoError(f"{path}: y: {labels[row]} in row {row}, expected 0 or 1; download the file again")
    return labels.astype(int).tolist()


def _pcam_slides(path: Path, count: int) -> list[str]:
    try:
        slides = pd.read_csv(path, usecols=["wsi"], dtype=str)["wsi"].fillna("").tolist()
    except ValueError as error:
        raise HistoError(f"{path}: {error}, expected a CSV table with a column wsi; download it again") from error
    if len(slides) != count:
        raise HistoError(f"{path}: {len(slides)} rows, expected {count}, one for each row of x; download it again")
    return slides


def _keys(file: h5py.File) -> list[str]:
    """The names in the file in text order."""
    try:
        keys = list(file)
    except UNREADABLE as error:
        raise HistoError(f"{file.filename}: unreadable ({error}); copy or download it again") from error
    if not keys:
        raise HistoError(f"{file.filename}: no images, expected one group per image; export the file again")
    for key in keys:
        if not (isinstance(key, str) and key.isprintable()):  # bytes that are no text, which no table could hold
            raise HistoError(f"{file.filename}: a group is named {key!r}, expected printable text; rename it")
    return sorted(keys)


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise HistoError(f"{path}: not a complete HDF5 file ({error}); copy or download it again") from error


def _member(parent: h5py.Group, name: str) -> h5py.Group | h5py.Dataset | None:
    """What `parent` holds under `name`, None where it holds nothing.

    Only hard links are followed: an external link, or a soft link whose path runs through one, leads to another file.
    The type of a link is asked of the low-level interface, because `name in parent` would already follow it. A name
    with a slash in it, which only a forged file has, would be taken for a path through other links.
    """
    links, raw = parent.id.links, name.encode("utf-8", "surrogateescape")
    if "/" in name or name == ".":
        raise HistoError(f"{_where(parent, name)}: a path, expected a name without slashes; export the file again")
    try:
        if not links.exists(raw):
            return None
        if links.get_info(raw).type == h5py.h5l.TYPE_HARD:
            return parent[name]
    except UNREADABLE as error:
        raise HistoError(f"{_where(parent, name)}: unreadable ({error}); copy or download the file again") from error
    raise HistoError(f"{_where(parent, name)}: a soft or external link, expected the data itself; copy it in")


def _dataset(parent: h5py.Group, name: str, kinds: str) -> h5py.Dataset | None:
    """The dataset `name` of `parent` with a dtype of these NumPy `kinds` and data inside the file, unread, or None."""
    dataset = _member(parent, name)
    if dataset is None:
        return None
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise HistoError(f"{_where(dataset)}: a group or empty, expected an array; export the file again")
    try:
        dtype, outside = dataset.dtype, dataset.external or dataset.is_virtual
        stored, chunk = dataset.id.get_storage_size(), math.prod(dataset.chunks or (0,)) * dtype.itemsize
    except UNREADABLE as error:
        raise HistoError(
            f"{_where(dataset)}: unreadable ({error}), expected plain numbers; export the file again"
        ) from error
    if outside:
        raise HistoError(f"{_where(dataset)}: data kept in other files, expected it in this one; copy it in")
    if dtype.kind not in kinds:
        raise HistoError(f"{_where(dataset)}: dtype {dtype}, expected plain numbers; convert it")
    if dataset.nbytes > SMALL + EXPANSION * stored or chunk > MAX_BYTES:
        found = f"{dtype} of shape {dataset.shape} in chunks of {chunk} bytes, {stored} bytes on disk"
        raise HistoError(f"{_where(dataset)}: {found}, expected the data to be there; export the file again")
    if missing := _unwritten(dataset):
        found = f"{missing} were never written, and would be read as {dataset.fillvalue}"
        raise HistoError(f"{_where(dataset)}: {found}, expected all of it; export the file again")
    return dataset


def _unwritten(dataset: h5py.Dataset) -> str:
    """Which part of a dataset holds no data, but what HDF5 fills in; "" where all was written.

    Storage is allocated when it is first written to, whole chunks of it at a time
    (https://docs.hdfgroup.org, "H5Pset_alloc_time").
    """
    try:
        if dataset.size and not dataset.id.get_storage_size():
            return "its values"
        if dataset.chunks:
            sides = zip(dataset.shape, dataset.chunks, strict=True)
            expected = math.prod(-(-extent // chunk) for extent, chunk in sides)
            if (written := dataset.id.get_num_chunks()) < expected:
                return f"{expected - written} of {expected} chunks"
    except UNREADABLE as error:
        raise HistoError(f"{_where(dataset)}: unreadable ({error}); copy or download the file again") from error
    return ""


def _read(dataset: h5py.Dataset, rows: slice | int | tuple[()] = ()) -> np.ndarray:
    try:
        return np.asarray(dataset[rows])
    except UNREADABLE as error:
        place = f"row {rows}: " if isinstance(rows, int) else ""
        raise HistoError(f"{_where(dataset)}: {place}unreadable ({error}); copy or download the file again") from error


def _where(item: h5py.Group | h5py.Dataset, member: str = "") -> str:
    return f"{item.file.filename}: {f'{item.name}/{member}'.strip('/')}"
