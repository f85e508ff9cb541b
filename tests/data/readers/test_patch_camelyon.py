from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from fixtures import damage_chunk, truncate, write_csv, write_pcam
from hdf5_files import pcam_file, refused

from hf_histo.config import DataOptions
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable


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
