"""Balanced sampling against its definition."""

from __future__ import annotations

from collections import Counter

import numpy as np

from hf_histo.training.sampling import BalancedSampler


def test_values_are_drawn_equally_often() -> None:
    centers = [0] * 900 + [3] * 90 + [4] * 10
    sampler = BalancedSampler(centers, seed=1)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 1000
    counts = Counter(centers[row] for row in drawn)
    assert max(abs(count - 1000 / 3) for count in counts.values()) < 5 * np.sqrt(1000 * 2 / 9)
    assert list(sampler) == drawn
    sampler.set_epoch(1)
    assert list(sampler) != drawn


def test_of_two_columns_every_combination_is_a_value() -> None:
    columns = np.array([[0, 0]] * 500 + [[0, 1]] * 300 + [[1, 1]] * 200)
    drawn = Counter(tuple(columns[row]) for row in BalancedSampler(columns, seed=0))
    assert drawn.keys() == {(0, 0), (0, 1), (1, 1)}
    assert max(abs(count - 1000 / 3) for count in drawn.values()) < 5 * np.sqrt(1000 * 2 / 9)
    one = np.array([5, 7, 7])
    assert list(BalancedSampler(one, seed=3)) == list(BalancedSampler(one[:, None], seed=3))
