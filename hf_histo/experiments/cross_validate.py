"""Cross-validation: each of k folds is held out in turn, without copies of an image in different folds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from hf_histo import launch
from hf_histo.config import Config
from hf_histo.config.experiments import CrossValidateOptions
from hf_histo.data.load import fingerprint, load
from hf_histo.data.protocol import refuse
from hf_histo.data.splits.folds import k_folds
from hf_histo.data.splits.leakage import grouped
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions, class_index
from hf_histo.evaluation.reporting import report
from hf_histo.evaluation.reporting.summary import METRICS, spread
from hf_histo.experiments import grid
from hf_histo.experiments.grid import Cell
from hf_histo.files import write_json
from hf_histo.result import Result


def cross_validate(config: Config, options: CrossValidateOptions) -> None:
    """Train a run for each fold and seed; print tables, and write cross_validate.json, predictions and figures.

    Raises HistoError for options without effect here, folds that can't be made, and as `grid.train` does.
    """
    folder = config.parent_folder()
    seeds = grid.seeds(config, options.seeds)
    together = dict.fromkeys(("pool_centers", "test_centers"), "all splits are put together")
    refuse(config, {**together, "streaming": "folds are of images that are kept"})
    files = load(config.data)
    split, family = config.data.split, config.data.family or "near"
    if split == "files":
        refuse(config, {"family": "--split files searches for none"})
    data = files if split == "files" else grouped(files, family, only_one=split == "clean")
    units = {"files": "groups of the files", "near": "families of near images"}
    unit = units.get(split, units.get(family, "families of copies"))
    cells = {
        (seed, fold): grid.cell(config, splits, folder / f"fold-{fold}-seed-{seed}", seed)
        for seed in seeds
        for fold, splits in k_folds(data, folds=options.folds, seed=seed).items()
    }
    results = dict(zip(cells, grid.train(list(cells.values()), folder, options, describe=_done), strict=True))
    if not launch.is_main_process():
        return

    runs = {cells[key].name: grid.on_test(result) for key, result in results.items()}
    pooled = {
        seed: _pooled([result for (of, _), result in results.items() if of == seed], config, folder, seed)
        for seed in seeds
    }
    names = data[next(iter(data))].features["label"].names
    spreads = {metric: spread(values[metric] for values in runs.values()) for metric in METRICS}
    print(f"\nHeld-out folds of {config.data.data}: mean ± sample deviation (folds: {options.folds})\n")
    reports = {cells[key].name: result.record["splits"]["test"] for key, result in results.items()}
    rows = [[report.marked(name, reports[name]), *values.values()] for name, values in runs.items()]
    print(report.table([["held out", *METRICS.values()], *rows, ["mean", *spreads.values()]]))
    for seed, of_seed in pooled.items():
        print(f"\nAll folds together, seed {seed}, 95% intervals over {unit}\n")
        print(report.center_table(of_seed))
        if len(names) > 2:
            print("\n" + report.table(report.class_rows(of_seed, names)))
        print("\n" + report.screening(of_seed, names))
    write_json(
        folder / "cross_validate.json",
        {
            "data": {"name": config.data.data, "fingerprint": fingerprint(files)},
            "options": config.flat(),
            "folds": options.folds,
            "held_out_together": unit,
            "seeds": options.seeds,
            "metrics": {metric: asdict(value) for metric, value in spreads.items()},
            "runs": runs,
            "pooled": pooled,
        },
    )
    print(f"\nwrote {folder / 'cross_validate.json'}")


def _done(cell: Cell, result: Result) -> str:
    return f"{cell.name}: balanced accuracy {grid.on_test(result)['balanced_accuracy']:.3f}"


def _pooled(results: list[Result], config: Config, folder: Path, seed: int) -> dict[str, Any]:
    """Pool the held-out predictions of all folds of a seed, write them as files, and return their report."""
    tables = [Predictions.read(result.adapter / "predictions" / "test.parquet") for result in results]
    every = pd.concat(tables, ignore_index=True)
    assert isinstance(every, Predictions)
    used = {what: None for table in tables for what in table.transductive or ()}
    every.attrs = {**tables[0].attrs, "transductive": list(used)}  # pandas drops them where the folds differ
    every.write(folder / "predictions" / f"seed-{seed}.parquet")
    report.confusion_matrix(every, folder / f"confusion-seed-{seed}.png")
    return classification.report(every, negative=class_index(every.label_names, config.data.negative_class))
