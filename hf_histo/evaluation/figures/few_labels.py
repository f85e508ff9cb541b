"""Accuracy against the number of labeled images: a curve with a band for each method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hf_histo.evaluation.figures.style import LINES, drawing
from hf_histo.evaluation.reporting.summary import Spread

ALL = 0  # number of shots that means all labeled images


def curves(series: Mapping[str, Mapping[int, Spread]], path: str | Path, *, title: str, axis: str) -> None:
    """Draw the mean over seeds against shots per class, with a band of ± one sample standard deviation, as a PNG.

    Args:
        series: values over seeds by name, then by shots per class; `ALL` is drawn at the right, as a point with a bar.
        path: path of the PNG.
        title: title of the figure.
        axis: label of the vertical axis.
    """
    shots = sorted({count for values in series.values() for count in values} - {ALL})
    end = 2 * max(shots, default=1)
    with drawing(path, 8, 5) as figure:
        axes = figure.subplots()
        for (name, values), (style, color) in zip(series.items(), LINES, strict=False):
            known = {count: value for count, value in values.items() if value.mean is not None}
            drawn = [count for count in shots if count in known]
            means = [known[count].mean or 0.0 for count in drawn]
            spreads = [known[count].deviation or 0.0 for count in drawn]
            axes.plot(drawn, means, style, color=color, marker="o", markersize=4, label=name)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(drawn, low, high, color=color, alpha=0.15, linewidth=0)
            if ALL in known:
                bar = known[ALL].deviation or 0.0
                axes.errorbar([end], [known[ALL].mean or 0.0], yerr=[bar], fmt="D", color=color, capsize=3)
        ticks = [*shots, *([end] if any(ALL in values for values in series.values()) else [])]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [*map(str, shots), *(["all"] if len(ticks) > len(shots) else [])])
        axes.minorticks_off()
        axes.set(xlabel="labeled images of each class", ylabel=axis, title=title)
        axes.legend(loc="lower right")
