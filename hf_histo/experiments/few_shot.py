"""Few-shot experiments: methods × shots × seeds × backbones × data sets. All methods use the same images of a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_histo import launch
from hf_histo.config import Config, DataOptions, PredictionOptions, PreparationOptions, parse_each
from hf_histo.config.experiments import ALL_LABELS, FewShotOptions
from hf_histo.data.protocol import prepare, refuse
from hf_histo.data.schema import center_names
from hf_histo.data.splits.few_shot import select
from hf_histo.errors import HistoError
from hf_histo.evaluation import probes
from hf_histo.evaluation.figures import few_labels
from hf_histo.evaluation.metrics import classification, hierarchical_metrics
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting.report import marked, table
from hf_histo.evaluation.reporting.summary import Spread, spread
from hf_histo.experiments import grid
from hf_histo.experiments.frozen_features import FrozenFeatures
from hf_histo.result import Result


@dataclass(frozen=True)
class Trial:
    """A method trained on one few-shot subset: everything that determines it, and its folder."""

    data: str
    backbone: str
    method: str
    shots: int  # images per class, or `few_labels.ALL`
    seed: int

    def folder(self, parent: Path) -> Path:
        shots = ALL_LABELS if self.shots == few_labels.ALL else f"{self.shots:02}"
        names = (Path(self.data).resolve().name, Path(self.backbone).name, Path(self.method).stem)
        return parent.joinpath(*names, f"{shots}-seed-{self.seed}")


# Options of reading and drawing images, and the backbone: the same for all methods.
SHARED = {option.name for option in fields(DataOptions)} - {"negative_class", "num_workers", "cache_dir"}
SHARED |= {"level", "pool_centers", "backbone"}
# Options with an effect on probes, which use frozen features.
PROBED = {option.name for group in (PreparationOptions, PredictionOptions) for option in fields(group)} | SHARED
PROBED |= {"revision", "random_weights", "image_size", "resize_size", "fit", "normalization"}
PROBED |= {"seed", "cache_dir", "output_dir"}

Results = dict[Trial, dict[str, Any]]


def few_shot(base: Config, options: FewShotOptions) -> None:
    """Fit the probes, train the runs; print tables, and write few_shot.md, .json and a figure for each data set.

    Args:
        base: the options of the command line, which apply to all methods.
        options: methods, data sets, backbones, shots and seeds.

    Raises HistoError for invalid options, and as `grid.train` does.
    """
    folder = base.parent_folder()
    shots = read_shots(options)
    configs = read_methods(options)
    refuse_idle(base, options, configs)
    launch.process()
    seeds = grid.seeds(base, options.seeds)

    measured: Results = {}
    cells: dict[Trial, grid.Cell] = {}
    trials: list[Trial] = []
    for name in options.data_sets or [base.data.data]:
        data = prepare(replace(base, data=replace(base.data, data=name)))
        for backbone in options.backbones or [base.model.backbone]:
            own = [Trial(name, backbone, m, n, seed) for m in options.methods for n in shots for seed in seeds]
            trials += own
            probing = [trial for trial in own if trial.method in probes.PROBES]
            if probing:
                config = replace(base, model=replace(base.model, backbone=backbone))
                features = FrozenFeatures(config, data, probing[0].folder(folder).parents[1] / "features.npz")
                for trial in probing:
                    drawn = select(data, seed=trial.seed, shots=trial.shots or None, level=base.protocol.level)
                    measured[trial] = fit_probe(trial, drawn, features)
                    if launch.is_main_process():
                        print(_line(str(trial.folder(folder).relative_to(folder)), measured[trial]), flush=True)
            for trial in own:
                if trial.method in configs:
                    place = trial.folder(folder)
                    config = config_of(trial, configs[trial.method]).at(place, trial.seed)
                    cells[trial] = grid.Cell(str(place.relative_to(folder)), config, data)
    trained = grid.train(
        list(cells.values()), folder, options, describe=lambda cell, result: _line(cell.name, grid.on_test(result))
    )
    if not launch.is_main_process():
        return

    measured |= {trial: of_run(result) for trial, result in zip(cells, trained, strict=True)}
    results = {trial: measured[trial] for trial in trials}
    draw(results, options, folder)
    content = {"options": base.flat(), "cells": [{**vars(trial), **of} for trial, of in results.items()]}
    grid.write(folder, "few_shot", content, markdown(results, options))
    print(f"\nwrote few_shot.md, .json and a figure for each data set in {folder}")


def read_shots(options: FewShotOptions) -> list[int]:
    """Parse `--shot_counts`: images per class, or `few_labels.ALL`. Raises HistoError for invalid values."""
    try:
        numbers = [None if count == ALL_LABELS else int(count) for count in options.shot_counts]
    except ValueError:
        raise HistoError(
            f"--shot_counts is {' '.join(options.shot_counts)}, expected numbers or {ALL_LABELS!r}"
        ) from None
    too_few = any(number is not None and number < 1 for number in numbers)
    if options.seeds < 1 or too_few or len({Path(m).stem for m in options.methods}) < len(options.methods):
        raise HistoError("--seeds and --shot_counts must be at least 1, --methods have different names; correct them")
    return [few_labels.ALL if number is None else number for number in numbers]


def read_methods(options: FewShotOptions) -> dict[str, Config]:
    """Read the configs in `--methods`, by file. Raises HistoError for a value that is neither a probe nor a file."""
    files = [method for method in options.methods if method not in probes.PROBES]
    for file in files:
        if not Path(file).is_file():
            raise HistoError(f"--methods {file}: no such file, and none of {', '.join(probes.PROBES)}")
    return dict(zip(files, parse_each(FewShotOptions, files), strict=True))


def refuse_idle(base: Config, options: FewShotOptions, configs: Mapping[str, Config]) -> None:
    """Raise HistoError for an option of the command line, or of a config, that has no effect here."""
    for config in (base, *configs.values()):
        config.parent_folder()  # a file, too, may ask for what is for one run
        refuse(config, dict.fromkeys(("shots", "percentage"), "--shot_counts draws the images"))
        refuse(config, {"streaming": "images are drawn from those that are kept"})
        refuse(config, {"aggregation": "--shot_counts draws images, not slides or groups"})
    if options.data_sets:
        refuse(base, {"data": "--data_sets gives the data"})
    if options.backbones:
        refuse(base, {"backbone": "--backbones gives the backbones"})
    if not configs:
        names = base.flat().keys() - PROBED
        refuse(base, {name: "probes train nothing, and no config is among --methods" for name in sorted(names)})
    shared = SHARED - ({"data"} if options.data_sets else set()) - ({"backbone"} if options.backbones else set())
    for file, config in configs.items():
        for name in sorted(shared):
            if (own := config.flat()[name]) != (given := base.flat()[name]):
                raise HistoError(
                    f"--methods {file}: {name} is {own!r}, expected {given!r} as without it: all methods have the same "
                    f"data and backbone; give --{name} on the command line"
                )


def config_of(trial: Trial, config: Config) -> Config:
    """Options of the training run of a trial."""
    return replace(
        config,
        data=replace(config.data, data=trial.data),
        model=replace(config.model, backbone=trial.backbone),
        protocol=replace(config.protocol, shots=trial.shots or None),
    )


def fit_probe(trial: Trial, drawn: datasets.DatasetDict, known: FrozenFeatures) -> dict[str, Any]:
    """Fit a probe on the images of a trial, and return its result on `test`."""
    parts = known.of(datasets.DatasetDict({split: drawn[split] for split in ("train", "val", "test")}))
    labels = {split: np.array(drawn[split]["label"][:]) for split in parts}
    scores = probes.PROBES[trial.method](parts["train"], labels["train"], parts["val"], labels["val"], parts["test"])
    test = drawn["test"]
    found = Predictions.make(
        test["id"][:],
        test["center"][:],
        test["group"][:],
        labels["test"],
        scores,
        label_names=test.features["label"].names,
        center_names=center_names(test),
        transductive=known.transductive(drawn),
    )
    count = probes.trainable(trial.method, parts["train"].shape[1], found.num_classes)
    return measured(found, count)


def of_run(result: Result) -> dict[str, Any]:
    """Result of a training run, as `measured` returns it."""
    test = Predictions.read(result.adapter / "predictions" / "test.parquet")
    return measured(test, result.record["parameters"]["trainable"])


def measured(test: Any, trainable: int) -> dict[str, Any]:
    """Result of a trial: metrics of the predictions of `test`, what is transductive in them, trained parameters."""
    values = classification.compute(test)
    by_level = hierarchical_metrics.scores(test) if hierarchical_metrics.are_in(test) else None
    return {
        "accuracy": values["accuracy"],
        "balanced_accuracy": values["balanced_accuracy"],
        "levels": by_level,
        "trainable": trainable,
        "transductive": test.transductive,
    }


def _line(name: str, of: Mapping[str, Any]) -> str:
    return f"{name}: accuracy {of['accuracy']:.3f}"


def chosen(results: Results, **wanted: object) -> list[dict[str, Any]]:
    """Results of all trials with the attributes `wanted`."""
    return [of for trial, of in results.items() if vars(trial).items() >= wanted.items()]


def over_seeds(results: Results, metric: str, **wanted: object) -> Spread:
    """`Spread` of a metric over all trials with the attributes `wanted`."""
    return spread(of[metric] for of in chosen(results, **wanted))


def method_name(results: Results, *, method: str, **wanted: object) -> str:
    """Name of a method in a table, marked as transductive if one of these trials is."""
    used = any(of["transductive"] for of in chosen(results, method=method, **wanted))
    return marked(Path(method).stem, {"transductive": used})


def markdown(results: Results, options: FewShotOptions) -> str:
    """Markdown tables: for each data set, methods by shots; then methods by data sets, with the most shots."""
    shots = list(dict.fromkeys(trial.shots for trial in results))
    rows_of = list(dict.fromkeys((trial.backbone, trial.method) for trial in results))
    data_sets = list(dict.fromkeys(trial.data for trial in results))
    titles = {count: ALL_LABELS if count == few_labels.ALL else f"{count} per class" for count in shots}
    parts = []
    for data in data_sets:
        lines: list[list[object]] = [["backbone", "method", "trained", *titles.values()]]
        for backbone, method in rows_of:
            wanted = {"data": data, "backbone": backbone, "method": method}
            means = [over_seeds(results, "accuracy", **wanted, shots=count) for count in shots]
            trained = chosen(results, **wanted)[0]["trainable"]
            lines.append([Path(backbone).name, method_name(results, **wanted), f"{trained:,}", *means])
        parts += [f"Accuracy on the test images of {Path(data).resolve().name}:", table(lines)]
    most = few_labels.ALL if few_labels.ALL in shots else max(shots)
    lines = [["backbone", "method", *(Path(data).resolve().name for data in data_sets)]]
    for backbone, method in rows_of:
        means = [
            over_seeds(results, "accuracy", data=data, backbone=backbone, method=method, shots=most)
            for data in data_sets
        ]
        lines.append([Path(backbone).name, method_name(results, backbone=backbone, method=method), *means])
    if len(data_sets) > 1:
        parts += [f"Accuracy with {titles[most]}:", table(lines)]
    parts.append(f"Mean ± sample deviation (seeds: {options.seeds}). All methods learn from the same images of a seed.")
    if any(of["transductive"] for of in results.values()):
        parts.append("Transductive: the unlabeled test images were used as a whole, for statistics of their center.")
    return "\n\n".join(parts)


def draw(results: Results, options: FewShotOptions, folder: Path) -> None:
    """A figure of accuracy by shots for each data set."""
    several = len(options.backbones) > 1
    for data in dict.fromkeys(trial.data for trial in results):
        series: dict[str, dict[int, Spread]] = {}
        for trial in results:
            if trial.data == data:
                name = Path(trial.method).stem + (f", {Path(trial.backbone).name}" if several else "")
                wanted = {"data": data, "backbone": trial.backbone, "method": trial.method, "shots": trial.shots}
                series.setdefault(name, {})[trial.shots] = over_seeds(results, "accuracy", **wanted)
        title = Path(data).resolve().name
        axis = f"test accuracy (seeds: {options.seeds})"
        few_labels.curves(series, folder / f"few_shot-{title}.png", title=title, axis=axis)
