"""Tables of flattened images: the three formats, both orders and ranges, and that no table is held in memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forged_parquet import forge_page, load_measured
from scipy.ndimage import gaussian_filter

from hf_histo.config import DataOptions
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError

LABELS = ["glioma", "none", "pituitary"]
SIZE = 12


def smooth(count: int, seed: int = 0) -> np.ndarray:
    """Smooth uint8 images (count, SIZE, SIZE, 3), each with 0 and 255 in it."""
    noise = np.random.default_rng(seed).normal(size=(count, SIZE, SIZE, 3))
    noise = gaussian_filter(noise, (0, 2, 2, 0))
    low, high = (pick(axis=(1, 2, 3), keepdims=True) for pick in (noise.min, noise.max))
    return np.rint((noise - low) / (high - low) * 255).astype(np.uint8)


def write(
    path: Path, images: np.ndarray, *, order: str = "hwc", maximum: int = 255, labels: list[object] | None = None
) -> np.ndarray:
    """Write a table, its label column last; return the values (N, n)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = (images.transpose(0, 3, 1, 2) if order == "chw" else images).reshape(len(images), -1)
    values = values if maximum == 255 else values.astype(np.float32) / 255
    labels = [LABELS[i % 3] for i in range(len(images))] if labels is None else labels
    if path.suffix == ".npz":
        np.savez_compressed(path, images=values, y=np.array(labels))
        return values
    table = pd.DataFrame(values, columns=[f"pixel_{i}" for i in range(values.shape[1])]).assign(Label=labels)
    table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)
    return values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data/train.csv", smooth(9))
    write(tmp_path / "data/Testing.csv", smooth(4, seed=1))
    return tmp_path / "data"


