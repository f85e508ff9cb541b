"""Digits in idx files: valid files are read exactly, and damaged ones refused."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fixtures import truncate

from hf_histo.data.load import fingerprint, load
from hf_histo.data.protocol import arrange
from hf_histo.data.schema import ImageTable
from hf_histo.data.splits.folds import hold_out
from hf_histo.errors import HistoError

REAL = Path(__file__).parents[4] / "shared" / "data" / "mnist"
TRAIN, LABELS, TEST = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_digits(directory: Path, *, packed: bool = True, test: bool = True) -> dict[str, np.ndarray]:
    """Write 40 training and 10 test digits of 5x7 pixels; return the arrays by the name of their file."""
    directory.mkdir(parents=True, exist_ok=True)
    random, written = np.random.default_rng(0), {}
    for split, count in {"train": 40, "t10k": 10}.items() if test else {"train": 40}.items():
        written[f"{split}-images-idx3-ubyte"] = random.integers(0, 256, (count, 5, 7), dtype=np.uint8)
        written[f"{split}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    for name, array in written.items():
        content = idx(array)
        path = directory / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return written


@pytest.mark.parametrize("packed", [True, False])
def test_the_digits_come_out_as_they_went_in(tmp_path: Path, packed: bool) -> None:
    written = write_digits(tmp_path / "digits", packed=packed)
    data = arrange(load(tmp_path / "digits"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 30, "val": 10, "test": 10}
    assert data["train"].features["label"].names == [str(i) for i in range(10)]
    assert not set(data["train"]["id"]) & set(data["val"]["id"])
    assert sorted(data["val"]["label"]) == list(range(10))
    for split, rows in data.items():
        file = "t10k" if split == "test" else "train"
        images = ImageTable(rows)
        for place, (row, label) in enumerate(zip(rows["id"], rows["label"], strict=True)):
            gray = written[f"{file}-images-idx3-ubyte"][int(row)]
            assert (images[place]["image"].numpy() == gray).all()
            assert label == written[f"{file}-labels-idx1-ubyte"][int(row)]
        assert set(rows["center"]) == {-1}
        assert set(rows["group"]) == {""}


def test_other_spellings_of_the_names_and_no_test(tmp_path: Path) -> None:
    write_digits(tmp_path, packed=False, test=False)
    (tmp_path / TRAIN).rename(tmp_path / "train10k-images.idx3-ubyte")
    packed = gzip.compress((tmp_path / LABELS).read_bytes())
    (tmp_path / LABELS).write_bytes(packed)  # gzipped, without the suffix
    assert set(load(tmp_path)) == {"train"}


def cut_off(folder: Path) -> str:
    truncate(folder / f"{TRAIN}.gz")
    return "can't be decompressed"


def cut_off_inside(folder: Path) -> str:
    write_digits(folder, packed=False)
    for path in folder.glob("*.gz"):
        path.unlink()
    truncate(folder / TRAIN)
    return "bytes after the header, expected 1,400"


def no_header(folder: Path) -> str:
    (folder / f"{TRAIN}.gz").write_bytes(gzip.compress(struct.pack(">2I", 0x0803, 40)))
    return "a header with the shape [40]"


def too_long(folder: Path) -> str:
    path = folder / f"{LABELS}.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\0"))
    return "more bytes after the header"


def swapped(folder: Path) -> str:
    images, labels = folder / f"{TRAIN}.gz", folder / f"{LABELS}.gz"
    images.rename(folder / "kept")
    labels.rename(images)
    (folder / "kept").rename(labels)
    return "that of images, expected 0x00000801 for labels; the two files may be swapped"


def no_idx(folder: Path) -> str:
    (folder / f"{LABELS}.gz").write_bytes(b"<html>not found</html>")
    return "starts with 0x3c68746d"


def no_gzip(folder: Path) -> str:
    (folder / f"{LABELS}.gz").write_bytes(b"\x1f\x8b" + b"\xff" * 30)
    return "can't be decompressed"


def damaged(folder: Path) -> str:
    path = folder / f"{TRAIN}.gz"
    content = bytearray(path.read_bytes())
    content[100:140] = b"\xff" * 40
    path.write_bytes(bytes(content))
    return "can't be decompressed"


def other_number(folder: Path) -> str:
    (folder / f"{LABELS}.gz").write_bytes(gzip.compress(idx(np.arange(39) % 10)))
    return "40 images, but 39 labels"


def no_digit(folder: Path) -> str:
    (folder / f"{LABELS}.gz").write_bytes(gzip.compress(idx(np.arange(40) % 11)))
    return "label 10 in row 10, expected 0 to 9"


def half_a_test(folder: Path) -> str:
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    return "t10k-labels-idx1-ubyte.gz: no such file"


def no_training(folder: Path) -> str:
    (folder / f"{TRAIN}.gz").unlink()
    return f"{TRAIN}.gz: no such file"


def twice(folder: Path) -> str:
    write_digits(folder, packed=False)
    return "expected one file of"


def huge(folder: Path) -> str:
    (folder / f"{TRAIN}.gz").write_bytes(gzip.compress(struct.pack(">4I", 0x0803, 1, 100_000, 100_000)))
    return "a header with the shape [1, 100000, 100000]"


@pytest.mark.parametrize(
    "harm",
    [
        cut_off, cut_off_inside, no_header, too_long, swapped, no_idx, no_gzip, damaged, other_number, no_digit,
        half_a_test, no_training, twice, huge,
    ],
)  # fmt: skip
def test_broken_files_are_refused(tmp_path: Path, harm: Callable[[Path], str]) -> None:
    write_digits(tmp_path / "digits")
    message = harm(tmp_path / "digits")
    with pytest.raises(HistoError) as caught:
        load(tmp_path / "digits")
    assert message in str(caught.value)
    assert str(tmp_path / "digits") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_is_another_data_set(tmp_path: Path) -> None:
    write_digits(tmp_path)
    before = fingerprint(load(tmp_path))
    (tmp_path / f"{LABELS}.gz").write_bytes(gzip.compress(idx((np.arange(40) + 1) % 10)))
    assert fingerprint(load(tmp_path)) != before


def test_a_tenth_of_each_class_is_held_out() -> None:
    labels = np.repeat([0, 1, 2, -1], [100, 11, 1, 5])
    kept, held_out = hold_out(labels)
    assert np.bincount(labels[held_out], minlength=3).tolist() == [10, 1, 0]
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    assert [rows.tolist() for rows in hold_out(labels)] == [kept.tolist(), held_out.tolist()]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real digits are not at {REAL}")
def test_the_real_digits() -> None:
    data = arrange(load(REAL))
    assert fingerprint(data) == fingerprint(load(REAL))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 8997, "val": 1003, "test": 10000}
    # The well-known first test digits of MNIST.
    assert data["test"]["label"][:5] == [7, 2, 1, 0, 4]
    assert ImageTable(data["test"])[0]["image"].shape == (3, 28, 28)
