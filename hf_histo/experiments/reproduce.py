"""Published tables, filled again: each row of a study is trained, and set beside what was reported."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from hf_histo import launch
from hf_histo.config import Config, parse_options
from hf_histo.config.commands import ReproduceOptions
from hf_histo.config.experiments import Sharing
from hf_histo.config.parser import with_options
from hf_histo.data.protocol import arranged, pooled
from hf_histo.data.synthetic import miniature
from hf_histo.errors import HistoError, did_you_mean
from hf_histo.evaluation import thresholds
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.reporting.report import marked, table
from hf_histo.evaluation.reporting.summary import spread
from hf_histo.experiments import grid
from hf_histo.experiments.studies import Study, StudyRow, study
from hf_histo.models import backbones, registry
from hf_histo.result import Result

GENERATORS = {
    "dlmi": miniature.write_multicenter,
    "brain-mri": miniature.write_mri,
    "cytology": miniature.write_cytology,
    "mnist-cases": miniature.write_digits,
}
SMALL = {"num_train_epochs": 1, "random_weights": True, "warmup_steps": 0}
DRY_SIZE, DINO_SIZE = 32, 28  # pixels: multiples of the patches, 16 or 32 and 14
NOT_RECORDED = "not recorded"
DRY_RUN = "**Dry run**: random weights, generated images, one epoch. It shows that each row runs; nothing was measured."


@dataclass(frozen=True)
class Outcome:
    """What became of a row: the results of its runs, or the reason why there are none."""

    results: Sequence[Result] = ()
    reason: str | None = None


def reproduce(options: ReproduceOptions) -> None:
    """Train all rows of a study that can be trained; print a table, and write STUDY.md and STUDY.json.

    Raises HistoError for invalid options, and at the end if a row was not run.
    """
    grid.check([], options)
    chosen = study(options.study)
    rows = select(chosen, options.rows)
    seeds = (1 if options.dry_run else chosen.seeds) if options.seeds is None else options.seeds
    if not options.dry_run and options.data is None:
        raise HistoError("--data is not given, expected the folder of the study's data; give it, or --dry_run")
    with tempfile.TemporaryDirectory() if options.dry_run else nullcontext(str(options.data)) as place:
        data = Path(place)
        if options.dry_run:
            data = data / "data"
            GENERATORS[options.study](data)
        configs = {row: config_of(row, options, data) for row in rows}
        outcomes = train(configs, replace(chosen, seeds=seeds), options)
    if not launch.is_main_process():
        return
    text = markdown(chosen, outcomes, seeds=seeds, is_dry=options.dry_run)
    content = {
        "study": chosen.title,
        "dry_run": options.dry_run,
        "seeds": seeds,
        "rows": {row.name: record(row, configs[row], outcome, options.dry_run) for row, outcome in outcomes.items()},
    }
    grid.write(options.output_dir, options.study, content, text)
    print(f"\nwrote {options.study}.md and .json in {options.output_dir}")
    if missing := [row.name for row, outcome in outcomes.items() if outcome.reason]:
        raise HistoError(
            f"{len(missing)} of {len(rows)} rows were not run, the first is {missing[0]}: the table has the reasons; "
            "the same command continues"
        )


def select(chosen: Study, names: Sequence[str]) -> list[StudyRow]:
    """The rows with these names, by default all. Raises HistoError for an unknown one."""
    known = {row.name: row for row in chosen.rows}
    for name in names:
        if name not in known:
            raise HistoError(
                f"--rows {name}: no such row; {did_you_mean(name, list(known), 'expected ' + ', '.join(known))}"
            )
    return [row for row in chosen.rows if row.name in names or not names]


def config_of(row: StudyRow, options: ReproduceOptions, data: Path) -> Config:
    """Options of a row's runs on the data in `data`. Raises HistoError as `parse_options` does."""
    given = {**row.options, "data": str(data / row.data)}
    config = parse_options(given, config=row.config)
    if options.backbones_dir and (folder := options.backbones_dir / Path(config.model.backbone).name).is_dir():
        config = with_options(config, {"backbone": str(folder)})
    if not options.dry_run:
        return config
    few = SMALL | {"cache_dir": str(data.parent / "cache")}
    entry = registry.find(config.model.backbone)
    is_dino = "dinov2" in config.model.backbone
    if entry and entry.library != "timm" and not is_dino:  # takes images of no other size
        few |= {"per_device_train_batch_size": 2} | ({} if config.protocol.shots else {"max_steps": 2})
    else:
        size = DINO_SIZE if is_dino else DRY_SIZE
        few |= {"image_size": size, "resize_size": size}
    if config.protocol.iterations_per_shot:
        few |= {"iterations_per_shot": 1}
    return with_options(config, few)