def refused(directory: Path, message: str, **options: str) -> None:
    with pytest.raises(HistoError, match=message) as caught:
        load(DataOptions(data=str(directory), **options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
@pytest.mark.parametrize("order", ["hwc", "chw"])
@pytest.mark.parametrize("maximum", [1, 255])
def test_every_format_order_and_range_gives_the_same_images(
    tmp_path: Path, suffix: str, order: str, maximum: int
) -> None:
    images = smooth(9)
    write(tmp_path / f"train{suffix}", images, order=order, maximum=maximum)
    data = load(tmp_path)
    assert list(data) == ["train"]
    train = data["train"]
    assert train.features["label"].names == LABELS and train["label"][:] == [i % 3 for i in range(9)]
    assert train["id"][:] == [str(i) for i in range(9)]
    for row, image in enumerate(images):
        assert np.array_equal(ImageTable(train)[row]["image"].permute(1, 2, 0), image)
    assert f"{order.upper()} 12x12 in [0, {maximum}], 9 images" in train.info.description


def test_splits_and_a_single_file(folder: Path) -> None:
    assert {name: len(rows) for name, rows in load(folder).items()} == {"train": 9, "test": 4}
    assert list(load(folder / "train.csv")) == ["full"]


def test_what_is_stated_is_not_detected(folder: Path) -> None:
    stated = load(DataOptions(data=str(folder), pixel_order="chw", pixel_range="255"))["train"]
    assert "CHW" in stated.info.description
    found = ImageTable(stated)[0]["image"].numpy()
    assert np.array_equal(found, smooth(9)[0].reshape(3, SIZE, SIZE))
    refused(folder, r"train\.csv: row 0: 133 in value 0, .*expected a number in \[0, 1\]", pixel_range="1")


def test_gray_images_number_labels_and_groups(tmp_path: Path) -> None:
    gray = smooth(4)[..., 0].reshape(4, -1)
    table = pd.DataFrame(gray).assign(label=[10, 2, 10, -1], patient=["a", "a", "b", "c"], id=["w", "x", "y", "z"])
    table.to_csv(tmp_path / "train.csv")  # with pandas' index, a column without a name
    train = load(tmp_path)["train"]
    assert train.features["label"].names == ["2", "10"] and train["label"][:] == [1, 0, 1, -1]
    assert train["group"][:] == ["a", "a", "b", "c"] and train["id"][:] == ["w", "x", "y", "z"]
    assert np.array_equal(ImageTable(train)[1]["image"].numpy(), np.stack([gray[1].reshape(SIZE, SIZE)] * 3))


def shuffled(path: Path, names: list[str]) -> None:
    """Rewrite a table with its columns in this order."""
    read, write = (pd.read_csv, "to_csv") if path.suffix == ".csv" else (pd.read_parquet, "to_parquet")
    getattr(read(path)[names], write)(path, index=False)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("file", ["train", "Testing", "both"])
def test_columns_are_found_by_name(tmp_path: Path, suffix: str, file: str) -> None:
    names = sorted(["Label", *(f"pixel_{i}" for i in range(3 * SIZE**2))])  # pixel_0, pixel_1, pixel_10, ...
    images = {"train": smooth(9), "Testing": smooth(4, seed=1)}
    for name, pixels in images.items():
        write(tmp_path / f"data/{name}{suffix}", pixels)
        if file in (name, "both"):
            shuffled(tmp_path / f"data/{name}{suffix}", names)
    data = load(tmp_path / "data")
    for split, pixels in zip(("train", "test"), images.values(), strict=True):
        for row, image in enumerate(pixels):
            assert np.array_equal(ImageTable(data[split])[row]["image"].permute(1, 2, 0), image)


def test_columns_without_numbers_are_ordered_as_in_train(tmp_path: Path) -> None:
    gray = smooth(6)[..., 0].reshape(6, -1)
    names = [f"{'mnopqrstuvwx'[i // 12]}{'mnopqrstuvwx'[i % 12]}" for i in range(144)]
    table = pd.DataFrame(gray, columns=names).assign(label=[0, 1] * 3)
    table.to_csv(tmp_path / "train.csv", index=False)
    table[[*names[::-1], "label"]].to_parquet(tmp_path / "val.parquet", index=False)
    for split, rows in load(tmp_path).items():
        assert np.array_equal(ImageTable(rows)[0]["image"][0], gray[0].reshape(SIZE, SIZE)), split


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.rename(columns={"pixel_7": "pixel_x"}),
            r"Testing\.csv: no column 'pixel_7', expected the columns",
        ),
        (lambda t: t.rename(columns={"pixel_7": "p"}), r"Testing\.csv: a column 'p' that train\.csv lacks"),
        (lambda t: t.rename(columns={"pixel_7": "pixel_8"}), r"Testing\.csv: two columns are named 'pixel_8'"),
        (lambda t: t.rename(columns={"pixel_7": "Target"}), r"Testing\.csv: several columns for label"),
    ],
)
def test_other_columns_than_those_of_train(folder: Path, change: object, message: str) -> None:
    table = change(pd.read_csv(folder / "Testing.csv"))  # type: ignore[operator]
    table.to_csv(folder / "Testing.csv", index=False)
    refused(folder, message)


def test_a_file_without_names_beside_one_with(folder: Path) -> None:
    write(folder / "val.npz", smooth(4))
    refused(folder, r"val\.npz: no column 'pixel_0', expected the columns of train\.csv")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
def test_the_range_is_required_of_every_image(tmp_path: Path, suffix: str) -> None:
    images = smooth(20).astype(np.float32)
    images[17] /= 255
    images[18] = 0  # black is black in any range
    write(tmp_path / f"train{suffix}", images)
    refused(tmp_path, rf"train{suffix}: row 17: values reach only 1, as of \[0, 1\], expected \[0, 255\]")
    skipped = load(DataOptions(data=str(tmp_path), on_bad_image="skip"))["train"]
    assert skipped["id"][:] == [str(i) for i in range(20) if i != 17]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(3)[np.arange(9) % 3], r"train\.npz: y has the shape \(9, 3\), expected \(N,\).*argmax"),
        (np.arange(8) % 3, r"train\.npz: 9 images, but 8 labels"),
        (np.arange(10) % 3, r"train\.npz: 9 images, but 10 labels"),
        (np.array(1), r"train\.npz: y has the shape \(\)"),
    ],
)
def test_invalid_labels(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "train.npz", images=smooth(9).reshape(9, -1), y=labels)
    refused(tmp_path, message)
    np.savez(tmp_path / "train.npz", images=smooth(9).reshape(9, -1), y=np.arange(9) % 3, id=np.arange(8))
    refused(tmp_path, r"train\.npz: values of unequal number: ")


