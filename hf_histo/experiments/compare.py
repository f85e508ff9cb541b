"""A table of results: each row is a config, which is trained and compared with a published result."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import datasets
import pandas as pd
import yaml

from hf_histo import launch
from hf_histo.adapter.files import read_metrics
from hf_histo.config import Config, PredictionOptions, parse, parse_each
from hf_histo.config.experiments import REPORTED, CompareOptions
from hf_histo.config.packaged import config_files
from hf_histo.data.load import fingerprint
from hf_histo.data.protocol import SELECTING, arranged, pooled, refuse
from hf_histo.data.splits import folds
from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration, thresholds
from hf_histo.evaluation.metrics import classification, paired
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting.report import marked, table
from hf_histo.evaluation.reporting.summary import METRICS, Spread, bar_chart, best, held_out, spread
from hf_histo.experiments import grid
from hf_histo.files import CHECKSUMS, atomic_file, checksum, read_json, read_text
from hf_histo.inference import Classifier
from hf_histo.training import run_folder
from hf_histo.transforms.augmentation import TestTimeViews


@dataclass(frozen=True)
class PublishedResult:
    """Entry of `reported.yaml` for a row.

    `name` is its title, `reported` the published test accuracy in [0, 1] or None, `source` where it was published, and
    `balanced` whether class 1 is predicted for half of the images.
    """

    name: str
    reported: float | None = None
    source: str | None = None
    balanced: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the table.

    `config` holds its options, `published` its published result, and `own_backbone` the backbone that its file names,
    even if the command line replaces it.
    """

    config: Config
    published: PublishedResult
    own_backbone: str


@dataclass(frozen=True)
class Run:
    """A training run of a row: its seed, the held-out center or None, and its data."""

    seed: int
    center: int | None
    data: datasets.DatasetDict

    def folder(self, row: Path) -> Path:
        """Its folder in that of the row."""
        if self.center is None:
            return row / f"seed-{self.seed}"
        return grid.center_folder(row, self.data, self.center, self.seed)


MADE_BY = "adapter.txt"  # beside a row's own predictions: the checksum of the adapter that made them
ECE = "ece"
WORST_CENTER = "worst_center"  # its accuracy, of the centers of a split
# Values of a row by split or held-out center, then metric, then seed.
Values = dict[str, dict[str, dict[int, float | None]]]
HELD_OUT = "held-out centers, mean"