def train(configs: Mapping[StudyRow, Config], chosen: Study, options: ReproduceOptions) -> dict[StudyRow, Outcome]:
    """Train the runs of each row; a row that fails with HistoError is recorded, and the others continue."""
    loaded: dict[str, datasets.DatasetDict] = {}  # by its options
    cells: dict[StudyRow, list[grid.Cell]] = {}
    outcomes: dict[StudyRow, Outcome] = {}
    for row, config in configs.items():
        try:
            key = repr(config.data)
            data = loaded[key] = loaded.get(key) or arranged(config.data)
            cells[row] = []
            own = pooled(config, data)
            for seed in range(chosen.seed, chosen.seed + chosen.seeds):
                place = options.output_dir / row.name / f"seed-{seed}"
                cells[row].append(grid.Cell(f"{row.name}: {place.name}", config.at(place, seed), own))
        except HistoError as error:
            outcomes[row] = Outcome(reason=str(error))
    if options.workers > 1 or options.cluster:
        # A backbone that can't be had would end one worker after the other.
        names = {configs[row].model.backbone: configs[row] for row in cells}
        reasons = {name: _reason(name, config) for name, config in names.items()}
        shared = [cell for row, of_row in cells.items() if not reasons[configs[row].model.backbone] for cell in of_row]
        try:
            grid.train(shared, options.output_dir, options)
        except HistoError as error:
            print(f"{error}; this process tries what is left", flush=True)
    for row, of_row in cells.items():
        try:
            outcomes[row] = Outcome(grid.train(of_row, options.output_dir, Sharing()))
            print(f"{row.name}: done", flush=True)
        except HistoError as error:
            outcomes[row] = Outcome(reason=str(error))
            print(f"{row.name}: not run: {error}", flush=True)
    return {row: outcomes[row] for row in configs}


def _reason(backbone: str, config: Config) -> str | None:
    """Why a backbone can't be loaded, or None."""
    try:
        backbones.load(backbone, 1, revision=config.model.revision, random_weights=config.model.random_weights)
    except HistoError as error:
        return str(error)
    return None


def obtained(row: StudyRow, outcome: Outcome) -> dict[str, list[float | None]]:
    """Accuracy in [0, 1] of each run, by split with labels."""
    found: dict[str, list[float | None]] = {}
    for result in outcome.results:
        for split, predictions in result.predictions.items():
            threshold = thresholds.for_share(predictions, 0.5).value if row.published.balanced else 0.5
            values = classification.compute(predictions, threshold=threshold)
            if values["n"]:
                found.setdefault(split, []).append(values["accuracy"])
    return found


def sizes(outcome: Outcome) -> dict[str, int]:
    """Trainable parameters, and the bytes of the adapter's file and of the whole model's tensors."""
    result = outcome.results[0]
    return {
        "trainable": result.record["parameters"]["trainable"],
        "adapter_file": (result.adapter / "adapter_model.safetensors").stat().st_size,
        "model": result.record["bytes"]["model"],
    }


def record(row: StudyRow, config: Config, outcome: Outcome, is_dry: bool) -> dict[str, Any]:
    """A row as JSON."""
    about = {"published": asdict(row.published), "parameters": row.parameters, "options": config.flat()}
    if outcome.reason:
        return about | {"not_run": outcome.reason}
    return about | ({} if is_dry else {"obtained": obtained(row, outcome)}) | {"sizes": sizes(outcome)}


def markdown(chosen: Study, outcomes: Mapping[StudyRow, Outcome], *, seeds: int, is_dry: bool) -> str:
    """The table in Markdown: a line for each row and split, "reported" beside "obtained"."""
    titles = ("row", "reported", "split", "obtained", "trained, reported", "trained", "adapter file", "model")
    lines: list[list[object]] = [list(titles)]
    for row, outcome in outcomes.items():
        published = row.published
        reported = NOT_RECORDED if published.reported is None else f"{published.reported:g}"
        count = NOT_RECORDED if row.parameters is None else f"{row.parameters:,}"
        if outcome.reason:
            lines.append([published.name, reported, "", f"not run: {outcome.reason}", count, "", "", ""])
            continue
        size = sizes(outcome)
        own = [count, f"{size['trainable']:,}", f"{size['adapter_file'] / 1e6:.2f} MB", f"{size['model'] / 1e6:.1f} MB"]
        shown = {"": "ran"} if is_dry else {split: spread(of) for split, of in obtained(row, outcome).items()}
        for split, value in (shown or {"": "no split with labels"}).items():
            tables = [result.predictions[split] for result in outcome.results if split in result.predictions]
            uses_target = published.balanced or any(of.transductive for of in tables)
            name = marked(split, {"transductive": uses_target}) if split else ""
            lines.append([published.name, reported, name, value, *own])
    notes = (
        [DRY_RUN] if is_dry else [f"Accuracy: mean ± sample deviation (seeds: {seeds}); reported on its test split."]
    )
    sources = {row.published.source for row in outcomes if row.published.source}
    notes += [f"Reported: {source}." for source in sorted(sources)]
    return "\n".join([f"# {chosen.title}", "", table(lines), "", *notes])
