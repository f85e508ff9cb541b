"""The images of few-shot subsets: the same for all methods, nested, and an error if there are too few."""

from __future__ import annotations

import itertools

import datasets
import numpy as np
import pytest

from hf_histo.data import schema
from hf_histo.data.load import fingerprint
from hf_histo.data.protocol import complete
from hf_histo.data.splits import few_shot
from hf_histo.errors import HistoError

NAMES = ["a", "b", "c"]


def table(counts: list[int], prefix: str) -> datasets.Dataset:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    n = len(labels)
    rows = {
        "id": [f"{prefix}{i}" for i in range(n)],
        "image": [{"bytes": b"", "path": None}] * n,
        "label": labels,
        "center": [-1] * n,
        "group": [""] * n,
    }
    data = datasets.Dataset.from_dict(rows, features=schema.features(NAMES))
    data.info.config_name = "made"
    return data


@pytest.fixture(scope="module")
def data() -> datasets.DatasetDict:
    return datasets.DatasetDict(train=table([40, 20, 16], "t"), val=table([9, 5, 4], "v"), test=table([3, 3, 1], "x"))


def counts(rows: datasets.Dataset) -> list[int]:
    return np.bincount(rows["label"], minlength=len(NAMES)).tolist()


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_shots_of_each_class(shots: int, data: datasets.DatasetDict) -> None:
    drawn = few_shot.select(data, seed=0, shots=shots)
    assert counts(drawn["train"]) == [shots] * 3
    assert counts(drawn["val"]) == [min(shots, 4)] * 3
    assert drawn["test"]["id"] == data["test"]["id"]


def test_more_shots_hold_the_fewer_and_seeds_differ(data: datasets.DatasetDict) -> None:
    by_shots = [set(few_shot.select(data, seed=3, shots=shots)["train"]["id"]) for shots in (1, 2, 4, 8, 16)]
    assert all(fewer < more for fewer, more in itertools.pairwise(by_shots))
    one, again = (few_shot.select(data, seed=3, shots=4)["train"]["id"] for _ in range(2))
    assert one == again
    seeds = [few_shot.select(data, seed=seed, shots=4) for seed in range(3)]
    assert len({tuple(drawn["train"]["id"]) for drawn in seeds}) == 3
    assert len({fingerprint(drawn) for drawn in seeds}) == 3


@pytest.mark.parametrize(
    ("percentage", "train", "val"),
    [(1, [1, 1, 1], [1, 1, 1]), (10, [4, 2, 1], [1, 1, 1]), (100, [40, 20, 16], [9, 5, 4])],
)
def test_a_percentage_of_each_class(
    percentage: float, train: list[int], val: list[int], data: datasets.DatasetDict
) -> None:
    drawn = few_shot.select(data, seed=0, percentage=percentage)
    assert (counts(drawn["train"]), counts(drawn["val"])) == (train, val)
    assert set(drawn["train"]["id"]) <= set(few_shot.select(data, seed=0, percentage=100)["train"]["id"])


def test_nothing_asked_for_is_all_of_it(data: datasets.DatasetDict) -> None:
    assert few_shot.select(data, seed=0) is data


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shots": 17}, "train: c has 16 images, expected at least 17 for --shots 17"),
        ({"shots": 1, "percentage": 10.0}, "expected one of them"),
        ({"level": 2}, "--level is 2, which can't act here: the classes have no levels"),
    ],
)
def test_what_can_not_be_drawn(options: dict[str, float], expected: str, data: datasets.DatasetDict) -> None:
    with pytest.raises(HistoError) as caught:
        few_shot.select(data, seed=0, **options)  # type: ignore[arg-type]
    assert expected in str(caught.value)


@pytest.mark.parametrize("options", [{"shots": 1}, {"percentage": 50.0}])
def test_a_class_missing_from_validation(options: dict[str, float], data: datasets.DatasetDict) -> None:
    changed = datasets.DatasetDict({**data, "val": table([4, 0, 4], "v")})
    with pytest.raises(HistoError, match="val: b has"):
        few_shot.select(changed, seed=0, **options)  # type: ignore[arg-type]


def test_splits_that_are_missing_are_made_and_do_not_overlap(data: datasets.DatasetDict) -> None:
    whole = complete(datasets.DatasetDict(full=table([50, 20, 10], "f")))
    assert {split: counts(rows) for split, rows in whole.items()} == {
        "train": [36, 14, 7],
        "val": [4, 2, 1],
        "test": [10, 4, 2],
    }
    ids = [key for rows in whole.values() for key in rows["id"]]
    assert len(ids) == len(set(ids)) == 80

    without = complete(datasets.DatasetDict(train=data["train"], test=data["test"]))
    assert set(without["train"]["id"]) | set(without["val"]["id"]) == set(data["train"]["id"])
    assert without["test"]["id"] == data["test"]["id"]
    assert min(counts(without["val"])) > 0
    assert complete(data) is data
