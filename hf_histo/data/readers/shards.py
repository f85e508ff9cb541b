"""Parquet and Arrow files of others: how far they expand, and which classes they declare, before they are converted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from hf_histo.data.readers import expansion
from hf_histo.data.readers.builder import EXPANSION, SMALL
from hf_histo.errors import HistoError
from hf_histo.files import regular

FORMATS = ("arrow", "parquet")  # as `datasets` names them


def check_rows(where: str, file: pq.ParquetFile, size: int, width: int) -> None:
    """Raise HistoError, starting with `where`, for a file that declares more than its bytes can hold.

    A value that is repeated takes nothing in parquet, and `width` bytes in each row here.

    Args:
        where: names the file.
        file: opened.
        size: of the file in bytes.
        width: bytes that become of a row.
    """
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    declared = sum(max(group.num_rows * width, group.total_byte_size) for group in groups)
    if declared > SMALL + EXPANSION * size:
        raise _expands(where, declared, size)


def check_content(files: Mapping[str, str | Path]) -> None:
    """Raise HistoError, as `check_rows` does, for files whose values expand too far, or that can't be read.

    All values are read once, by a process whose memory is bounded; see `expansion`.

    Args:
        files: their paths by what names them in messages.
    """
    sizes = {os.fspath(path): regular(path).stat().st_size for path in files.values()}
    bounds = {path: SMALL + EXPANSION * size for path, size in sizes.items()}
    command = [sys.executable, "-P", expansion.__file__, json.dumps(bounds)]
    # The system's allocator gives back what is freed, and reserves nothing.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    by_path = {os.fspath(path): where for where, path in files.items()}
    for path, line in zip_longest(bounds, done.stdout.splitlines()):
        found = f"the reader ended with exit code {done.returncode}" if line is None else json.loads(line)
        if isinstance(found, str):
            raise HistoError(f"{by_path[path]}: can't be read ({found}), expected a whole file; replace it")
        if found >= bounds[path]:
            raise _expands(by_path[path], found, sizes[path])


def schema_of(file: IO[bytes], format: str) -> pa.Schema:
    """The columns of a file in one of `FORMATS`."""
    if format == "parquet":
        return pq.read_schema(file)
    try:
        return pa.ipc.open_stream(file).schema
    except (OSError, pa.ArrowInvalid, MemoryError):  # read so, its first bytes are a length
        file.seek(0)
        return pa.ipc.open_file(file).schema


def check_types(where: str, schema: pa.Schema) -> None:
    """Raise HistoError for a column in which one stored value can stand in many rows, or values take no bytes.

    The size that is read would be no bound for the size that is converted.
    """
    for field in schema:
        if not (pa.types.is_null(field.type) or _is_plain(field.type)):
            raise HistoError(
                f"{where}: column {field.name} is {field.type}, expected texts, bytes, numbers, or lists of them; "
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
    """Raise HistoError for a file that declares other class names than `names`, or another order, for its numbers.

    `datasets` keeps the declaration in the schema's metadata, takes that of one file and leaves the others unread. A
    file without one has nothing but numbers, which are the places in `names`.
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
