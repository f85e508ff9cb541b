"""Train the rows of a table and set what they reach beside what was published: the report's table, as one command.

    accelerate launch recipes/compare.py --rows recipes/configs/report/*.yaml --data DIR --seeds 2 --output_dir OUT
    accelerate launch recipes/compare.py --rows a.yaml b.yaml --data DIR --protocol leave_one_center_out \\
        --select worst --output_dir OUT --backbone ../shared/models/mobilenetv2_100.tf_in1k

    accelerate launch recipes/compare.py --data DIR --output_dir OUT \\
        --rows recipes/configs/mri_vgg16_lora.yaml recipes/configs/mri_backbones/*.yaml

A row is a config of a training recipe, and any of its options given here holds for every row. `reported.yaml`, in its
folder or that of another row, tells, by the config's file name without suffix, the row's `name`, the published test
accuracy (`reported`, with its `source`), and whether predictions are `balanced`: class 1 for half of a split's images,
labels unseen. Rows that differ in nothing else, or only in options of prediction (--test_time_views and the like),
share a training.

With `--protocol validation` every split with labels beside train is evaluated, with `leave_one_center_out` each center
that training never saw. Each row, seed and center is a run of its own in OUT/ROW, so the same command goes on where an
earlier one was stopped. Into OUT go PROTOCOL.md, .json and .png.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import datasets
import pandas as pd
import yaml

from hf_histo import launch
from hf_histo.config import Config, PredictionOptions, option, parse, parse_with
from hf_histo.data.load import fingerprint, load
from hf_histo.data.protocol import refuse
from hf_histo.data.splits.folds import leave_one_center_out, pool_centers
from hf_histo.data.splits.leakage import arrange
from hf_histo.errors import HistoError
from hf_histo.evaluation import predictions, thresholds
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.reporting.report import marked, table
from hf_histo.evaluation.reporting.summary import METRICS, Spread, bar_chart, best, held_out, spread
from hf_histo.files import atomic_file, write_json
from hf_histo.finetune import fine_tune
from hf_histo.inference import Classifier
from hf_histo.launch import run
from hf_histo.training import run_folder
from hf_histo.transforms.augmentation import TestTimeViews

TOLD = "reported.yaml"


@dataclass
class Options:
    _argument_group_name = "comparison"

    rows: list[str] = field(metadata={"help": f"configs to compare; a {TOLD} among them is no row"})
    seeds: int = option(2, "number of seeds for each row, counted up from --seed")
    protocol: Literal["validation", "leave_one_center_out"] = option("validation", "what rows are evaluated on")
    select: Literal["worst", "mean"] | None = option(None, "recommend a row by its worst or its mean held-out center")


@dataclass(frozen=True)
class Told:
    """What `reported.yaml` tells of a row."""

    name: str
    reported: float | None = None
    source: str | None = None
    balanced: bool = False


@dataclass(frozen=True)
class Row:
    """A row, and the backbone that its file names, whatever the command line says."""

    config: Config
    told: Told
    own_backbone: str


# Of a row, by split or held-out center, then metric, then seed.
Values = dict[str, dict[str, dict[int, float | None]]]


def read_told(paths: Sequence[Path]) -> dict[str, Told]:
    """What is told of rows, by stem. Raises HistoError for a file that can't be read, or tells anything else."""
    every = {path.stem: Told(path.stem) for path in paths}
    for file in sorted({path.parent / TOLD for path in paths}):
        if not file.is_file():
            continue
        for stem in every:
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
                told = Told(**(asdict(every[stem]) | content.get(stem, {})))
            except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
                raise HistoError(
                    f"{file}: {stem} can't be read ({' '.join(str(error).split())}), expected a mapping of name, "
                    "reported, source and balanced"
                ) from None
            if told.reported is not None and not (
                isinstance(told.reported, int | float) and 0 <= told.reported <= 1 and told.source
            ):
                raise HistoError(
                    f"{file}: {stem} reports {told.reported!r}, expected a number from 0 to 1 and its source"
                )
            every[stem] = told
    return every


