"""Parquet files of others: how far they expand, and which classes they declare, before they are converted."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow.parquet as pq

from hf_histo.data.readers.builder import EXPANSION, SMALL
from hf_histo.errors import HistoError

BATCH = 16  # rows that are expanded at a time


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


def check_content(where: str, file: pq.ParquetFile, size: int) -> None:
    """Raise HistoError, as `check_rows` does, for a file whose values expand too far: all are read, few at a time."""
    expanded = 0
    for batch in file.iter_batches(batch_size=BATCH):
        expanded += batch.nbytes
        if expanded > SMALL + EXPANSION * size:
            raise _expands(where, expanded, size)


def check_classes(where: str, file: pq.ParquetFile, column: str, names: Sequence[str]) -> None:
    """Raise HistoError for a file that declares other class names than `names`, or another order, for its numbers.

    `datasets` keeps the declaration in the schema's metadata, takes that of one file and leaves the others unread. A
    file without one has nothing but numbers, which are the places in `names`.
    """
    declared = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    own = declared.get("info", {}).get("features", {}).get(column, {}).get("names", names)
    if list(own) != list(names):
        raise HistoError(
            f"{where}: declares the classes {', '.join(own)}, expected {', '.join(names)} in this order, as the rest; "
            "write it again with these"
        )


def _expands(where: str, expanded: int, size: int) -> HistoError:
    found = f"expands to {expanded:,} bytes or more, from {size:,}"
    return HistoError(f"{where}: {found}, expected at most {EXPANSION} times as many; write it again")
