"""Means, deviations and the worst center, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from hf_histo.errors import HistoError
from hf_histo.evaluation.reporting.summary import Spread, bar_chart, best, held_out, spread


def test_spread() -> None:
    assert spread([0.25, 0.5, 0.75]) == Spread(0.5, 0.25, 3)
    assert spread([0.8, None]) == Spread(0.8, None, 1)
    assert spread([None]) == spread([]) == Spread(None, None, 0)
    assert [str(spread(values)) for values in ([0.8, 0.9], [0.25], [])] == ["0.850 ± 0.071", "0.250", "–"]


def test_held_out_centers() -> None:
    summary = held_out({0: {0: 0.9, 1: 1.0}, 3: {1: 0.6, 0: 0.7}, 4: {0: 0.5, 1: 0.9}})
    assert summary.centers == {0: spread([0.9, 1.0]), 3: spread([0.6, 0.7]), 4: spread([0.5, 0.9])}
    # Not of all six values: the deviation is that of the seeds, not of the centers.
    assert summary.mean == spread([(0.9 + 0.7 + 0.5) / 3, (1.0 + 0.6 + 0.9) / 3])
    # The lowest mean over seeds is center 3's, though the lowest value is center 4's.
    assert (summary.worst, summary.worst_center) == (spread([0.6, 0.7]), 3)


def test_an_undefined_center_is_left_out() -> None:
    summary = held_out({0: {0: 0.9}, 1: {0: None}})
    assert (summary.mean.mean, summary.worst.mean, summary.worst_center) == (0.9, 0.9, 0)
    nothing = held_out({0: {0: None}})
    assert (nothing.mean, nothing.worst, nothing.worst_center) == (Spread(None, None, 0), Spread(None, None, 0), None)


@pytest.mark.parametrize("values", [{}, {0: {0: 0.5}, 1: {0: 0.5, 1: 0.5}}])
def test_missing_runs_are_refused(values: dict[int, dict[int, float | None]]) -> None:
    with pytest.raises(HistoError, match="seeds by center"):
        held_out(values)


def test_best() -> None:
    assert best({"a": spread([0.5]), "b": spread([0.9, 0.5]), "c": spread([0.7]), "d": spread([])}) == "b"
    with pytest.raises(HistoError, match="undefined for all of a"):
        best({"a": spread([])})


def test_bar_chart(tmp_path: Path) -> None:
    rows = {"one": {"val": spread([0.8, 0.9]), "test": spread([0.7])}, "two": {"val": spread([])}}
    for name, reported in (("marked", {"one": 0.95}), ("plain", {})):
        bar_chart(rows, tmp_path / f"{name}.png", reported=reported, axis="accuracy")
    marked, plain = (np.asarray(PIL.Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("marked", "plain"))
    assert marked.shape == plain.shape
    assert (marked == 0).sum() > (plain == 0).sum()  # a black diamond, and its line in the legend
