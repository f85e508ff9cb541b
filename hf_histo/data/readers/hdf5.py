"""Safe reading of HDF5 files, which may be damaged or forged: sizes are checked first, and no link is followed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s, h5t

from hf_histo.data.readers.builder import EXPANSION, SMALL
from hf_histo.data.reading import MAX_PIXELS
from hf_histo.errors import HistoError

MAX_BYTES = 3 * MAX_PIXELS  # largest image, and largest chunk (HDF5 reads whole chunks); checked before reading

# What h5py raises for objects that are damaged, truncated or of a type that NumPy lacks.
UNREADABLE = (OSError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(slots=True)
class Item:
    """A group, dataset or named type that was reached by hard links alone.

    `h5py.Group` and `h5py.Dataset` would cost more time than HDF5 itself in files of many small arrays.

    Attributes:
        id: its handle in the low-level interface of h5py.
        file, path: of the HDF5 file, and of the object within it ("" for the root group), for messages.
        known: by name, the type of the last array of that name, its NumPy dtype, and its type in memory.
    """

    id: h5g.GroupID | h5d.DatasetID | h5t.TypeID
    file: str
    path: str
    known: dict[str, tuple[h5t.TypeID, np.dtype, h5t.TypeID | None]]

    @property
    def is_group(self) -> bool:
        return isinstance(self.id, h5g.GroupID)


@dataclass(slots=True)
class Array:
    """A dataset that passed the checks of `array`: its shape and dtype, the shape of its chunks (None: contiguous)."""

    id: h5d.DatasetID
    file: str
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    memory_type: h5t.TypeID
    chunks: tuple[int, ...] | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@contextmanager
def open_file(path: Path) -> Iterator[Item]:
    """The root group of an HDF5 file, open for reading. Raises HistoError if it is incomplete or of another format."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise HistoError(f"{path}: not a complete HDF5 file ({error}); copy or download it again") from error
    with file:
        yield Item(h5g.open(file.id, b"/"), str(path), "", {})


def names(group: Item) -> list[str | bytes]:
    """Names of what is in a group, in the order of the file; bytes where a name is not UTF-8."""
    try:
        return list(h5py.Group(group.id))
    except UNREADABLE as error:
        raise HistoError(f"{group.file}: unreadable ({error}); copy or download it again") from error


def _open(parent: h5g.GroupID, name: bytes) -> h5g.GroupID | h5d.DatasetID | h5t.TypeID:
    """Any object; a dataset fastest."""
    try:
        return h5d.open(parent, name)
    except UNREADABLE:
        return h5o.open(parent, name)


def member(parent: Item, name: str, open_object: Callable[[h5g.GroupID, bytes], Any] = h5o.open) -> Item | None:
    """Group or dataset `name` of `parent`; None if it does not exist.

    Only hard links are followed: an external link, or a soft link whose path runs through one, leads to another file.
    The type of a link is read first, because opening an object would already follow it.

    Raises HistoError for another link, an unreadable object, and a name that contains a slash (only a forged file has
    one), which HDF5 would follow as a path through other links.
    """
    links, raw = parent.id.links, name.encode("utf-8", "surrogateescape")
    if "/" in name or name == ".":
        raise HistoError(f"{where(parent, name)}: a path, expected a name without slashes; export the file again")
    try:
        try:
            kind = links.get_info(raw).type
        except UNREADABLE:
            if links.exists(raw):
                raise
            return None
        if kind == h5l.TYPE_HARD:
            path = f"{parent.path}/{name}" if parent.path else name
            return Item(open_object(parent.id, raw), parent.file, path, parent.known)
    except UNREADABLE as error:
        raise HistoError(f"{where(parent, name)}: unreadable ({error}); copy or download the file again") from error
    raise HistoError(f"{where(parent, name)}: a soft or external link, expected the data itself; copy it in")


