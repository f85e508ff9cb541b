"""Summary of one run, and of several: mean and deviation over seeds, mean and worst of the held-out centers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd

from hf_histo.errors import HistoError
from hf_histo.evaluation import decisions
from hf_histo.evaluation.figures.style import COLORS, drawing
from hf_histo.evaluation.metrics import hierarchical_metrics
from hf_histo.evaluation.reporting import report

METRICS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}
HEADLINE = {"accuracy": "accuracy", "auroc": "AUROC"}
OVERALL = "overall"  # in place of a center: all images of a split


def of_run(metrics: Mapping[str, Any], adapter: Path, seconds: float | None, address: str | None = None) -> str:
    """Return a text: a table of the evaluated splits, what is transductive, decisions, sizes, seconds, the folder.

    Args:
        metrics: content of metrics.json.
        adapter: path of the adapter folder.
        seconds: duration of the run; None if it was finished before.
        address: URL of the upload, if any.
    """
    reports = {split: values["overall"] for split, values in metrics["splits"].items()}
    names = ["accuracy", "auroc", "loss"]
    if "recall_0" in reports["val"]:  # of more than two classes
        names[1:1] = ["balanced_accuracy"]
        names += [name for name in reports["val"] if name.startswith("sensitivity_at")]
    rows: list[list[object]] = [["split", "images", *names]]
    for split, overall in reports.items():
        title = report.marked(_with_centers(split, metrics["splits"][split]), metrics["splits"][split])
        rows.append([title, overall["n"], *(overall[name]["value"] for name in names)])
    notes = [report.transductive(of, split) for split, of in metrics["splits"].items()]
    levels = metrics.get("levels", {})
    parameters, size = metrics["parameters"], metrics["bytes"]
    return "\n".join(
        [
            report.table(rows),
            *(fill(sentence, 120) for sentence in [*filter(None, notes), *decisions.in_words(metrics)]),
            *(f"{split}:\n{hierarchical_metrics.summary(of)}" for split, of in levels.items()),
            f"trainable parameters: {parameters['trainable']:,} of {parameters['total']:,} ({parameters['share']:.2%})",
            f"adapter: {size['adapter'] / 2**20:.2f} MiB, beside {size['model'] / 2**20:.2f} MiB for the whole model",
            f"seconds: {seconds:.0f}" if seconds is not None else "finished before, nothing was trained",
            f"adapter folder: {adapter}",
            *([f"uploaded: {address}"] if address else []),
        ]
    )


def frame(reports: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The metrics of a run as a table: a row for each split as a whole, and for each of its centers.

    Args:
        reports: a `classification.report` for each split.

    Returns:
        A table with the columns `split`; `center`, "overall" for the whole split; `images` and `groups`, their numbers
        (labeled images); `transductive`, whether the predictions used the unlabeled images as a whole; then each metric
        of `classification`, NaN where it is undefined, with `<metric>_low` and `<metric>_high`, the bounds of its 95%
        confidence interval, if any row has one.
    """
    rows = []
    for split, of_split in reports.items():
        for center, part in {OVERALL: of_split["overall"], **of_split["centers"]}.items():
            row: dict[str, Any] = {"split": split, "center": center, "images": part["n"], "groups": part["groups"]}
            row["transductive"] = bool(of_split["transductive"])
            for name, entry in part.items():
                if isinstance(entry, Mapping) and "value" in entry:
                    row |= {name: entry["value"], f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
            rows.append(row)
    table = pd.DataFrame(rows)
    numbers = table.columns[5:]
    table[numbers] = table[numbers].astype(float)
    bounds = [name for name in numbers if name.endswith(("_low", "_high"))]
    return table.drop(columns=[name for name in bounds if table[name].isna().all()])


def rows(reports: Mapping[str, Mapping[str, Any]]) -> list[list[object]]:
    """The headline metrics of a run with intervals: a header, a row for each split, and for each center of several."""
    named: dict[str, Mapping[str, Any]] = {}
    for split, of_split in reports.items():
        named[report.marked(_with_centers(split, of_split), of_split)] = of_split["overall"]
        if len(of_split["centers"]) > 1:
            named |= {
                report.marked(f"{split}, center {center}", of_split): part
                for center, part in of_split["centers"].items()
            }
    return report.interval_rows(named)


def _with_centers(split: str, measured: Mapping[str, Any]) -> str:
    """A split with its centers in parentheses, if these have names."""
    names = [name for name in measured.get("centers", ()) if not name.isdecimal()]
    return f"{split} ({', '.join(names)})" if names else split


@dataclass(frozen=True)
class Spread:
    """A metric over seeds; `str` formats it with three decimals.

    Attributes:
        mean: mean of the values; None without values.
        deviation: sample standard deviation (denominator n - 1); None for fewer than two values.
        n: number of values.
    """

    mean: float | None
    deviation: float | None
    n: int

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        return f"{self.mean:.3f}" + ("" if self.deviation is None else f" ± {self.deviation:.3f}")


@dataclass(frozen=True)
class HeldOut:
    """A metric by held-out center.

    Attributes:
        centers: the metric over seeds, by center.
        mean: the mean over centers, over seeds; each center has the same weight, whatever its number of images.
        worst: the one of `centers` with the lowest mean; None if the metric is undefined for all.
        worst_center: name of that center, or its number as text; None likewise.
    """

    centers: dict[str, Spread]
    mean: Spread
    worst: Spread
    worst_center: str | None


def spread(values: Iterable[float | None]) -> Spread:
    """`Spread` of the values that are defined (not None)."""
    defined = [value for value in values if value is not None]
    return Spread(
        statistics.fmean(defined) if defined else None,
        statistics.stdev(defined) if len(defined) > 1 else None,
        len(defined),
    )


def held_out(values: Mapping[str, Mapping[int, float | None]]) -> HeldOut:
    """Summarize the values of a metric (None: undefined), given by held-out center, then by seed.

    Raises HistoError if there is no center, or centers have different seeds.
    """
    seeds = {tuple(sorted(by_seed)) for by_seed in values.values()}
    if len(seeds) != 1:
        raise HistoError(f"seeds by center are {sorted(seeds)}, expected the same for each; run the missing ones")
    centers = {center: spread(by_seed.values()) for center, by_seed in values.items()}
    means = [spread(by_seed[seed] for by_seed in values.values()).mean for seed in next(iter(seeds))]
    defined = {center: of_center.mean for center, of_center in centers.items() if of_center.mean is not None}
    worst = min(defined, key=defined.__getitem__, default=None)
    return HeldOut(centers, spread(means), Spread(None, None, 0) if worst is None else centers[worst], worst)


def best(values: Mapping[str, Spread]) -> str:
    """Name with the highest mean; on a tie, the first one.

    Raises HistoError if no mean is defined.
    """
    defined = {name: value.mean for name, value in values.items() if value.mean is not None}
    if not defined:
        raise HistoError(f"values are undefined for all of {', '.join(values) or 'no rows'}; choose another metric")
    return max(defined, key=defined.__getitem__)


def bar_chart(
    rows: Mapping[str, Mapping[str, Spread]], path: str | Path, *, reported: Mapping[str, float], axis: str
) -> None:
    """Draw horizontal bars with deviations for each row and series, and diamonds for published values, as a PNG.

    Args:
        rows: values in [0, 1] by name of the row, then of the series; the first row is at the top.
        path: path of the PNG.
        reported: published values, by name of the row.
        axis: label of the horizontal axis.
    """
    series = list(dict.fromkeys(name for values in rows.values() for name in values))
    height = 0.8 / max(1, len(series))
    with drawing(path, 9, 1.5 + len(rows) * (0.35 + 0.3 * len(series))) as figure:
        axes = figure.subplots()
        for place, (name, color) in enumerate(zip(series, cycle(COLORS), strict=False)):
            shown = [(row, values[name]) for row, values in enumerate(rows.values()) if name in values]
            drawn = [(row, value.mean, value.deviation) for row, value in shown if value.mean is not None]
            where = [row + (place - (len(series) - 1) / 2) * height for row, _, _ in drawn]
            means = [mean for _, mean, _ in drawn]
            deviations = [math.nan if d is None else d for _, _, d in drawn]  # NaN draws no whisker
            axes.barh(where, means, height, xerr=deviations, color=color, edgecolor="white", capsize=3, label=name)
            for y, mean in zip(where, means, strict=True):
                axes.text(0.01, y, f"{mean:.3f}", va="center", color="white", weight="bold")
        if marked := [(reported[name], row) for row, name in enumerate(rows) if name in reported]:
            axes.plot(*zip(*marked, strict=True), "D", color="black", markeredgecolor="white", label="reported (test)")
        axes.set_yticks(range(len(rows)), [fill(name, 34) for name in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
        axes.set(xlabel=axis, xlim=(0, 1))
        figure.legend(loc="outside upper center", ncols=3)
