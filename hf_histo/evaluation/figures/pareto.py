"""Pareto front: runs by trainable parameters and metric, and those that no other run beats in both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from hf_histo.evaluation.figures.style import COLORS, GRAY, drawing

MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Point:
    """A way to adapt a model, and its result.

    Attributes:
        series: what it shares with other points, such as the adapted layers.
        name: what distinguishes it within its series, such as the rank.
        trainable: number of trainable parameters, above 0.
        mean: mean of the metric over seeds; higher is better.
        deviation: sample standard deviation over seeds; None for a single seed.
    """

    series: str
    name: str
    trainable: int
    mean: float
    deviation: float | None = None


def front(points: Mapping[str, Point]) -> list[str]:
    """Names of the points on the Pareto front, by rising number of parameters.

    A point is on the front if no other point is at least as good in both mean and parameters, and better in one.
    """

    def beats(one: Point, other: Point) -> bool:
        at_least = one.mean >= other.mean and one.trainable <= other.trainable
        return at_least and (one.mean, one.trainable) != (other.mean, other.trainable)

    best = [name for name, point in points.items() if not any(beats(other, point) for other in points.values())]
    return sorted(best, key=lambda name: points[name].trainable)


def chart(points: Mapping[str, Point], path: str | Path, *, axis: str) -> None:
    """Draw means with deviations against trainable parameters (logarithmic axis), and the Pareto front, as a PNG.

    Args:
        points: at least one point, by name.
        path: path of the PNG.
        axis: label of the vertical axis.
    """
    with drawing(path, 8, 5.5) as figure:
        axes = figure.subplots()
        steps = [(points[name].trainable, points[name].mean) for name in front(points)]
        axes.step(*zip(*steps, strict=True), where="post", color=GRAY, linestyle="--", label="Pareto front")
        series = dict.fromkeys(point.series for point in points.values())
        for name, color, marker in zip(series, cycle(COLORS), cycle(MARKERS), strict=False):
            own = [point for point in points.values() if point.series == name]
            sizes, means = [point.trainable for point in own], [point.mean for point in own]
            deviations = [point.deviation or 0.0 for point in own]
            axes.errorbar(sizes, means, yerr=deviations, fmt=marker, color=color, capsize=3, label=name)
            for point in own:
                place = (point.trainable, point.mean)
                axes.annotate(point.name, place, xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k: powers of ten would need mathematical text
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="trainable parameters", ylabel=axis)
        axes.legend(loc="lower right")
