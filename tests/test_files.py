"""Files and folders are written atomically."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_histo import files
from hf_histo.errors import HistoError
from hf_histo.files import atomic_file, atomic_folder, write_json


def test_a_file_replaces_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "below" / "table.csv"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".csv"
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert [child.name for child in path.parent.iterdir()] == ["table.csv"]


def test_a_folder_appears_whole_and_readable(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "run") as temporary:
        (temporary / "weights").touch(mode=0o600)
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "run" / "weights").stat().st_mode & 0o777 == 0o644
    with pytest.raises(ValueError, match="broken"), atomic_folder(tmp_path / "other"):
        raise ValueError("broken")
    assert [child.name for child in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_who_may_read_is_what_the_umask_decides(tmp_path: Path, mask: int, file_mode: int, folder_mode: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_file(tmp_path / "table.csv") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT, 0o600))  # as safetensors does
        with atomic_folder(tmp_path / "folder") as temporary:
            os.close(os.open(temporary / "weights", os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("table.csv", "folder/weights", "folder")]
    assert modes == [file_mode, file_mode, folder_mode]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "metrics.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_checksums_show_a_changed_bit_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "weights.bin").write_bytes(bytes(1000))
    (tmp_path / "options.json").write_text("{}")
    files.write_checksums(tmp_path, run="a")
    assert files.read_checksums(tmp_path)["run"] == "a"
    (tmp_path / "notes.txt").write_text("of the user")  # not listed
    assert sorted(files.read_checksums(tmp_path)["files"]) == ["below/weights.bin", "options.json"]
    flipped = bytearray(1000)
    flipped[500] ^= 1
    (tmp_path / "below" / "weights.bin").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"below/weights\.bin does not match its checksum"):
        files.read_checksums(tmp_path)
    (tmp_path / "below" / "weights.bin").unlink()
    with pytest.raises(OSError, match=r"weights\.bin"):
        files.read_checksums(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"files": 1}'])
def test_a_damaged_list_of_checksums_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / files.CHECKSUMS).write_text(content)
    with pytest.raises(ValueError, match=r"damaged|Expecting"):
        files.read_checksums(tmp_path)


def _link(place: Path) -> None:
    (place.parent / "target").write_text("kept")
    place.symlink_to(place.parent / "target")


def _dangling(place: Path) -> None:
    place.symlink_to(place.parent / "target")


def _device(place: Path) -> None:
    try:
        os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # what /dev/full is
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("make", [_link, _dangling, _device, os.mkfifo, Path.mkdir])
def test_only_regular_files_are_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    place = tmp_path / "out.csv"
    make(place)
    before = {path: path.lstat() for path in tmp_path.iterdir()}
    with pytest.raises(HistoError, match=r"out\.csv.*expected"), atomic_file(place):
        pytest.fail("written")
    assert {path: path.lstat() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("make", [_link, _dangling, os.mkfifo, Path.touch])
def test_only_folders_are_replaced_by_folders(tmp_path: Path, make: Callable[[Path], None]) -> None:
    place = tmp_path / "run"
    make(place)
    before = {path: path.lstat() for path in tmp_path.iterdir()}
    with pytest.raises(HistoError, match=r"run: is .*expected"), atomic_folder(place):
        pytest.fail("written")
    assert {path: path.lstat() for path in tmp_path.iterdir()} == before


def test_no_output_is_an_input_or_in_one(tmp_path: Path) -> None:
    data, alias = tmp_path / "data", tmp_path / "alias"
    data.mkdir()
    (data / "test.h5").touch()
    alias.symlink_to(data)
    for output, source in (
        (data / "test.h5", data / "test.h5"),
        (alias / "test.h5", data / "test.h5"),
        (data / "test.h5", alias),
        (data / "new.csv", data),
        (data / ".." / "data" / "new.csv", alias),
    ):
        with pytest.raises(HistoError, match=f"{output.name}: .*expected"):
            files.require_output(output, [source])
    with pytest.raises(HistoError, match=r"is the input .* or inside it"):
        files.require_output(data, [data], folder=True)
    files.require_output(tmp_path / "new.csv", [data, "owner/name", None])
    files.require_output(data / "other.csv", [data / "test.h5"])


def test_what_was_written_is_renamed_and_not_copied(tmp_path: Path) -> None:
    """A copy could be cut off, by a kill or a full disk, under its final name."""
    with files.atomic_file(tmp_path / "table.csv") as temporary:
        temporary.write_text("rows")
        written = temporary.stat().st_ino
    assert (tmp_path / "table.csv").stat().st_ino == written
    with files.atomic_folder(tmp_path / "run") as folder:
        written = folder.stat().st_ino
    assert (tmp_path / "run").stat().st_ino == written