def compare(base: Config, options: CompareOptions) -> None:
    """Train the runs of all rows; print a table, and write PROTOCOL.md, .json and .png.

    Args:
        base: the options of the command line, which apply to all rows.
        options: rows and protocol.

    Raises HistoError for invalid options and rows, and as `grid.train` does.
    """
    folder = base.parent_folder()
    grid.seeds(base, options.seeds)
    if options.select and options.protocol == "validation":
        raise HistoError("--select on validation misleads, expected --protocol leave_one_center_out; add it")
    rows = read_rows(options)

    shared = next(iter(rows.values())).config.data
    data = arranged(shared)
    classes = next(iter(data.values())).features["label"].names
    if len(classes) > 2 and (balanced := [row.published.name for row in rows.values() if row.published.balanced]):
        raise HistoError(f"--rows {', '.join(balanced)}: balanced is for two classes, found {len(classes)}; drop it")
    held_out_folds = cache(lambda seed: folds.leave_one_center_out(data, seed=seed))  # the same for every row
    runs = {stem: list(runs_of(row.config, data, options, held_out_folds)) for stem, row in rows.items()}
    cells = [
        grid.Cell(
            f"{row.published.name}: {(place := run.folder(folder / stem)).name}",
            row.config.at(place, run.seed),
            run.data,
        )
        for stem, row in rows.items()
        if trainer_of(stem, rows) == stem
        for run in runs[stem]
    ]
    grid.train(cells, folder, options, describe=lambda cell, _: f"{cell.name} is done")
    found = {stem: list(predictions(stem, rows, runs[stem], folder)) for stem in rows}
    if not launch.is_main_process():
        return

    values = {stem: measure(found[stem]) for stem in rows}
    differences = differences_to(options.baseline, found, options.protocol) if options.baseline else {}
    results = {stem: summed_up(values[stem], options.protocol) for stem in rows}
    source = f"{shared.data} (content fingerprint {fingerprint(data)})"
    costs = {stem: cost(stem, rows, runs[stem], folder) for stem in rows}
    robust = {stem: robustness(stem, rows, runs[stem], folder) for stem in rows}
    transductive = {stem: uses_target(row, found[stem]) for stem, row in rows.items()}
    text = markdown(rows, results, transductive, costs, robust, differences, source, options)
    chosen = None
    if options.select:
        by_row = {stem: found[f"held-out centers, {options.select}"]["accuracy"] for stem, found in results.items()}
        chosen = best(by_row)
        text += f"\nRecommended, by {options.select} accuracy over held-out centers: {rows[chosen].published.name}."
    bar_chart(
        {row.published.name: {s: of["accuracy"] for s, of in results[stem].items()} for stem, row in rows.items()},
        folder / f"{options.protocol}.png",
        reported={
            row.published.name: row.published.reported for row in rows.values() if row.published.reported is not None
        },
        axis=f"accuracy on {Path(shared.data).name}: mean ± sample deviation (seeds: {options.seeds})",
    )
    content = {
        stem: {
            "published": asdict(row.published),
            "options": row.config.flat(),
            "results": {s: {m: asdict(x) for m, x in found.items()} for s, found in results[stem].items()},
            "values": values[stem],
            "transductive": sorted(transductive[stem]),
            "cost": asdict(costs[stem]),
            "robustness": {when: asdict(of) for when, of in robust[stem].items()},
            "differences": {s: asdict(of) for s, of in differences.get(stem, {}).items()},
        }
        for stem, row in rows.items()
    }
    about = {"data": source, "protocol": options.protocol, "seeds": options.seeds, "recommended": chosen}
    about["baseline"] = options.baseline
    grid.write(folder, options.protocol, {**about, "rows": content}, text)
    print(f"\nwrote {options.protocol}.md, .json and .png in {folder}")


def read_published(paths: Sequence[Path]) -> dict[str, PublishedResult]:
    """Published results by the stem of the row's file. Raises HistoError for an unreadable file or unknown keys."""
    every = {path.stem: PublishedResult(path.stem) for path in paths}
    for file in sorted({path.parent / REPORTED for path in paths}):
        if not file.is_file():
            continue
        for stem in every:
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
                row = PublishedResult(**(asdict(every[stem]) | content.get(stem, {})))
            except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
                raise HistoError(
                    f"{file}: {stem} can't be read ({' '.join(str(error).split())}), expected a mapping of name, "
                    "reported, source and balanced"
                ) from None
            if row.reported is not None and not (
                isinstance(row.reported, int | float) and 0 <= row.reported <= 1 and row.source
            ):
                raise HistoError(
                    f"{file}: {stem} reports {row.reported!r}, expected a number from 0 to 1 and its source"
                )
            every[stem] = row
    return every


def read_rows(options: CompareOptions) -> dict[str, Row]:
    """Rows by the stem of their file. Raises HistoError for equal names, and rows with different data."""
    rows: dict[str, Row] = {}
    paths = [path for path in config_files(options.rows) if path.name != REPORTED]
    published = read_published(paths)
    for path, config in zip(paths, parse_each(CompareOptions, [str(path) for path in paths]), strict=True):
        if options.protocol == "leave_one_center_out":
            reason = "with --protocol leave_one_center_out a center is held out of training"
            refuse(config, dict.fromkeys(("pool_centers", "test_centers", "streaming"), reason))
        config.parent_folder()  # a file, too, may ask for what is for one run
        row = Row(config, published[path.stem], parse(None, ["--config", str(path)]).model.backbone)
        if path.stem in rows or row.published.name in [other.published.name for other in rows.values()]:
            raise HistoError(f"--rows {path}: {row.published.name!r} is the name of two rows; rename one")
        for one in rows.values():
            for name in SELECTING if options.baseline is not None else ():
                if (value := config.flat()[name]) != (other := one.config.flat()[name]):
                    found = f"{name} is {value}, but {other} in {one.published.name!r}"
                    raise HistoError(f"--rows {path}: {found}, so that images differ: compare them without --baseline")
            if config.data != one.config.data:
                raise HistoError(
                    f"--rows {path}: its data is {config.data}, expected that of all rows, {one.config.data}; give it"
                )
        rows[path.stem] = row
    if not rows:
        raise HistoError(f"--rows {' '.join(options.rows)}: no config among them, expected at least one")
    if options.baseline is not None and options.baseline not in rows:
        raise HistoError(f"--baseline {options.baseline}: not among the rows, expected one of {', '.join(rows)}")
    return rows


