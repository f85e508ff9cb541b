"""Miniature cytology data sets in each layout, and what is wrong with broken ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures import truncate, write_hicervix, write_image, write_lists, write_named

from hf_histo.config import DataOptions
from hf_histo.data import hierarchy
from hf_histo.data.load import load
from hf_histo.data.readers import cytology
from hf_histo.errors import HistoError


def refusal(folder: Path, cache: Path) -> str:
    with pytest.raises(HistoError) as caught:
        load(folder, cache_dir=cache)
    return str(caught.value)


@pytest.mark.parametrize("name", ["splits/train.txt", "splits/val.txt"])
def test_lists_that_are_pipes_are_refused_before_they_are_opened(tmp_path: Path, name: str) -> None:
    folder = write_lists(tmp_path / "set")
    (folder / name).unlink(missing_ok=True)
    (folder / "splits/valid.txt").unlink()
    os.mkfifo(folder / name)
    assert f"{name}: a pipe, expected a file" in refusal(folder, tmp_path / "cache")


def test_files_named_by_class(tmp_path: Path) -> None:
    data = load(write_named(tmp_path / "set"), cache_dir=tmp_path / "cache")
    assert list(data) == ["train", "val", "test"]
    names = data["train"].features["label"].names
    assert names == ["HSIL", "normal_columnar"]  # the last underscore separates class and number
    for rows in data.values():
        assert [names[label] in key for label, key in zip(rows["label"], rows["id"], strict=True)] == [True] * 6
    assert data["train"]["id"][3] == "images/train/normal_columnar_000.bmp"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("images/train/HSIL.bmp", "its name has no class"),
        ("images/val/HSIL_.bmp", "its name has no class"),
        ("images/test/other_1.bmp", "is of class 'other'"),
        ("images/test/normal_1.bmp", "is of class 'normal' (the text before the last underscore)"),
    ],
)
def test_a_file_whose_name_has_no_known_class(name: str, expected: str, tmp_path: Path) -> None:
    write_image(write_named(tmp_path / "set") / name)
    message = refusal(tmp_path / "set", tmp_path / "cache")
    assert expected in message
    assert name in message


def test_lists_of_files(tmp_path: Path) -> None:
    data = load(write_lists(tmp_path / "set"), cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 3, "val": 2, "test": 1}
    assert data["train"].features["label"].names == ["normal cells", "hsil"]  # in the order of classnames.txt
    assert data["train"]["label"] == [1, 1, 0]
    assert data["train"]["id"][2] == "images/nl/cell (0).png"


def test_lists_without_class_names(tmp_path: Path) -> None:
    folder = write_lists(tmp_path / "set")
    (folder / "classnames.txt").unlink()
    (folder / "splits" / "train.txt").write_text("nl/cell (0).png\nhsil/cell (0).png\n")
    (folder / "splits" / "test.txt").unlink()
    data = load(folder, cache_dir=tmp_path / "cache")
    assert data["train"].features["label"].names == ["hsil", "nl"]
    assert list(data) == ["train", "val"]


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("splits/test.txt", "nl/missing.png", "test.txt, line 1: 'nl/missing.png' is not an image in"),
        ("splits/test.txt", "nl/cell (3).png 1", "class 'nl' has the number 1, expected 0 as in classnames.txt"),
        ("splits/test.txt", "\nnl/cell (0).png", "test.txt, line 2: 'nl/cell (0).png' is in"),
        ("splits/test.txt", "nl/" + 300 * "x" + ".png", "is not an image in"),
        ("splits/test.txt", "", "lists no images"),
        ("classnames.txt", "nl\n", "class 'hsil' is not in classnames.txt: nl"),
        ("classnames.txt", 300 * "x", "is not a folder in images/"),
        ("classnames.txt", "nl\nscc\n", "classnames.txt, line 2: 'scc' is not a folder in images/"),
        ("classnames.txt", "nl\nnl\n", "classnames.txt, line 2: 'nl' is not a folder in images/, or is listed twice"),
    ],
)
def test_a_list_that_is_wrong(file: str, text: str, expected: str, tmp_path: Path) -> None:
    (write_lists(tmp_path / "set") / file).write_text(text)
    assert expected in refusal(tmp_path / "set", tmp_path / "cache")


@pytest.mark.parametrize("way", ["upwards", "absolute", "a link"])
@pytest.mark.parametrize("write", [write_lists, write_hicervix])
def test_an_image_outside_the_folder(way: str, write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder, secret = write(tmp_path / "set"), tmp_path / "secret.png"
    write_image(secret)
    if way == "a link":
        listed = folder / ("images/nl/cell (0).png" if write is write_lists else "train/a.png")
        listed.unlink()
        listed.symlink_to(secret)
    elif write is write_lists:
        for name in ("classnames.txt", "splits/test.txt"):
            (folder / name).unlink()
        new = secret if way == "absolute" else "../secret.png"
        (folder / "splits" / "train.txt").write_text(f"nl/cell (0).png\nhsil/cell (0).png\n{new}\n")
    else:
        new = secret if way == "absolute" else "../../secret.png"
        (folder / "train.csv").write_text((folder / "train.csv").read_text().replace("a.png", str(new)))
    assert f"{secret}, expected a file within {folder}" in refusal(folder, tmp_path / "cache")


def test_the_training_list_is_required(tmp_path: Path) -> None:
    (write_lists(tmp_path / "set") / "splits" / "train.txt").unlink()
    assert "train.txt: no such file" in refusal(tmp_path / "set", tmp_path / "cache")


def test_three_levels(tmp_path: Path) -> None:
    data = load(write_hicervix(tmp_path / "set"), cache_dir=tmp_path / "cache")
    names = data["train"].features["label"].names
    assert names == ["AGC > AGC-FN > EC", "AGC > AGC-FN > ECC", "ASC > ASC-H", "ASC > ASC-US", "Normal"]
    assert names[data["val"]["label"][0]] == "ASC > ASC-US"
    first = hierarchy.at_level(data, 1)
    assert first["train"].features["label"].names == ["AGC", "ASC", "Normal"]
    assert len(first["train"]) == 5
    # A class without level 3 keeps its level 2; images without level 2 are left out at both levels.
    second, third = hierarchy.at_level(data, 2), hierarchy.at_level(data, 3)
    assert second["test"].features["label"].names == ["AGC > AGC-FN", "ASC > ASC-H", "ASC > ASC-US"]
    assert third["test"].features["label"].names == names[:4]
    assert len(second["test"]) == len(third["test"]) == 4
    assert second["test"]["label"] == [2, 1, 0, 0]
    with pytest.raises(HistoError, match="--level is 4, expected 1 to 3"):
        hierarchy.at_level(data, 4)


def test_classes_are_those_of_training_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_hicervix(tmp_path / "set")
    text = (folder / "test.csv").read_text().replace("AGC-FN,EC\n", "AGC-FN,EGC\n")
    (folder / "test.csv").write_text(text)
    data = load(folder, cache_dir=tmp_path / "cache")
    assert len(data["train"].features["label"].names) == 5
    assert len(data["test"]) == 4
    assert "left out 1 images of ['AGC > AGC-FN > EGC'], which train lacks" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("a.png", "gone.png", "row 2: 'gone.png' is not in"),
        ("a.png", 300 * "x", "is not in"),
        ("ASC,ASC-US", ",ASC-US", "row 2: level_1 is empty"),
        ("ASC,ASC-US", "ASC,AGC-FN", "'AGC-FN' is below 'AGC' and below 'ASC'"),
        ("level_3", "level_x", "expected the columns image_name, level_1, level_2, level_3"),
    ],
)
def test_a_table_that_is_wrong(old: str, new: str, expected: str, tmp_path: Path) -> None:
    folder = write_hicervix(tmp_path / "set")
    (folder / "train.csv").write_text((folder / "train.csv").read_text().replace(old, new))
    assert expected in refusal(folder, tmp_path / "cache")


def test_a_split_of_which_nothing_is_kept(tmp_path: Path) -> None:
    folder = write_hicervix(tmp_path / "set")
    (folder / "val.csv").write_text("image_name,level_1,level_2,level_3\na.png,EGC,,\n")
    assert "val.csv: no image of a class of train.csv" in refusal(folder, tmp_path / "cache")


@pytest.mark.parametrize("name", ["SIPaKMeD", "herlev-papsmear", "mlcc_2", "bcfc"])
def test_a_known_data_set_has_all_its_classes(name: str, tmp_path: Path) -> None:
    count = next(count for key, count in cytology.CLASSES.items() if name.lower().startswith(key))
    for i in range(count + 1):
        write_image(tmp_path / name / "train" / f"class{i}" / "a.png", i)
    assert f"has {count + 1} classes" in refusal(tmp_path / name, tmp_path / "cache")
    (tmp_path / name / "train" / f"class{count}" / "a.png").unlink()
    (tmp_path / name / "train" / f"class{count}").rmdir()
    assert len(load(tmp_path / name, cache_dir=tmp_path / "cache")["train"].features["label"].names) == count


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_named, "images/train/HSIL_001.bmp"),
        (write_lists, "images/hsil/cell (1).png"),
        (write_hicervix, "train/b.png"),
    ],
)
def test_unreadable_images_are_left_out(write: Callable[[Path], Path], name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    before = len(load(folder, cache_dir=tmp_path / "cache")["train"])
    truncate(folder / name)
    assert f"{name}: not a readable image" in refusal(folder, tmp_path / "cache")
    options = DataOptions(data=str(folder), cache_dir=str(tmp_path / "cache"), on_bad_image="skip")
    if write is write_hicervix:  # its only image of ASC-H
        with pytest.raises(HistoError, match="train has no readable image of ASC > ASC-H"):
            load(options)
        return
    train = load(options)["train"]
    assert len(train) == before - 1 and f"left out {name}: not a readable image" in train.info.description
