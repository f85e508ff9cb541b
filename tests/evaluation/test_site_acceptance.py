"""The evidence about a site: tests that hold their level and find shifts, predicted accuracy, and the verdict."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from site_simulation import SimulatedSite, atc_coverage

from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.site_acceptance import (
    Estimate,
    Evidence,
    Shift,
    color_p_value,
    confidence,
    confidence_sequence,
    decide,
    p_value,
    predicted_accuracies,
    shares_by_group,
    shift,
)

GOOD = Evidence(0.9, 0.92, 0.05, Shift(0.0, 0.5, (40, 20)), 0.5, Estimate(0.89, 0.84, 0.94))


def test_a_shift_of_groups_is_found_and_alike_groups_are_not() -> None:
    """Images of a group are nearly the same: a test of images instead of groups would reject far too often."""
    random, alarms, by_image = np.random.default_rng(0), 0, 0
    for seed in range(60):
        groups = np.repeat(np.arange(24), 8)
        values = random.normal(0, 1, (24, 2))[groups] + random.normal(0, 0.1, (192, 2))
        old, new = groups < 12, groups >= 12
        alarms += shift(values[old], values[new], groups[old], groups[new], seed=seed).p_value <= 0.05
        rows = np.arange(96)
        by_image += shift(values[old], values[new], rows, rows, seed=seed).p_value <= 0.05
    assert alarms <= 8 and by_image > 30
    moved = shift(values[old], values[new] + 3, groups[old], groups[new])
    assert moved.p_value == 0.001 and moved.distance > 1
    assert moved == shift(values[old], values[new] + 3, groups[old], groups[new])


def test_alike_sides_may_differ_in_the_sizes_of_their_groups() -> None:
    """Pairs with an image of each class, against random images: no group of the second side is balanced."""
    random, alarms = np.random.default_rng(1), 0
    for seed in range(60):
        labels, groups = np.arange(120) % 2, np.arange(120) // 2
        sides = [(4.0 * labels + random.normal(0, 1, 120))[:, None] for _ in range(2)]
        some = random.permutation(120)[:40]
        alarms += shift(sides[0], sides[1][some], groups, groups[some], seed=seed).p_value <= 0.05
    assert alarms <= 8


def test_energy_distance_by_hand() -> None:
    """0 and 1 against 1: twice the mean distance between, 1/2, less that within, 1/2 and 0, over the deviation."""
    found = shift(np.array([[0.0], [1.0]]), np.array([[1.0]]), np.arange(2), np.arange(1))
    assert found.distance == pytest.approx(0.5 / np.std([0, 1, 1]))


def test_colors_beyond_the_limit_are_counted_once_for_each_group() -> None:
    assert color_p_value(np.full(20, 3.0), 2.0, np.zeros(20, int)) == pytest.approx(0.02)
    assert color_p_value(np.full(20, 3.0), 2.0, np.arange(20)) < 1e-30
    assert color_p_value(np.full(20, 1.0), 2.0, np.arange(20)) == 1


def test_accuracy_is_predicted_where_confidence_means_the_same() -> None:
    random = np.random.default_rng(0)

    def site(count: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
        sure = np.abs(random.normal(0, sharpness, count))
        return sure, random.random(count) < 1 / (1 + np.exp(-sure))

    sure, right = site(3000, 3.0)
    for sharpness in (3.0, 1.0):
        new, truth = site(3000, sharpness)
        found = predicted_accuracies(sure, right, np.arange(3000), new, np.arange(3000))
        assert set(found) == {"atc", "importance"}
        assert found["importance"].value == pytest.approx(truth.mean(), abs=0.04)
        for estimate in found.values():
            assert estimate.low < estimate.value < estimate.high
    assert found["atc"].value < right.mean() - 0.05
    few = predicted_accuracies(sure[:100], right[:100], np.arange(100), new[:20], np.arange(20) // 5)
    assert few["atc"].high - few["atc"].low > 2 * (found["atc"].high - found["atc"].low)


def test_the_interval_of_predicted_accuracy_holds_what_it_should_and_is_not_wider() -> None:
    for new in (SimulatedSite(100, 1), SimulatedSite(20, 5, sharpness=1.5)):
        inside, width = atc_coverage(SimulatedSite(40, 8), new, draws=60)
        assert inside >= 0.9
        assert width < 1.4


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("sharpness", [1.5, 3.0, 20.0])
@pytest.mark.parametrize(
    ("validation", "groups", "images"),
    [((60, 10), 20, 1), ((60, 10), 100, 1), ((20, 20), 10, 10), ((12, 20), 12, 10), ((300, 1), 400, 1)],
)
def test_the_interval_holds_at_small_and_large_sites(
    validation: tuple[int, int], groups: int, images: int, sharpness: float, spread: float
) -> None:
    new = SimulatedSite(groups, images, sharpness, spread)
    inside, width = atc_coverage(SimulatedSite(*validation, spread=spread), new, draws=200)
    assert inside >= 0.92
    assert width < 2


def test_of_one_group_no_accuracy_is_predicted() -> None:
    sure, right, groups = SimulatedSite(20, 5).draw(np.random.default_rng(0))
    for of_val, of_new in ((groups, np.zeros(100, int)), (np.zeros(100, int), groups)):
        for estimate in predicted_accuracies(sure, right, of_val, sure, of_new).values():
            assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_thresholded_confidence_by_hand() -> None:
    """Three of four are right, so three exceed the threshold on val: 0.5. Of the new ones, two of four do."""
    sure, right = np.array([0.1, 0.9, 0.5, 0.7]), np.array([True, True, True, False])
    found = predicted_accuracies(sure, right, np.arange(4), np.array([0.2, 0.5, 0.4, 3.0]), np.arange(4))
    assert found["atc"].value == 0.5
    none_right = predicted_accuracies(sure, np.zeros(4, bool), np.arange(4), sure, np.arange(4))
    assert none_right["atc"].value == 0


def test_confidence_is_the_distance_from_the_threshold() -> None:
    two = Predictions.make(range(3), [-1] * 3, [""] * 3, [0, 1, 1], [-2.0, 0.5, 3.0])
    assert confidence(two).tolist() == [2.0, 0.5, 3.0]
    assert confidence(two, 1 / (1 + np.exp(-1))) == pytest.approx([3.0, 0.5, 2.0])
    three = Predictions.make(range(2), [-1] * 2, [""] * 2, [0, 1], [[2.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    assert confidence(three).tolist() == three.class_log_odds.max(axis=1).tolist()


def test_a_confidence_sequence_holds_at_all_times_and_narrows() -> None:
    random, misses = np.random.default_rng(0), 0
    for _ in range(100):
        values = (random.random(80) < 0.85).astype(float)
        misses += any(not low <= 0.85 <= high for low, high in map(confidence_sequence, (values[:20], values)))
    assert misses <= 8
    low, high = confidence_sequence((random.random(1000) < 0.85).astype(float))
    assert 0.78 < low < 0.85 < high < 0.91
    assert confidence_sequence(np.ones(4))[1] == 1 and confidence_sequence(np.ones(100))[0] > 0.94
    assert confidence_sequence(np.zeros(100))[1] < 0.06


def test_shares_of_groups_in_their_order() -> None:
    right = np.array([True, False, True, True, False])
    assert shares_by_group(right, np.array([7, 3, 7, 3, 5])).tolist() == [1.0, 0.5, 0.0]


def shifted(p_value: float, groups: tuple[int, int] = (40, 20)) -> Shift:
    return Shift(0.4, p_value, groups)


@pytest.mark.parametrize(
    ("evidence", "verdict", "reason"),
    [
        (GOOD, "accept", "no difference"),
        (replace(GOOD, shift=shifted(0.012)), "recalibrate", r"what the model gives .*\(p = 0.0120\)"),
        (replace(GOOD, shift=shifted(0.02)), "accept", "no difference"),  # a fourth of 5% is for each of two tests
        (replace(GOOD, shift=shifted(0.02), color_p_value=None), "recalibrate", "what the model gives"),
        (replace(GOOD, color_p_value=0.001), "recalibrate", "the colors differ"),
        (replace(GOOD, predicted=Estimate(0.7, 0.6, 0.8)), "refuse", "predicted without labels is 0.700"),
        (replace(GOOD, labeled=(0.5, 0.8)), "refuse", "by its labels, .* below 0.870"),
        (replace(GOOD, labeled=(0.88, 0.95), shift=shifted(0.001)), "accept", "at least 0.870"),
        (
            replace(GOOD, labeled=(0.7, 0.95), shift=shifted(0.001)),
            "recalibrate",
            "label more; what the model gives",
        ),
        # Nothing can be found by so few groups.
        (replace(GOOD, shift=shifted(0.02, (50, 1))), "recalibrate", "1 groups .* of color.* in what the model gives"),
        (replace(GOOD, shift=shifted(0.5, (4, 4))), "recalibrate", "in what the model gives: give images of more"),
        (replace(GOOD, shift=shifted(0.5, (4, 4)), labeled=(0.88, 1.0)), "accept", "at least 0.870"),
        (replace(GOOD, shift=shifted(0.5, (5, 5))), "accept", "no difference"),
    ],
)
def test_the_verdict(evidence: Evidence, verdict: str, reason: str) -> None:
    found, reasons = decide(evidence)
    assert found == verdict
    assert re.search(reason, "; ".join(reasons))


def test_a_p_value_is_never_shown_as_zero() -> None:
    assert [p_value(value) for value in (0.03104, 0.0001, 1e-9)] == [
        "p = 0.0310",
        "p = 0.0001",
        "p < 0.0001",
    ]


def test_no_p_value_is_below_what_so_few_groups_allow() -> None:
    """Sides that could not differ more have the p-value of `too_few_groups`, up to chance in the permutations."""
    for ours, theirs, least in ((4, 4, 2 / 70), (5, 5, 2 / 252), (10, 1, 1 / 11), (6, 2, 1 / 28)):
        values = np.where(np.arange(ours + theirs) < ours, 0.0, 9.0) + 0.01 * np.arange(ours + theirs)
        found = shift(values[:ours, None], values[ours:, None], np.arange(ours), np.arange(theirs))
        assert found.groups == (ours, theirs)
        assert found.p_value == pytest.approx(least, abs=0.012)
