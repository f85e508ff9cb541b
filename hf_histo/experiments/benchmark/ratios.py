"""What is compared with what, and what a comparison should come to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hf_histo.experiments.benchmark import features, jobs, prediction, reading, slide_prediction, steps
from hf_histo.experiments.benchmark.timing import OURS, STOCK, STOCK_FLOAT32, TUNED

Quantity = Literal["images/s", "seconds", "device memory"]


@dataclass(frozen=True)
class Ratio:
    """Two sides of a part, and the aim of the ratio of the first to the second.

    Attributes:
        part, side, against: as in what was found.
        quantity: what is divided. More "images/s" is better, more of the others is worse.
        aim: the least ratio of "images/s", the largest of the others; None where there is none.
    """

    part: str
    side: str
    against: str
    quantity: Quantity
    aim: float | None = None

    @property
    def aimed(self) -> str | None:
        """The aim in words."""
        return None if self.aim is None else f"at {'least' if self.quantity == 'images/s' else 'most'} {self.aim}"


@dataclass(frozen=True)
class Value:
    """The ratio of the medians over repetitions, and the range of the ratios in single repetitions."""

    median: float
    low: float
    high: float


# The tuned peer comes first: what a careful user would have without this package.
RATIOS = (
    Ratio("training", OURS, TUNED, "images/s"),
    Ratio("training", OURS, STOCK, "images/s"),
    Ratio("training", OURS, STOCK_FLOAT32, "images/s", 2.5),
    Ratio("training", OURS, steps.FLOOR, "seconds", 1.5),
    Ratio("memory", OURS, TUNED, "device memory"),
    Ratio("memory", OURS, steps.FULL, "device memory", 0.5),
    Ratio("prediction", OURS, prediction.MERGED, "images/s", 0.9),
    Ratio("prediction", prediction.several(OURS), prediction.several(prediction.MERGED), "images/s", 0.9),
    Ratio("prediction", prediction.in_bf16(OURS), prediction.in_bf16(prediction.MERGED), "images/s", 0.9),
    Ratio("prediction", prediction.in_bf16(OURS), prediction.in_bf16(prediction.OPENVINO), "images/s"),
    Ratio("prediction", OURS, prediction.UNMERGED, "images/s"),
    Ratio("prediction", OURS, prediction.STOCK, "images/s"),
    Ratio("prediction", OURS, prediction.ONNX_RUNTIME, "images/s"),
    Ratio("prediction", OURS, prediction.OPENVINO, "images/s"),
    Ratio("slides", slide_prediction.LEVEL, prediction.MERGED, "images/s", 0.9),
    Ratio("slides", slide_prediction.FINER, prediction.MERGED, "images/s", 0.9),
    Ratio("features", features.WRITING, features.FED, "images/s"),
    Ratio("features", features.PROBE, features.READ, "seconds", 1.3),
    Ratio("jobs", jobs.LAUNCHED, jobs.BARE, "seconds"),
    Ratio("scaling", jobs.PROCESSES[2], jobs.PROCESSES[1], "images/s"),
    Ratio("reading", OURS, reading.OPENED, "images/s", 5.0),
    Ratio("augmenting", OURS, reading.PIL, "images/s", 5.0),
)


def ratios(found: Mapping[str, Any]) -> dict[Ratio, Value | str]:
    """The ratios of what was measured, or why there are none, in the order of `RATIOS`.

    Args:
        found: by part, then by side: a value for each repetition, or why there are none. In "memory", bytes on "host"
            and "device" by side, None where there is no device. What was not measured is absent.
    """
    return {
        ratio: _value(ratio, found[ratio.part])
        for ratio in RATIOS
        if {ratio.side, ratio.against} <= found.get(ratio.part, {}).keys()
    }


def _value(ratio: Ratio, sides: Mapping[str, Any]) -> Value | str:
    one, other = sides[ratio.side], sides[ratio.against]
    if ratio.quantity == "device memory":
        one, other = ([side["device"]] if side["device"] else "no GPU" for side in (one, other))
    for side in (one, other):
        if isinstance(side, str):
            return side
    if ratio.quantity == "images/s":
        one, other = other, one
    single = [a / b for a, b in zip(one, other, strict=True)]
    return Value(statistics.median(one) / statistics.median(other), min(single), max(single))
