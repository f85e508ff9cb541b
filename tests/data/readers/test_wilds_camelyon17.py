from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from fixtures import truncate, write_csv, write_wilds

from hf_histo.config import DataOptions
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError


def refused(directory: Path, message: str) -> None:
    with pytest.raises(HistoError, match=message) as caught:
        load(directory)
    assert "\n" not in str(caught.value)


def rewrite(directory: Path, column: str, row: int, value: object) -> None:
    """Set one cell of metadata.csv."""
    path = directory / "metadata.csv"
    rows = [line.split(",") for line in path.read_text().splitlines()]
    rows[row + 1][rows[0].index(column)] = str(value)
    write_csv(path, rows)


def test_official_splits(tmp_path: Path) -> None:
    paths = write_wilds(tmp_path)
    splits = load(tmp_path)
    assert list(splits) == ["train", "id_val", "val", "test"]
    numbers = {"train": [0, 1, 2, 3], "id_val": [4, 5], "val": [6, 7], "test": [8, 9]}
    for name, rows in numbers.items():
        assert splits[name]["id"][:] == [paths[i].stem for i in rows]
        assert splits[name]["label"][:] == [i % 2 for i in rows]
    assert splits["train"]["center"][:] == [0, 3, 4, 0]
    assert splits["train"]["group"][:] == ["patient_004", "patient_034", "patient_044", "patient_004"]
    assert set(splits["val"]["center"]) == {1} and set(splits["test"]["center"]) == {2}


def test_files_are_embedded_as_they_are(tmp_path: Path) -> None:
    paths = write_wilds(tmp_path)
    val = load(tmp_path)["val"]
    assert val.with_format("arrow")[:]["image"][0]["bytes"].as_py() == paths[6].read_bytes()
    rgb = np.asarray(PIL.Image.open(io.BytesIO(paths[6].read_bytes())).convert("RGB"))
    assert np.array_equal(ImageTable(val)[0]["image"], rgb.transpose(2, 0, 1))


def test_patient_numbers_may_lack_their_zeros(tmp_path: Path) -> None:
    write_wilds(tmp_path)
    rewrite(tmp_path, "patient", 0, 4)
    assert load(tmp_path)["train"]["group"][0] == "patient_004"


def test_test_is_optional(tmp_path: Path) -> None:
    write_wilds(tmp_path)
    lines = (tmp_path / "metadata.csv").read_text().splitlines()
    (tmp_path / "metadata.csv").write_text("\n".join(lines[:-2]))
    assert list(load(tmp_path)) == ["train", "id_val", "val"]


def test_refuses_one_corrupt_patch(tmp_path: Path) -> None:
    paths = write_wilds(tmp_path)
    truncate(paths[7])
    refused(tmp_path, rf"{paths[7]}: not a readable image")


def test_refuses_one_missing_patch(tmp_path: Path) -> None:
    paths = write_wilds(tmp_path)
    paths[7].unlink()
    refused(tmp_path, rf"{paths[7]}: no such file")


def test_refuses_a_patch_that_leads_outside(tmp_path: Path) -> None:
    patch = write_wilds(tmp_path / "set")[7]
    patch.rename(tmp_path / "secret.png")
    patch.symlink_to(tmp_path / "secret.png")
    refused(tmp_path / "set", rf"{patch}: leads to {tmp_path / 'secret.png'}, expected a file within")


def test_refuses_another_size(tmp_path: Path) -> None:
    paths = write_wilds(tmp_path)
    PIL.Image.new("RGB", (50, 60)).save(paths[3])
    refused(tmp_path, rf"{paths[3]}: shape \(3, 60, 50\), expected \(3, 96, 96\)")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tumor", 2, r"metadata\.csv: tumor is 2 in row 3, expected 0 or 1"),
        ("split", 5, r"metadata\.csv: split is 5 in row 3"),
        ("center", "", r"metadata\.csv: .*expected a CSV table with whole numbers"),
        ("center", 2**63, r"metadata\.csv: .*expected a CSV table with whole numbers"),
        ("center", 10**30, r"metadata\.csv: .*expected a CSV table with whole numbers"),
        ("center", "1e30", r"metadata\.csv: .*expected a CSV table with whole numbers"),
        ("patient", "../../etc", r"metadata\.csv: .*expected a CSV table with whole numbers"),
    ],
)
def test_refuses_a_bad_cell(tmp_path: Path, column: str, value: object, message: str) -> None:
    write_wilds(tmp_path)
    rewrite(tmp_path, column, 3, value)
    refused(tmp_path, message)


def test_refuses_a_table_without_a_column_or_rows(tmp_path: Path) -> None:
    write_wilds(tmp_path)
    table = tmp_path / "metadata.csv"
    text = table.read_text()
    table.write_text(text.replace("tumor", "label"))
    refused(tmp_path, r"metadata\.csv: .*tumor")
    table.write_text("")
    refused(tmp_path, r"metadata\.csv: ")
    table.write_text(text.splitlines()[0])
    refused(tmp_path, r"metadata\.csv: no rows for train")


def test_refuses_an_absent_validation_center(tmp_path: Path) -> None:
    write_wilds(tmp_path)
    for row in (6, 7):
        rewrite(tmp_path, "center", row, 2)
    with pytest.raises(HistoError, match=r"metadata\.csv: no rows for val"):
        load(tmp_path)


def test_an_unreadable_patch_is_left_out(tmp_path: Path) -> None:
    paths = write_wilds(tmp_path)
    truncate(paths[1])
    refused(tmp_path, r"x_32_y_64\.png: not a readable image")
    train = load(DataOptions(data=str(tmp_path), on_bad_image="skip"))["train"]
    assert train["id"][:] == [paths[i].stem for i in (0, 2, 3)]
    assert f"left out {paths[1].relative_to(tmp_path)}: not a readable image" in train.info.description