def trainer_of(stem: str, rows: dict[str, Row]) -> str:
    """Stem of the row whose adapters the row `stem` uses: one with the same training options.

    Of several, it is the first one, preferably without prediction options, then preferably not balanced.
    """

    def training(row: Row) -> Config:
        return replace(row.config, prediction=PredictionOptions())

    alike = {other: row for other, row in rows.items() if training(row) == training(rows[stem])}
    return min(
        alike,
        key=lambda other: (alike[other].config.prediction != PredictionOptions(), alike[other].published.balanced),
    )


def runs_of(
    config: Config,
    data: datasets.DatasetDict,
    options: CompareOptions,
    held_out_folds: Callable[[int], dict[int, datasets.DatasetDict]],
) -> Iterator[Run]:
    """Yield the runs of a row: one per seed and, with `leave_one_center_out`, per held-out center.

    `held_out_folds` maps a seed to the splits of each held-out center.
    """
    own = pooled(config, data)
    for seed in grid.seeds(config, options.seeds):
        if options.protocol == "leave_one_center_out":
            for center, fold in held_out_folds(seed).items():
                yield Run(seed, center, fold)
        else:
            yield Run(seed, None, own)


@dataclass(frozen=True)
class Evaluated:
    """Labeled predictions of a run: the name of their split or held-out center, and the threshold of its row."""

    name: str
    seed: int
    table: Predictions
    threshold: float


def predictions(stem: str, rows: dict[str, Row], runs: Sequence[Run], folder: Path) -> Iterator[Evaluated]:
    """Yield those of a row; its adapters, or those of the row whose training it shares, must be finished."""
    row, trainer = rows[stem], trainer_of(stem, rows)
    for run in runs:
        adapter = run.folder(folder / trainer) / run_folder.ADAPTER
        tables = adapter / "predictions"
        if row.config.prediction != rows[trainer].config.prediction:
            tables = predict(adapter, row.config.at(run.folder(folder / stem), run.seed), run.data)
        for split in ["test"] if run.center is not None else [split for split in run.data if split != "train"]:
            table = Predictions.read(tables / f"{split}.parquet")
            if not table.labeled.empty:
                threshold = thresholds.for_share(table, 0.5).value if row.published.balanced else 0.5
                name = title(split, table) if run.center is None else next(iter(table.known_centers))
                yield Evaluated(name, run.seed, table, threshold)


def measure(found: Sequence[Evaluated]) -> Values:
    """The metrics of a row."""
    values: Values = {}
    for of in found:
        metrics = classification.compute(of.table, threshold=of.threshold)
        metrics[ECE] = calibration.expected_calibration_error(of.table)
        by_center = [
            classification.compute(of_center, threshold=of.threshold)["accuracy"]
            for of_center in of.table.known_centers.values()
        ]
        metrics[WORST_CENTER] = min((value for value in by_center if value is not None), default=None)
        for metric in (*METRICS, ECE, WORST_CENTER):
            values.setdefault(of.name, {}).setdefault(metric, {})[of.seed] = metrics[metric]
    return values


def uses_target(row: Row, found: Sequence[Evaluated]) -> set[str]:
    """The splits or held-out centers whose unlabeled images predictions or decisions of a row used as a whole."""
    return {of.name for of in found if of.table.transductive or row.published.balanced}