def test_labels_as_a_column(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=smooth(9).reshape(9, -1), y=(np.arange(9) % 3)[:, None])
    assert load(tmp_path)["train"]["label"][:] == [i % 3 for i in range(9)]


@pytest.mark.parametrize("labels", [[2, 10, None, 2, 10, 2], ["2", "10", None, "2", "10", "2"], [2.0, 10, None] * 2])
def test_nulls_of_a_parquet_table(tmp_path: Path, labels: list[Any]) -> None:
    """A null label is hidden, and integers beside it keep their text."""
    pixels = pa.table({f"p{i}": values for i, values in enumerate(smooth(6)[..., 0].reshape(6, -1).T)})
    ids = pa.array([2**60 + row for row in range(6)])
    table = pixels.append_column("label", pa.array(labels)).append_column("id", ids)
    pq.write_table(table, tmp_path / "train.parquet")
    train = load(tmp_path)["train"]
    assert train.features["label"].names == ["2", "10"] and train["label"][:3] == [0, 1, -1]
    assert train["id"][:] == [str(2**60 + row) for row in range(6)]
    for role, values in {"id": [7, None, 9, 10, 11, 12], "group": ["a", None] * 3}.items():
        pq.write_table(
            pixels.append_column("label", pa.array(labels)).append_column(role, pa.array(values)),
            tmp_path / "train.parquet",
        )
        refused(
            tmp_path, rf"train\.parquet: row 1: the {role} is blank, expected a value in each; fill it in, or remove"
        )


BOUNDED = """
import resource, sys
from hf_histo.data.load import load
from hf_histo.errors import HistoError

resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30,) * 2)
try:
    load(sys.argv[1], cache_dir=sys.argv[2])
except HistoError as error:
    print(error)
"""


def bomb(path: Path, kind: str) -> None:
    """A small file that would become gigabytes."""
    rows = 7000
    columns = {f"p{i}": np.zeros(rows, np.uint8) for i in range(16)} | {"label": pa.array(["a", "b"] * (rows // 2))}
    if kind in ("text", "label"):
        length = 10**6 if kind == "text" else 2000
        columns["label"] = pa.DictionaryArray.from_arrays(
            np.arange(rows, dtype=np.int32) % 2, ["a" * length, "b" * length]
        )
    if kind == "rows":
        rows = 6_000_000
        columns = {f"p{i}": np.zeros(rows, np.uint8) for i in range(16)} | {"label": np.zeros(rows, np.uint8)}
    pq.write_table(pa.table(columns), path, compression="zstd")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", r"expands to [\d,]+ bytes or more"),
        ("label", r"a label of 2,000 characters, expected at most 1,000"),
        ("rows", r"expands to [\d,]+ bytes or more"),
    ],
)
def test_a_small_file_that_expands_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    bomb(tmp_path / "train.parquet", kind)
    assert (tmp_path / "train.parquet").stat().st_size < 2_000_000
    command = [sys.executable, "-c", BOUNDED, str(tmp_path), str(tmp_path / "cache")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(rf"train\.parquet: {message}", ended.stdout), ended.stdout + ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is bounded on Linux")
def test_a_page_that_unpacks_to_more_than_its_file_declares(tmp_path: Path) -> None:
    columns = {"p0": np.random.default_rng(0).random(10_000)} | {f"p{i}": np.zeros(10_000) for i in range(1, 16)}
    table = pa.table(columns | {"label": ["a", "b"] * 5_000})
    pq.write_table(table, tmp_path / "train.parquet", use_dictionary=False, compression="zstd")
    forge_page(tmp_path / "train.parquet", 2**31 - 2**20)
    error, peak = load_measured(str(tmp_path), tmp_path / "cache")
    assert "train.parquet: expands to " in error
    assert peak < 1200


def edit(folder: Path, change: object) -> None:
    table = pd.read_csv(folder / "train.csv", dtype=object)
    change(table).to_csv(folder / "train.csv", index=False)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="Label"), r"train\.csv: no column label"),
        (lambda t: t.assign(pixel_7=[*["1"] * 8, "abc"]), r"train\.csv: row 8: no number in value 7"),
        (lambda t: t.assign(pixel_7=[*["1"] * 8, ""]), r"train\.csv: row 8: no number in value 7"),
        (lambda t: t.assign(pixel_7=[*["1"] * 8, "256"]), r"train\.csv: row 8: 256 in value 7"),
        (lambda t: t.assign(Label="none"), "expected at least two"),
        (lambda t: t[t["Label"] != "glioma"], r"Testing\.csv: class 'glioma', which train\.csv lacks"),
        (lambda t: t[:0], r"train\.csv: no rows"),
        (lambda t: t.join(pd.Series([*"aabbccdd", ""], name="patient")), r"train\.csv: row 8: the group is blank"),
        (lambda t: t.assign(**{f"pixel_{i}": "5" for i in range(432)}), "state it by --pixel_range"),
        (lambda t: t.assign(**{f"pixel_{i}": "50" for i in range(432)}), "state it by --pixel_order"),
    ],
)
def test_refusals(folder: Path, change: object, message: str) -> None:
    edit(folder, change)
    refused(folder, message)


