"""A class with other images in another split is found; one from the same source is not, despite copies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hf_histo.evaluation.metrics.two_sample_test import EVERY, separations

CLASSES = ["glioma", "none", "rare"]


def source(train: int = 120, test: int = 60, shift: float = 1.5) -> tuple[np.ndarray, pd.DataFrame]:
    """Features of two classes, of which the first is shifted in test, and of a rare one."""
    random = np.random.default_rng(0)
    rows, features = [], []
    for split, count in (("train", train), ("test", test)):
        for label in (0, 1):
            for i in range(count):
                rows.append((split, f"{label}/{i}", label, ""))
                features.append(random.normal(size=16) + 4 * label)
                features[-1][:4] += shift if (split, label) == ("test", 0) else 0
        rows.append((split, "2/0", 2, ""))
        features.append(random.normal(size=16))
    return np.array(features), pd.DataFrame(rows, columns=["split", "id", "label", "group"])


def test_the_class_that_differs_is_found() -> None:
    features, table = source()
    found = {of.label: of for of in separations(features, table, CLASSES)}
    assert list(found) == [EVERY, *CLASSES]
    shifted, alike, rare = (found[name] for name in CLASSES)
    assert (shifted.train, shifted.images) == (120, 60)
    assert shifted.auroc is not None and shifted.auroc > 0.9
    assert alike.auroc is not None and alike.low is not None and alike.high is not None
    assert alike.low < 0.5 < alike.high and 0.35 < alike.auroc < 0.65
    assert rare.auroc is None and (rare.split, rare.train, rare.images) == ("test", 1, 1)


@pytest.mark.parametrize("grouped", [True, False])
def test_groups_of_one_side_are_not_known_from_another_fold(grouped: bool) -> None:
    """Slices resemble those of the same patient only: in other folds, these would reveal the side."""
    random = np.random.default_rng(0)
    patients = random.normal(size=(24, 64))
    rows = np.repeat(np.arange(24), 10)
    features = patients[rows] + 0.1 * random.normal(size=(240, 64))
    table = pd.DataFrame(
        {"split": np.where(rows < 12, "train", "test"), "id": [str(i) for i in range(240)], "label": 0}
    )
    table["group"] = [f"sub-{row}" if grouped else "" for row in rows]
    auroc = separations(features, table, ["one"])[0].auroc
    assert auroc is not None and (auroc < 0.8) == grouped


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "images"), [(24, 10), (80, 5), (180, 1)])
def test_sides_of_one_source_are_not_separated(groups: int, images: int) -> None:
    """The interval of the AUROC holds 0.5 in about 95% of data sets in which the sides do not differ."""
    random, held = np.random.default_rng(0), []
    for _ in range(200):
        rows = np.repeat(np.arange(groups), images)
        features = random.normal(size=(groups, 8))[rows] + random.normal(size=(len(rows), 8))
        sides = np.where(rows < groups // 2, "train", "test")
        table = pd.DataFrame({"split": sides, "id": [str(i) for i in range(len(rows))], "label": 0})
        found = separations(features, table.assign(group=[f"g{row}" for row in rows]), ["one"])[0]
        assert found.low is not None and found.high is not None
        held.append(found.low <= 0.5 <= found.high)
    assert np.mean(held) >= 0.93


def test_groups_on_both_sides_are_left_out() -> None:
    features, table = source(shift=0)
    table.loc[(table["id"] == "1/3"), "group"] = "family_1"
    table.loc[(table["id"] == "1/4"), "group"] = ["family_2", "family_3"]
    found = separations(features, table, CLASSES)
    assert [(of.train, of.images) for of in found] == [(240, 120), (120, 60), (119, 59), (1, 1)]


def test_hidden_labels_count_in_all_and_data_without_train_has_no_result() -> None:
    features, table = source(test=20)
    table.loc[table["split"] == "test", "label"] = -1
    (found,) = separations(features, table, CLASSES)
    assert found.label == EVERY and found.images == 41
    assert separations(features, table.replace({"split": {"train": "val"}}), CLASSES) == []
