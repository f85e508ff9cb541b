"""Balanced sampling, and batches of bags, against their definition."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np

from hf_histo.training.sampling import BagSampler, BalancedSampler, bag_starts


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


def test_batches_of_whole_bags() -> None:
    rows = [np.arange(0, 50, 2), np.arange(1, 50, 2), np.arange(50, 53)]
    of_row = np.zeros(53, np.int64)
    for bag, members in enumerate(rows):
        of_row[members] = bag
    sampler = BagSampler(rows, batch_size=2, bag_size=10, seed=4)
    batches = [np.array(batch) for batch in sampler]
    assert len(batches) == len(sampler) == 2
    drawn: dict[int, list[int]] = {}
    for batch in batches:
        starts = bag_starts(batch, of_row)
        for part in np.split(batch, starts[1:]):
            drawn[int(of_row[part[0]])] = part.tolist()
            assert len(set(of_row[part])) == 1
    assert {bag: len(part) for bag, part in drawn.items()} == {0: 10, 1: 10, 2: 3}
    assert all(part == sorted(set(part)) for part in drawn.values())
    assert [batch.tolist() for batch in batches] == list(sampler)
    sampler.set_epoch(1)
    assert sorted(itertools.chain(*sampler)) != sorted(itertools.chain(*batches))  # other images of the large bags


def test_bags_drawn_equally_often_by_value() -> None:
    rows = [np.arange(3 * bag, 3 * bag + 3) for bag in range(200)]
    labels = np.array([0] * 180 + [1] * 20)
    of_row = np.repeat(np.arange(200), 3)
    (batch,) = BagSampler(rows, batch_size=200, bag_size=3, seed=0, balanced=labels)
    starts = bag_starts(np.array(batch), of_row)
    assert len(starts) == 200  # also of bags that are drawn twice in a row
    assert abs(labels[of_row[np.array(batch)[starts]]].mean() - 0.5) < 5 * 0.5 / np.sqrt(200)
    assert bag_starts(np.array([3, 4, 5, 3, 4, 5, 9]), of_row).tolist() == [0, 3, 6]
    assert bag_starts(np.array([3, 3]), of_row).tolist() == [0, 1]
