"""Robustness of features to the center, by hand and on features that know the class, the center, or both."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hf_histo.evaluation.metrics.robustness import FEWEST, known, robustness, robustness_index

GROUPS, IMAGES = 12, 5  # of each center, and images of each class in a group


def images(centers: int = 2) -> pd.DataFrame:
    rows = [
        {"label": label, "center": center, "group": f"{center}/{group}"}
        for center in range(centers)
        for group in range(GROUPS)
        for label in (0, 1)
        for _ in range(IMAGES)
    ]
    return pd.DataFrame(rows)


def features(table: pd.DataFrame, *, of_class: float, of_center: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(size=(len(table), 2))
    noise[:, 0] += of_class * table["label"]
    noise[:, 1] += of_center * table["center"]
    return noise


def test_the_index_by_hand() -> None:
    labels, centers = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    neighbors = [
        np.array([1, 2]),  # the class alone; the center alone
        np.array([0]),  # the class alone
        np.array([1]),  # neither, which does not count
        np.array([2]),  # the class alone
    ]
    assert robustness_index(neighbors, labels, centers) == 3 / 4
    assert robustness_index([np.array([3]), np.array([2])], labels, centers) is None


def test_features_of_the_class_alone() -> None:
    table = images()
    found = robustness(features(table, of_class=20, of_center=0), table)
    assert found["reason"] is None
    assert found["index"] > 0.99
    assert found["center"]["low"] < found["center"]["chance"] == 0.5 < found["center"]["high"]
    assert found["drop"]["average_performance_drop"] == pytest.approx(0, abs=0.02)


def test_features_of_the_center_alone() -> None:
    table = images(3)
    found = robustness(features(table, of_class=0, of_center=20), table)
    assert [pair["centers"] for pair in found["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    assert [pair["images"] for pair in found["pairs"]] == [4 * GROUPS * IMAGES] * 3
    assert found["index"] < 0.05
    assert found["center"]["value"] == 1
    assert found["center"]["chance"] == pytest.approx(1 / 3)


def test_a_strong_center_costs_a_classifier_accuracy() -> None:
    table = images()
    found = robustness(features(table, of_class=2, of_center=8), table)["drop"]
    first, *_, last = found["balanced_accuracy"]
    assert last < first - 0.1
    assert found["average_performance_drop"] < -0.05


def test_neighbors_of_the_own_group_do_not_count() -> None:
    table = images()
    place = table["group"].str.split("/").str[1].astype(int)  # each group beside one of the other center
    noise = np.random.default_rng(1).normal(scale=0.01, size=len(table))
    found = (10 * place + 3 * table["label"] + table["center"] + noise).to_numpy()[:, None]
    assert robustness(found, table)["index"] == 1
    assert robustness(found, table.assign(group=""))["index"] is None  # the nearest share class and center


@pytest.mark.parametrize("fault", ["one center", "one class", "few images", "none"])
def test_it_is_withheld_with_the_reason(fault: str) -> None:
    table = images()
    if fault == "one center":
        table["center"] = 0
    elif fault == "one class":
        table = table[(table["label"] == 0) | (table["center"] == 0)]
    elif fault == "few images":
        table = table.groupby(["label", "center"]).head(FEWEST - 1)
    else:
        table = table[:0]
    found = robustness(features(table, of_class=1, of_center=1), table)
    assert found["reason"] == "expected two centers with at least 20 labeled images of two classes each"
    assert (found["index"], found["center"], found["drop"]) == (None, None, None)


def test_a_group_of_two_centers_is_in_one_part() -> None:
    """Features that identify the group alone do not predict the class of other groups, if both centers have each."""
    table = images()
    place = np.arange(len(table)) % 20
    table = table.assign(group=[f"patient {number}" for number in place], label=place % 2)
    assert table.groupby("group")["center"].nunique().eq(2).all()
    found = robustness(np.eye(20)[place], table)["drop"]
    assert found["balanced_accuracy"] == pytest.approx([0.5] * 5)


def test_few_groups() -> None:
    table = images()
    table["group"] = table["center"].map(lambda center: f"slide {center}")
    found = robustness(features(table, of_class=1, of_center=1), table)
    assert found["center"] == {"value": None, "low": None, "high": None, "chance": 0.5}
    assert found["drop"] is None
    assert found["index"] is not None


def test_hidden_labels_and_unknown_centers_are_left_out() -> None:
    table = pd.DataFrame({"label": [0, -1, 1, 1], "center": [0, 0, -1, 2]})
    assert known(table).tolist() == [True, False, False, True]