def differences_to(
    baseline: str, found: Mapping[str, Sequence[Evaluated]], protocol: str
) -> dict[str, dict[str, paired.Difference]]:
    """How much more accurate each other row is than `baseline`, by the split's name in the table."""
    right: dict[str, dict[str, dict[int, pd.DataFrame]]] = {}
    for stem, of_row in found.items():
        for of in of_row:
            right.setdefault(stem, {}).setdefault(of.name, {})[of.seed] = paired.outcomes(of.table, of.threshold)
    base = right.pop(baseline)
    if protocol == "leave_one_center_out":
        return {stem: {HELD_OUT: paired.difference(ours, base)} for stem, ours in right.items()}
    return {
        stem: {name: paired.difference({name: ours[name]}, {name: base[name]}) for name in ours}
        for stem, ours in right.items()
    }


@dataclass(frozen=True)
class Cost:
    """What a row's trainings cost: number of trained parameters, and the seconds of a run; of shared ones as well."""

    parameters: int
    seconds: Spread


def cost(stem: str, rows: dict[str, Row], runs: Sequence[Run], folder: Path) -> Cost:
    """The cost of the finished runs of a row, or of the row whose training it shares."""
    places = [run.folder(folder / trainer_of(stem, rows)) for run in runs]
    metrics = read_metrics(places[0] / run_folder.ADAPTER)
    seconds = [read_json(place / run_folder.COST)["seconds"] for place in places]
    return Cost(metrics["parameters"]["trainable"], spread(seconds))


@dataclass(frozen=True)
class Robustness:
    """Robustness index and average performance drop of the features of a row, over its runs; see `robustness`.

    `withheld` has the reason of each run that has none.
    """

    index: Spread
    drop: Spread
    withheld: list[str]


def robustness(stem: str, rows: dict[str, Row], runs: Sequence[Run], folder: Path) -> dict[str, Robustness]:
    """Robustness "before" and "after" the trainings of a row, or of the one it shares; empty without `--robustness`."""
    places = [run.folder(folder / trainer_of(stem, rows)) for run in runs]
    found = [read_metrics(place / run_folder.ADAPTER).get("robustness") for place in places]
    if not any(found):
        return {}
    sides = {when: [of[when] for of in found if of] for when in ("before", "after")}
    return {
        when: Robustness(
            spread(of["index"] for of in measured),
            spread(of["drop"] and of["drop"]["average_performance_drop"] for of in measured),
            [of["reason"] for of in measured if of["reason"]],
        )
        for when, measured in sides.items()
    }


def predict(adapter: Path, config: Config, fold: datasets.DatasetDict) -> Path:
    """Predict with an adapter and the prediction options of `config`; return the folder of the predictions.

    The folder is in that of the run; predictions that exist are kept, unless they are of another training.
    """
    run = run_folder.Run.of(config, fingerprint(fold))
    run_folder.begin(run)
    folder, state = run.folder / run_folder.PREDICTIONS, launch.process()
    made_by, current = folder / MADE_BY, checksum(adapter / CHECKSUMS)
    if state.is_main_process and not (made_by.is_file() and read_text(made_by) == current):
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_file(made_by) as temporary:
            temporary.write_text(current, encoding="utf-8")
    state.wait_for_everyone()
    missing = [split for split in fold if split != "train" and not (folder / f"{split}.parquet").is_file()]
    state.wait_for_everyone()
    if missing:
        classifier = Classifier.from_pretrained(adapter)
        for split in missing:
            table = classifier.predict(
                fold[split],
                test_time_views=TestTimeViews.of(config),
                adapt_batch_norm=config.prediction.adapt_batch_norm,
                batch_size=config.training.per_device_eval_batch_size,
            )
            if state.is_main_process:
                table.write(folder / f"{split}.parquet")
        state.wait_for_everyone()
    return folder


def title(split: str, table: Predictions) -> str:
    """Name of a split with its centers, if known."""
    centers = list(table.known_centers)
    return f"{split} (center{'s' if len(centers) > 1 else ''} {', '.join(centers)})" if centers else split


