"""Prediction sets: limits by hand, coverage by simulation of alike images in groups, and sets that are withheld."""

from __future__ import annotations

import numpy as np
import pytest

from hf_histo.errors import HistoError
from hf_histo.evaluation.prediction_sets import REFER, calibrate, least_groups, limits
from hf_histo.evaluation.predictions import Predictions


def table(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray, centers: np.ndarray | None = None) -> Predictions:
    where = np.full(len(labels), -1) if centers is None else centers
    return Predictions.make(
        range(len(labels)), where, [f"g{group}" for group in groups], labels, logits, label_names=["normal", "tumor"]
    )


def test_a_limit_by_hand() -> None:
    """Three groups of class 1 have 1/4 each, shared by their images; at 0.6, the third image reaches the coverage."""
    odds = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    groups = np.array([0, 0, 1, 2, 2])  # cumulated weights: 1/8, 1/4, 1/2, 5/8, 3/4
    both, labels = np.stack([-odds, odds], axis=1), np.ones(5, int)
    for coverage, expected in ((0.5, 3.0), (0.6, 2.0), (0.75, 1.0), (0.76, -np.inf)):
        least, counts = limits(both, labels, groups, coverage)
        assert least[1] == expected
        assert counts.tolist() == [0, 3]
    assert [least_groups(coverage) for coverage in (0.5, 0.75, 0.76, 0.8, 0.9, 0.95)] == [1, 3, 4, 4, 9, 19]


def test_the_coverage_holds_for_new_groups_whose_images_are_alike() -> None:
    """Ten groups of 1 to 30 images: by images as if they were independent, the coverage would be missed."""
    random = np.random.default_rng(0)
    covered: dict[str, list[float]] = {"groups": [], "images": []}
    for _ in range(400):
        sizes = random.permutation([1, 2, 3, 4, 6, 8, 12, 16, 24, 30])
        groups = np.repeat(np.arange(10), sizes)
        odds = random.normal(0, 2, 10)[groups] + random.normal(0, 0.5, len(groups))
        new = random.normal(0, 2, 300) + random.normal(0, 0.5, 300)
        for name, of in (("groups", groups), ("images", np.arange(len(groups)))):
            least, _ = limits(np.stack([-odds, odds], axis=1), np.ones(len(odds), int), of, 0.8)
            covered[name].append((new >= least[1]).mean())
    assert 0.795 < np.mean(covered["groups"]) < 0.88
    assert np.mean(covered["images"]) < 0.78


def test_sets_of_each_class_and_center() -> None:
    """Center 0 is well separated, center 1 is not; the images of another center get the limits of both together."""
    count = 40
    labels, groups = np.arange(2 * count) % 2, np.arange(2 * count)
    centers = np.repeat([0, 1], count)
    random = np.random.default_rng(0)
    logits = (2 * labels - 1) * np.where(centers == 0, 6.0, 0.5) + random.normal(0, 1, 2 * count)
    rule = calibrate(table(logits, labels, groups, centers), 0.9)
    assert set(rule.centers) == {"0", "1"}
    assert rule.every.groups == (count, count) and rule.every.reason is None
    new = table(np.tile([-7.0, -0.2, 0.2, 7.0], 3), np.full(12, -1), np.arange(12), np.repeat([0, 1, 5], 4))
    found = rule.apply(new)
    normal, tumor, both = ["normal"], ["tumor"], ["normal", "tumor"]
    assert found["set"].tolist()[:8] == [normal, [], [], tumor, normal, both, both, tumor]
    assert found["decision"].tolist()[:8] == ["normal", REFER, REFER, "tumor", "normal", REFER, REFER, "tumor"]
    assert np.array_equal(rule.members(new)[8:], new.class_log_odds[8:] >= rule.every.log_odds)
    assert found["id"].tolist() == new["id"].tolist() and found.label_names == ["normal", "tumor"]


def test_with_too_few_groups_no_set_is_claimed() -> None:
    labels = np.arange(60) % 2
    few = table((2.0 * labels - 1) * 9, labels, np.where(labels == 1, np.arange(60) % 16, np.arange(60)))
    rule = calibrate(few, 0.9)
    assert rule.every.groups == (30, 8)
    assert rule.every.reason is not None
    assert "0.9 needs 9 groups" in rule.every.reason and "found 8 of tumor" in rule.every.reason
    found = rule.apply(few)
    assert all(each == ["normal", "tumor"] for each in found["set"]) and set(found["decision"]) == {REFER}
    assert calibrate(few, 0.8).every.reason is None


def test_three_classes_and_images_without_a_group() -> None:
    random = np.random.default_rng(1)
    labels = np.arange(300) % 3
    logits = 2 * np.eye(3)[labels] + random.normal(0, 1, (300, 3))
    rows = Predictions.make(range(300), np.full(300, -1), [""] * 300, labels, logits)
    rule = calibrate(rows, 0.9)
    assert rule.every.groups == (100, 100, 100)
    holds = rule.members(rows)[np.arange(300), labels]
    for label in range(3):  # the 91st of 100 images with equal weights of 1/101
        assert holds[labels == label].sum() == 91


@pytest.mark.parametrize(
    ("coverage", "label", "message"),
    [
        (1.0, 1, "coverage is 1.0, expected a share above 0 and below 1"),
        (float("nan"), 1, "coverage is nan"),
        (0.9, -1, "no image to calibrate on is labeled"),
    ],
)
def test_what_can_not_be_calibrated_on(coverage: float, label: int, message: str) -> None:
    with pytest.raises(HistoError, match=message):
        calibrate(table(np.zeros(3), np.full(3, label), np.arange(3)), coverage)