def test_columns_that_make_no_image(folder: Path) -> None:
    (folder / "Testing.csv").unlink()
    edit(folder, lambda t: t.drop(columns="pixel_7"))
    refused(folder, r"train\.csv: 431 columns of values, expected 3 x S x S or S x S")


def test_a_bad_row_is_left_out(folder: Path) -> None:
    edit(folder, lambda t: t.assign(pixel_7=[*["1"] * 8, "abc"]))
    train = load(DataOptions(data=str(folder), on_bad_image="skip"))["train"]
    assert train["id"][:] == [str(i) for i in range(8)]
    assert "left out train.csv: row 8: no number in value 7" in train.info.description


@pytest.mark.parametrize("name", ["train.csv", "train.parquet", "train.npz"])
@pytest.mark.parametrize("content", [b"", b"PAR1 or PK\x03\x04 and nothing", None])
def test_broken_files(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is None:  # cut off
        write(tmp_path / name, smooth(9))
        content = (tmp_path / name).read_bytes()[:-400]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, rf"{name}: ")


PEAKS = """
import sys
from pathlib import Path
from hf_histo.data.load import load

def peak():  # not ru_maxrss, which a process inherits from its parent
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))

status = Path("/proc/self/status")
folder, count = Path(sys.argv[1]), int(sys.argv[2])
for suffix in (".csv", ".npz", ".parquet"):
    load(folder / f"few{suffix}", cache_dir=folder / "cache")  # what is loaded and allocated once
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = peak()
    assert len(load(folder / f"many{suffix}", cache_dir=folder / "cache")["full"]) == count
    print(suffix, peak() - before)
"""


def write_many(path: Path, count: int, side: int) -> None:
    """Write a table of `count` smooth images, alternating between two, if possible without holding it in memory."""
    images = [image.resize((side, side)) for image in map(PIL.Image.fromarray, smooth(2))]
    values = np.stack([np.asarray(image).reshape(-1) for image in images])
    if path.suffix == ".npz":
        np.savez(path, images=values[np.arange(count) % 2], y=np.arange(count) % 2)
    elif path.suffix == ".parquet":
        columns = {str(i): np.resize(pair, count) for i, pair in enumerate(values.T)}
        pq.write_table(pa.table(columns | {"label": np.arange(count) % 2}), path)
    else:
        lines = [",".join(map(str, [label, *row])) for label, row in enumerate(values.tolist())]
        with path.open("w") as file:
            file.write(",".join(["label", *map(str, range(values.shape[1]))]) + "\n")
            file.writelines(lines[row % 2] + "\n" for row in range(count))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize(
    ("count", "side"),
    [(2400, 40), pytest.param(2870, 224, marks=pytest.mark.slow)],  # the latter as many and as large as the real ones
)
def test_a_table_is_never_in_memory(tmp_path: Path, count: int, side: int) -> None:
    for suffix in (".csv", ".npz", ".parquet"):
        write_many(tmp_path / f"few{suffix}", 20, side)
        write_many(tmp_path / f"many{suffix}", count, side)
    command = [sys.executable, "-c", PEAKS, str(tmp_path), str(count)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    whole = count * 3 * side**2 * 4
    print(f"{found}the table as float32: {whole}")
    peaks = [int(line.split()[1]) for line in found.splitlines()]
    assert len(peaks) == 3 and all(peak < whole / 2 for peak in peaks)
