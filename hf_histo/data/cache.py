"""Cache of converted data sets: checksums of what was written, and fingerprints of the source files."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import xxhash

from hf_histo.errors import HistoError
from hf_histo.files import CHECKSUMS, atomic_file, checksum, read_checksums, read_json, regular, write_checksums

logger = logging.getLogger(__name__)

NOTE = ".note"  # end of the name of a file of `write_note`
DIGITS = 32  # hexadecimal digits of a 128-bit xxh3 hash


def discard_damaged(folder: Path) -> None:
    """Read all converted data in and below `folder`; remove, with a warning, what does not match its checksums.

    Data without checksums is kept: it is from an older version, or from a process that was killed before it wrote
    them, and its files were written atomically.
    """
    for listed in sorted(folder.rglob(CHECKSUMS)):
        try:
            read_checksums(listed.parent)
        except (OSError, ValueError, HistoError) as error:
            logger.warning("%s: damaged (%s); the data is converted again", listed.parent, error)
            shutil.rmtree(listed.parent)


def seal(folder: Path) -> None:
    """Write the checksums of all files in and below `folder` for `discard_damaged`, unless every file has one."""
    try:
        listed = {*read_json(folder / CHECKSUMS)["files"], CHECKSUMS}
    except FileNotFoundError:
        listed = set()
    if listed != {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}:
        write_checksums(folder)


def write_note(folder: str, number: int, text: str) -> None:
    """Store a text for `take_notes`, from any process."""
    Path(folder, f"{number:05d}{NOTE}").write_text(text, encoding="utf-8")


def take_notes(folder: str) -> str:
    """The texts of `write_note` in the order of their numbers; they are removed."""
    paths = sorted(Path(folder).glob(f"*{NOTE}"))
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    for path in paths:
        path.unlink()
    return text


def state_of(directory: Path, files: Mapping[str, Path]) -> str:
    """Hash (32 hexadecimal digits) of the paths, sizes, inodes and modification times of files; none is opened.

    Raises HistoError for anything but a regular file, and FileNotFoundError for a missing one.
    """
    state = xxhash.xxh3_128(os.fsencode(directory.resolve()))
    for name, path in files.items():
        stat = regular(path).stat()
        # The change time catches a file that was rewritten and had its modification time set back; the inode, one that
        # was replaced by a rename.
        seen = f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}"
        state.update(os.fsencode(seen))
    return state.hexdigest()


def content_of(directory: Path, files: Mapping[str, Path], state: str, memos: Path) -> str:
    """Hash (32 hexadecimal digits) of the names and contents of files, cached in the folder `memos` under `state`.

    A damaged cache entry is computed again. Raises HistoError for a file that changes while it is read.
    """
    memo = memos / state
    text = memo.read_text(encoding="ascii", errors="replace") if memo.is_file() else ""
    if text[DIGITS:] == _check(state, text[:DIGITS]):
        return text[:DIGITS]
    contents = xxhash.xxh3_128()
    for name, path in files.items():
        contents.update(os.fsencode(f"{name}\0{checksum(path)}\0"))
    found = contents.hexdigest()
    check_unchanged(directory, directory, files, state)
    with atomic_file(memo) as temporary:
        temporary.write_text(found + _check(state, found), encoding="ascii")
    return found


def check_unchanged(where: str | Path, directory: Path, files: Mapping[str, Path], state: str) -> None:
    """Raise HistoError, starting with `where`, unless `state_of` the files is still `state`."""
    try:
        unchanged = state_of(directory, files) == state
    except FileNotFoundError:
        unchanged = False
    if not unchanged:
        raise HistoError(f"{where}: a file changed while it was read, expected none to; run the command again")


def _check(state: str, content: str) -> str:
    return xxhash.xxh3_128_hexdigest(f"{state} {content}".encode("utf-8", "replace"))
