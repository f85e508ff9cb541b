"""Files that appear whole or not at all: written beside their final name, flushed to disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ConfigDict

from hf_histo.errors import HistoError

CHECKSUMS = "checksums.json"
# How pydantic reads a dataclass from JSON: types as they are declared, no other keys, finite numbers. Each class that a
# file holds has it as `__pydantic_config__`; not all versions of pydantic hand it on to its parts.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def require_output(path: str | Path, inputs: Iterable[str | Path | None] = (), *, folder: bool = False) -> None:
    """Raise `HistoError` unless a file, or a `folder`, may be written at `path`.

    That is: nothing is there, or a regular file (a folder); it is no link; and it is not, and does not lie in, one of
    `inputs`, the files and folders that the same command reads. Names of the Hub among them are no places here.
    """
    path = Path(path)
    if path.is_symlink():
        raise HistoError(f"output {path}: is a link, expected a place of its own; choose another, or remove the link")
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        kind = "folder" if folder else "regular file"
        raise HistoError(f"output {path}: is no {kind}, expected a new place or a {kind}; choose another")
    for source in inputs:
        if source and Path(source).exists() and path.resolve().is_relative_to(Path(source).resolve()):
            raise HistoError(f"output {path}: is or lies in the input {source}, expected another place; choose one")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it onto `path`, else remove it.

    The temporary name keeps the suffix of `path`, for writers that choose a format by it. Raises `HistoError` as
    `require_output` does.
    """
    path = Path(path)
    require_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".incomplete{path.suffix}", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success rename it onto `path`, which must not exist, else remove it.

    Raises `HistoError` as `require_output` does.
    """
    path = Path(path)
    require_output(path, folder=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".incomplete", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes for the owner alone
                _flush(file)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def regular(path: str | Path) -> Path:
    """`path`, once it is known to be a regular file, or a link to one: opening a pipe or a device could never return.

    Raises HistoError for what is none, and OSError where there is nothing.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise HistoError(f"{path}: a {kinds.get(stat.S_IFMT(mode), 'device')}, expected a file; copy it into one")
    return path


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises OSError, and ValueError for no JSON, or one too large or nested too deeply."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file that people write, or this package.

    Raises OSError, ValueError above 16 MiB, and HistoError as `regular` does.
    """
    with regular(path).open("rb") as file:
        content = file.read(2**24 + 1)
    if len(content) > 2**24:
        raise ValueError("larger than 16 MiB")
    return content.decode("utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; NaN is a ValueError: write None where a value is undefined."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def checksum(path: str | Path) -> str:
    """Content hash (xxh3, 128 bits) of a file, 32 hexadecimal digits. It shows damage, not tampering."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def write_checksums(folder: Path, **facts: Any) -> None:
    """Write `CHECKSUMS` into a complete folder: the hash of each file in and below it, and `facts`, ready for JSON."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: checksum(folder / name) for name in names if name != CHECKSUMS}
    write_json(folder / CHECKSUMS, {**facts, "files": files})


def read_checksums(folder: Path) -> dict[str, Any]:
    """The content of `CHECKSUMS` in a folder, all of whose listed files were read and are as they were written.

    Files that are not listed are not looked at. Raises OSError where it or a file can't be read, and ValueError, naming
    the file, where one was changed or the list is damaged.
    """
    content = read_json(folder / CHECKSUMS)
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError(f"{CHECKSUMS} is damaged")
    for name, expected in content["files"].items():
        if checksum(folder / name) != expected:
            raise ValueError(f"{name} is not as it was written")
    return content


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
