from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import h5py
import pytest
from fixtures import write_challenge, write_pcam, write_wilds

from hf_histo.data import load as load_module
from hf_histo.data.hdf5 import Challenge, PixelFormat
from hf_histo.data.load import check_trainable, fingerprint, load
from hf_histo.data.splits import shared_groups
from hf_histo.errors import HistoError


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits of the challenge that were converted, as they are converted."""
    converted: list[str] = []
    original = Challenge._generate_examples

    def counted(self: Challenge, path: Path, **arguments: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        converted.append(path.stem)
        return original(self, path, **arguments)

    monkeypatch.setattr(Challenge, "_generate_examples", counted)
    return converted


def test_converts_once(tmp_path: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_challenge(tmp_path / "data")
    first = load(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert conversions == ["train", "val", "test"]
    # Neither converted nor read again: without h5py and the hash nothing could be.
    monkeypatch.setattr(h5py, "File", None)
    monkeypatch.setattr(load_module.hashlib, "file_digest", None)
    second = load(str(tmp_path / "data"), cache_dir=tmp_path / "cache")
    assert conversions == ["train", "val", "test"]
    assert fingerprint(first) == fingerprint(second)
    assert second["train"].info.description == first["train"].info.description
    assert second["train"][:]["id"] == first["train"][:]["id"]


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_a_moved_folder_hits(tmp_path: Path, conversions: list[str], move: Any) -> None:
    write_challenge(tmp_path / "data")
    first = load(tmp_path / "data", cache_dir=tmp_path / "cache")
    move(tmp_path / "data", tmp_path / "elsewhere")
    second = load(tmp_path / "elsewhere", cache_dir=tmp_path / "cache")
    assert len(conversions) == 3
    assert fingerprint(first) == fingerprint(second)
    assert first["train"]._fingerprint == second["train"]._fingerprint  # the key of `map`'s cache


def test_a_changed_byte_misses(tmp_path: Path, conversions: list[str]) -> None:
    write_challenge(tmp_path / "data")
    first = load(tmp_path / "data", cache_dir=tmp_path / "cache")
    file = tmp_path / "data/val.h5"
    before = file.stat()
    with h5py.File(file, "r+") as opened:
        opened["3/label"][()] = 0
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    second = load(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert len(conversions) == 6
    assert fingerprint(first) != fingerprint(second)
    assert (first["val"]["label"][3], second["val"]["label"][3]) == (1, 0)


def test_a_file_that_is_not_read_does_not_matter(tmp_path: Path, conversions: list[str]) -> None:
    write_challenge(tmp_path / "data")
    load(tmp_path / "data", cache_dir=tmp_path / "cache")
    (tmp_path / "data/notes.txt").write_text("hello")
    load(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert len(conversions) == 3


def test_fingerprint_survives_what_is_done_to_the_table(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    splits = load(tmp_path)
    assert len(fingerprint(splits)) == 32
    assert fingerprint(splits["train"].select([1]).filter(lambda row: True)) == fingerprint(splits)


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    write_challenge(tmp_path / "data")
    with h5py.File(tmp_path / "data/test.h5", "r+") as file:
        file["1/label"] = 9
    for _ in range(2):
        with pytest.raises(HistoError, match=r"test\.h5: 1/label: 9"):
            load(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    with h5py.File(tmp_path / "data/test.h5", "r+") as file:
        del file["1/label"]
    assert len(load(tmp_path / "data", cache_dir=tmp_path / "cache")["test"]) == 4


def test_a_full_disk_comes_out_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: datasets.arrow_writer.ArrowWriter, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_challenge(tmp_path / "data")
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_examples_on_file", full)
    with pytest.raises(OSError, match="No space left"):
        load(tmp_path / "data", cache_dir=tmp_path / "cache")


def test_a_bug_is_not_dressed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_challenge(tmp_path)
    monkeypatch.setattr(PixelFormat, "read", lambda *_: 1 / 0)
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        load(tmp_path, cache_dir=tmp_path / "cache")


def test_recognizes_each_layout(tmp_path: Path) -> None:
    write_challenge(tmp_path / "challenge")
    write_pcam(tmp_path / "pcam")
    write_wilds(tmp_path / "wilds")
    columns = {tuple(load(tmp_path / name)["train"].features) for name in ("challenge", "pcam", "wilds")}
    assert columns == {("id", "image", "label", "center", "group")}


def test_refuses_unknown_folders(tmp_path: Path) -> None:
    with pytest.raises(HistoError, match=r"absent: no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(HistoError, match=r"found nothing; expected train\.h5.*camelyonpatch.*metadata\.csv"):
        load(tmp_path)
    for i in range(10):
        (tmp_path / f"{i}.jpg").touch()
    with pytest.raises(HistoError, match=r"found 0\.jpg, 1\.jpg, .* and 2 more; expected"):
        load(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_refuses_a_missing_split(tmp_path: Path, split: str) -> None:
    write_challenge(tmp_path)
    (tmp_path / f"{split}.h5").unlink()
    with pytest.raises(HistoError, match=rf"{split}\.h5: no such file, expected train\.h5, val\.h5"):
        load(tmp_path)


def test_trainable(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    splits = load(tmp_path)
    check_trainable(splits["train"])
    with pytest.raises(HistoError, match="classes present: tumor, expected at least two of normal, tumor"):
        check_trainable(splits["train"].filter(lambda row: row["label"] == 1))
    with pytest.raises(HistoError, match="hidden"):
        check_trainable(splits["test"])


def test_shared_groups(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    splits = load(tmp_path)
    assert shared_groups(splits) == {}
    splits["val"] = splits["train"].select([0, 1, 2])
    assert shared_groups(splits) == {("train", "val"): ["slide_100", "slide_105"]}
    splits = datasets.DatasetDict({name: split.map(lambda _: {"group": ""}) for name, split in splits.items()})
    assert shared_groups(splits) == {}


def test_one_file_is_the_test_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_challenge(folder)
    data = load(folder / "train.h5", cache_dir=tmp_path / "cache")
    assert list(data) == ["test"]
    assert data["test"]["id"] == load(folder, cache_dir=tmp_path / "cache")["train"]["id"]


def test_one_file_that_is_no_hdf5_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "images.h5"
    file.write_text("not HDF5")
    with pytest.raises(HistoError, match=r"images\.h5"):
        load(file, cache_dir=tmp_path / "cache")
