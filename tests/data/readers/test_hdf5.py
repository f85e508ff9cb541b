from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from fixtures import CENTERS, COUNTS, damage_chunk, truncate, write_challenge, write_csv, write_pcam

from hf_histo.config import DataOptions
from hf_histo.data.load import load
from hf_histo.data.readers import multicenter_hdf5
from hf_histo.data.schema import ImageTable
from hf_histo.data.splits.checks import shared_groups
from hf_histo.errors import HistoError

REAL = Path(__file__).parents[4] / "shared/data/histo-5centres"


def refused(directory: Path, message: str) -> None:
    """The folder is refused in one line that matches `message`, and nothing half done is left in the cache."""
    with pytest.raises(HistoError, match=message) as caught:
        load(directory, cache_dir=directory / "cache")
    assert "\n" not in str(caught.value)
    assert not list((directory / "cache").rglob("*.arrow"))


def edit(directory: Path, split: str, key: str, value: object, **options: object) -> None:
    """Replace the dataset `key`, or remove it where `value` is None."""
    with h5py.File(directory / f"{split}.h5", "r+") as file:
        if key in file:
            del file[key]
        if value is not None:
            file.create_dataset(key, data=value, **options)


def image(dtype: str = "uint8") -> np.ndarray:
    return np.full((3, 12, 14), 200).astype(dtype)


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


@pytest.mark.parametrize(
    ("member", "chunks"),
    [(member, chunks) for member in ("img", "metadata") for chunks in (None, True, "some")] + [("label", None)],
)
def test_refuses_what_was_never_written(tmp_path: Path, member: str, chunks: object) -> None:
    write_challenge(tmp_path)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        old = file[f"3/{member}"][()]
        del file[f"3/{member}"]
        sides = (1, *np.shape(old)[1:]) if chunks == "some" else chunks
        made = file["3"].create_dataset(member, np.shape(old), old.dtype, chunks=sides, fillvalue=1)
        if chunks == "some":
            made[:1] = old[:1]
    found = "2 of 3 chunks" if chunks == "some" else "(its values|1 of 1 chunks)"
    refused(tmp_path, rf"val\.h5: 3/{member}: {found} were never written, and would be read as 1, expected all of it")


@pytest.mark.parametrize("part", ["x", "y"])
def test_pcam_refuses_what_was_never_written(tmp_path: Path, part: str) -> None:
    write_pcam(tmp_path)
    with h5py.File(tmp_path / f"camelyonpatch_level_2_split_valid_{part}.h5", "r+") as file:
        old = file[part]
        shape, dtype = old.shape, old.dtype
        del file[part]
        file.create_dataset(part, shape, dtype, chunks=(1, *shape[1:]))[:2] = 1
    refused(tmp_path, rf"valid_{part}\.h5: {part}: 2 of 4 chunks were never written")


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


def test_refuses_what_is_declared_but_not_there(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "val", "3/img", None)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.create_dataset("3/img", (3, 1_000_000, 1_000_000), "uint8", chunks=(3, 64, 64))
    refused(tmp_path, r"val\.h5: 3/img: uint8 of shape \(3, 1000000, 1000000\) .*, 0 bytes on disk")


def test_refuses_huge_metadata_before_reading(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "val", "3/metadata", None)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.create_dataset("3/metadata", (10**12,), "int64", chunks=(64,))
    refused(tmp_path, r"val\.h5: 3/metadata: int64 of shape \(1000000000000,\) .*, 0 bytes on disk")


