"""Accuracy against trainable parameters for several LoRA ranks and target layers, and the Pareto front."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from hf_histo import launch
from hf_histo.config import Config, refuse_given, with_options
from hf_histo.config.experiments import ParetoOptions
from hf_histo.data.load import fingerprint
from hf_histo.data.protocol import prepare
from hf_histo.errors import HistoError
from hf_histo.evaluation.figures.pareto import Point, chart, front
from hf_histo.evaluation.reporting.report import marked, table
from hf_histo.evaluation.reporting.summary import Spread, spread
from hf_histo.experiments import grid
from hf_histo.result import Result

HEAD_ALONE = "classifier-alone"


def pareto(config: Config, options: ParetoOptions) -> None:
    """Train a run for each combination and seed; print a table, and write pareto.md, .json and .png.

    Raises HistoError for invalid options, and as `grid.train` does.
    """
    folder = config.parent_folder()
    seeds = grid.seeds(config, options.seeds)
    reasons = {"method": "LoRA and the classifier alone are compared", "target_modules": "--layers gives the layers"}
    refuse_given(config, reasons)
    chosen = combinations(config, options)

    data = prepare(config)
    if options.front_split not in data or max(data[options.front_split]["label"][:]) < 0:
        raise HistoError(
            f"--front_split is {options.front_split}, expected a split with labels; {config.data.data} has none there"
        )
    cells = {
        (name, seed): grid.Cell(f"{name}: seed {seed}", own.at(folder / name / f"seed-{seed}", seed), data)
        for name, own in chosen.items()
        for seed in seeds
    }
    trained = grid.train(list(cells.values()), folder, options, describe=lambda cell, _: f"{cell.name} is done")
    if not launch.is_main_process():
        return
    results: dict[str, list[Result]] = {}
    for (name, _), result in zip(cells, trained, strict=True):
        results.setdefault(name, []).append(result)

    points = {
        name: Point(
            "classifier alone" if name == HEAD_ALONE else str(chosen[name].adapter.target_modules),
            "" if name == HEAD_ALONE else f"r = {chosen[name].adapter.lora_rank}",
            of_seeds[0].record["parameters"]["trainable"],
            accuracy(of_seeds, options.front_split).mean or 0.0,
            accuracy(of_seeds, options.front_split).deviation,
        )
        for name, of_seeds in results.items()
    }
    best = front(points)
    splits = next(iter(results.values()))[0].record["splits"]
    titles = [f"{marked(split, of)} accuracy" for split, of in splits.items()]
    rows: list[list[object]] = [["run", "trainable", "MiB as fp16", *titles, "front"]]
    for name in sorted(points, key=lambda name: points[name].trainable):
        measured = [accuracy(results[name], split) for split in splits]
        size = results[name][0].record["bytes"]["adapter_fp16"] / 2**20
        rows.append([name, f"{points[name].trainable:,}", f"{size:.2f}", *measured, "yes" if name in best else ""])
    text = (
        f"{table(rows)}\n\nAccuracy on {config.data.data} (content fingerprint {fingerprint(data)}): mean ± sample "
        f"deviation (seeds: {options.seeds}). Front: no other run has a higher accuracy on {options.front_split} with "
        "as few trainable parameters."
    )
    axis = f"{options.front_split} accuracy on {Path(config.data.data).name} (seeds: {options.seeds})"
    chart(points, folder / "pareto.png", axis=axis)
    content = {
        "data": {"name": config.data.data, "fingerprint": fingerprint(data)},
        "options": config.flat(),
        "split": options.front_split,
        "front": best,
        "points": {name: asdict(point) for name, point in points.items()},
        "accuracy": {
            name: {split: asdict(accuracy(of_seeds, split)) for split in splits} for name, of_seeds in results.items()
        },
    }
    grid.write(folder, "pareto", content, text)
    print(f"\nwrote pareto.md, .json and .png in {folder}")


def combinations(config: Config, options: ParetoOptions) -> dict[str, Config]:
    """Options of each combination of layers and rank, by the name of its folder.

    Raises HistoError for two of one name, and a method of peft without a rank.
    """
    found = {HEAD_ALONE: with_options(config, {"method": "linear"})}
    for layers in options.layers:
        for rank in options.ranks:
            name = f"{re.sub(r'[^A-Za-z0-9]+', '-', layers).strip('-')}-rank-{rank}"
            if name in found:
                raise HistoError(f"--layers and --ranks give {name} twice, expected different ones; leave one out")
            alpha = config.adapter.lora_alpha / config.adapter.lora_rank * rank
            chosen = {"method": "lora", "target_modules": layers, "lora_rank": rank, "lora_alpha": alpha}
            found[name] = with_options(config, chosen)
            if found[name].adapter.lora_rank != rank:
                raise HistoError(f"--adapter {config.adapter.adapter}: has no rank, expected a method with one")
    return found


def accuracy(results: list[Result], split: str) -> Spread:
    """Accuracy on a split over seeds; undefined if the split has no labels."""
    return spread(result.record["splits"][split]["overall"]["accuracy"]["value"] for result in results)