def array(parent: Item, name: str, kinds: str) -> Array | None:
    """The dataset `name` of `parent`, not yet read, with all data inside the file; None if it does not exist.

    `kinds` are the allowed NumPy dtype kinds, such as "uif". Raises HistoError, naming file and object, for a group,
    another dtype, and data that is stored elsewhere, missing, or far larger than its bytes on disk.
    """
    item = member(parent, name, _open)
    if item is None:
        return None
    data = item.id
    if not isinstance(data, h5d.DatasetID) or (shape := data.shape) is None:
        raise HistoError(f"{where(item)}: a group or empty, expected an array; export the file again")
    try:
        dtype, memory_type = _types(item, name)
        outside, chunks = _layout(item)
        stored = data.get_storage_size()
    except UNREADABLE as error:
        raise HistoError(
            f"{where(item)}: unreadable ({error}), expected plain numbers; export the file again"
        ) from error
    if outside:
        raise HistoError(f"{where(item)}: data kept in other files, expected it in this one; copy it in")
    if dtype.kind not in kinds or memory_type is None:
        raise HistoError(f"{where(item)}: dtype {dtype}, expected plain numbers; convert it")
    found = Array(data, item.file, item.path, shape, dtype, memory_type, chunks)
    chunk = math.prod(chunks or (0,)) * dtype.itemsize
    if found.nbytes > SMALL + EXPANSION * stored or chunk > MAX_BYTES:
        size = f"{dtype} of shape {shape} in chunks of {chunk} bytes, {stored} bytes on disk"
        raise HistoError(f"{where(item)}: {size}, expected the data to be there; export the file again")
    if missing := _unwritten(found, stored):
        fill = h5py.Dataset(data).fillvalue
        part = f"{missing} were never written, and would be read as {fill}"
        raise HistoError(f"{where(item)}: {part}, expected all of it; export the file again")
    return found


def _types(item: Item, name: str) -> tuple[np.dtype, h5t.TypeID | None]:
    """NumPy dtype of a dataset, and its type in memory (None unless it is of numbers).

    Looked up where the type is that of the last array of the same name, as it mostly is.
    """
    stored = item.id.get_type()
    last = item.known.get(name)
    if last is None or not last[0].equal(stored):
        dtype = stored.dtype
        last = stored, dtype, h5t.py_create(dtype) if dtype.kind in "biuf" else None
        item.known[name] = last
    return last[1:]


def _layout(item: Item) -> tuple[bool, tuple[int, ...] | None]:
    """Whether data of a dataset is in other files, and the shape of its chunks, if any."""
    # Only contiguous data in this file has an offset (https://docs.hdfgroup.org, "H5Dget_offset").
    if item.id.get_offset() is not None:
        return False, None
    created = item.id.get_create_plist()
    layout = created.get_layout()
    outside = layout == h5d.VIRTUAL or created.get_external_count() > 0
    return outside, created.get_chunk() if layout == h5d.CHUNKED else None


def _unwritten(data: Array, stored: int) -> str:
    """Name of the part of a dataset that was never written, which HDF5 would read as a fill value; "" if all was.

    Storage is allocated on the first write, by whole chunks (https://docs.hdfgroup.org, "H5Pset_alloc_time").
    """
    if data.size and not stored:
        return "its values"
    if data.chunks:
        expected = math.prod(-(-extent // chunk) for extent, chunk in zip(data.shape, data.chunks, strict=True))
        try:
            written = data.id.get_num_chunks()
        except UNREADABLE as error:
            raise HistoError(f"{where(data)}: unreadable ({error}); copy or download the file again") from error
        if written < expected:
            return f"{expected - written} of {expected} chunks"
    return ""


def read(data: Array, rows: slice | int | None = None) -> np.ndarray:
    """Read `rows` of a dataset, by default all. Raises HistoError if the dataset is damaged."""
    try:
        if rows is not None:
            return np.asarray(h5py.Dataset(data.id)[rows])
        values = np.empty(data.shape, data.dtype)
        if data.size:
            data.id.read(h5s.ALL, h5s.ALL, values, data.memory_type)
        return values
    except UNREADABLE as error:
        place = f"row {rows}: " if isinstance(rows, int) else ""
        raise HistoError(f"{where(data)}: {place}unreadable ({error}); copy or download the file again") from error


def where(item: Item | Array, member: str = "") -> str:
    """File and path of an object, for messages."""
    return f"{item.file}: {f'{item.path}/{member}'.strip('/')}"
