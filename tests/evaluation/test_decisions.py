"""Decisions in numbers of images and in words, checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hf_histo.data.splits.checks import Composition
from hf_histo.evaluation.decisions import advice, decisions, in_words, rows
from hf_histo.evaluation.predictions import Predictions


def table(labels: list[int], probabilities: list[float], center: int) -> Predictions:
    odds = np.log(np.array(probabilities) / (1 - np.array(probabilities)))
    n = len(labels)
    return Predictions.make(range(n), [center] * n, [""] * n, labels, odds, label_names=["normal", "tumor"])


def composition(*centers: str) -> Composition:
    return Composition(0, 0, 0, {}, dict.fromkeys(centers, 1))


VAL = table([0, 0, 1, 1], [0.1, 0.6, 0.7, 0.9], 1)
TEST = table([0, 0, 0, 1, -1], [0.6, 0.7, 0.2, 0.4, 0.9], 2)


def words(splits: dict[str, Composition], thresholds: dict[str, float], **tables: Predictions) -> list[str]:
    metrics: dict[str, Any] = {"decisions": decisions(tables, splits, thresholds)}
    return in_words(metrics | {"splits": {name: {"transductive": []} for name in tables}})


def test_in_numbers() -> None:
    splits = {"train": composition("0"), "val": composition("1"), "test": composition("0", "2")}
    found = decisions({"val": VAL, "test": TEST}, splits, {"validation": 0.65})
    assert found["classes"] == ["normal", "tumor"]
    assert found["splits"]["test"] == {
        "centers": ["0", "2"],
        "new": ["2"],
        "images": [3, 1],
        "thresholds": {
            "default": {"value": 0.5, "wrong": [2, 1]},
            "validation": {"value": 0.65, "wrong": [1, 1]},
            "balanced": {"value": pytest.approx(0.65), "wrong": [1, 1]},
        },
    }


def test_in_words() -> None:
    splits = {"train": composition("0"), "val": composition("1"), "test": composition("0", "2")}
    val, test, advice = words(splits, {"validation": 0.65}, val=VAL, test=TEST)
    assert val == (
        "val (center 1; not in train): at 0.5 (the default), 1 of 2 (50%) normal are called tumor, and 0 of 2 (0%) "
        "tumor are missed; at 0.65 (chosen on val: --threshold validation), 0 of 2 (0%) normal are called tumor, and "
        "0 of 2 (0%) tumor are missed."
    )
    assert test.endswith(
        "at 0.65 (half are called so: --balanced, transductive), 1 of 3 (33%) normal are called tumor, and 1 of 1 "
        "(100%) tumor are missed."
    )
    assert test.startswith("test (center 0, 2; 2 not in train): at 0.5 (the default), 2 of 3 (67%) normal are called")
    assert advice.startswith("Threshold at a new center: 0.65, which has the best balanced accuracy on val, whose")
    assert advice.endswith(
        "If the share of tumor there is known, `hf_histo predict --balanced SHARE` finds it (transductive)."
    )


def test_as_a_table() -> None:
    splits = {"train": composition("0"), "val": composition("1")}
    metrics = {"decisions": decisions({"val": VAL}, splits, {}), "splits": {"val": {"transductive": []}}}
    assert rows(metrics) == [
        ["", "threshold", "normal called tumor", "tumor missed"],
        ["val (center 1; not in train)", "0.5, the default", "1 of 2 (50%)", "0 of 2 (0%)"],
    ]


def test_the_threshold_is_recommended_where_val_is_of_new_centers_alone() -> None:
    for centers in (("0",), ("0", "1"), ()):
        splits = {"train": composition("0"), "val": composition(*centers)}
        assert words(splits, {"validation": 0.65}, val=VAL)[-1].startswith("Threshold at a new center: not known.")
    splits = {"train": composition("0"), "val": composition("1")}
    assert "none was chosen" in words(splits, {}, val=VAL)[-1]


def test_splits_without_labels_and_earlier_runs() -> None:
    hidden = table([-1, -1], [0.2, 0.4], 2)
    splits = {"train": composition("0"), "val": composition("1"), "test": composition("2")}
    assert len(words(splits, {}, val=VAL, test=hidden)) == 2
    earlier: dict[str, Any] = {"splits": {}}
    assert (in_words(earlier), rows(earlier), advice(earlier)) == ([], [], "")