def summed_up(values: Values, protocol: str) -> dict[str, dict[str, Spread]]:
    """Summary over seeds, by the split's name in the table, then by metric."""
    if protocol == "validation":
        return {split: {m: spread(of.values()) for m, of in by_metric.items()} for split, by_metric in values.items()}
    summaries = {m: held_out({center: by_metric[m] for center, by_metric in values.items()}) for m in (*METRICS, ECE)}
    means, worst = ({metric: getattr(summary, of) for metric, summary in summaries.items()} for of in ("mean", "worst"))
    worst[ECE] = max(summaries[ECE].centers.values(), key=lambda of: -1 if of.mean is None else of.mean)
    return {HELD_OUT: means, "held-out centers, worst": worst}


def markdown(
    rows: dict[str, Row],
    results: dict[str, dict[str, dict[str, Spread]]],
    transductive: dict[str, set[str]],
    costs: dict[str, Cost],
    robust: dict[str, dict[str, Robustness]],
    differences: Mapping[str, Mapping[str, paired.Difference]],
    data: str,
    options: CompareOptions,
) -> str:
    """The table in Markdown, with notes on data, protocol and sources."""
    lines: list[list[object]] = [["", "backbone", "reported test accuracy", "split", *METRICS.values(), "seeds"]]
    more = {ECE: "ECE", **({WORST_CENTER: "worst center's accuracy"} if options.protocol == "validation" else {})}
    lines[0] += [*more.values(), "trained parameters", "seconds"]
    is_held_out = options.protocol == "leave_one_center_out"
    if any(robust.values()):
        lines[0] += ["robustness index, before → after training", "average performance drop"]
    if options.baseline:
        lines[0].append(f"accuracy minus that of {rows[options.baseline].published.name} (95% interval)")
    for stem, row in rows.items():
        for split, found in results[stem].items():
            backbone = Path(row.config.model.backbone).name
            reported = "" if row.published.reported is None else f"{row.published.reported:.4f}"
            used = split in transductive[stem] or (is_held_out and bool(transductive[stem]))
            shown = marked(split, {"transductive": used})
            measured = [*(found[m] for m in METRICS), options.seeds, *(found[m] for m in more)]
            spent = [f"{costs[stem].parameters:,}", f"{costs[stem].seconds.mean or 0:.0f}"]
            if any(robust.values()):
                sides = robust[stem].values()
                spent += [" → ".join(str(of.index) for of in sides), " → ".join(str(of.drop) for of in sides)]
            compared = [differences.get(stem, {}).get(split, "")] if options.baseline else []
            lines.append([row.published.name, backbone, reported, shown, *measured, *spent, *compared])
    notes = [f"Obtained on {data}: mean ± sample deviation (seeds: {options.seeds})."]
    notes.append(
        "ECE: expected calibration error of the predictions as they are (15 bins). Seconds: mean duration of a run "
        "with its evaluation, on the machine that did it."
    )
    if options.protocol == "validation":
        notes.append("Checkpoints were chosen on val.")
    if options.baseline:
        chance = "other groups and other seeds" if options.seeds > 1 else "other groups, for this one seed"
        notes.append(f"Differences are paired by image, center and seed; their intervals are those of {chance}.")
    if moved := [row.published.name for row in rows.values() if row.config.model.backbone != row.own_backbone]:
        notes.append(f"On another backbone than its config names: {'; '.join(moved)}.")
    if any(transductive.values()):
        notes.append("Transductive: used the unlabeled images of the split, or of each held-out center, as a whole.")
    if any(robust.values()):
        notes.append(
            "Robustness index: 1 where neighbors in the features share the class alone, 0 where the center alone; "
            "average performance drop: of accuracy, where class and center go together in training (0 is best)."
        )
    for stem, row in rows.items():
        if reasons := dict.fromkeys(reason for side in robust[stem].values() for reason in side.withheld):
            notes.append(f"Robustness of {row.published.name} withheld: {'; '.join(reasons)}.")
    if any(row.published.balanced for row in rows.values()):
        notes.append("Balanced: class 1 for half of the images of the split, found on them as a whole, without labels.")
    published = [row.published for row in rows.values() if row.published.reported is not None]
    sources = [f"Reported {of.reported:.4f}, on the publication's test split: {of.source}." for of in published]
    return "\n".join([table(lines), "", *notes, *sources])
