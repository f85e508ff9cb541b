"""Checks of parquet and Arrow files before conversion: how far they expand, and which classes they declare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_histo.data.readers import expansion
from hf_histo.data.readers.builder import EXPANSION, SMALL
from hf_histo.errors import HistoError
from hf_histo.files import regular

FORMATS = ("arrow", "parquet")  # as `datasets` names them
FAULTS = (  # exceptions that `datasets` and Arrow raise for damaged files
    *(OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, MemoryError),
    *(pa.ArrowException, datasets.exceptions.DatasetsError),
)


def check_rows(where: str, file: pq.ParquetFile, size: int, width: int) -> None:
    """Raise HistoError for a parquet file that declares more than `EXPANSION` times its size.

    A repeated value takes no space in parquet, but `width` bytes in each row after the conversion.

    Args:
        where: names the file; the error starts with it.
        file: the open file.
        size: size of the file in bytes.
        width: bytes per row after the conversion.
    """
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    declared = sum(max(group.num_rows * width, group.total_byte_size) for group in groups)
    if declared > SMALL + EXPANSION * size:
        raise _expands(where, declared, size)


def check_content(files: Mapping[str, str | Path]) -> None:
    """Raise HistoError for files that can't be read, or whose values expand to more than `EXPANSION` times their size.

    All values are read once, by a process with limited memory; see `expansion`.

    Args:
        files: path of each file, by its name in messages.
    """
    sizes = {os.fspath(path): regular(path).stat().st_size for path in files.values()}
    bounds = {path: SMALL + EXPANSION * size for path, size in sizes.items()}
    command = [sys.executable, "-P", expansion.__file__, json.dumps(bounds)]
    # The system's allocator returns freed memory and reserves none.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    by_path = {os.fspath(path): where for where, path in files.items()}
    for path, line in zip_longest(bounds, done.stdout.splitlines()):
        found = f"the reader ended with exit code {done.returncode}" if line is None else json.loads(line)
        if isinstance(found, str):
            raise HistoError(f"{by_path[path]}: can't be read ({found}), expected a complete file; replace it")
        if found >= bounds[path]:
            raise _expands(by_path[path], found, sizes[path])


def schema_of(file: IO[bytes], format: str) -> pa.Schema:
    """Arrow schema of a file in one of `FORMATS`."""
    if format == "parquet":
        return pq.read_schema(file)
    try:
        return pa.ipc.open_stream(file).schema
    except (OSError, pa.ArrowInvalid, MemoryError):  # a file: as a stream's length, its first bytes are invalid
        file.seek(0)
        return pa.ipc.open_file(file).schema


def check_types(where: str, schema: pa.Schema) -> None:
    """Raise HistoError for a column type that stores one value for many rows (dictionaries), or values of no bytes.

    For such a column, the size in memory would not bound the size after conversion.
    """
    for field in schema:
        if not (pa.types.is_null(field.type) or _is_plain(field.type)):
            raise HistoError(
                f"{where}: column {field.name} is {field.type}, expected text, bytes, numbers, or lists of them; "
                "convert or remove it"
            )


def _is_plain(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _is_plain(kind.storage_type)
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size > 0 and _is_plain(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if pa.types.is_fixed_size_binary(kind):
        return bool(kind.byte_width > 0)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return bool(pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or any(is_kind(kind) for is_kind in texts))


def check_classes(where: str, schema: pa.Schema, column: str, names: Sequence[str]) -> None:
    """Raise HistoError for a file that declares other class names than `names`, or another order, for a label column.

    `datasets` stores class names in the schema's metadata, uses those of one file, and ignores the others. A file
    without class names passes: its labels are taken as indices into `names`.
    """
    declared = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    own = declared.get("info", {}).get("features", {}).get(column, {}).get("names", names)
    if list(own) != list(names):
        raise HistoError(
            f"{where}: declares the classes {', '.join(own)}, expected {', '.join(names)} in this order, as the rest; "
            "write it again with these"
        )


def _expands(where: str, expanded: int, size: int) -> HistoError:
    found = f"expands to {expanded:,} bytes or more, from {size:,}"
    return HistoError(f"{where}: {found}, expected at most {EXPANSION} times as many; write it again")


def readable(rows: Iterable[dict[str, Any]], option: str) -> Iterator[dict[str, Any]]:
    """Yield streamed rows. Raises `HistoError`, starting with `option`, for a damaged shard."""
    try:
        yield from rows
    except FAULTS as error:
        reason = str(error)[:300]
        raise HistoError(f"{option}: a shard can't be read ({reason}), expected a complete one; replace it") from None
