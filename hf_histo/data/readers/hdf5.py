"""Safe reading of HDF5 files, which may be damaged or forged: sizes are checked first, and no link is followed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s, h5t

from hf_histo.data.readers.builder import EXPANSION, SMALL
from hf_histo.data.reading import MAX_PIXELS
from hf_histo.errors import HistoError

MAX_BYTES = 3 * MAX_PIXELS  # largest image, and largest chunk (HDF5 reads whole chunks); checked before reading
MAX_HEADER = 2**16  # bytes of an object header that are compared

# What h5py raises for objects that are damaged, truncated or of a type that NumPy lacks.
UNREADABLE = (OSError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(slots=True)
class Header:
    """Bytes of the object header of an array before and after the address of its data, and its shape and dtype."""

    before: bytes
    after: bytes
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(slots=True)
class Source:
    """An open file, and what is known of its arrays.

    Attributes:
        path: of the file, for messages.
        size: bytes of the file.
        descriptor: that of the open file; None where the bytes of the file can't be read beside HDF5.
        types: by name, the type of the last array of that name, its NumPy dtype, and its type in memory.
        headers: by name and allowed kinds, the header of the last array of that name that passed the checks of `array`.
    """

    path: str
    size: int
    descriptor: int | None
    types: dict[str, tuple[h5t.TypeID, np.dtype, h5t.TypeID | None]] = field(default_factory=dict)
    headers: dict[tuple[str, str], Header] = field(default_factory=dict)


@dataclass(slots=True)
class Item:
    """A group, dataset or named type that was reached by hard links alone.

    `h5py.Group` and `h5py.Dataset` would cost more time than HDF5 itself in files of many small arrays.

    Attributes:
        id: its handle in the low-level interface of h5py.
        source: the file.
        path: within the file, "" for the root group.
    """

    id: h5g.GroupID | h5d.DatasetID | h5t.TypeID
    source: Source
    path: str

    @property
    def file(self) -> str:
        return self.source.path

    @property
    def is_group(self) -> bool:
        return isinstance(self.id, h5g.GroupID)


@dataclass(slots=True)
class Array:
    """A dataset that passed the checks of `array`.

    Attributes:
        source, path: the file, and the path within it.
        shape, dtype: of the values.
        address: position of the values in the file; None where HDF5 reads them, by the handle `id`, in the type
            `memory_type`.
        chunks: shape of the chunks; None for contiguous data.
    """

    source: Source
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    address: int | None = None
    id: Any = None
    memory_type: Any = None
    chunks: tuple[int, ...] | None = None

    @property
    def file(self) -> str:
        return self.source.path

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
        # The default driver; Windows has no `os.pread`.
        descriptor = file.id.get_vfd_handle() if file.driver == "sec2" and hasattr(os, "pread") else None
        try:
            root = h5g.open(file.id, b"/")
        except UNREADABLE as error:
            raise HistoError(f"{path}: unreadable ({error}); copy or download it again") from error
        yield Item(root, Source(str(path), file.id.get_filesize(), descriptor), "")


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
            return Item(open_object(parent.id, raw), parent.source, _path(parent, name))
    except UNREADABLE as error:
        raise HistoError(f"{where(parent, name)}: unreadable ({error}); copy or download the file again") from error
    raise HistoError(f"{where(parent, name)}: a soft or external link, expected the data itself; copy it in")


def array(parent: Item, name: str, kinds: str) -> Array | None:
    """The dataset `name` of `parent`, not yet read, with all data inside the file; None if it does not exist.

    `kinds` are the allowed NumPy dtype kinds, such as "uif". Raises HistoError, naming file and object, for a group,
    another dtype, and data that is stored elsewhere, missing, or far larger than its bytes on disk.
    """
    if found := _alike(parent, name, kinds):
        return found
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
    found = Array(item.source, item.path, shape, dtype, None, data, memory_type, chunks)
    chunk = math.prod(chunks or (0,)) * dtype.itemsize
    if found.nbytes > SMALL + EXPANSION * stored or chunk > MAX_BYTES:
        size = f"{dtype} of shape {shape} in chunks of {chunk} bytes, {stored} bytes on disk"
        raise HistoError(f"{where(item)}: {size}, expected the data to be there; export the file again")
    if missing := _unwritten(found, stored):
        fill = h5py.Dataset(data).fillvalue
        part = f"{missing} were never written, and would be read as {fill}"
        raise HistoError(f"{where(item)}: {part}, expected all of it; export the file again")
    if header := _header(parent, name, found):
        item.source.headers[name, kinds] = header
    return found


def _header(parent: Item, name: str, data: Array) -> Header | None:
    """The header of a checked array, for `_alike`; None unless its values are stored in one piece as NumPy holds them.

    Version 1 alone: a header of version 2 ends in a checksum (HDF5 File Format Specification, IV.A.1, "Data Object
    Header Prefix": the version in byte 0, the size without the prefix of 16 bytes in bytes 8 to 11).
    """
    offset, stored = data.id.get_offset(), data.source.types[name][0]
    if offset is None or data.nbytes > MAX_BYTES or not stored.equal(data.memory_type):
        return None
    start = parent.id.links.get_info(name.encode()).u
    prefix = _bytes(data.source, start, 16)
    size = int.from_bytes(prefix[8:12], "little")
    if prefix[:1] != b"\1" or size > MAX_HEADER:
        return None
    header, address = _bytes(data.source, start, 16 + size), offset.to_bytes(8, "little")
    position = header.find(address)
    if position < 0 or position != header.rfind(address):
        return None
    return Header(header[:position], header[position + 8 :], data.shape, data.dtype)


def _alike(parent: Item, name: str, kinds: str) -> Array | None:
    """An array whose header has the same bytes as the last one's that was checked, but for the address of its data.

    Such an array would pass the same checks: all that HDF5 knows of it is in its header. Not opening it saves more than
    half of the time. Returns None for any other array, and one whose data are not within the file.
    """
    source, header = parent.source, parent.source.headers.get((name, kinds))
    if header is None:
        return None
    try:
        link = parent.id.links.get_info(name.encode())
    except UNREADABLE:
        return None
    if link.type != h5l.TYPE_HARD:
        return None
    end = len(header.before) + 8
    found = _bytes(source, link.u, end + len(header.after))
    if found[: end - 8] != header.before or found[end:] != header.after:
        return None
    address = int.from_bytes(found[end - 8 : end], "little")
    data = Array(source, _path(parent, name), header.shape, header.dtype, address)
    return data if address + data.nbytes <= source.size else None


def _bytes(source: Source, start: int, size: int) -> bytes:
    """Bytes of an open file; fewer where it ends, none where they can't be read beside HDF5."""
    if source.descriptor is None or start >= source.size:
        return b""
    return os.pread(source.descriptor, size, start)


def _path(parent: Item, name: str) -> str:
    return f"{parent.path}/{name}" if parent.path else name


def _types(item: Item, name: str) -> tuple[np.dtype, h5t.TypeID | None]:
    """NumPy dtype of a dataset, and its type in memory (None unless it is of numbers).

    Looked up where the type is that of the last array of the same name, as it mostly is.
    """
    stored = item.id.get_type()
    last = item.source.types.get(name)
    if last is None or not last[0].equal(stored):
        dtype = stored.dtype
        last = stored, dtype, h5t.py_create(dtype) if dtype.kind in "biuf" else None
        item.source.types[name] = last
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
        if data.address is not None:
            values = np.frombuffer(_bytes(data.source, data.address, data.nbytes), data.dtype).reshape(data.shape)
            return values if rows is None else values[rows]
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