def read_rows(options: Options) -> dict[str, Row]:
    """The rows by their files' names; raises HistoError where they can't be told apart or differ in their data."""
    rows: dict[str, Row] = {}
    paths = [Path(name) for name in options.rows if Path(name).name != TOLD]
    told = read_told(paths)
    for path in paths:
        own = parse(None, ["--config", str(path)])
        config, _ = parse_with(Options, None, ["--config", str(path), *sys.argv[1:]])
        if options.protocol == "leave_one_center_out":
            refuse(config, {"pool_centers": "with --protocol leave_one_center_out a center is held out of training"})
        row = Row(config, told[path.stem], own.model.backbone)
        if path.stem in rows or row.told.name in [other.told.name for other in rows.values()]:
            raise HistoError(f"--rows {path}: {row.told.name!r} is the name of two rows; rename one")
        for one in rows.values():
            if config.data != one.config.data:
                raise HistoError(
                    f"--rows {path}: its data is {config.data}, expected that of all rows, {one.config.data}; give it"
                )
        rows[path.stem] = row
    if not rows:
        raise HistoError(f"--rows {' '.join(options.rows)}: no config among them, expected at least one")
    return rows


def trainer_of(stem: str, rows: dict[str, Row]) -> str:
    """Whose adapters a row predicts with: of the rows with its training, the first that is plain at prediction."""

    def training(row: Row) -> Config:
        return replace(row.config, prediction=PredictionOptions())

    alike = {other: row for other, row in rows.items() if training(row) == training(rows[stem])}
    return min(
        alike, key=lambda other: (alike[other].config.prediction != PredictionOptions(), alike[other].told.balanced)
    )


def measure(stem: str, rows: dict[str, Row], data: datasets.DatasetDict, folder: Path, options: Options) -> Values:
    """Make all runs of a row; where its adapters are another row's, that one's are made."""
    values: Values = {}
    row, trainer = rows[stem], trainer_of(stem, rows)
    first = row.config.training.seed
    for seed in range(first, first + options.seeds):
        for center, fold in folds(row.config, data, seed, options).items():
            name = f"seed-{seed}" if center is None else f"center-{center}-seed-{seed}"
            adapter = folder / trainer / name / run_folder.ADAPTER
            tables = adapter / "predictions"
            if stem == trainer:
                fine_tune(row.config.at(folder / stem / name, seed), fold)
            elif row.config.prediction != rows[trainer].config.prediction:
                tables = predict(adapter, row.config.at(folder / stem / name, seed), fold)
            for split in ["test"] if center is not None else [split for split in fold if split != "train"]:
                table = predictions.read(tables / f"{split}.parquet")
                threshold = thresholds.for_share(table, 0.5).value if row.told.balanced else 0.5
                found = classification.compute(table, threshold=threshold)
                if found["n"]:
                    by_metric = values.setdefault(title(split, table) if center is None else str(center), {})
                    for metric in METRICS:
                        by_metric.setdefault(metric, {})[seed] = found[metric]
            if launch.is_main_process():
                print(f"{row.told.name}: {name} is done", flush=True)
    return values


def folds(
    config: Config, data: datasets.DatasetDict, seed: int, options: Options
) -> dict[int, datasets.DatasetDict] | dict[None, datasets.DatasetDict]:
    """The splits of a row's runs of a seed, by the center that is held out; None where none is."""
    if options.protocol == "leave_one_center_out":
        return leave_one_center_out(data, seed=seed)
    return {None: pool_centers(data, seed=seed) if config.centers.pool_centers else data}


def predict(adapter: Path, config: Config, fold: datasets.DatasetDict) -> Path:
    """The folder with an adapter's predictions by the prediction options of `config`, in the folder of its run."""
    folder = run_folder.begin(config, fingerprint(fold)) / run_folder.PREDICTIONS
    missing = [split for split in fold if split != "train" and not (folder / f"{split}.parquet").is_file()]
    launch.process().wait_for_everyone()
    if missing:
        classifier = Classifier.from_pretrained(adapter)
        for split in missing:
            table = classifier.predict(
                fold[split],
                views=TestTimeViews.of(config),
                adapt_batch_norm=config.prediction.adapt_batch_norm,
                batch_size=config.training.per_device_eval_batch_size,
            )
            if launch.is_main_process():
                predictions.write(folder / f"{split}.parquet", table, classifier.sidecar.label_names)
        launch.process().wait_for_everyone()
    return folder


def title(split: str, table: pd.DataFrame) -> str:
    """A split with its centers, where these are known."""
    centers = ", ".join(map(str, sorted(set(table["center"]) - {-1})))
    return f"{split} (center{'s' if ',' in centers else ''} {centers})" if centers else split


