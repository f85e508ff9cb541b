"""Coverage: how often the intervals contain the true value, on simulated tables."""

from __future__ import annotations

import numpy as np
import pytest
from interval_coverage import Source, coverage

HELD = {10: 0.92, 20: 0.93}  # share of 95% intervals, by the number of groups


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("correlation", [0.1, 0.3, 0.6])
@pytest.mark.parametrize(("mixed", "shared"), [(False, 0.0), (True, 1.0), (True, 0.0)])
@pytest.mark.parametrize("groups", [10, 20])
def test_intervals_of_grouped_images_hold_the_true_value(
    groups: int, mixed: bool, shared: float, correlation: float, accuracy: float
) -> None:
    found = coverage(Source(groups, accuracy, correlation, mixed, shared), tables=1000)
    for name in ("accuracy", "balanced_accuracy", "recall", "auroc"):
        assert found[name].withheld == 0
        assert found[name].share >= HELD[groups], name
    assert found["sensitivity_at_0.9"].share >= 0.88


@pytest.mark.slow
@pytest.mark.parametrize("images", [5, 100])
@pytest.mark.parametrize("uneven", [0.0, 0.7])
def test_intervals_hold_for_smaller_and_larger_and_for_unequal_groups(images: int, uneven: float) -> None:
    found = coverage(Source(20, 0.9, 0.3, images=images, uneven=uneven), tables=500)
    for name in ("accuracy", "balanced_accuracy", "recall", "auroc"):
        assert found[name].withheld < 0.5
        assert found[name].share >= 0.93, name


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.8, 0.9, 0.98])
@pytest.mark.parametrize(("images", "positive"), [(30, 0.5), (100, 0.5), (100, 0.1), (300, 0.1), (1000, 0.5)])
def test_intervals_of_single_images_hold_the_true_value(images: int, positive: float, accuracy: float) -> None:
    """Wilson's interval of a share itself holds between 0.9 and 1 here (Agresti & Coull 1998, fig. 3)."""
    found = coverage(Source(images, accuracy, 0.0, images=1, positive=positive), tables=500)
    for name in ("accuracy", "balanced_accuracy", "recall", "auroc"):
        assert found[name].share >= 0.9, name


def test_the_simulation_knows_the_truth_and_sees_intervals_that_are_too_narrow() -> None:
    source = Source(4000, 0.9, 0.3, mixed=True, shared=0.5, uneven=0.5)
    table = source.table(np.random.default_rng(0))
    right = (table["label"] == (table["logit"] >= 0)).mean()
    assert right == pytest.approx(source.truth["accuracy"], abs=0.01)
    few = coverage(Source(10, 0.9, 0.6), tables=40)
    ungrouped = coverage(Source(10, 0.9, 0.6), tables=40, grouped=False)
    assert ungrouped["accuracy"].share < 0.8 < few["accuracy"].share
    assert ungrouped["accuracy"].width < few["accuracy"].width / 2
