"""Forged parquet files whose pages expand further than declared, and the memory used to refuse them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SCRIPT = """
import resource, sys
from pathlib import Path
from hf_histo.data.load import load
from hf_histo.errors import HistoError

error = ""
try:
    load(sys.argv[1], cache_dir=sys.argv[2])
except HistoError as refused:
    error = str(refused)
own = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) // 1024, error)
"""


def forge_page(path: Path, unpacked: int) -> None:
    """Replace the only page of the first column by one of `unpacked` zeros; the footer declares the size it had."""
    content, column = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(0).column(0)
    start, size = column.data_page_offset, column.total_compressed_size
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        for _ in range(unpacked // 2**20):
            stream.write(bytes(2**20))
    body = sink.getvalue().to_pybytes()

    def varint(value: int) -> bytes:
        groups = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)]
        return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])

    def number(value: int) -> bytes:  # thrift's compact protocol: a field of i32 after the one before it, zigzag
        return b"\x15" + varint(2 * value)

    # PageHeader: type 0, both sizes, and field 5: DataPageHeader of one value, plain, levels as runs.
    header = number(0) + number(unpacked) + number(len(body)) + b"\x2c"
    header += number(1) + number(0) + number(3) + number(3) + b"\x00\x00"
    assert len(header) + len(body) <= size, "the page does not fit"
    content[start : start + size] = (header + body).ljust(size, b"\0")
    path.write_bytes(content)


def load_measured(name: str, cache: Path) -> tuple[str, int]:
    """The error of loading a data set ("" if it loads), and the peak memory in MiB of its process or of a child."""
    command = [sys.executable, "-c", SCRIPT, name, str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, _, error = done.stdout.strip().partition(" ")
    return error, int(peak)
