from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import datasets
import h5py
import multiprocess
import numpy as np
import pytest
from fixtures import CENTERS, COUNTS, damage_chunk, write_challenge
from hdf5_files import edit, image, refused

from hf_histo import launch
from hf_histo.config import DataOptions
from hf_histo.data import cache
from hf_histo.data.load import fingerprint, load
from hf_histo.data.readers import builder, multicenter_hdf5
from hf_histo.data.schema import ImageTable
from hf_histo.data.splits.checks import shared_groups
from hf_histo.errors import HistoError

REAL = Path(__file__).parents[4] / "shared/data/histo-5centres"


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize(
    ("dtype", "maximum"),
    [("uint8", 255), *((dtype, maximum) for dtype in ("float16", "float32", "float64", ">f4") for maximum in (1, 255))],
)
def test_challenge_formats_give_the_same_images(tmp_path: Path, dtype: str, maximum: int, channels_first: bool) -> None:
    written = write_challenge(tmp_path, dtype=dtype, maximum=maximum, channels_first=channels_first)
    splits = load(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == COUNTS
    for name, split in splits.items():
        for key, sample in zip(split["id"], ImageTable(split).__getitems__(range(len(split))), strict=True):
            assert np.array_equal(sample["image"], written[name][int(key)].transpose(2, 0, 1))
    order = "CHW" if channels_first else "HWC"
    assert f"train.h5: {np.dtype(dtype)} {order} 12x14 in [0, {maximum}]" in splits["train"].info.description


def test_challenge_columns(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    splits = load(tmp_path)
    assert splits["train"]["id"][:5] == ["0", "1", "10", "11", "2"]  # text order
    for row in splits["train"]:
        number = int(row["id"])
        assert (row["label"], row["center"]) == (number % 2, CENTERS["train"][number % 3])
        assert row["group"] == f"slide_{100 + number // 2}"
    assert set(splits["test"]["label"]) == {-1}
    assert set(splits["test"]["center"]) == {2}
    assert splits["test"]["group"][0] == "slide_900"
    assert splits["train"].features["label"].names == ["normal", "tumor"]


def test_keys_sort_as_text_whatever_order_the_file_tracks(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    with h5py.File(tmp_path / "train.h5") as old, h5py.File(tmp_path / "new.h5", "w", track_order=True) as new:
        for key in sorted(old, key=int):
            old.copy(key, new)
        assert list(new)[2] == "2"
    (tmp_path / "new.h5").replace(tmp_path / "train.h5")
    assert load(tmp_path)["train"]["id"][:3] == ["0", "1", "10"]


def test_labels_of_the_test_file_are_used_where_given(tmp_path: Path) -> None:
    write_challenge(tmp_path, test_labels=True)
    edit(tmp_path, "test", "0/label", -1)
    edit(tmp_path, "test", "2/label", None)
    assert load(tmp_path)["test"]["label"][:] == [-1, 1, -1, 1]


def test_the_test_file_is_optional(tmp_path: Path) -> None:
    write_challenge(tmp_path, counts={"train": 4, "val": 2})
    assert list(load(tmp_path)) == ["train", "val"]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_metadata_names_no_group(tmp_path: Path, length: int) -> None:
    write_challenge(tmp_path, metadata=length)
    splits = load(tmp_path)
    assert set(splits["train"]["group"]) == {""}
    assert set(splits["train"]["center"]) == ({-1} if length == 0 else {0, 3, 4})


def test_a_label_in_metadata_1_is_never_a_group(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    for split in ("train", "val"):
        for i in range(COUNTS[split]):
            edit(tmp_path, split, f"{i}/metadata", [0, i % 2, 77])
    splits = load(tmp_path)
    assert {group for split in splits.values() for group in split["group"]} == {""}
    assert "group: unknown" in splits["train"].info.description


def test_float_metadata_may_hide_later_entries(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "test", "0/metadata", [2.0, 900.0, np.nan])
    edit(tmp_path, "test", "1/metadata", [2.0, np.nan])
    row = load(tmp_path)["test"]
    assert (row["center"][:2], row["group"][:2]) == ([2, 2], ["slide_900", ""])


@pytest.mark.parametrize(
    ("split", "key", "value", "message"),
    [
        ("val", "3/img", None, r"val\.h5: 3: no img"),
        ("val", "3/img", image()[:, :6], r"val\.h5: 3/img: uint8 \(3, 6, 14\), expected uint8 \(3, 12, 14\)"),
        ("val", "3/img", image("float32"), r"val\.h5: 3/img: float32 .*expected uint8"),
        ("val", "3/img", image()[0], r"val\.h5: 3/img: shape \(12, 14\), expected \(3, H, W\)"),
        ("val", "3/img", image()[:2], r"val\.h5: 3/img: shape \(2, 12, 14\)"),
        ("val", "3/img", image()[:, :, :3], r"val\.h5: 3/img: shape \(3, 12, 3\)"),
        ("val", "3/img", image("int32"), r"val\.h5: 3/img: dtype int32"),
        ("val", "3/img", image("uint16"), r"val\.h5: 3/img: uint16, expected uint8"),
        ("val", "3/img", "text", r"val\.h5: 3/img: dtype object"),
        ("val", "3/img", h5py.Empty("uint8"), r"val\.h5: 3/img: a group or empty"),
        ("val", "3/img", np.zeros((3, 2, 2), [("r", "u1")]), r"val\.h5: 3/img: dtype .*expected plain numbers"),
        ("train", "3/label", None, r"train\.h5: 3: no label"),
        ("val", "3/label", None, r"val\.h5: 3: no label"),
        ("val", "3/label", 2, r"val\.h5: 3/label: 2, expected 0 or 1"),
        ("val", "3/label", -1, r"val\.h5: 3/label: -1, expected 0 or 1"),
        ("val", "3/label", np.nan, r"val\.h5: 3/label: nan"),
        ("val", "3/label", [0, 1], r"val\.h5: 3/label: an array of shape \(2,\)"),
        ("val", "3/label", np.zeros((), [("a", "i8")]), r"val\.h5: 3/label: dtype .*expected plain numbers"),
        ("test", "3/label", 7, r"test\.h5: 3/label: 7"),
        ("val", "3/metadata", 1, r"val\.h5: 3/metadata: shape \(\), expected \(n,\)"),
        ("val", "3/metadata", [[1, 2, 3]], r"val\.h5: 3/metadata: shape \(1, 3\)"),
        ("val", "3/metadata", [0.5, 1, 2], r"val\.h5: 3/metadata: \[0\.5, 1\.0\], expected whole numbers"),
        ("val", "3/metadata", [np.inf], r"val\.h5: 3/metadata: \[inf\]"),
        ("val", "stray", image(), r"val\.h5: stray: not a group"),
    ],
)
def test_refuses_one_bad_image(tmp_path: Path, split: str, key: str, value: object, message: str) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, split, key, value)
    refused(tmp_path, message)


@pytest.mark.parametrize("bad", [-0.1, 1.5, 300, np.nan, np.inf])
@pytest.mark.parametrize("probed", [True, False])
def test_refuses_one_value_out_of_range(tmp_path: Path, bad: float, probed: bool) -> None:
    # Of 70 images every other is looked at before the conversion: "0" is among them, "1" not.
    write_challenge(tmp_path, counts={"train": 70, "val": 2}, dtype="float32", maximum=1)
    pixels = np.full((3, 12, 14), 0.5, np.float32)
    pixels[1, 2, 3] = bad
    key = "0" if probed else "1"
    edit(tmp_path, "train", f"{key}/img", pixels)
    refused(tmp_path, rf"train\.h5:.* {key}/img")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("key", ["0", "1"])  # looked at before the conversion, and not
def test_refuses_one_image_of_another_range(tmp_path: Path, dtype: str, key: str) -> None:
    write_challenge(tmp_path, counts={"train": 70, "val": 2}, dtype=dtype)
    edit(tmp_path, "train", "2/img", np.zeros((3, 12, 14), dtype))  # black in any range
    edit(tmp_path, "train", f"{key}/img", np.full((3, 12, 14), 0.75, dtype))
    refused(tmp_path, rf"train\.h5: {key}/img: values reach only 0\.75, as of \[0, 1\], expected \[0, 255\]")


@pytest.mark.parametrize("center", [2.0**63, 1e30, 2**64 - 1])
def test_refuses_a_center_that_is_no_64_bit_number(tmp_path: Path, center: float) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "val", "3/metadata", np.array([center, 1, 1], np.uint64 if isinstance(center, int) else np.float64))
    refused(tmp_path, r"val\.h5: 3/metadata: center \d+, expected one below 2\^63")


@pytest.mark.parametrize(
    ("dtype", "peak"), [("uint8", 1), ("uint8", 0), ("uint8", 9), ("float32", 1.01), ("float32", 9)]
)
def test_refuses_an_ambiguous_range(tmp_path: Path, dtype: str, peak: float) -> None:
    write_challenge(tmp_path)
    for i in range(COUNTS["val"]):
        edit(tmp_path, "val", f"{i}/img", np.full((3, 12, 14), peak, dtype))
    refused(tmp_path, rf"val\.h5: {dtype} values of 0/img .* reach only {peak:g}")


def test_refuses_other_sizes_in_another_split(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    write_challenge(tmp_path, counts={"val": 4}, size=20)
    refused(tmp_path, r"val\.h5: images of 20x22, but 12x14 in train\.h5")


def test_refuses_a_huge_image_before_reading(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "val", "3/img", None)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.create_dataset("3/img", data=np.zeros((3, 10_001, 10_000), np.uint8), compression=1)
    refused(tmp_path, r"val\.h5: 3/img: uint8 of shape \(3, 10001, 10000\), expected at most 300000000 bytes")


def test_refuses_one_image_linked_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multicenter_hdf5, "EXPANSION", 10)
    monkeypatch.setattr(multicenter_hdf5, "SMALL", 0)
    write_challenge(tmp_path, size=40)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        for i in range(500):
            file[f"again{i}"] = file["0"]
    refused(tmp_path, r"val\.h5: 506 images of 40x42 in \d+ bytes")


def test_refuses_a_name_that_is_no_text(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.id.links.move(b"3", file.id, b"\xff\xfe")
    refused(tmp_path, r"val\.h5: a group is named .*, expected printable text")


@pytest.mark.parametrize("first", ["damaged", "whole"])
def test_images_that_cannot_be_read_are_left_out(tmp_path: Path, first: str) -> None:
    write_challenge(tmp_path, counts={"train": 70, "val": 4, "test": 3})
    damage_chunk(tmp_path / "train.h5", "1/img")
    damage_chunk(tmp_path / "train.h5", "0/img") if first == "damaged" else edit(
        tmp_path, "train", "2/img", image()[:1]
    )
    edit(tmp_path, "val", "3/img", None)
    options = DataOptions(data=str(tmp_path), cache_dir=str(tmp_path / "cache"), on_bad_image="skip")
    data = load(options)
    assert not {"1", "0" if first == "damaged" else "2"} & set(data["train"]["id"])
    assert [len(rows) for rows in data.values()] == [68, 3, 3]
    description = data["train"].info.description
    assert description.count("left out ") == 3 and str(tmp_path) not in description
    assert "\nleft out train.h5: 1/img: unreadable" in description and "\nleft out val.h5: 3: no img" in description
    edit(tmp_path, "val", "2/label", 7)
    with pytest.raises(HistoError, match=r"val\.h5: 2/label: 7, expected 0 or 1"):  # no image, but still a fault
        load(options)


def several_processes(monkeypatch: pytest.MonkeyPatch, number: int = 3) -> None:
    """Convert in `number` processes wherever there are at least as many images."""
    monkeypatch.setattr(builder, "PER_PROCESS", 1)
    monkeypatch.setattr(launch, "thread_count", lambda: number)


def test_any_number_of_processes_gives_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_challenge(tmp_path, counts={"train": 70, "val": 4, "test": 2})
    for split, key in (("train", "0"), ("train", "31"), ("train", "66"), ("val", "3")):
        edit(tmp_path, split, f"{key}/img", None)
    options = DataOptions(data=str(tmp_path), on_bad_image="skip")
    expected = load(options, cache_dir=tmp_path / "one")
    assert not [path for path in (tmp_path / "one").rglob("*.arrow") if "-of-" in path.name]
    several_processes(monkeypatch)
    found = load(options, cache_dir=tmp_path / "three")
    assert {path.name[-9:] for path in (tmp_path / "three").rglob("challenge-train*")} == {"003.arrow"}  # of 3
    assert not list((tmp_path / "three").rglob(f"*{cache.NOTE}"))
    assert fingerprint(found) == fingerprint(expected)
    for split, rows in expected.items():
        assert found[split].data.table.combine_chunks() == rows.data.table.combine_chunks()
        assert found[split].info.description == rows.info.description
        assert found[split].info.description.count("left out ") == 4


def test_the_first_of_the_errors_in_several_processes_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_challenge(tmp_path, counts={"train": 70, "val": 4})
    several_processes(monkeypatch)
    for key in ("38", "67"):  # in the order of text, in the second and the third process
        edit(tmp_path, "train", f"{key}/label", 7)
    refused(tmp_path, r"train\.h5: 38/label: 7, expected 0 or 1")


def test_a_full_disk_in_one_of_several_processes_comes_out_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: datasets.arrow_writer.ArrowWriter, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_challenge(tmp_path)
    several_processes(monkeypatch)
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        load(tmp_path, cache_dir=tmp_path / "cache")


def test_a_killed_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_challenge(tmp_path)
    several_processes(monkeypatch)
    main, read = os.getpid(), multicenter_hdf5.PixelFormat.read
    monkeypatch.setattr(
        multicenter_hdf5.PixelFormat,
        "read",
        lambda *given: read(*given) if os.getpid() == main else os.kill(os.getpid(), signal.SIGKILL),
    )
    refused(tmp_path, "one of 3 processes that convert it was killed")


@pytest.mark.parametrize(
    ("sent", "handler"), [(signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, launch._interrupt)]
)
def test_a_signal_ends_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, handler: Any
) -> None:
    write_challenge(tmp_path)
    several_processes(monkeypatch)
    main, read = os.getpid(), multicenter_hdf5.PixelFormat.read

    def interrupt(*given: object) -> object:
        if os.getpid() != main:
            os.kill(main, sent)
            time.sleep(10)
        return read(*given)

    monkeypatch.setattr(multicenter_hdf5.PixelFormat, "read", interrupt)
    before = signal.signal(sent, handler)  # a command in the background of a script ignores SIGINT
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            load(tmp_path, cache_dir=tmp_path / "cache")
    finally:
        signal.signal(sent, before)
        for child in multiprocess.active_children():  # the second one's signal may interrupt the end of a manager
            child.kill()
    assert getattr(caught.value, "number", signal.SIGINT) == sent
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize(("rows", "cores", "number"), [(4999, 8, 1), (5000, 8, 2), (10**6, 8, 8), (0, 8, 1)])
def test_each_process_has_enough_images(rows: int, cores: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "thread_count", lambda: cores)
    parts = builder.parts(rows)
    assert len(parts) == number
    assert [row for part in parts for row in part] == list(range(rows))
    monkeypatch.setattr(builder.multiprocess, "get_start_method", lambda: "spawn")
    assert builder.parts(rows) == [range(rows)]


def test_refuses_an_empty_file(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    h5py.File(tmp_path / "val.h5", "w").close()
    refused(tmp_path, r"val\.h5: no images")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real data are not at {REAL}")
def test_real_five_centers() -> None:
    splits = load(REAL)
    assert {name: len(split) for name, split in splits.items()} == {"train": 1617, "val": 400, "test": 600}
    assert {name: set(split["center"]) for name, split in splits.items()} == {
        "train": {0, 3, 4},
        "val": {1},
        "test": {2},
    }
    assert set(splits["train"]["label"]) == set(splits["val"]["label"]) == {0, 1}
    assert set(splits["test"]["label"]) == {-1}
    assert {name: len(set(split["group"])) for name, split in splits.items()} == {
        "train": 760,
        "val": 223,
        "test": 248,
    }
    assert shared_groups(splits) == {}
    with h5py.File(REAL / "val.h5") as file:
        key = splits["val"]["id"][17]
        assert np.array_equal(ImageTable(splits["val"])[17]["image"], file[key]["img"])
