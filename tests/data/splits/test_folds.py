"""Splits by held-out center and fold: their content, and that no group is in two splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import pytest
from fixtures import write_challenge

from hf_histo.data import schema
from hf_histo.data.load import fingerprint, load
from hf_histo.data.splits.folds import (
    held_out_centers,
    k_folds,
    leave_one_center_out,
    pool_centers,
    with_test,
    with_validation,
)
from hf_histo.errors import HistoError

Rows = list[tuple[int, int, str]]  # label, center, group


def split(rows: Rows) -> datasets.Dataset:
    """Images whose only pixel encodes the row, with ids that count from 0, as in the challenge's files."""
    labels, centers, groups = zip(*rows, strict=True)
    columns = {
        "id": [str(i) for i in range(len(rows))],
        "image": [{"bytes": b"P6\n1 1\n255\n" + bytes((i % 256, i // 256, 0)), "path": None} for i in range(len(rows))],
        "label": labels,
        "center": centers,
        "group": groups,
    }
    return datasets.Dataset.from_dict(columns, features=schema.features(["normal", "tumor"]))


def rows(center: int, count: int, per_group: int = 4, positive: int = 2) -> Rows:
    """One of `positive` images is a tumor; a slide holds `per_group`."""
    return [(int(i % positive == 0), center, f"slide_{center}_{i // per_group}") for i in range(count)]


@pytest.fixture
def data() -> datasets.DatasetDict:
    train = [*rows(0, 120), *rows(3, 80, positive=4)]
    return datasets.DatasetDict(train=split(train), val=split(rows(1, 60)), test=split(rows(2, 40)))


def test_every_center_is_held_out_once_and_nothing_is_lost(data: datasets.DatasetDict) -> None:
    folds = leave_one_center_out(data, seed=0)
    assert list(folds) == [0, 1, 3]
    for center, fold in folds.items():
        assert list(fold) == ["train", "val", "test"]
        assert set(fold["test"]["center"]) == {center}
        ids = [key for part in fold.values() for key in part["id"]]
        assert len(set(ids)) == len(ids) == 260
        assert {key.split("/")[0] for key in ids} == {"train", "val"}
        assert center not in {*fold["train"]["center"], *fold["val"]["center"]}
        groups = [set(part["group"]) for part in fold.values()]
        assert sum(map(len, groups)) == len(set.union(*groups))
        for part in fold.values():
            assert part.features == data["train"].features
            assert part.column_names == data["train"].column_names


def test_an_id_leads_back_to_its_image(data: datasets.DatasetDict) -> None:
    for part in leave_one_center_out(data, seed=0)[0].values():
        images = schema.ImageTable(part)
        for place, key in enumerate(part["id"]):
            source, row = key.split("/")
            assert images[place]["image"].flatten().tolist() == [int(row) % 256, int(row) // 256, 0]
            assert part[place]["center"] == data[source][int(row)]["center"]


def test_validation_has_its_share_of_every_class_and_center(data: datasets.DatasetDict) -> None:
    for share in (0.15, 0.3, 0.5):
        for fold in leave_one_center_out(data, seed=1, validation_share=share).values():
            train, part = (Counter(zip(fold[s]["label"], fold[s]["center"], strict=True)) for s in ("train", "val"))
            for stratum, count in (train + part).items():
                assert part[stratum] / count == pytest.approx(share, abs=0.08), stratum


def test_the_seed_decides(data: datasets.DatasetDict) -> None:
    one, again, other = (leave_one_center_out(data, seed=seed)[1] for seed in (0, 0, 1))
    assert [part["id"] for part in one.values()] == [part["id"] for part in again.values()]
    assert one["val"]["id"] != other["val"]["id"]
    assert one["test"]["id"] == other["test"]["id"]


def test_the_fingerprint_is_of_the_fold(tmp_path: Path) -> None:
    write_challenge(tmp_path / "a", counts={"train": 36, "val": 12})
    write_challenge(tmp_path / "b", counts={"train": 36, "val": 12}, channels_first=False)
    data, other = load(tmp_path / "a"), load(tmp_path / "b")
    before = fingerprint(data)
    folds = [*leave_one_center_out(data, seed=0).values(), *leave_one_center_out(other, seed=0).values()]
    found = [fingerprint(fold) for fold in folds]
    assert len({before, *found}) == 9  # four centers, twice
    assert {len(name) for name in found} == {32}
    assert [fingerprint(fold) for fold in leave_one_center_out(data, seed=0).values()] == found[:4]
    assert {fingerprint(part) for part in folds[0].values()} == {found[0]}
    assert fingerprint(data) == before


def test_a_group_in_two_centers_does_not_leak() -> None:
    shared = [(0, 0, "slide_3_0"), (1, 0, "slide_3_0")]
    folds = leave_one_center_out(
        datasets.DatasetDict(train=split([*rows(0, 40), *shared]), val=split([*rows(3, 40), *rows(4, 40)])), seed=0
    )
    assert not {"train/40", "train/41"} & {*folds[3]["train"]["id"], *folds[3]["val"]["id"]}
    assert {"train/40", "train/41"} <= set(folds[0]["test"]["id"])
    assert not {f"val/{i}" for i in range(4)} & {*folds[0]["train"]["id"], *folds[0]["val"]["id"]}
    assert len(folds[4]["train"]) + len(folds[4]["val"]) == 82


def test_an_image_of_unknown_group_is_its_own() -> None:
    plain = [(label, center, "") for label, center, _ in [*rows(0, 70), *rows(1, 70)]]
    fold = leave_one_center_out(datasets.DatasetDict(train=split(plain)), seed=0)[0]
    assert [len(part) for part in fold.values()] == [60, 10, 70]
    assert set(Counter(fold["val"]["label"]).values()) <= {4, 5, 6}  # as even as the version of scikit-learn makes it


def test_hidden_labels_and_other_splits_stay_out(data: datasets.DatasetDict) -> None:
    hidden = split([*rows(0, 40), *rows(1, 40), (-1, -1, "x"), (-1, 5, "y")])
    folds = leave_one_center_out(datasets.DatasetDict(train=hidden, test=data["test"]), seed=0)
    assert list(folds) == [0, 1]
    assert sum(len(part) for part in folds[0].values()) == 80


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([*rows(0, 8), (0, -1, "a")], "1 of 9 labeled images have no known center"),
        (rows(3, 40), "labeled images of centers [3], expected at least two"),
        ([(-1, 0, "a"), (-1, 1, "b")], "all labels are hidden"),
        ([*rows(0, 40), *rows(1, 40, positive=1)], "center 0 held out: classes present in train: tumor"),
        ([*rows(0, 40), *rows(1, 40, per_group=40)], "center 0 held out: 40 images in 1 groups are left"),
        ([(0, 0, "a"), (1, 0, "b"), (0, 1, "c"), (1, 1, "d")], "2 images in 2 groups are left"),
        ([(0, 0, "a"), (1, 1, "a"), (1, 0, "a")], "0 images in 0 groups are left"),
    ],
)
def test_what_can_not_be_folded(train: Rows, message: str) -> None:
    with pytest.raises(HistoError) as error:
        leave_one_center_out(datasets.DatasetDict(train=split(train)), seed=0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_share_and_splits_out_of_range(data: datasets.DatasetDict) -> None:
    for share in (0, 0.6, float("nan")):
        with pytest.raises(HistoError, match="validation_share"):
            leave_one_center_out(data, seed=0, validation_share=share)
    with pytest.raises(HistoError, match="splits full, expected train or val"):
        leave_one_center_out(datasets.DatasetDict(full=data["train"]), seed=0)


def test_pooling_trains_on_every_labeled_center_and_keeps_the_test(data: datasets.DatasetDict) -> None:
    pooled = pool_centers(data)
    assert set(pooled["train"]["center"]) == set(pooled["val"]["center"]) == {0, 1, 3}
    assert len(pooled["train"]) + len(pooled["val"]) == 260
    assert 0.05 < len(pooled["val"]) / 260 < 0.2
    assert not set(pooled["train"]["group"]) & set(pooled["val"]["group"])
    assert pooled["test"]["id"] == data["test"]["id"]
    assert fingerprint(pooled) != fingerprint(data)
    assert fingerprint(pooled) == fingerprint(pool_centers(data))
    with pytest.raises(HistoError, match=r"validation_share is 0\.9"):
        pool_centers(data, validation_share=0.9)
    with pytest.raises(HistoError, match="no image has a known center"):
        pool_centers(datasets.DatasetDict(train=split([(0, -1, "a"), (1, -1, "b")])))
    two = pool_centers(datasets.DatasetDict(train=split(rows(0, 60)), val=split(rows(1, 60))))
    assert set(two["train"]["center"]) == set(two["val"]["center"]) == {0, 1}


def test_images_of_unknown_center_are_in_no_split_of_held_out_centers(data: datasets.DatasetDict) -> None:
    data["train"] = split([*rows(0, 60), *rows(3, 40), *rows(-1, 8)])
    parts, notes = held_out_centers(data, {3})
    assert set(parts["train"]["center"]) == {0} and set(parts["test"]["center"]) == {3}
    assert notes[0] == "8 images of train are left out, whose center is unknown"


def test_folds_hold_out_every_image_once_and_no_group_twice(data: datasets.DatasetDict) -> None:
    folds = k_folds(data, folds=4, seed=1)
    held_out = [key for fold in folds.values() for key in fold["test"]["id"]]
    assert len(held_out) == len(set(held_out)) == 300  # of all three splits
    for fold in folds.values():
        groups = [set(part["group"]) for part in fold.values()]
        assert list(fold) == ["train", "val", "test"]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 75
        assert sum(map(len, fold.values())) == 300
        assert len(fold["test"]) == pytest.approx(75, abs=12)
        assert sum(fold["test"]["label"]) / len(fold["test"]) == pytest.approx(130 / 300, abs=0.1)
        assert len(fold["val"]) == pytest.approx(0.1 * 225, abs=10)
    assert len({fingerprint(fold) for fold in folds.values()}) == 4
    again, other = k_folds(data, folds=4, seed=1), k_folds(data, folds=4, seed=2)
    assert [fingerprint(fold) for fold in again.values()] == [fingerprint(fold) for fold in folds.values()]
    assert fingerprint(other[0]) != fingerprint(folds[0])


def test_folds_refuse_a_class_of_too_few_groups_and_less_than_two() -> None:
    data = datasets.DatasetDict(train=split([*rows(0, 40), *[(1, 0, "slide_x")] * 3]))
    assert len(k_folds(data, folds=2)) == 2
    normal = [(0, 0, f"slide_{i}") for i in range(20)]
    enough = datasets.DatasetDict(train=split([*normal, (1, 0, "slide_x"), (1, 0, "slide_y")]))
    assert [sum(fold["test"]["label"]) for fold in k_folds(enough, folds=2).values()] == [1, 1]
    few = datasets.DatasetDict(train=split([*normal, *[(1, 0, "slide_x")] * 3]))
    with pytest.raises(HistoError, match="class 'tumor' has 1 groups, expected at least one for each of 2 folds"):
        k_folds(few, folds=2)
    with pytest.raises(HistoError, match="folds is 1"):
        k_folds(data, folds=1)


def test_validation_is_cut_where_there_is_none(data: datasets.DatasetDict) -> None:
    assert with_validation(data) is data
    without = datasets.DatasetDict(train=data["train"], test=data["test"])
    cut = with_validation(without)
    assert set(cut) == {"train", "val", "test"}
    assert not set(cut["train"]["group"]) & set(cut["val"]["group"])
    assert sorted([*cut["train"]["id"], *cut["val"]["id"]]) == sorted(data["train"]["id"])
    assert len(cut["val"]) == pytest.approx(20, abs=8)
    assert fingerprint(cut) == fingerprint(with_validation(without)) != fingerprint(without)


def test_a_single_split_is_divided_into_whole_groups_the_same_way_each_time(data: datasets.DatasetDict) -> None:
    divided = with_test(datasets.DatasetDict(full=data["train"]), "full")
    assert list(divided) == ["train", "val", "test"]
    groups = [set(part["group"]) for part in divided.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 50
    assert len(divided["test"]) == pytest.approx(200 / 5, abs=8)
    first = k_folds(datasets.DatasetDict(full=data["train"]), folds=5, seed=0)[0]
    assert [part["id"][:] for part in divided.values()] == [part["id"][:] for part in first.values()]


def test_folds_follow_their_seed(data: datasets.DatasetDict) -> None:
    def held_out(seed: int) -> list[list[str]]:
        return [sorted(fold["test"]["id"]) for fold in k_folds(data, folds=2, seed=seed).values()]

    assert held_out(0) == held_out(0)
    assert any(held_out(seed) != held_out(0) for seed in (1, 2, 3))
