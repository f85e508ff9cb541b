"""Ratios of a benchmark: what is divided by what, of medians, and what is missing."""

from __future__ import annotations

from typing import Any

import pytest

from hf_histo.experiments.benchmark import features, jobs, prediction, reading, steps
from hf_histo.experiments.benchmark.ratios import RATIOS, Value, ratios


@pytest.fixture
def found() -> dict[str, Any]:
    """Of two repetitions, which differ for some sides."""
    of_eight = prediction.several("this package"), prediction.several(prediction.MERGED)
    return {
        "training": {
            "tuned peer": [6.0, 12.0],
            "this package": [3.0, 5.0],
            "stock": [10.0, 10.0],
            "stock, float32": [16.0, 16.0],
            steps.FLOOR: [2.0, 2.0],
        },
        "prediction": {
            "this package": [5.0, 5.0],
            prediction.MERGED: [4.0, 4.0],
            of_eight[0]: [50.0, 50.0],
            of_eight[1]: [30.0, 30.0],
            prediction.in_bf16("this package"): [3.0, 3.0],
            prediction.in_bf16(prediction.MERGED): [1.5, 1.5],
            prediction.in_bf16(prediction.OPENVINO): [0.75, 0.75],
            prediction.UNMERGED: [6.0, 6.0],
            prediction.STOCK: [15.0, 15.0],
            prediction.ONNX_RUNTIME: [2.5, 2.5],
            prediction.OPENVINO: "not installed: pip install openvino",
        },
        "features": {features.WRITING: [2.0], features.FED: [1.0], features.PROBE: [3.0], features.READ: [4.0]},
        "memory": {
            "this package": {"host": 3, "device": 30},
            "tuned peer": {"host": 3, "device": 60},
            steps.FULL: {"host": 3, "device": 40},
        },
        "jobs": {jobs.BARE: [10.0], jobs.LAUNCHED: [15.0]},
        "scaling": {"1 process": [8.0], "2 processes": [5.0]},
        "reading": {"this package": [0.5], reading.OPENED: [5.0]},
        "augmenting": {"this package": [2.0], reading.PIL: [7.0]},
    }


def test_ratios_are_those_of_the_medians(found: dict[str, Any]) -> None:
    """A ratio of speeds is above 1 if the first side is faster; one of seconds and bytes, if it needs more."""
    values = [value.median if isinstance(value, Value) else value for value in ratios(found).values()]
    assert values == [
        *(9 / 4, 10 / 4, 16 / 4, 4 / 2),
        *(30 / 60, 30 / 40),
        *(0.8, 0.6, 0.5, 0.25, 1.2, 3.0, 0.5, "not installed: pip install openvino"),
        *(0.5, 0.75),
        *(1.5, 1.6),
        *(10.0, 3.5),
    ]


def test_the_range_is_that_of_single_repetitions(found: dict[str, Any]) -> None:
    assert next(iter(ratios(found).values())) == Value(9 / 4, 6 / 3, 12 / 5)


def test_the_tuned_peer_comes_first_and_every_aim_has_a_direction() -> None:
    assert (RATIOS[0].side, RATIOS[0].against) == ("this package", "tuned peer")
    aims = {(ratio.part, ratio.quantity): ratio.aimed for ratio in RATIOS if ratio.aim is not None}
    assert aims["prediction", "images/s"] == "at least 0.9"
    assert aims["training", "seconds"] == "at most 1.5"
    assert aims["memory", "device memory"] == "at most 0.5"


def test_without_a_gpu_there_is_no_ratio_of_its_memory(found: dict[str, Any]) -> None:
    for sides in found["memory"].values():
        sides["device"] = None
    assert [value for ratio, value in ratios(found).items() if ratio.part == "memory"] == ["no GPU", "no GPU"]


def test_what_was_not_measured_is_left_out(found: dict[str, Any]) -> None:
    del found["prediction"], found["training"]["tuned peer"]
    left = [(ratio.part, ratio.against) for ratio in ratios(found)]
    assert ("training", "stock") in left and ("training", "tuned peer") not in left
    assert "prediction" not in {part for part, _ in left}
