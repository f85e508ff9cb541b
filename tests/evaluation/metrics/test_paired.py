"""The paired difference of accuracies: its value, its interval, and how often that holds the true value."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import paired
from hf_histo.evaluation.metrics.paired import Difference
from hf_histo.evaluation.predictions import Predictions

Side = dict[str, dict[int, pd.DataFrame]]


def side(right: dict[str, dict[int, list[int]]], groups: str) -> Side:
    """Outcomes of images 0, 1, ... of each center; `groups` has a letter for each image."""
    return {
        center: {
            seed: pd.DataFrame({"right": np.array(of, bool), "group": list(groups)}, [f"{n}" for n in range(len(of))])
            for seed, of in seeds.items()
        }
        for center, seeds in right.items()
    }


def test_by_hand() -> None:
    """With seed 0, one of 6 images more at center a and two fewer at b; with seed 1, no difference."""
    ones = [1] * 6
    ours = side({"a": {0: ones, 1: ones}, "b": {0: [0, 0, 1, 1, 1, 1], 1: ones}}, "uvwxyz")
    theirs = side({"a": {0: [0, 1, 1, 1, 1, 1], 1: ones}, "b": {0: ones, 1: ones}}, "uvwxyz")
    found = paired.difference(ours, theirs)
    assert found.value == pytest.approx(((1 / 6 - 2 / 6) / 2 + 0) / 2)
    assert (
        found.seeds == 2 and found.low is not None and found.high is not None and found.low < found.value < found.high
    )
    assert paired.difference(theirs, ours).value == pytest.approx(-found.value)
    assert str(Difference(0.0123, -0.001, 0.02, 3)) == "+0.012 (-0.001 to +0.020)"


def test_what_has_no_interval() -> None:
    few = side({"a": {0: [1, 1, 0]}}, "xyz")
    assert paired.difference(few, side({"a": {0: [1, 0, 0]}}, "xyz")) == Difference(pytest.approx(1 / 3), None, None, 1)
    alike = side({"a": {0: [1] * 6}}, "uvwxyz")
    assert paired.difference(alike, alike) == Difference(0.0, None, None, 1)


def test_sides_that_are_not_alike_are_refused() -> None:
    ours = side({"a": {0: [1, 1, 0]}}, "xyz")
    with pytest.raises(HistoError, match=r"a \(seeds 0\) and a \(seeds 1\), expected the same"):
        paired.difference(ours, side({"a": {1: [1, 1, 0]}}, "xyz"))
    other = {"a": {0: ours["a"][0].rename({"0": "9"})}}
    with pytest.raises(HistoError, match="center a, seed 0: the sides predict different images"):
        paired.difference(ours, other)
    seeds = {"a": {0: ours["a"][0], 1: other["a"][0]}}
    with pytest.raises(HistoError, match="center a: seed 1 has other images than the first"):
        paired.difference(seeds, seeds)
    shuffled = {"a": {0: ours["a"][0].iloc[::-1]}}
    assert paired.difference(ours, shuffled).value == 0


def test_outcomes_of_predictions() -> None:
    table = Predictions.make("abcd", [0] * 4, ["g", "", "g", "h"], [0, 1, 1, -1], [-1.0, 0.2, -2.0, 3.0])
    found = paired.outcomes(table)
    assert found["right"].tolist() == [True, True, False]
    assert found.index.tolist() == ["a", "b", "c"] and found["group"].nunique() == 2
    assert paired.outcomes(table, 0.9)["right"].tolist() == [True, False, False]


def coverage(seeds: int, centers: int, slides: int, effect: float, tables: int) -> float:
    """How often the interval holds the true difference, where slides differ in difficulty and seeds in quality."""
    generator = np.random.default_rng(seeds * slides)
    held = 0
    for _ in range(tables):
        per = 10
        groups = np.repeat([f"{n}" for n in range(slides)], per)
        sides: list[Side] = [{}, {}]
        quality = generator.normal(0, 0.02, (2, seeds))  # of a training, the same at all centers
        for center in range(centers):
            hard = generator.normal(0, 0.06, slides).repeat(per)
            gain = generator.normal(0, 0.04, slides).repeat(per)  # of the first side, by slide
            luck = generator.random(slides * per)  # of an image, for both sides and all seeds
            for which in (0, 1):
                sides[which][str(center)] = {}
                for seed in range(seeds):
                    chance = 0.88 + hard + (effect + gain) * (which == 0) + quality[which, seed]
                    mixed = np.where(generator.random(slides * per) < 0.7, luck, generator.random(slides * per))
                    sides[which][str(center)][seed] = pd.DataFrame({"right": mixed < chance, "group": groups})
        found = paired.difference(*sides)
        assert found.low is not None and found.high is not None
        held += found.low <= effect <= found.high
    return held / tables


def test_the_interval_holds_the_true_difference() -> None:
    assert coverage(seeds=3, centers=3, slides=20, effect=0.03, tables=60) >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("centers", "slides"), [(1, 20), (4, 10), (4, 40)])
@pytest.mark.parametrize("effect", [0.0, 0.04])
def test_the_interval_holds_the_true_difference_in_many_settings(
    seeds: int, centers: int, slides: int, effect: float
) -> None:
    assert coverage(seeds, centers, slides, effect, tables=500) >= 0.93