def test_refuses_a_billion_rows(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    with h5py.File(pcam_file(tmp_path, "x.h5"), "w") as file:
        file.create_dataset("x", (10**9, 96, 96, 3), "uint8", chunks=(3, 96, 96, 3), compression="gzip")
    refused(tmp_path, r"valid_x\.h5: x: uint8 of shape \(1000000000, 96, 96, 3\) .*, 0 bytes on disk")


def test_refuses_a_chunk_that_unpacks_to_more_than_memory_holds(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "val", "3/img", None)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        chunks = {"chunks": (1000, 1000, 1000), "maxshape": (None, None, None)}
        file.create_dataset("3/img", (3, 12, 14), "uint8", compression="gzip", **chunks)
    refused(tmp_path, r"val\.h5: 3/img: .* in chunks of 1000000000 bytes")


def test_refuses_one_image_linked_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multicenter_hdf5, "EXPANSION", 10)
    monkeypatch.setattr(multicenter_hdf5, "SMALL", 0)
    write_challenge(tmp_path, size=40)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        for i in range(500):
            file[f"again{i}"] = file["0"]
    refused(tmp_path, r"val\.h5: 506 images of 40x42 in \d+ bytes")


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "a\\b", "=1+1", "%n%s"])
def test_a_key_is_a_name_and_never_a_path(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    write_challenge(data)
    with h5py.File(data / "val.h5", "r+") as file:
        file.move("3", name.replace("/", "|"))
    content = (data / "val.h5").read_bytes()
    if "/" in name:  # what no library writes: the bytes of a name replaced in the file
        (data / "val.h5").write_bytes(content.replace(name.replace("/", "|").encode(), name.encode()))
        refused(data, r"val\.h5: \.\./\.\./etc/passwd: a path, expected a name without slashes")
    else:
        assert name in load(data, cache_dir=tmp_path / "cache")["val"]["id"]
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "cache"}


