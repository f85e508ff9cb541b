"""Learn from a handful of labels: methods x shots x seeds x backbones x data sets, as one command that goes on.

    accelerate launch recipes/few_shot.py --data_sets DIR DIR2 --backbones uni biomedclip --output_dir OUT \\
        --methods prototype knn linear recipes/configs/cytology_lora.yaml --shot_counts 1 2 4 8 16 all --seeds 3

A method is a probe of frozen features (prototype: the nearest class mean; knn; linear: a logistic regression), or a
config of recipes/cytology_lora.py, any of whose options, given here, holds for every method. All methods learn from the
same images of a seed, choose what they choose on the same validation images, and are judged on the whole test split.
Probes see the images that a training would predict from: prepared and normalized alike, in all test-time views. Each
backbone sees a data set once for all probes, or, with --normalization, once for each draw. Every training is a run of
its own, in OUT/DATA/BACKBONE/METHOD/SHOTS-SEED, so the same command resumes where an earlier one was stopped. Into OUT
go few_shot.md, .json and a figure for each data set.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_histo import launch
from hf_histo.config import Config, option, parse_with
from hf_histo.data.load import fingerprint
from hf_histo.data.protocol import prepare, refuse
from hf_histo.data.splits.few_shot import complete, select
from hf_histo.errors import HistoError
from hf_histo.evaluation import predictions, probes
from hf_histo.evaluation.figures import few_labels
from hf_histo.evaluation.figures.embedding import features
from hf_histo.evaluation.metrics import classification, hierarchical_metrics
from hf_histo.evaluation.reporting.report import table
from hf_histo.evaluation.reporting.summary import Spread, spread
from hf_histo.files import atomic_file, write_json
from hf_histo.finetune import fine_tune
from hf_histo.hub import read_metrics
from hf_histo.launch import run
from hf_histo.models import backbones
from hf_histo.transforms import augmentation, preprocessing
from hf_histo.transforms.augmentation import TestTimeViews
from hf_histo.transforms.mri import Preparation
from hf_histo.transforms.stain import CenterNormalizer

ALL = "all"


@dataclass
class Options:
    _argument_group_name = "grid"

    methods: list[str] = field(metadata={"help": f"probes ({', '.join(probes.PROBES)}) and configs"})
    data_sets: list[str] = field(
        default_factory=list, metadata={"help": "folders of data sets (default: the one of --data)"}
    )
    backbones: list[str] = field(
        default_factory=list, metadata={"help": "their names or folders (default: --backbone)"}
    )
    shot_counts: list[str] = field(
        default_factory=lambda: ["1", "2", "4", "8", "16"], metadata={"help": f"images of each class, or '{ALL}'"}
    )
    seeds: int = option(3, "number of seeds, counted up from --seed")


@dataclass(frozen=True)
class Cell:
    """One training: what decides it, and its folder."""

    data: str
    backbone: str
    method: str
    shots: int  # `few_labels.ALL` for all
    seed: int

    def folder(self, parent: Path) -> Path:
        shots = ALL if self.shots == few_labels.ALL else f"{self.shots:02}"
        names = (Path(self.data).resolve().name, Path(self.backbone).name, Path(self.method).stem)
        return parent.joinpath(*names, f"{shots}-seed-{self.seed}")


Results = dict[Cell, dict[str, Any]]


class Features:
    """What a frozen backbone makes of the images that a run of `config` sees: prepared, normalized, in all its views.

    Computed once and kept in a file, unless color is normalized, by statistics of the images that are drawn.
    """

    def __init__(self, config: Config, data: datasets.DatasetDict, path: Path) -> None:
        options = config.model
        self.config = config
        self.model = backbones.load(
            options.backbone,
            2,
            revision=options.revision,
            random_weights=options.random_weights,
            image_size=options.image_size,
        )
        source = backbones.locate(options.backbone)
        sizes = options.image_size, options.resize_size
        declared = preprocessing.resolve(self.model.config, source, *sizes, options.fit)
        self.preprocessing = replace(declared, preparation=Preparation.of(config.preparation))
        self.rows = {split: {name: row for row, name in enumerate(rows["id"])} for split, rows in data.items()}
        self.arrays: dict[str, np.ndarray] = {}
        if config.centers.normalization != "none":
            return
        given = (self.preprocessing, TestTimeViews.of(config), config.prediction.adapt_batch_norm)
        key = f"{fingerprint(data)} {backbones.identity(self.model)} {given}"
        if not path.is_file() or str(np.load(path)["key"]) != key:
            found: dict[str, Any] = {split: self._computed(split, rows, None) for split, rows in data.items()}
            if launch.is_main_process():
                with atomic_file(path) as temporary:
                    np.savez(temporary, key=key, **found)
            launch.process().wait_for_everyone()
        self.arrays = {split: array for split, array in np.load(path).items() if split != "key"}

    def of(self, drawn: datasets.DatasetDict) -> dict[str, np.ndarray]:
        """Features (n, d) of the images that are drawn from each split."""
        if self.arrays:
            return {
                split: self.arrays[split][[self.rows[split][i] for i in rows["id"]]] for split, rows in drawn.items()
            }
        side = augmentation.preset(self.config.augmentation.augmentation).side(self.preprocessing.image_size)
        images = self.preprocessing.read(drawn["train"], side)  # as training reads them
        normalizer = CenterNormalizer.fit(images, self.config.centers.normalization)
        return {split: self._computed(split, rows, normalizer) for split, rows in drawn.items()}

    def _computed(self, split: str, rows: datasets.Dataset, normalizer: CenterNormalizer | None) -> np.ndarray:
        color = normalizer and normalizer.extended(self.preprocessing.read(rows))
        options: dict[str, Any] = {"normalizer": color, "description": f"Features of {split}"}
        if split != "train":
            options |= {
                "views": TestTimeViews.of(self.config),
                "adapt_batch_norm": self.config.prediction.adapt_batch_norm,
            }
        return features(self.model, rows, self.preprocessing, **options)


def probe(cell: Cell, drawn: datasets.DatasetDict, known: Features) -> dict[str, Any]:
    """Fit a probe on the drawn images and measure it on `test`."""
    parts = known.of(datasets.DatasetDict({split: drawn[split] for split in ("train", "val", "test")}))
    labels = {split: np.array(drawn[split]["label"]) for split in parts}
    scores = probes.PROBES[cell.method](parts["train"], labels["train"], parts["val"], labels["val"], parts["test"])
    test = drawn["test"]
    found = predictions.make(test["id"], test["center"], test["group"], labels["test"], scores)
    found.attrs["label_names"] = test.features["label"].names
    count = probes.trainable(cell.method, parts["train"].shape[1], len(found.attrs["label_names"]))
    return measured(found, count)


def measured(test: Any, trainable: int) -> dict[str, Any]:
    """What is kept of a cell."""
    values = classification.compute(test)
    by_level = hierarchical_metrics.scores(test) if hierarchical_metrics.are_in(test) else None
    return {
        "accuracy": values["accuracy"],
        "balanced_accuracy": values["balanced_accuracy"],
        "levels": by_level,
        "trainable": trainable,
    }


def train(cell: Cell, config: Config, data: datasets.DatasetDict, folder: Path) -> dict[str, Any]:
    """Fine-tune as a config says, and measure it on `test`."""
    protocol = replace(config.protocol, shots=cell.shots or None)
    model = replace(config.model, backbone=cell.backbone)
    own = replace(config, data=replace(config.data, data=cell.data), model=model, protocol=protocol)
    result = fine_tune(own.at(folder, cell.seed), data)
    test = predictions.read(result.adapter / "predictions" / "test.parquet")
    return measured(test, read_metrics(result.adapter)["parameters"]["trainable"])


def over_seeds(results: Results, metric: str, **wanted: object) -> Spread:
    """Of the cells with these attributes."""
    chosen = [of for cell, of in results.items() if all(getattr(cell, key) == value for key, value in wanted.items())]
    return spread(of[metric] for of in chosen)


def markdown(results: Results, options: Options) -> str:
    """For each data set, methods by shots; then methods by data sets, with all that they may learn from."""
    shots = list(dict.fromkeys(cell.shots for cell in results))
    rows_of = list(dict.fromkeys((cell.backbone, cell.method) for cell in results))
    data_sets = list(dict.fromkeys(cell.data for cell in results))
    titles = {count: ALL if count == few_labels.ALL else f"{count} per class" for count in shots}
    parts = []
    for data in data_sets:
        lines: list[list[object]] = [["backbone", "method", "trained", *titles.values()]]
        for backbone, method in rows_of:
            wanted = {"data": data, "backbone": backbone, "method": method}
            means = [over_seeds(results, "accuracy", **wanted, shots=count) for count in shots]
            trained = next(of["trainable"] for cell, of in results.items() if vars(cell).items() >= wanted.items())
            lines.append([Path(backbone).name, Path(method).stem, f"{trained:,}", *means])
        parts += [f"Accuracy on the test images of {Path(data).resolve().name}:", table(lines)]
    most = few_labels.ALL if few_labels.ALL in shots else max(shots)
    lines = [["backbone", "method", *(Path(data).resolve().name for data in data_sets)]]
    for backbone, method in rows_of:
        means = [
            over_seeds(results, "accuracy", data=data, backbone=backbone, method=method, shots=most)
            for data in data_sets
        ]
        lines.append([Path(backbone).name, Path(method).stem, *means])
    if len(data_sets) > 1:
        parts += [f"Accuracy with {titles[most]}:", table(lines)]
    parts.append(f"Mean ± sample deviation (seeds: {options.seeds}). All methods learn from the same images of a seed.")
    return "\n\n".join(parts)


def main() -> None:
    if any(argument.split("=")[0] == "--config" for argument in sys.argv[1:]):
        raise HistoError("--config is one config, expected each of them as a method; give it to --methods")
    base, options = parse_with(Options, __doc__)
    folder = base.parent_folder()
    try:
        shots = [few_labels.ALL if count == ALL else int(count) for count in options.shot_counts]
    except ValueError:
        raise HistoError(f"--shot_counts is {' '.join(options.shot_counts)}, expected numbers or {ALL!r}") from None
    configs = {}
    for method in options.methods:
        if method not in probes.PROBES:
            if not Path(method).is_file():
                raise HistoError(f"--methods {method}: no such file, and none of {', '.join(probes.PROBES)}")
            configs[method] = parse_with(Options, None, ["--config", method, *sys.argv[1:]])[0]
    if options.seeds < 1 or min(shots) < 0 or len({Path(m).stem for m in options.methods}) < len(options.methods):
        raise HistoError("--seeds and --shot_counts are numbers from 1 on, --methods of different names; correct them")

    refuse(base, dict.fromkeys(("shots", "percentage"), "--shot_counts draws the images"))
    launch.process()
    results: Results = {}
    for name in options.data_sets or [base.data.data]:
        data = complete(prepare(replace(base, data=replace(base.data, data=name))))
        for backbone in options.backbones or [base.model.backbone]:
            config = replace(base, model=replace(base.model, backbone=backbone))
            place = Cell(name, backbone, "", 0, 0).folder(folder).parents[1]
            probing = any(method in probes.PROBES for method in options.methods)
            known = Features(config, data, place / "features.npz") if probing else None
            for method in options.methods:
                for count in shots:
                    for seed in range(base.training.seed, base.training.seed + options.seeds):
                        cell = Cell(name, backbone, method, count, seed)
                        if known and method in probes.PROBES:
                            drawn = select(data, seed=seed, shots=count or None, level=base.protocol.level)
                            results[cell] = probe(cell, drawn, known)
                        else:
                            results[cell] = train(cell, configs[method], data, cell.folder(folder))
                        if launch.is_main_process():
                            done = cell.folder(folder).relative_to(folder)
                            print(f"{done}: accuracy {results[cell]['accuracy']:.3f}", flush=True)
    if not launch.is_main_process():
        return

    text = markdown(results, options)
    print("\n" + text)
    with atomic_file(folder / "few_shot.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    several = len(options.backbones) > 1
    for data_set in dict.fromkeys(cell.data for cell in results):
        series: dict[str, dict[int, Spread]] = {}
        for cell in results:
            if cell.data == data_set:
                name = Path(cell.method).stem + (f", {Path(cell.backbone).name}" if several else "")
                wanted = {"data": data_set, "backbone": cell.backbone, "method": cell.method, "shots": cell.shots}
                series.setdefault(name, {})[cell.shots] = over_seeds(results, "accuracy", **wanted)
        title = Path(data_set).resolve().name
        axis = f"test accuracy (seeds: {options.seeds})"
        few_labels.curves(series, folder / f"few_shot-{title}.png", title=title, axis=axis)
    cells = [{**vars(cell), **of} for cell, of in results.items()]
    write_json(folder / "few_shot.json", {"options": base.flat(), "cells": cells})
    print(f"\nwrote few_shot.md, .json and a figure for each data set in {folder}")


if __name__ == "__main__":
    run(main)