def summed_up(values: Values, protocol: str) -> dict[str, dict[str, Spread]]:
    """By what the table calls a split, then by metric, over seeds."""
    if protocol == "validation":
        return {split: {m: spread(of.values()) for m, of in by_metric.items()} for split, by_metric in values.items()}
    summaries = {m: held_out({int(center): by_metric[m] for center, by_metric in values.items()}) for m in METRICS}
    return {
        "held-out centers, mean": {metric: summary.mean for metric, summary in summaries.items()},
        "held-out centers, worst": {metric: summary.worst for metric, summary in summaries.items()},
    }


def markdown(
    rows: dict[str, Row], results: dict[str, dict[str, dict[str, Spread]]], data: str, options: Options
) -> str:
    """The table, and what has to be known to read it."""
    lines: list[list[object]] = [["", "backbone", "reported test accuracy", "split", *METRICS.values(), "seeds"]]
    for stem, row in rows.items():
        for split, found in results[stem].items():
            backbone = Path(row.config.model.backbone).name
            told = "" if row.told.reported is None else f"{row.told.reported:.4f}"
            shown = marked(split, {"transductive": row.told.balanced})
            lines.append([row.told.name, backbone, told, shown, *(found[m] for m in METRICS), options.seeds])
    notes = [f"Obtained on {data}: mean ± sample deviation (seeds: {options.seeds})."]
    if options.protocol == "validation":
        notes.append("Checkpoints were chosen on val.")
    if moved := [row.told.name for row in rows.values() if row.config.model.backbone != row.own_backbone]:
        notes.append(f"On another backbone than its config names: {'; '.join(moved)}.")
    if any(row.told.balanced for row in rows.values()):
        notes.append("Balanced: class 1 for half of the images of the split, found on them as a whole, without labels.")
    told_rows = [row.told for row in rows.values() if row.told.reported is not None]
    sources = [f"Reported {told.reported:.4f}, on the publication's test split: {told.source}." for told in told_rows]
    return "\n".join([table(lines), "", *notes, *sources])


def main() -> None:
    if any(argument.split("=")[0] == "--config" for argument in sys.argv[1:]):
        raise HistoError("--config is one config, expected each of them as a row; give it to --rows")
    base, options = parse_with(Options, __doc__)
    folder = base.parent_folder()
    if options.seeds < 1:
        raise HistoError(f"--seeds is {options.seeds}, expected at least 1")
    if options.select and options.protocol == "validation":
        raise HistoError("--select on validation misleads, expected --protocol leave_one_center_out; add it")
    rows = read_rows(options)

    shared = next(iter(rows.values())).config.data
    data = arrange(load(shared), shared.split, shared.family)
    trainers_first = sorted(rows, key=lambda stem: trainer_of(stem, rows) != stem)
    values = {stem: measure(stem, rows, data, folder, options) for stem in trainers_first}
    if not launch.is_main_process():
        return

    results = {stem: summed_up(values[stem], options.protocol) for stem in rows}
    source = f"{shared.data} (content fingerprint {fingerprint(data)})"
    text = markdown(rows, results, source, options)
    chosen = None
    if options.select:
        by_row = {stem: found[f"held-out centers, {options.select}"]["accuracy"] for stem, found in results.items()}
        chosen = best(by_row)
        text += f"\nRecommended, by {options.select} accuracy over held-out centers: {rows[chosen].told.name}."
    print("\n" + text)
    with atomic_file(folder / f"{options.protocol}.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    bar_chart(
        {row.told.name: {s: found["accuracy"] for s, found in results[stem].items()} for stem, row in rows.items()},
        folder / f"{options.protocol}.png",
        reported={row.told.name: row.told.reported for row in rows.values() if row.told.reported is not None},
        axis=f"accuracy on {Path(shared.data).name}: mean ± sample deviation (seeds: {options.seeds})",
    )
    content = {
        stem: {
            "told": asdict(row.told),
            "options": row.config.flat(),
            "results": {s: {m: asdict(x) for m, x in found.items()} for s, found in results[stem].items()},
            "values": values[stem],
        }
        for stem, row in rows.items()
    }
    write_json(
        folder / f"{options.protocol}.json",
        {"data": source, "protocol": options.protocol, "seeds": options.seeds, "recommended": chosen, "rows": content},
    )
    print(f"\nwrote {options.protocol}.md, .json and .png in {folder}")


if __name__ == "__main__":
    run(main)