def test_refuses_a_name_that_is_no_text(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.id.links.move(b"3", file.id, b"\xff\xfe")
    refused(tmp_path, r"val\.h5: a group is named .*, expected printable text")


@pytest.mark.parametrize(
    "link",
    [
        h5py.ExternalLink("other.h5", "/0"),
        h5py.ExternalLink("absent.h5", "/0"),
        h5py.SoftLink("/outside/0"),
        h5py.SoftLink("/nowhere"),
    ],
)
@pytest.mark.parametrize("key", ["3", "3/img", "3/label", "3/metadata"])
def test_refuses_links(tmp_path: Path, link: object, key: str) -> None:
    write_challenge(tmp_path)
    write_challenge(tmp_path / "other", counts={"train": 2})
    (tmp_path / "other/train.h5").replace(tmp_path / "other.h5")
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        del file[key]
        file[key] = link
    refused(tmp_path, rf"val\.h5: {key}: a soft or external link")


def test_refuses_data_kept_in_other_files(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    (tmp_path / "raw").write_bytes(bytes(3 * 12 * 14))
    edit(tmp_path, "val", "3/img", None)
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.create_dataset("3/img", (3, 12, 14), "uint8", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
    refused(tmp_path, r"val\.h5: 3/img: data kept in other files")


def test_refuses_a_virtual_dataset(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    edit(tmp_path, "val", "3/img", None)
    layout = h5py.VirtualLayout((3, 12, 14), "uint8")
    layout[...] = h5py.VirtualSource(tmp_path / "train.h5", "0/img", (3, 12, 14))
    with h5py.File(tmp_path / "val.h5", "r+") as file:
        file.create_virtual_dataset("3/img", layout)
    refused(tmp_path, r"val\.h5: 3/img: data kept in other files")


@pytest.mark.parametrize(
    "break_file", [truncate, lambda path: path.write_bytes(b"not HDF5"), lambda path: path.write_bytes(b"")]
)
def test_refuses_a_broken_file(tmp_path: Path, break_file: Callable[[Path], object]) -> None:
    write_challenge(tmp_path)
    break_file(tmp_path / "val.h5")
    refused(tmp_path, r"val\.h5: not a complete HDF5 file .*copy or download it again")


@pytest.mark.parametrize("key", ["0", "1"])  # looked at before the conversion, and not
def test_refuses_one_damaged_image_among_many(tmp_path: Path, key: str) -> None:
    write_challenge(tmp_path, counts={"train": 70, "val": 2})
    damage_chunk(tmp_path / "train.h5", f"{key}/img")
    refused(tmp_path, rf"train\.h5: {key}/img: unreadable")


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
    said = data["train"].info.description
    assert said.count("left out ") == 3 and str(tmp_path) not in said
    assert "\nleft out train.h5: 1/img: unreadable" in said and "\nleft out val.h5: 3: no img" in said
    edit(tmp_path, "val", "2/label", 7)
    with pytest.raises(HistoError, match=r"val\.h5: 2/label: 7, expected 0 or 1"):  # no image, but still a fault
        load(options)


def test_refuses_an_empty_file(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    h5py.File(tmp_path / "val.h5", "w").close()
    refused(tmp_path, r"val\.h5: no images")


@pytest.mark.parametrize("meta", [True, False])
def test_pcam(tmp_path: Path, meta: bool) -> None:
    written = write_pcam(tmp_path, meta=meta)
    splits = load(tmp_path)
    for name, official in (("train", "train"), ("val", "valid"), ("test", "test")):
        split, patches = splits[name], written[official]
        assert split["id"][:] == [str(i) for i in range(len(patches))]
        assert split["label"][:] == [i % 2 for i in range(len(patches))]
        assert set(split["center"]) == {-1}
        assert split["group"][:] == [f"camelyon16_{official}_{i // 2:03}" if meta else "" for i in range(len(patches))]
        tensors = ImageTable(split)
        assert all(np.array_equal(tensors[i]["image"], patches[i].transpose(2, 0, 1)) for i in range(len(patches)))


def test_pcam_may_hide_the_labels_of_test(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    (tmp_path / "camelyonpatch_level_2_split_test_y.h5").unlink()
    assert set(load(tmp_path)["test"]["label"]) == {-1}


def pcam_file(directory: Path, part: str) -> Path:
    return directory / f"camelyonpatch_level_2_split_valid_{part}"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            "x",
            np.zeros((4, 3, 96, 96), np.uint8),
            r"valid_x\.h5: x: uint8 \(4, 3, 96, 96\), expected uint8 \(N, H, W, 3\)",
        ),
        ("x", np.zeros((4, 96, 96, 3), np.uint16), r"valid_x\.h5: x: uint16"),
        ("x", np.zeros((0, 96, 96, 3), np.uint8), r"valid_x\.h5: x: uint8 \(0, 96, 96, 3\)"),
        ("x", None, r"valid_x\.h5: no x"),
        ("x", np.zeros((5, 96, 96, 3), np.uint8), r"valid_y\.h5: y of shape \(4, 1, 1, 1\), expected 5 labels"),
        ("y", None, r"valid_y\.h5: no y, expected 4 labels"),
        ("y", np.array([0, 1, 2, 1], np.uint8), r"valid_y\.h5: y: 2 in row 2, expected 0 or 1"),
    ],
)
def test_pcam_refuses(tmp_path: Path, part: str, value: np.ndarray | None, message: str) -> None:
    write_pcam(tmp_path)
    with h5py.File(pcam_file(tmp_path, f"{part}.h5"), "w") as file:
        if value is not None:
            file[part] = value
    refused(tmp_path, message)


def test_pcam_refuses_a_table_that_disagrees(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    write_csv(pcam_file(tmp_path, "meta.csv"), [["wsi"], ["a"], ["b"]])
    refused(tmp_path, r"valid_meta\.csv: 2 rows, expected 4")
    write_csv(pcam_file(tmp_path, "meta.csv"), [["slide"], ["a"], ["b"]])
    refused(tmp_path, r"valid_meta\.csv: .*expected a CSV table with a column wsi")


def test_pcam_refuses_broken_and_missing_files(tmp_path: Path) -> None:
    write_pcam(tmp_path)
    damage_chunk(pcam_file(tmp_path, "x.h5"), "x")
    refused(tmp_path, r"valid_x\.h5: x: unreadable")
    truncate(pcam_file(tmp_path, "x.h5"))
    refused(tmp_path, r"valid_x\.h5: not a complete HDF5 file")
    pcam_file(tmp_path, "y.h5").unlink()
    refused(tmp_path, r"valid_y\.h5: no such file")


def test_pcam_patches_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    written = write_pcam(tmp_path)
    damage_chunk(tmp_path / "camelyonpatch_level_2_split_train_x.h5", "x")  # of rows 0 to 2
    data = load(DataOptions(data=str(tmp_path), cache_dir=str(tmp_path / "cache"), on_bad_image="skip"))
    assert data["train"]["id"][:] == ["3", "4", "5", "6"] and len(data["val"]) == 4
    assert np.array_equal(ImageTable(data["train"])[0]["image"].permute(1, 2, 0), written["train"][3])
    for row in range(3):
        assert f"left out camelyonpatch_level_2_split_train_x.h5: x: row {row}: unr" in data["train"].info.description


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
