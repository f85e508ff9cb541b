"""Files that appear whole or not at all: written beside their final name, flushed to disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from pydantic import ConfigDict

from hf_histo.errors import HistoError

CHECKSUMS = "checksums.json"
# How pydantic parses a dataclass from JSON: declared types only, no unknown keys, finite numbers. Each class that is
# parsed from a file sets it as `__pydantic_config__`, since not all versions of pydantic pass it on to nested classes.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def require_output(path: str | Path, inputs: Iterable[str | Path | None] = (), *, folder: bool = False) -> None:
    """Raise `HistoError` unless a file, or a `folder`, may be written at `path`.

    `path` must be new, or already a regular file (with `folder`: a folder). It must not be a link, and it must not be,
    or be inside, one of `inputs`: the files and folders that the same command reads. Hub names in `inputs` are ignored.
    """
    path = Path(path)
    if path.is_symlink():
        raise HistoError(f"output {path}: is a link, expected a regular path; choose another, or remove the link")
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        kind = "folder" if folder else "regular file"
        raise HistoError(f"output {path}: is not a {kind}, expected a new path or a {kind}; choose another")
    for source in inputs:
        if source and Path(source).exists() and path.resolve().is_relative_to(Path(source).resolve()):
            raise HistoError(f"output {path}: is the input {source} or inside it, expected another path; choose one")


def require_new(option: str, path: Path) -> None:
    """Raise `HistoError`, naming the option that gave `path`, if it exists."""
    if path.exists():
        raise HistoError(f"{option} {path} exists already; choose another one, or remove it")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it onto `path`, else remove it.

    The temporary name keeps the suffix of `path`, for writers that choose a format by it. Who may read the file, the
    umask decides. Raises `HistoError` as `require_output` does.
    """
    path = Path(path)
    require_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unfinished(path, path.suffix)
    temporary.touch(exist_ok=False)
    mode = _mode(temporary)
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors, for one, writes a new file in its place, for the owner alone
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success rename it onto `path`, which must not exist, else remove it.

    Who may read its files, the umask decides. Raises `HistoError` as `require_output` does.
    """
    path = Path(path)
    require_output(path, folder=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unfinished(path)
    temporary.mkdir()
    mode = _mode(temporary) & 0o666
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # see `atomic_file`
                _flush(file)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Try to lock the file `path` for the block, without waiting; yield whether this process now holds the lock.

    The operating system releases the lock when the process ends, even if it is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def regular(path: str | Path) -> Path:
    """Check that `path` is a regular file, or a link to one, and return it: opening a pipe or a device could block.

    Raises HistoError for any other kind of file, and OSError if it does not exist.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise HistoError(f"{path}: a {kinds.get(stat.S_IFMT(mode), 'device')}, expected a file; copy it into one")
    return path


def read_json(path: str | Path) -> Any:
    """Parsed content of a JSON file. Raises OSError, and ValueError for JSON that is invalid, too large or too deep."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_text(path: str | Path) -> str:
    """Text of a UTF-8 file of at most 16 MiB, such as a config or a record.

    Raises OSError, ValueError above 16 MiB, and HistoError as `regular` does.
    """
    with regular(path).open("rb") as file:
        content = file.read(2**24 + 1)
    if len(content) > 2**24:
        raise ValueError("larger than 16 MiB")
    return content.decode("utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically. Raises ValueError for NaN: pass None for an undefined value."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def checksum(path: str | Path) -> str:
    """Content hash (xxh3, 128 bits) of a file, 32 hexadecimal digits. It detects damage, not tampering."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def checksums(files: Mapping[str, Path | bytes]) -> dict[str, str]:
    """Map each name to the `checksum` of its file, or of the bytes given in its place."""
    return {
        name: xxhash.xxh3_128_hexdigest(content) if isinstance(content, bytes) else checksum(content)
        for name, content in files.items()
    }


def write_checksums(folder: Path, names: Iterable[str] | None = None, **facts: Any) -> None:
    """Write `CHECKSUMS` into a complete folder: the hash of each file by name, beside `facts`, which are JSON values.

    `names` are paths relative to `folder`; by default, all files in it and its subfolders.
    """
    if names is None:
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = (name for name in found if name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {**facts, "files": checksums({name: folder / name for name in names})})


def read_checksums(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Verify the files `names` (default: all listed ones) of a folder; return the content of its `CHECKSUMS`.

    Other files are ignored. Raises OSError if `CHECKSUMS` or a file can't be read, and ValueError, naming the file, if
    a file was changed or is not listed, or if the list is damaged.
    """
    try:
        content = read_json(folder / CHECKSUMS)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError(f"{CHECKSUMS} is damaged")
    for name in content["files"] if names is None else names:
        if checksum(folder / name) != content["files"].get(name):
            raise ValueError(f"{name} does not match its checksum in {CHECKSUMS}")
    return content


def _unfinished(path: Path, suffix: str = "") -> Path:
    """A new name beside `path`, by which others know what is not finished."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.incomplete{suffix}")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
