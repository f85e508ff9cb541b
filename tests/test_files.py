"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_histo import files
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
    with pytest.raises(ValueError, match=r"below/weights\.bin is not as it was written"):
        files.read_checksums(tmp_path)
    (tmp_path / "below" / "weights.bin").unlink()
    with pytest.raises(OSError, match=r"weights\.bin"):
        files.read_checksums(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"files": 1}'])
def test_a_damaged_list_of_checksums_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / files.CHECKSUMS).write_text(content)
    with pytest.raises(ValueError, match=r"damaged|Expecting"):
        files.read_checksums(tmp_path)
