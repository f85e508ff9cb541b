"""Leave-one-center-out evaluation: each acquisition center is held out in turn, and used as the test set."""

from __future__ import annotations

from dataclasses import asdict

from hf_histo import launch
from hf_histo.config import Config
from hf_histo.config.experiments import LeaveOneCenterOutOptions
from hf_histo.data.load import fingerprint
from hf_histo.data.protocol import prepare, refuse
from hf_histo.data.schema import center_name, center_names
from hf_histo.data.splits import folds
from hf_histo.evaluation.reporting.report import marked, table
from hf_histo.evaluation.reporting.summary import METRICS, held_out
from hf_histo.experiments import grid
from hf_histo.experiments.grid import Cell
from hf_histo.files import write_json
from hf_histo.result import Result


def leave_one_center_out(config: Config, options: LeaveOneCenterOutOptions) -> None:
    """Train a run for each held-out center and seed; print a table, and write leave_one_center_out.json.

    Raises HistoError for options without effect here, and as `grid.train` does.
    """
    folder = config.parent_folder()
    seeds = grid.seeds(config, options.seeds)
    held_out_in_turn = dict.fromkeys(("pool_centers", "test_centers"), "each center is held out of training in turn")
    refuse(config, {**held_out_in_turn, "streaming": "it knows no centers"})
    data = prepare(config)
    cells = {
        (center, seed): grid.cell(config, fold, grid.center_folder(folder, fold, center, seed), seed)
        for seed in seeds
        for center, fold in folds.leave_one_center_out(data, seed=seed).items()
    }
    results = grid.train(list(cells.values()), folder, options, describe=_done)
    if not launch.is_main_process():
        return

    runs = {cell.name: grid.on_test(result) for cell, result in zip(cells.values(), results, strict=True)}
    names = center_names(next(iter(data.values())))
    values: dict[str, dict[str, dict[int, float | None]]] = {metric: {} for metric in METRICS}
    for (center, seed), cell in cells.items():
        for metric, by_center in values.items():
            by_center.setdefault(center_name(center, names), {})[seed] = runs[cell.name][metric]
    summaries = {metric: held_out(by_center) for metric, by_center in values.items()}
    centers = next(iter(values.values()))
    lines = {f"center {center}": [summary.centers[center] for summary in summaries.values()] for center in centers}
    lines["mean over centers"] = [summary.mean for summary in summaries.values()]
    lines["worst center"] = [summary.worst for summary in summaries.values()]
    used = [result.record["splits"]["test"] for result in results if result.record["splits"]["test"]["transductive"]]
    lines = {marked(name, used[0] if used else {}): spreads for name, spreads in lines.items()}
    print(f"\nHeld-out centers of {config.data.data}: mean ± sample deviation (seeds: {options.seeds})\n")
    print(table([["held out", *METRICS.values()], *([name, *spreads] for name, spreads in lines.items())]))
    if used:
        print("\nTransductive: used the unlabeled images of each held-out center as a whole.")
    write_json(
        folder / "leave_one_center_out.json",
        {
            "data": {"name": config.data.data, "fingerprint": fingerprint(data)},
            "options": config.flat(),
            "seeds": options.seeds,
            "metrics": {metric: asdict(summary) for metric, summary in summaries.items()},
            "runs": runs,
        },
    )
    print(f"\nwrote {folder / 'leave_one_center_out.json'}")


def _done(cell: Cell, result: Result) -> str:
    overall = result.record["splits"]["test"]["overall"]
    return f"{cell.name}: accuracy {overall['accuracy']['value']:.3f} on {overall['n']} images"
