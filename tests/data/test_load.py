from __future__ import annotations

import csv
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import pandas as pd
import pytest
from fixtures import write_challenge, write_pcam, write_wilds

from hf_histo.config import DataOptions
from hf_histo.data import cache
from hf_histo.data.load import check_trainable, fingerprint, load
from hf_histo.data.readers.multicenter_hdf5 import MulticenterHdf5, PixelFormat
from hf_histo.data.splits.checks import shared_groups
from hf_histo.data.synthetic import tissue
from hf_histo.errors import HistoError


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits of the challenge that were converted, as they are converted."""
    converted: list[str] = []
    original = MulticenterHdf5._generate_examples

    def counted(self: MulticenterHdf5, path: Path, **arguments: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        converted.append(path.stem)
        return original(self, path, **arguments)

    monkeypatch.setattr(MulticenterHdf5, "_generate_examples", counted)
    return converted


def test_converts_once(tmp_path: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_challenge(tmp_path / "data")
    first = load(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert conversions == ["train", "val", "test"]
    # Neither converted nor read again: h5py and the hash are disabled.
    monkeypatch.setattr(h5py, "File", None)
    monkeypatch.setattr(cache, "checksum", None)
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


@pytest.mark.parametrize("file", ["train.arrow", "dataset_info.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_conversion_is_made_anew(
    tmp_path: Path, conversions: list[str], caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    write_challenge(tmp_path / "data")
    first = load(tmp_path / "data", cache_dir=tmp_path / "cache")
    before = [first[split].with_format("arrow")[:] for split in first]
    (path,) = (tmp_path / "cache/challenge").rglob(f"*{file}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    changed = {"flip": content, "cut": content[: len(content) // 2], "empty": b""}
    path.unlink()
    if damage != "gone":
        path.write_bytes(changed[damage])
    again = load(tmp_path / "data", cache_dir=tmp_path / "cache")
    if (file, damage) == ("checksums.json", "gone"):  # as if a process was killed before it wrote them
        assert len(conversions) == 3 and path.is_file()
    else:
        assert len(conversions) == 6 and "damaged" in caplog.text
    assert [again[split].with_format("arrow")[:] for split in again] == before
    assert fingerprint(again) == fingerprint(first)
    load(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert len(conversions) in (3, 6)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "of a former version"])
def test_a_damaged_memo_of_the_fingerprint_is_made_anew(tmp_path: Path, damage: str) -> None:
    write_challenge(tmp_path / "data")
    expected = fingerprint(load(tmp_path / "data", cache_dir=tmp_path / "cache"))
    (memo,) = (tmp_path / "cache/hf_histo_fingerprints").iterdir()
    text = memo.read_text()
    other = "0" if text[5] != "0" else "1"
    kinds = {"flip": text[:5] + other + text[6:], "cut": text[:20], "empty": "", "of a former version": text[:32]}
    memo.write_text(kinds[damage])
    assert fingerprint(load(tmp_path / "data", cache_dir=tmp_path / "cache")) == expected
    assert memo.read_text() == text


def test_the_built_in_data_is_generated_again_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tissue, "generate", write_challenge)
    expected = fingerprint(load("synthetic", cache_dir=tmp_path))
    (path,) = (tmp_path / "hf_histo_synthetic").rglob("train.h5")
    with h5py.File(path, "r+") as file:
        file["0/label"][()] = 1 - file["0/label"][()]
    assert fingerprint(load("synthetic", cache_dir=tmp_path)) == expected and "damaged" in caplog.text


@pytest.mark.parametrize("replace", [os.replace, shutil.copyfile])
@pytest.mark.parametrize("split", ["train", "test"])  # read already, and not yet
def test_a_file_that_changes_while_another_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Any, split: str
) -> None:
    write_challenge(tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "original")
    write_challenge(tmp_path / "other", counts={"train": 12, "val": 6, "test": 4}, metadata=1)
    whole = MulticenterHdf5._generate_examples

    def interfere(self: MulticenterHdf5, path: Path, **arguments: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if path.stem == "val":
            replace(tmp_path / "other" / f"{split}.h5", tmp_path / "data" / f"{split}.h5")
        yield from whole(self, path, **arguments)

    monkeypatch.setattr(MulticenterHdf5, "_generate_examples", interfere)
    with pytest.raises(HistoError, match=r"data: a file changed while it was read, expected none to; run the command"):
        load(tmp_path / "data", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(MulticenterHdf5, "_generate_examples", whole)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    fresh = load(tmp_path / "original", cache_dir=tmp_path / "elsewhere")
    found = load(tmp_path / "original", cache_dir=tmp_path / "cache")
    assert found["test"][:]["group"] == fresh["test"][:]["group"]


@pytest.mark.parametrize("name", ["train.h5", "train.csv", "train/a/1.png", "metadata.csv", "data.csv", "data.h5"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_pipes_and_devices_are_refused_before_they_are_opened(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    (tmp_path / "data/patches").mkdir()
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "data/pipe" if kind == "link" else path)
        if kind == "link":
            path.symlink_to(tmp_path / "data/pipe")
    with pytest.raises(HistoError, match=r": (a pipe|a device|no such folder|no known layout|a link to)"):
        load(tmp_path / "data" / name if name.startswith("data.") else tmp_path / "data")


def test_ids_are_there_once(tmp_path: Path) -> None:
    write_wilds(tmp_path)
    lines = (tmp_path / "metadata.csv").read_text().splitlines()
    (tmp_path / "metadata.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(HistoError, match=r"train: 2 images have the id 'patch_\w+', expected another one for each"):
        load(tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("column", ["id", "patient", "label"])
@pytest.mark.parametrize("text", ["\x1b[31mred", "a\x07", "a\r=cmd", "a\u202eb", "a" * 1001])
def test_texts_that_a_terminal_would_obey_are_refused(tmp_path: Path, column: str, text: str) -> None:
    gray = np.arange(64).reshape(4, 16) * 3
    table = pd.DataFrame(gray, columns=map(str, range(16))).assign(label=["a", "b"] * 2, id=list("wxyz"), patient="p")
    table.loc[[1, 3] if column == "label" else 1, column] = text
    table.to_csv(tmp_path / "train.csv", index=False, quoting=csv.QUOTE_ALL)
    with pytest.raises(HistoError, match=r"expected printable text of at most 1000 characters") as caught:
        load(tmp_path, cache_dir=tmp_path / "cache")
    assert str(caught.value).isprintable()


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


def test_an_unexpected_exception_is_not_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("option", [{"slices": 3}, {"gray_bits": 12}, {"pixel_order": "chw"}])
def test_an_option_that_changes_nothing_for_a_layout_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    write_challenge(tmp_path / "data")
    with pytest.raises(HistoError, match=rf"--{next(iter(option))} is .* changes nothing for data in the layout chall"):
        load(DataOptions(data=str(tmp_path / "data"), **option))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"labell_column": "x"},
            "unknown option 'labell_column' of how a source is read; did you mean 'label_column'?",
        ),
        ({"lora_rank": 8}, "unknown option 'lora_rank' of how a source is read; expected some of image_root, "),
        ({"gray_bits": 7}, "--gray_bits is 7, expected at least 8 and at most 16"),
        ({"on_bad_image": "ignore"}, "invalid choice: 'ignore'"),
        ({"slices": "many"}, "invalid int value: 'many'"),
    ],
)
def test_options_are_checked_as_on_the_command_line(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_challenge(tmp_path)
    with pytest.raises(HistoError) as refused:
        load(tmp_path, **options)
    assert message in str(refused.value)


def test_an_option_that_changes_nothing_on_the_hub_is_refused_before_it_is_asked() -> None:
    with pytest.raises(HistoError, match="--slices is 3, which changes nothing for data of the Hub"):
        load(DataOptions(data="hub:ana/cells", slices=3))
