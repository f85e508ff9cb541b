"""The report of a benchmark: benchmark.md, benchmark.json and benchmark.png."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_histo.evaluation.figures.style import COLORS, GRAY, drawing
from hf_histo.evaluation.reporting.report import table
from hf_histo.experiments import grid
from hf_histo.experiments.benchmark.ratios import Value, ratios
from hf_histo.experiments.benchmark.timing import OURS, STOCK, STOCK_FLOAT32, TUNED

NAME = "benchmark"
# Parts whose seconds are those of a batch, and of no images; all others are of one image.
OF_A_BATCH, OF_A_COMMAND = ("training", "scaling"), ("jobs",)
TITLES = {
    "training": "training step",
    "prediction": "prediction, an image; float32 unless named",
    "slides": "prediction of a slide, a tile",
    "features": "features of a linear probe, an image",
    "jobs": "command",
    "scaling": "training step on CPUs, the same batch and threads in all",
    "reading": "reading, an image",
    "augmenting": "augmenting on one core, an image",
}


def write(folder: Path, found: dict[str, Any]) -> None:
    """Print the report and write it to `folder`, with ratios added to `found`; see `measure.benchmark` for that."""
    by_block = {name: ratios(block) for name, block in found["blocks"].items()}
    found["ratios"] = {
        name: [
            dataclasses.asdict(ratio) | (dataclasses.asdict(value) if isinstance(value, Value) else {"missing": value})
            for ratio, value in of_block.items()
        ]
        for name, of_block in by_block.items()
    }
    lines = [about(found), ", ".join(f"{name} {version}" for name, version in found["versions"].items())]
    for name, block in found["blocks"].items():
        lines += [f"## {name}", *tables(block, found["batch"])]
        if by_block[name]:
            lines.append(ratio_table(by_block[name]))
    written = f"{NAME}.md and .json"
    if drawn := {name: block["training"] for name, block in found["blocks"].items() if "training" in block}:
        draw(folder / f"{NAME}.png", drawn, found)
        written = f"{NAME}.md, .json and .png"
    grid.write(folder, NAME, found, "\n\n".join(lines))
    print(f"\nwrote {written} in {folder}")


def about(found: Mapping[str, Any]) -> str:
    """Date, machine, load and settings in a sentence."""
    load = ", ".join(
        f"{when} {found['load'][when]:.1f}" for when in ("before", "after") if found["load"][when] is not None
    )
    threads, precision = f"{found['threads']} threads", f"mixed precision {found['precision']}"
    parts = [found["date"], found["machine"], f"load {load}" if load else "", threads, precision]
    text = ", ".join([*filter(None, parts), f"batches of {found['batch']}", f"repetitions: {found['repetitions']}"])
    return text + (", quick: no measurement" if found["quick"] else "")


def tables(block: Mapping[str, Any], batch: int) -> list[str]:
    """A table for each part of a block, as Markdown."""
    found = []
    for part, title in TITLES.items():
        if part in block:
            images = None if part in OF_A_COMMAND else batch if part in OF_A_BATCH else 1
            found.append(timing_table(title, block[part], images))
    if "memory" in block:
        rows: list[list[object]] = [["peak memory in training steps", "host MiB", "device MiB"]]
        rows += [[name, *map(_mib, (of["host"], of["device"]))] for name, of in block["memory"].items()]
        found.append(table(rows))
    if "growth" in block:
        rows = [["reading from a table of rows", "images/s", "own memory, MiB"]]
        rows += [[f"{g['rows']:,}", _number(1 / g["seconds"]), _mib(g["memory"])] for g in block["growth"]]
        found.append(table(rows))
    return found


def timing_table(title: str, sides: Mapping[str, Any], images: int | None) -> str:
    """Medians over repetitions and their range, of seconds in which `images` are done."""
    rows: list[list[object]] = [[title, "seconds", "range", *(["images/s"] if images else [])]]
    for name, seconds in sides.items():
        if isinstance(seconds, str):
            rows.append([name, seconds, None, *([None] if images else [])])
            continue
        median = statistics.median(seconds)
        spread = _range(min(seconds), max(seconds))
        rows.append([name, _number(median), spread, *([_number(images / median)] if images else [])])
    return table(rows)


def ratio_table(found: Mapping[Any, Value | str]) -> str:
    """Every ratio with what it is of, its range over repetitions, and its aim."""
    rows: list[list[object]] = [["of", "against", "ratio of", "ratio", "range", "aim"]]
    for ratio, value in found.items():
        measured = (value, None) if isinstance(value, str) else (_number(value.median), _range(value.low, value.high))
        rows.append([f"{ratio.part}: {ratio.side}", ratio.against, ratio.quantity, *measured, ratio.aimed])
    return table(rows)


def draw(path: Path, training: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    """A panel of bars for each backbone: images per second in a training step."""
    count = max(map(len, training.values()))
    with drawing(path, 8, len(training) * (1 + 0.3 * count)) as figure:
        for axes, (name, sides) in zip(
            figure.subplots(len(training), squeeze=False)[:, 0], training.items(), strict=True
        ):
            colors = {OURS: COLORS[1]} | dict.fromkeys((TUNED, STOCK, STOCK_FLOAT32), GRAY)
            names = list(sides)[::-1]
            speed = [found["batch"] / statistics.median(sides[side]) for side in names]
            bars = axes.barh(names, speed, color=[colors.get(side, COLORS[0]) for side in names])
            axes.bar_label(bars, fmt="%.1f", padding=3)
            axes.set(xlabel="images per second in a training step", title=name)
        figure.suptitle(about(found), fontsize="x-small")


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _mib(count: int | None) -> str | None:
    return None if count is None else f"{count / 2**20:,.0f}"


def _range(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}"
