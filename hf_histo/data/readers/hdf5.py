"""Safe reading of HDF5 files, which may be damaged or forged: sizes are checked first, and no link is followed."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np

from hf_histo.data.readers.builder import EXPANSION, SMALL
from hf_histo.data.reading import MAX_PIXELS
from hf_histo.errors import HistoError

MAX_BYTES = 3 * MAX_PIXELS  # largest image, and largest chunk (HDF5 reads whole chunks); checked before reading

# What h5py raises for objects that are damaged, truncated or of a type that NumPy lacks.
UNREADABLE = (OSError, KeyError, RuntimeError, TypeError, ValueError)


def open_file(path: Path) -> h5py.File:
    """Open an HDF5 file for reading. Raises HistoError if it is incomplete or of another format."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise HistoError(f"{path}: not a complete HDF5 file ({error}); copy or download it again") from error


def member(parent: h5py.Group, name: str) -> h5py.Group | h5py.Dataset | None:
    """Group or dataset `name` of `parent`; None if it does not exist.

    Only hard links are followed: an external link, or a soft link whose path runs through one, leads to another file.
    The type of a link is read by the low-level interface, because `name in parent` would already follow it.

    Raises HistoError for another link, an unreadable object, and a name that contains a slash (only a forged file has
    one), which h5py would follow as a path through other links.
    """
    links, raw = parent.id.links, name.encode("utf-8", "surrogateescape")
    if "/" in name or name == ".":
        raise HistoError(f"{where(parent, name)}: a path, expected a name without slashes; export the file again")
    try:
        if not links.exists(raw):
            return None
        if links.get_info(raw).type == h5py.h5l.TYPE_HARD:
            return parent[name]
    except UNREADABLE as error:
        raise HistoError(f"{where(parent, name)}: unreadable ({error}); copy or download the file again") from error
    raise HistoError(f"{where(parent, name)}: a soft or external link, expected the data itself; copy it in")


def array(parent: h5py.Group, name: str, kinds: str) -> h5py.Dataset | None:
    """The dataset `name` of `parent`, not yet read, with all data inside the file; None if it does not exist.

    `kinds` are the allowed NumPy dtype kinds, such as "uif". Raises HistoError, naming file and object, for a group,
    another dtype, and data that is stored elsewhere, missing, or far larger than its bytes on disk.
    """
    dataset = member(parent, name)
    if dataset is None:
        return None
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise HistoError(f"{where(dataset)}: a group or empty, expected an array; export the file again")
    try:
        dtype, outside = dataset.dtype, dataset.external or dataset.is_virtual
        stored, chunk = dataset.id.get_storage_size(), math.prod(dataset.chunks or (0,)) * dtype.itemsize
    except UNREADABLE as error:
        raise HistoError(
            f"{where(dataset)}: unreadable ({error}), expected plain numbers; export the file again"
        ) from error
    if outside:
        raise HistoError(f"{where(dataset)}: data kept in other files, expected it in this one; copy it in")
    if dtype.kind not in kinds:
        raise HistoError(f"{where(dataset)}: dtype {dtype}, expected plain numbers; convert it")
    if dataset.nbytes > SMALL + EXPANSION * stored or chunk > MAX_BYTES:
        found = f"{dtype} of shape {dataset.shape} in chunks of {chunk} bytes, {stored} bytes on disk"
        raise HistoError(f"{where(dataset)}: {found}, expected the data to be there; export the file again")
    if missing := _unwritten(dataset):
        found = f"{missing} were never written, and would be read as {dataset.fillvalue}"
        raise HistoError(f"{where(dataset)}: {found}, expected all of it; export the file again")
    return dataset


def _unwritten(dataset: h5py.Dataset) -> str:
    """Name of the part of a dataset that was never written, which HDF5 would read as a fill value; "" if all was.

    Storage is allocated on the first write, by whole chunks (https://docs.hdfgroup.org, "H5Pset_alloc_time").
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
        raise HistoError(f"{where(dataset)}: unreadable ({error}); copy or download the file again") from error
    return ""


def read(dataset: h5py.Dataset, rows: slice | int | tuple[()] = ()) -> np.ndarray:
    """Read `rows` of a dataset, by default all. Raises HistoError if the dataset is damaged."""
    try:
        return np.asarray(dataset[rows])
    except UNREADABLE as error:
        place = f"row {rows}: " if isinstance(rows, int) else ""
        raise HistoError(f"{where(dataset)}: {place}unreadable ({error}); copy or download the file again") from error


def where(item: h5py.Group | h5py.Dataset, member: str = "") -> str:
    """File and path of an object, for messages."""
    return f"{item.file.filename}: {f'{item.name}/{member}'.strip('/')}"
