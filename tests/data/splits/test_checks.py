from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from fixtures import write_challenge

from hf_histo.data import schema
from hf_histo.data.audit.near_duplicates import components, inventory
from hf_histo.data.load import fingerprint, load
from hf_histo.data.schema import ImageTable
from hf_histo.data.splits.checks import Composition, clean, composition, named, shared_groups, with_families
from hf_histo.errors import HistoError


def png(value: int) -> bytes:
    """A file whose pixels depend on `value` alone."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def made(splits: dict[str, list[tuple[int, int, str]]]) -> tuple[datasets.DatasetDict, pd.DataFrame]:
    """Splits of images given as (picture, label, group), with ids "train 0" and so on; and their inventory."""
    data = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(
                [
                    {
                        "id": f"{name} {i}",
                        "image": {"bytes": png(picture), "path": None},
                        "label": label,
                        "center": 0,
                        "group": group,
                    }
                    for i, (picture, label, group) in enumerate(rows)
                ],
                features=schema.features(["normal", "tumor"]),
            )
            for name, rows in splits.items()
        }
    )
    return data, inventory(data)


def ids(data: datasets.DatasetDict) -> dict[str, list[str]]:
    return {name: list(split["id"]) for name, split in data.items()}


def test_components() -> None:
    labels = np.array([5, 7, 5, 9, 1, 7])
    assert components(labels, np.empty((0, 2), np.int64)).tolist() == [0, 1, 0, 2, 3, 1]
    assert components(labels, np.array([[2, 3], [3, 5]])).tolist() == [0, 0, 0, 0, 1, 0]


def test_clean_keeps_one_of_each_family_in_the_first_split() -> None:
    data, table = made(
        {
            "test": [(0, 0, ""), (1, 1, ""), (2, 0, ""), (2, 0, ""), (9, 1, "")],
            "train": [(0, 0, ""), (3, 1, ""), (3, 1, ""), (4, 0, "")],
            "val": [(1, 1, ""), (4, 0, ""), (5, 1, "")],
        }
    )
    cleaned = clean(data, table)
    assert ids(cleaned) == {
        "test": ["test 2", "test 4"],
        "train": ["train 0", "train 1", "train 3"],
        "val": ["val 0", "val 2"],
    }
    assert fingerprint(cleaned) == fingerprint(clean(data, table)) != fingerprint(data)
    again = inventory(cleaned)
    assert again["family"].nunique() == len(again)


def test_clean_can_favor_test() -> None:
    data, table = made({"train": [(0, 0, ""), (1, 1, "")], "test": [(0, 0, ""), (2, 1, "")]})
    assert ids(clean(data, table, first=["test"])) == {"train": ["train 1"], "test": ["test 0", "test 1"]}


def test_clean_drops_contradictions() -> None:
    rows = [(0, 0, ""), (0, 1, ""), (1, 1, ""), (2, -1, ""), (2, 0, "")]
    data, table = made({"train": rows, "test": [(0, 0, ""), (3, 0, "")]})
    # A hidden label causes no conflict.
    assert ids(clean(data, table)) == {"train": ["train 2", "train 3"], "test": ["test 1"]}


def test_clean_refuses_to_empty_a_split() -> None:
    data, table = made({"train": [(0, 0, ""), (1, 1, "")], "test": [(0, 0, "")]})
    with pytest.raises(HistoError, match="test: all 1 images are copies"):
        clean(data, table)


def test_families_become_groups_and_join_known_ones() -> None:
    data, table = made(
        {
            "train": [(0, 0, "a"), (1, 1, "a"), (2, 0, "b"), (3, 0, ""), (3, 1, ""), (4, 0, "")],
            "test": [(1, 1, "c"), (5, 0, "c"), (4, 1, ""), (6, 0, "d")],
        }
    )
    grouped = with_families(data, table)
    train, test = grouped["train"]["group"][:], grouped["test"]["group"][:]
    assert train[:3] == ["a", "a", "b"]
    assert test[:2] == ["a", "a"] and test[3] == "d"  # c shares a picture with a
    assert train[3] == train[4] != train[5] == test[2]
    assert all(name.startswith("family_") for name in train[3:])
    assert shared_groups(grouped) == {("train", "test"): ["a", train[5]]}
    assert grouped["train"].features == data["train"].features
    assert np.array_equal(ImageTable(grouped["test"])[1]["image"], ImageTable(data["test"])[1]["image"])


def test_another_inventory_is_refused() -> None:
    data, table = made({"train": [(0, 0, ""), (1, 1, "")]})
    more, _ = made({"train": [(0, 0, ""), (1, 1, ""), (2, 1, "")]})
    for other, listed in ((more, table), (data, table.assign(id=["a", "b"])), (data, table.assign(split="val"))):
        for function in (clean, with_families):
            with pytest.raises(HistoError, match="expected the inventory of this data"):
                function(other, listed)  # type: ignore[operator]


def test_other_groups_are_other_data(tmp_path: Path) -> None:
    write_challenge(tmp_path, counts={"train": 24, "val": 12}, size=40)
    data = load(tmp_path)
    before = fingerprint(data)
    alone, grouped = (with_families(data, table) for table in (inventory(data).assign(group=""), inventory(data)))
    assert len({fingerprint(alone), fingerprint(grouped), before}) == 3
    assert fingerprint(data) == before
    assert sum(map(len, grouped.values())) == 36


def test_what_splits_hold_and_what_of_train_is_in_them() -> None:
    data, _ = made(
        {
            "train": [(0, 0, "a"), (1, 1, "a"), (1, 1, "b"), (2, 1, "")],
            "val": [(3, 0, ""), (4, -1, "")],
            "test": [(2, 1, "b"), (2, 0, "c"), (5, 1, "a")],
        }
    )
    found = composition(data)
    names = data["train"].features["label"].names
    assert found["train"] == Composition(
        images=4,
        hidden=0,
        groups=2,
        classes=dict(zip(names, [1, 3], strict=False)) | dict.fromkeys(names[2:], 0),
        centers={"0": 4},
    )
    assert (found["val"].hidden, found["val"].groups) == (1, 0)
    leaks = {split: (held.copies_of_train, held.groups_of_train) for split, held in list(found.items())[1:]}
    assert leaks == {"val": (0, 0), "test": (2, 2)}


def test_a_split_alone_has_nothing_of_train_in_it() -> None:
    data, _ = made({"full": [(0, 0, ""), (1, 1, "")]})
    assert composition(data)["full"].copies_of_train is None


def test_fingerprints_of_derived_splits_stay_the_same_across_versions() -> None:
    """A run that is resumed compares them."""
    data, _ = made({"train": [(0, 0, "a"), (1, 1, "")], "test": [(2, 0, "b")]})
    for rows in data.values():
        rows.info.config_name = "made"
    assert fingerprint(named(data, data)) == "ce2079cac2d1ce7f4b765f8c04bcf5c2"
