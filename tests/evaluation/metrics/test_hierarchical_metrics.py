"""Scores of hierarchical classes for probabilities that are worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import hierarchical_metrics
from hf_histo.evaluation.predictions import Predictions

NAMES = ["A > x", "A > y", "B > z", "C"]


def table(probability: list[list[float]], labels: list[int], names: list[str] | None = None) -> pd.DataFrame:
    n = len(labels)
    made = Predictions.make(range(n), [-1] * n, [""] * n, labels, np.log(probability))
    made.attrs["label_names"] = names or NAMES
    return made


# The most probable class of all is z, but A is more probable than B: by level A and z contradict each other.
TORN = [0.30, 0.25, 0.40, 0.05]


def test_the_path_goes_down_from_the_most_probable_top() -> None:
    rows = table([TORN, [0.1, 0.1, 0.1, 0.7], [0.2, 0.5, 0.2, 0.1]], [0, 3, 1])
    assert hierarchical_metrics.top_down(rows).tolist() == [0, 3, 1]


def test_scores_by_level_and_along_the_path() -> None:
    found = hierarchical_metrics.scores(table([TORN, TORN, [0.1, 0.1, 0.1, 0.7], TORN], [0, 2, 3, -1]))
    assert found["n"] == 3
    assert found["levels"]["1"] == {"classes": 3, "by_level": pytest.approx(2 / 3), "top_down": pytest.approx(2 / 3)}
    # By level, z is right once and wrong once; along the path, x is.
    assert found["levels"]["2"] == {"classes": 4, "by_level": pytest.approx(2 / 3), "top_down": pytest.approx(2 / 3)}
    assert found["mean"] == {"by_level": pytest.approx(2 / 3), "top_down": pytest.approx(2 / 3)}
    assert found["consistent"] == pytest.approx(1 / 3)


def test_a_path_is_consistent_and_no_worse_at_the_top() -> None:
    random = np.random.default_rng(0)
    rows = table(random.dirichlet(np.ones(4), 200).tolist(), random.integers(0, 4, 200).tolist())
    found = hierarchical_metrics.scores(rows)
    assert found["levels"]["1"]["by_level"] == found["levels"]["1"]["top_down"]
    assert 0 < found["consistent"] < 1


def test_the_summary_has_a_line_for_each_level_and_their_mean() -> None:
    found = hierarchical_metrics.scores(table([TORN, [0.1, 0.1, 0.1, 0.7], TORN], [0, 3, 0]))
    lines = hierarchical_metrics.summary(found).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["1", "3", "1.000", "1.000"],
        ["2", "4", "0.333", "1.000"],
        ["mean", "", "0.667", "1.000"],
    ]


def test_no_labels_and_no_levels() -> None:
    found = hierarchical_metrics.scores(table([TORN], [-1]))
    assert found["n"] == 0
    assert found["levels"]["1"]["by_level"] is None
    assert found["mean"]["top_down"] is None
    with pytest.raises(HistoError, match="have one level"):
        hierarchical_metrics.scores(table([TORN], [0], ["a", "b", "c", "d"]))
