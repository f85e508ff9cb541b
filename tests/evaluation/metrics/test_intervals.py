"""Intervals against textbook formulas for groups of single images, and properties of all intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from hf_histo.evaluation.metrics import classification, intervals
from hf_histo.evaluation.predictions import Predictions


def table(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> pd.DataFrame:
    n = len(labels)
    names = [""] * n if groups is None else [f"g{group}" for group in groups]
    return Predictions.make(range(n), [-1] * n, names, labels, logits)


def random_table(n: int, groups: int | None = None, seed: int = 0, distance: float = 2.0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    logits = distance * (labels - 0.5) + random.normal(size=n)
    if groups is None:
        return table(logits, labels)
    group = random.integers(0, groups, n)
    return table(logits + random.normal(size=groups)[group], labels, group)


def overall(predictions: pd.DataFrame) -> dict[str, dict[str, float]]:
    return classification.report(predictions)["overall"]


@pytest.mark.parametrize("n", [200, 1000])
def test_shares_of_single_images_have_wilsons_interval(n: int) -> None:
    predictions = random_table(n)
    right = (predictions["label"] == (predictions["logit"] >= 0)).to_numpy()
    positive = (predictions["label"] == 1).to_numpy()
    for name, hits in (("accuracy", right), ("recall", right[positive])):
        expected = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        found = overall(predictions)[name]
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.003)


@pytest.mark.parametrize("right", [[20, 20, 19, 12, 20, 8, 20, 17, 20, 20], [18] * 10, [20] * 10, [0] * 10])
def test_few_groups_have_the_interval_by_hand(right: list[int]) -> None:
    """The roots of (p - q)² = t² q (1 - q) / n in q, where p is the mean of ten groups of 20 images."""
    shares, correct = np.array(right) / 20, np.concatenate([np.arange(20) < count for count in right])
    labels = np.arange(200) % 2
    found = overall(table(np.where(correct, 1.0, -1.0) * (2 * labels - 1), labels, np.arange(200) // 20))["accuracy"]
    p, most = shares.mean(), 200 / (1 + 19 * intervals.CORRELATION)
    variance = shares.var(ddof=1) / 10
    n = min(most, p * (1 - p) / variance) if variance > 1e-12 else most
    k = student.ppf(0.975, df=9) ** 2 / n
    low, high = sorted(np.roots([1 + k, -2 * p - k, p**2]).real)
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=1e-9)


def test_a_value_at_its_end_with_some_spread_has_an_interval() -> None:
    """Such as a sensitivity of 1 whose threshold depends on one group."""
    evidence = [intervals.Evidence.of("with tumor", np.full(10, 20.0))]
    steady = intervals.of_share(1.0, np.ones(10), evidence)
    assert steady[1] == 1 and steady[0] > 0.8
    for spread, at_most in ((0.001, steady[0]), (0.5, 0.5)):
        low, high = intervals.of_share(1.0, np.array([1.0] * 9 + [1 - spread]), evidence)
        assert low == pytest.approx(at_most) if spread < 0.01 else low < at_most
        assert high == 1


def test_auroc_of_single_images_has_the_width_of_delong() -> None:
    """DeLong et al. 1988, "Comparing the areas under two or more correlated ROC curves", Biometrics 44:837-845."""
    predictions = random_table(400, distance=1.0)
    score, positive = predictions["logit"].to_numpy(), (predictions["label"] == 1).to_numpy()
    above = (score[positive][:, None] > score[~positive][None]).astype(float)
    variance = sum(above.mean(axis=side).var(ddof=1) / above.shape[1 - side] for side in (0, 1))
    found = overall(predictions)["auroc"]
    assert found["high"] - found["low"] == pytest.approx(2 * norm.ppf(0.975) * np.sqrt(variance), rel=0.1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("groups", [10, 40, None])
def test_intervals_hold_their_values_and_stay_in_range(groups: int | None, seed: int) -> None:
    for name, found in overall(random_table(300, groups, seed)).items():
        if isinstance(found, dict) and "value" in found:
            assert 0 <= found["low"] < found["high"]
            assert found["low"] <= found["value"] <= found["high"]
            assert name == "loss" or found["high"] <= 1


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("groups", [None, 12])
def test_all_right_or_all_wrong_is_not_certain(groups: int | None, right: bool) -> None:
    labels = np.arange(120) % 2
    logits = (20.0 if right else -20.0) * (labels - 0.5)
    found = overall(table(logits, labels, None if groups is None else np.arange(120) // 10))
    for name in ("accuracy", "recall", "auroc", "balanced_accuracy"):
        assert found[name]["value"] == right
        assert (found[name]["high"] == 1) == right and (found[name]["low"] == 0) != right
        assert found[name]["high"] - found[name]["low"] > 0.02
    if groups is None and right:
        exact = binomtest(120, 120).proportion_ci(method="wilson")
        assert found["accuracy"]["low"] == pytest.approx(exact.low, abs=0.002)


def test_images_of_a_group_are_never_taken_for_independent() -> None:
    """Ten groups whose accuracies are equal, which may be chance."""
    group = np.arange(1000) // 100
    labels = np.arange(1000) % 2
    wrong = np.arange(1000) % 100 < 10
    logits = np.where(wrong, -1.0, 1.0) * (2 * labels - 1)
    alike, single = overall(table(logits, labels, group))["accuracy"], overall(table(logits, labels))["accuracy"]
    assert alike["value"] == single["value"] == 0.9
    assert alike["high"] - alike["low"] > 3 * (single["high"] - single["low"])


def test_fewer_groups_give_wider_intervals() -> None:
    """The same errors, in more and fewer groups that are each all right or all wrong."""
    width = []
    for size in (1, 5, 20):
        wrong = np.arange(400) // size % 10 == 0
        labels = np.arange(400) % 2
        found = overall(table(np.where(wrong, -1.0, 1.0) * (2 * labels - 1), labels, np.arange(400) // size))
        width.append(found["accuracy"]["high"] - found["accuracy"]["low"])
    assert width[0] * 1.8 < width[1] and width[1] * 1.5 < width[2]


def test_many_groups_are_left_out_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    block = intervals.blocks(1234)
    assert sorted(np.bincount(block)) == [6] * 166 + [7] * 34
    assert np.array_equal(block, intervals.blocks(1234))
    assert intervals.blocks(intervals.BLOCKS).tolist() == list(range(intervals.BLOCKS))
    predictions = random_table(1000)
    few = overall(predictions)
    monkeypatch.setattr(intervals, "BLOCKS", 10_000)
    each = overall(predictions)
    for name in ("accuracy", "auroc", "loss", "f1"):
        assert few[name]["high"] - few[name]["low"] == pytest.approx(each[name]["high"] - each[name]["low"], rel=0.15)


def test_loss_of_single_images_has_the_interval_of_a_mean() -> None:
    predictions = random_table(1000)
    losses = np.logaddexp(0, np.where(predictions["label"] == 1, -1, 1) * predictions["logit"])
    error = norm.ppf(0.975) * losses.std(ddof=1) / np.sqrt(1000) / losses.mean()
    found = overall(predictions)["loss"]
    expected = losses.mean() * np.exp([-error, error])
    assert [found["low"], found["high"]] == pytest.approx(expected.tolist(), rel=0.02)


def test_evidence_of_equal_and_of_unequal_groups() -> None:
    equal = intervals.Evidence.of("with tumor", np.full(10, 20.0))
    assert (equal.groups, equal.effective_groups) == (10, pytest.approx(10))
    assert equal.images == pytest.approx(200 / (1 + 19 * intervals.CORRELATION))
    single = intervals.Evidence.of("with tumor", np.array([1.0, 0.0, 1.0]))
    assert (single.groups, single.effective_groups, single.images) == (2, 2, 2)
    uneven = intervals.Evidence.of("with tumor", np.array([80.0, 10, 10]))
    assert uneven.effective_groups == pytest.approx(100**2 / (80**2 + 2 * 10**2))
    none = intervals.Evidence.of("with tumor", np.zeros(3))
    assert none.lack() == "0 groups with tumor, expected at least 5"
    assert equal.lack() is None
