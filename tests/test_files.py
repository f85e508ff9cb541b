"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

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
