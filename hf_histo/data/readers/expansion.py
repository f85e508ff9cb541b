"""Measure how many bytes parquet and Arrow files expand to, in a process with limited memory.

    python -P expansion.py {"FILE": BOUND, ...}

A parquet page or Arrow buffer is decompressed as a whole, to the size that it declares itself, before anything can be
counted: a few kilobytes may become two gigabytes. Therefore the memory of this process is limited, on Linux.
`shards.check_content` runs this file as a script; it imports nothing from this package, so that it starts quickly.

For each file it prints a line of JSON: the number of bytes, counted up to the bound, or the reason why the file can't
be read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FEW, BLOCK = 16, 2**21  # read at a time: rows of variable-length values, and values of fixed length
SLACK, MOST = 2**27, 2**32  # bytes: memory allowed beyond a file and its bound, and the largest bound
NULL = 8  # bytes counted for a null: it takes none in a column of type null, but does after a cast


def main() -> None:
    for path, bound in json.loads(sys.argv[1]).items():
        _limit(min(bound, MOST) + Path(path).stat().st_size)
        try:
            found: int | str = _expanded(path, bound)
        except MemoryError:
            found = bound
        except Exception as error:  # whatever Arrow raises of a damaged file
            found = " ".join(str(error).split())[:300] or type(error).__name__
        print(json.dumps(found), flush=True)


def _limit(more: int) -> None:
    """Limit the memory of this process to what it uses now plus `more` bytes and `SLACK`."""
    if sys.platform == "linux":
        import resource

        status = Path("/proc/self/status").read_text()
        taken = 1024 * int(status.partition("VmData:")[2].split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = taken + more + SLACK
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if most < 0 else min(wanted, most), most))


def _expanded(path: str, bound: int) -> int:
    expanded = 0
    for batch in _parquet(path) if _is_parquet(path) else _arrow(path):
        expanded += sum(column.nbytes or NULL * len(column) for column in batch.columns)
        if expanded > bound:
            break
    return expanded


def _is_parquet(path: str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(4) == b"PAR1"


def _parquet(path: str) -> Iterator[pa.RecordBatch | pa.Table]:
    file = pq.ParquetFile(path, pre_buffer=False)
    others = [field.name for field in file.schema_arrow if not pa.types.is_primitive(field.type)]
    fixed = [field.name for field in file.schema_arrow if pa.types.is_primitive(field.type)]
    for group in range(file.num_row_groups):
        step = max(1, BLOCK // max(1, file.metadata.row_group(group).num_rows))
        for start in range(0, len(fixed), step):
            yield file.read_row_group(group, columns=fixed[start : start + step], use_threads=False)
        if others:
            yield from file.iter_batches(FEW, row_groups=[group], columns=others, use_threads=False)


def _arrow(path: str) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow stream or, as `datasets` opens it, of an Arrow file."""
    with pa.OSFile(path) as file:
        try:
            batches = pa.ipc.open_stream(file)
        except (OSError, pa.ArrowInvalid, MemoryError):  # a file: as a stream's length, its first bytes are invalid
            file.seek(0)
            opened = pa.ipc.open_file(file)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        for batch in batches:
            batch.validate(full=True)
            yield batch


if __name__ == "__main__":
    main()
