from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from dicom_files import SECRET, dicom, dicom_bytes, write_dicom
from fixtures import images

from hf_histo.config import DataOptions
from hf_histo.data import protocol
from hf_histo.data.load import fingerprint, load
from hf_histo.data.readers import image_rows
from hf_histo.data.schema import ImageTable, center_names
from hf_histo.errors import HistoError

COUNT = 48
CENTERS = ("Leipzig", "Halle", "Jena")


def rows_of(folder: Path) -> pd.DataFrame:
    """Two classes, three centers; a patient has two images, one of each class."""
    (folder / "img").mkdir(parents=True)
    rows = []
    for number, image in enumerate(images(COUNT)):
        PIL.Image.fromarray(image).save(folder / "img" / f"{number}.png")
        center = CENTERS[number // 2 % 3]
        rows.append((f"img/{number}.png", ("cat", "ant")[number % 2], center, f"P{number // 2}"))
    return pd.DataFrame(rows, columns=["Image Path", "label", "hospital", "patient"])


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    return rows_of(tmp_path / "data")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "images.csv"


def refused(file: Path, message: str, **options: Any) -> str:
    with pytest.raises(HistoError, match=message) as caught:
        load(DataOptions(data=str(file), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_become_the_schema(table: pd.DataFrame, file: Path) -> None:
    table.to_csv(file, index=False)
    rows = load(file)["full"]
    assert rows["id"][:] == table["Image Path"].to_list()
    assert rows.features["label"].names == ["ant", "cat"] and rows["label"][:4] == [1, 0, 1, 0]
    assert center_names(rows) == sorted(CENTERS) and rows["center"][:6] == [2, 2, 0, 0, 1, 1]
    assert rows["group"][:3] == ["P0", "P0", "P1"]
    assert np.array_equal(ImageTable(rows)[5]["image"], images(COUNT)[5].transpose(2, 0, 1))


def utf16(table: pd.DataFrame, file: Path) -> None:
    table.to_csv(file, index=False, encoding="utf-16")


def semicolons(table: pd.DataFrame, file: Path) -> None:
    table.to_csv(file, index=False, sep=";", encoding="utf-8-sig")


def tabs(table: pd.DataFrame, file: Path) -> None:
    table.to_csv(file.with_suffix(".tsv"), index=False, sep="\t")


def parquet(table: pd.DataFrame, file: Path) -> None:
    table.astype({"hospital": "category"}).to_parquet(file.with_suffix(".parquet"), index=False)


def workbook(table: pd.DataFrame, file: Path) -> None:
    pytest.importorskip("openpyxl")
    table.to_excel(file.with_suffix(".xlsx"), index=False)


@pytest.mark.parametrize("write", [utf16, semicolons, tabs, parquet, workbook])
def test_formats_hold_the_same(
    write: Callable[[pd.DataFrame, Path], None], table: pd.DataFrame, file: Path, tmp_path: Path
) -> None:
    table.to_csv(file, index=False)
    expected = load(file)["full"]
    file.unlink()
    write(table, file)
    (written,) = (path for path in file.parent.iterdir() if path.is_file())
    assert load(written)["full"].to_dict() == expected.to_dict()


def test_a_workbook_without_openpyxl(file: Path, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    book = file.with_suffix(".xlsx")
    book.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    refused(book, r"needs openpyxl: pip install 'hf_histo\[excel\]', or save it as CSV")


def test_numbers_as_labels_and_centers_keep_their_order(table: pd.DataFrame, file: Path) -> None:
    table["label"] = [(2.0, 10.0)[row % 2] for row in range(COUNT)]
    table["hospital"] = [(None, 7.0, 12.0)[row % 3] for row in range(COUNT)]
    table.to_csv(file, index=False)
    rows = load(file)["full"]
    assert rows.features["label"].names == ["2", "10"]
    assert center_names(rows) == [] and rows["center"][:3] == [-1, 7, 12]


def test_columns_are_named_by_options(table: pd.DataFrame, file: Path) -> None:
    table["befund"] = table.pop("label").str.upper()
    table.insert(0, "site", "thorax")
    table.to_csv(file, index=False)
    refused(file, "2 columns could be the center: site, hospital, expected one; name it by --center_column")
    named = {"label_column": "befund", "center_column": "hospital", "group_column": "none"}
    rows = load(DataOptions(data=str(file), **named))["full"]
    assert rows.features["label"].names == ["ANT", "CAT"]
    assert center_names(rows) == sorted(CENTERS) and set(rows["group"]) == {""}
    refused(file, r"no column 'befunde' \(--label_column\), .*; did you mean 'befund'\?", label_column="befunde")


def test_groups_are_whole_in_splits_of_70_15_and_15_percent(table: pd.DataFrame, file: Path, tmp_path: Path) -> None:
    table.to_csv(file, index=False)
    data = protocol.arranged(DataOptions(data=str(file)))
    groups = [set(rows["group"]) for rows in data.values()]
    assert list(data) == ["train", "val", "test"] and len(set.union(*groups)) == sum(map(len, groups)) == COUNT // 2
    again = protocol.arranged(DataOptions(data=str(file), cache_dir=str(tmp_path / "cache")))
    assert [rows["id"][:] for rows in again.values()] == [rows["id"][:] for rows in data.values()]
    single = protocol.arranged(DataOptions(data=str(file), group_column="none", center_column="none"))
    assert {split: len(rows) for split, rows in single.items()} == {"train": 36, "val": 6, "test": 6}


def test_centers_are_held_out_by_name(table: pd.DataFrame, file: Path) -> None:
    table.to_csv(file, index=False)
    options = DataOptions(data=str(file), test_centers="Leipzig")
    data = protocol.arranged(options)
    expected = table.loc[table["hospital"] == "Leipzig", "Image Path"].to_list()
    assert data["test"]["id"][:] == expected
    assert len(data["train"]) + len(data["val"]) == COUNT - len(expected) and len(data["val"]) >= 4
    two = protocol.arranged(dataclasses.replace(options, test_centers="Leipzig, Jena"))
    assert set(two["test"]["center"]) == {1, 2} and set(two["train"]["center"]) == {0}
    with pytest.raises(
        HistoError, match=r"--test_centers is 'leipzig', expected some of Halle, Jena, Leipzig; did you"
    ):
        protocol.arranged(dataclasses.replace(options, test_centers="leipzig"))
    with pytest.raises(HistoError, match="no image has a known center"):
        protocol.arranged(dataclasses.replace(options, center_column="none"))


def test_a_patient_of_two_centers_is_not_trained_on_when_one_is_held_out(table: pd.DataFrame, file: Path) -> None:
    table.loc[2, "patient"] = "P0"  # whose other images are of the center that is held out
    table.to_csv(file, index=False)
    data = protocol.arranged(DataOptions(data=str(file), test_centers="Leipzig"))
    assert "img/2.png" not in {key for rows in data.values() for key in rows["id"]}
    assert "1 images of full are left out" in data["train"].info.description


def test_given_splits_stay(table: pd.DataFrame, file: Path) -> None:
    table["split"] = [("Training", "valid", "test")[min(2, row // 2 % 6)] for row in range(COUNT)]
    table.loc[table["split"] == "test", "label"] = ""
    table.to_csv(file, index=False)
    data = protocol.arranged(DataOptions(data=str(file)))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 8, "val": 8, "test": 32}
    assert set(data["test"]["label"]) == {-1}
    held_out = protocol.arranged(DataOptions(data=str(file), test_centers="Jena"))
    assert set(held_out["test"]["center"]) == {1} and 1 not in held_out["train"]["center"]
    refused(file, r"csv, rows 6, 7, 8, 9, 10 and 27 more: the label is blank \(or -1, hidden\)", split_column="none")


def test_a_table_for_each_split(table: pd.DataFrame, file: Path) -> None:
    for split, part in {"train": table[:24], "val": table[24:36], "test": table[36:]}.items():
        part.to_csv(file.with_name(f"{split}.csv"), index=False)
    data = load(file.parent)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 24, "val": 12, "test": 12}
    table[:24].to_csv(file.with_name("val.csv"), index=False)
    refused(
        file.parent, r"train\.csv, row 2 and .*val\.csv, row 2 have the id 'img/0\.png', expected one row per image"
    )


def test_a_table_without_labels_is_to_be_predicted(table: pd.DataFrame, file: Path) -> None:
    table[["Image Path"]].to_csv(file, index=False)
    data = load(file)
    assert list(data) == ["test"] and set(data["test"]["label"]) == {-1}


def test_images_lie_below_another_folder(table: pd.DataFrame, file: Path, tmp_path: Path) -> None:
    table.to_csv(tmp_path / "table.csv", index=False)
    root = tmp_path / "data"
    data = load(DataOptions(data=str(tmp_path / "table.csv"), image_root=str(root)))
    table["Image Path"] = [str(root / name) for name in table["Image Path"]]
    table.to_csv(tmp_path / "absolute.csv", index=False)
    absolute = load(DataOptions(data=str(tmp_path / "absolute.csv"), image_root=str(root)))
    assert absolute["full"]["id"][:] == data["full"]["id"][:]
    assert str(tmp_path) not in absolute["full"].info.description


def test_the_key_covers_the_table_and_every_image_but_no_place(table: pd.DataFrame, file: Path, tmp_path: Path) -> None:
    table.to_csv(file, index=False)
    known = fingerprint(load(file))
    moved = Path(shutil.copytree(file.parent, tmp_path / "moved")) / file.name
    assert fingerprint(load(moved)) == known
    options = DataOptions(data=str(moved), image_root=str(file.parent))
    assert fingerprint(load(options)) == known
    PIL.Image.fromarray(images(1)[0] // 2).save(moved.parent / "img" / "7.png")
    assert fingerprint(load(moved)) != known
    table.loc[0, "hospital"] = "Jena"
    table.to_csv(file, index=False)
    assert fingerprint(load(file)) != known


def test_a_missing_image_is_named_or_left_out(
    table: pd.DataFrame, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table.to_csv(file, index=False)
    (file.parent / "img" / "5.png").unlink()
    (file.parent / "img" / "9.png").write_bytes(b"no image")
    refused(file, r"images\.csv, row 7: image 'img/5\.png' is missing, expected a file below")
    rows = load(DataOptions(data=str(file), on_bad_image="skip"))["full"]
    assert len(rows) == COUNT - 2
    left_out = [line for line in rows.info.description.splitlines() if line.startswith("left out")]
    assert [line.partition(":")[0] for line in left_out] == [
        "left out images.csv, row 7",
        "left out images.csv, row 11 (img/9.png)",
    ]
    assert "row 7" in caplog.text and "row 11" in caplog.text


def test_images_outside_the_root(table: pd.DataFrame, file: Path, tmp_path: Path) -> None:
    shutil.copy(file.parent / "img" / "0.png", tmp_path / "other.png")
    (file.parent / "img" / "link.png").symlink_to(tmp_path / "other.png")
    for text in ("../other.png", str(tmp_path / "other.png"), "img/link.png"):
        table.loc[3, "Image Path"] = text
        table.to_csv(file, index=False)
        refused(file, r"row 5: image '.*' lies outside .*; correct it, or state the folder .* by --image_root")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({(3, "label"): ""}, r"row 5: the label is blank"),
        ({(3, "Image Path"): " "}, r"row 5: the image is blank"),
        ({(3, "patient"): None}, r"row 5: the group is blank"),
        (
            {(3, "hospital"): "Leip\u00adzig"},
            r"the center 'Leip\\xadzig', expected printable text of at most 1000 ch",
        ),
        ({(3, "label"): "Ant"}, r"row 5: the label is written in 2 ways, 'ant' \(23 rows\) and 'Ant' \(1 rows\)"),
        ({(3, "Image Path"): "./img/0.png"}, r"rows 2, 5 have the id 'img/0\.png', expected one row per image"),
    ],
)
def test_contradictions_are_refused(
    change: dict[tuple[int, str], Any], message: str, table: pd.DataFrame, file: Path
) -> None:
    for (row, column), value in change.items():
        table.loc[row, column] = value
    table.to_csv(file, index=False)
    refused(file, message)


def test_spaces_around_a_name_make_no_other_center(table: pd.DataFrame, file: Path) -> None:
    table.loc[[0, 6], "hospital"] = "Leipzig "
    table.to_csv(file, index=False)
    assert center_names(load(file)["full"]) == sorted(CENTERS)


def test_spellings_of_a_center_are_merged_with_a_warning(
    table: pd.DataFrame, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table.to_csv(file, index=False)
    expected = load(file)["full"]["center"]
    table.loc[table.index[table["hospital"] == "Leipzig"][:2], "hospital"] = ["leipzig", "LEIPZIG"]
    table.to_csv(file, index=False)
    data = load(file)["full"]
    assert center_names(data) == sorted(CENTERS)
    assert data["center"] == expected
    for text in ("'leipzig' (1 rows)", "'LEIPZIG' (1 rows)", "taken as one: Leipzig"):
        assert text in caplog.text


def test_three_spellings_of_a_center_are_one(table: pd.DataFrame, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the first one is neither the most frequent one nor the rarest."""
    spellings = ["leipzig"] * 4 + ["Leipzig"] * 10 + ["LEIPZIG"] * 2
    table.loc[table["hospital"] == "Leipzig", "hospital"] = spellings
    table.to_csv(file, index=False)
    data = load(file)["full"]
    assert center_names(data) == sorted(CENTERS)
    found = "3 ways, 'leipzig' (4 rows) and 'Leipzig' (10 rows) and 'LEIPZIG' (2 rows), taken as one: Leipzig"
    assert caplog.text.count(found) == caplog.text.count("taken as one") == 1


def test_ids_groups_and_splits_that_contradict(table: pd.DataFrame, file: Path) -> None:
    table["id"] = [f"scan {row}" for row in range(COUNT)]
    table["split"] = ["train", "val"] * (COUNT // 2)
    table.to_csv(file, index=False)
    refused(file, r"24 groups .* are in several splits: P0, P1, .* and 19 more, expected each in one; P0 is in train")
    table.loc[4, "id"] = "scan 0"
    table.to_csv(file, index=False)
    refused(file, "rows 2, 6 have the id 'scan 0'", split_column="none")
    table["split"] = "fold 1"
    table.to_csv(file, index=False)
    refused(file, r"row 2: split 'fold 1', expected train, val, test")


def test_a_table_that_is_neither_of_images_nor_of_pixels(file: Path, table: pd.DataFrame) -> None:
    table.rename(columns={"Image Path": "foto"}).to_csv(file, index=False)
    refused(
        file, r"the columns are foto, .*, expected one of image paths .*--image_column.*, or numbers, one column for"
    )
    assert len(load(DataOptions(data=str(file), image_column="foto"))["full"]) == COUNT


def test_files_that_can_not_be_read(file: Path, table: pd.DataFrame) -> None:
    file.write_bytes("image,label\nä.png,1\n".encode("latin-1"))
    refused(file, "can't decode byte 0xe4 .*, expected text in UTF-8, or UTF-16")
    file.write_bytes("image,label\na.png,1\n".encode("utf-16-le"))
    refused(file, "UTF-16 or UTF-32 without a byte order mark, expected text in UTF-8, or UTF-16 with its mark")
    file.write_text("image,label\na.png,1,2\n")
    refused(file, "unreadable .*Expected 2 fields in line 2, saw 3")
    file.write_text("image,label,label\na.png,1,2\n")
    refused(file, "2 columns could be the label: label, label, expected one")
    file.write_text("image,label\n")
    refused(file, "no rows, expected one for each image")


def test_options_of_a_table_are_refused_elsewhere(tmp_path: Path) -> None:
    for number, image in enumerate(images(4)):
        path = tmp_path / "data" / ("a", "b")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    refused(tmp_path / "data", "--center_column is 'site', which changes nothing", center_column="site")
    refused(tmp_path / "data", "--image_root is 'x', which changes nothing", image_root="x")


def test_backslashes_of_windows(table: pd.DataFrame, file: Path) -> None:
    table["Image Path"] = table["Image Path"].str.replace("/", "\\")
    table.to_csv(file, index=False)
    assert load(file)["full"]["id"][0] == "img/0.png"


def in_memory(table: pd.DataFrame, kind: str) -> tuple[Any, ...]:
    if kind == "frame":
        return (table,)
    if kind == "lists":
        return (table["Image Path"].to_list(), table["label"].to_list())
    rows = datasets.Dataset.from_dict({"image": table["Image Path"].to_list(), "label": table["label"].to_list()})
    if kind == "texts":
        return (rows,)
    rows = rows.cast_column("image", datasets.Image()).class_encode_column("label")
    return (rows if kind == "paths" else rows.map(lambda row: row),)  # which holds the bytes


@pytest.mark.parametrize("kind", ["frame", "lists", "texts", "paths", "bytes"])
def test_tables_in_memory(
    kind: str, table: pd.DataFrame, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    data = load(*in_memory(table, kind), cache_dir=tmp_path / "cache")
    rows = data["full"]
    assert rows.features["label"].names == ["ant", "cat"] and rows["label"][:4] == [1, 0, 1, 0]
    assert np.array_equal(ImageTable(rows)[5]["image"], images(COUNT)[5].transpose(2, 0, 1))
    if kind == "frame":
        assert center_names(rows) == sorted(CENTERS)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*.parquet"))
    assert str(tmp_path).encode() not in stored


def test_tables_in_memory_take_options(table: pd.DataFrame, file: Path) -> None:
    data = load(table, image_root=file.parent, group_column="none")
    assert set(data["full"]["group"]) == {""}
    with pytest.raises(HistoError, match="unknown option 'test_centers'"):
        load(table, image_root=file.parent, test_centers="Jena")
    with pytest.raises(HistoError, match="48 images, but 3 labels"):
        load(table["Image Path"].to_list(), [1, 2, 3], image_root=file.parent)


def test_a_table_is_read_once(table: pd.DataFrame, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.to_csv(file, index=False)
    read: list[Path] = []
    original = image_rows._cells
    monkeypatch.setattr(image_rows, "_cells", lambda path: read.append(path) or original(path))
    load(file)
    assert read == [file]


def test_the_patient_of_dicom_files_is_the_group(table: pd.DataFrame, file: Path) -> None:
    for row, image in enumerate(images(COUNT)):
        scan = dicom(image[..., 0], PatientID=f"{SECRET}{row // 4}")
        write_dicom(file.parent / f"scans/{row}", scan)
        table.loc[row, "Image Path"] = f"scans/{row}"
    table = table.drop(columns="patient")
    table.to_csv(file, index=False)
    rows = load(file)["full"]
    assert rows["group"][:5] == ["patient 1"] * 4 + ["patient 2"] and len(set(rows["group"])) == COUNT // 4
    assert set(load(DataOptions(data=str(file), group_column="none"))["full"]["group"]) == {""}
    given = table.assign(patient="A")
    given.to_csv(file, index=False)
    assert set(load(file)["full"]["group"]) == {"A"}
    table["split"] = ["train"] * 30 + ["val"] * 18
    table.to_csv(file, index=False)
    found = refused(
        file,
        r"1 groups .* are in several splits: patient 8, .*train \(.*row 30\) and val \(.*row 32\)",
    )
    assert SECRET not in found


def test_dicom_within_a_table_is_refused(file: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    data = dicom_bytes(images(1)[0])
    rows = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None}], "label": ["a"]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    with pytest.raises(HistoError, match="row 0 of the data set: a DICOM file within a table, expected it as a file"):
        load(rows, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*"))
