"""How often a site is accepted that should be, and one that should not, from a leave-one-center-out's predictions."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import DataOptions
from hf_histo.config.commands import AcceptanceStudyOptions
from hf_histo.data.load import fingerprint
from hf_histo.data.protocol import arranged
from hf_histo.data.schema import ImageTable
from hf_histo.data.splits import folds
from hf_histo.errors import HistoError
from hf_histo.evaluation import site_acceptance
from hf_histo.evaluation.prediction_sets import group_numbers
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting.report import table
from hf_histo.evaluation.reporting.summary import spread
from hf_histo.experiments import grid
from hf_histo.experiments.accept import weighed
from hf_histo.experiments.coverage import RECORD, stored
from hf_histo.files import read_json, require_output
from hf_histo.training import run_folder


@dataclass(frozen=True)
class SiteStudy:
    """Verdicts on draws of `images` images of one site by one run.

    Attributes:
        images: in each draw; the mean, where some parts of `val` have fewer than were asked for.
        drop: accuracy on `val` minus that of all images of the site.
        verdicts: share of the draws with each verdict, of "accept", "recalibrate" and "refuse".
        errors: mean absolute error of each way to predict the accuracy of the site's images.
        inside: share of the draws in which that accuracy is in the interval of each.
        widths: mean width of these intervals.
        beyond: share of the site's images whose color is beyond the limit; None where colors are not tested.
        color_alarms: share of the draws in which the test of color raises an alarm; None likewise.
    """

    images: int
    drop: float
    verdicts: Mapping[str, float]
    errors: Mapping[str, float]
    inside: Mapping[str, float]
    widths: Mapping[str, float]
    beyond: float | None
    color_alarms: float | None

    @property
    def alarms(self) -> float:
        """Share of the draws that were not accepted."""
        return 1 - self.verdicts["accept"]


@dataclass(frozen=True)
class Site:
    """Labeled images of a site, and their distances (n,) from the training colors of a run, beyond which `limit` is.

    The distances are None where colors are not tested.
    """

    predictions: Predictions
    distances: NDArray[np.float64] | None = None
    limit: float = np.inf

    def __getitem__(self, rows: NDArray[np.int64]) -> Site:
        distances = None if self.distances is None else self.distances[rows]
        return Site(self.predictions.iloc[rows], distances, self.limit)

    @property
    def color_p_value(self) -> float | None:
        if self.distances is None:
            return None
        return site_acceptance.color_p_value(self.distances, self.limit, group_numbers(self.predictions))


def study(options: AcceptanceStudyOptions) -> None:
    """Print a table of sites and numbers of images, and write acceptance_study.md and acceptance_study.json.

    For each run, the draws of its held-out center measure the power, and draws of one half of the groups of `val`,
    against the other half, the false alarms. Colors are tested with `--data`.

    Raises HistoError as `coverage.stored` does, for centers with too few images, and for other data than the runs'.
    """
    require_output(options.output_dir, [options.runs], folder=True)
    images = None if options.data is None else _images(options.runs, options.data)
    measured: dict[str, dict[int, list[SiteStudy]]] = {}
    for name, splits in stored(options.runs).items():
        (center,) = splits["test"].known_centers
        if splits["test"].labeled.empty:
            raise HistoError(f"{options.runs / name}: no label of its test center is known, expected labels to compare")
        adapter = options.runs / name / run_folder.ADAPTER
        sites = {split: _site(splits[split].labeled, adapter, images) for split in ("val", "test")}
        for count in options.counts:
            for title, measure in ((f"center {center}", held_out), ("val, the other half", alike)):
                found = measure(sites["val"], sites["test"], count, options)
                measured.setdefault(title, {}).setdefault(count, []).append(found)
    text = table(_rows(measured))
    content = {
        "options": {key: value for key, value in asdict(options).items() if key not in ("runs", "data", "output_dir")},
        "sites": {
            title: {count: [asdict(each) for each in found] for count, found in by_count.items()}
            for title, by_count in measured.items()
        },
    }
    grid.write(options.output_dir, "acceptance_study", content, text)
    print(f"\nwrote {options.output_dir / 'acceptance_study.json'}")


def held_out(validation: Site, test: Site, count: int, options: AcceptanceStudyOptions) -> SiteStudy:
    """Verdicts on `count` random images of the held-out center, against all of `val`."""
    size = len(test.predictions)
    if count > size:
        raise HistoError(f"--counts has {count}, but a held-out center has {size} images; give fewer")
    draws = []
    for number in range(options.draws):
        random = np.random.default_rng([options.seed, count, number])
        draws.append((validation.predictions, test[random.permutation(size)[:count]]))
    return _judged(draws, test, accuracy(validation.predictions) - accuracy(test.predictions), count, options)


def alike(validation: Site, test: Site, count: int, options: AcceptanceStudyOptions) -> SiteStudy:
    """Verdicts on `count` images of a random half of the groups of `val`, against its other groups.

    Where a half has fewer images, all of them are drawn.
    """
    groups = group_numbers(validation.predictions)
    if groups.max() < 1:
        raise HistoError("val has one group, expected two or more, to judge one half of them by the other")
    draws = []
    for number in range(options.draws):
        random = np.random.default_rng([options.seed, count, number])
        chosen = np.isin(groups, random.permutation(groups.max() + 1)[: (groups.max() + 1) // 2])
        rows = random.permutation(np.flatnonzero(chosen))[:count]
        draws.append((validation.predictions[~chosen], validation[rows]))
    drawn = round(statistics.fmean(len(new.predictions) for _, new in draws))
    return _judged(draws, validation, 0.0, drawn, options)


def accuracy(predictions: Predictions) -> float:
    """Share of right ones among labeled predictions."""
    return float((predictions.predicted_classes() == predictions.labels).mean())


def _judged(
    draws: Sequence[tuple[Predictions, Site]], site: Site, drop: float, count: int, options: AcceptanceStudyOptions
) -> SiteStudy:
    truth = accuracy(site.predictions)
    verdicts = dict.fromkeys(("accept", "recalibrate", "refuse"), 0)
    errors: dict[str, list[float]] = {}
    inside: dict[str, list[float]] = {}
    widths: dict[str, list[float]] = {}
    color_alarms = 0
    for number, (reference, new) in enumerate(draws):
        color = new.color_p_value
        evidence, predicted = weighed(
            reference, new.predictions, tolerance=options.tolerance, color_p_value=color, seed=number
        )
        verdicts[site_acceptance.decide(evidence)[0]] += 1
        color_alarms += color is not None and color <= site_acceptance.COLOR_LEVEL
        for name, estimate in predicted.items():
            errors.setdefault(name, []).append(abs(estimate.value - truth))
            inside.setdefault(name, []).append(float(estimate.low <= truth <= estimate.high))
            widths.setdefault(name, []).append(estimate.high - estimate.low)
    return SiteStudy(
        images=count,
        drop=drop,
        verdicts={name: number / len(draws) for name, number in verdicts.items()},
        errors={name: statistics.fmean(values) for name, values in errors.items()},
        inside={name: statistics.fmean(values) for name, values in inside.items()},
        widths={name: statistics.fmean(values) for name, values in widths.items()},
        beyond=None if site.distances is None else float((site.distances > site.limit).mean()),
        color_alarms=None if site.distances is None else color_alarms / len(draws),
    )


def _images(runs: Path, data: str) -> tuple[ImageTable, dict[str, int]]:
    """The images that the runs were trained and tested on, and the row of each by its id in their predictions.

    Raises HistoError for other data.
    """
    record = read_json(runs / RECORD)
    names = {option.name for option in dataclasses.fields(DataOptions)}
    chosen = DataOptions(**{name: value for name, value in record["options"].items() if name in names})
    rows = arranged(dataclasses.replace(chosen, data=data))
    if fingerprint(rows) != record["data"]["fingerprint"]:
        found = f"its fingerprint is {fingerprint(rows)}, that of the runs {record['data']['fingerprint']}"
        raise HistoError(f"--data {data}: not the data of --runs {runs} ({found}); give that, or leave it out")
    every = datasets.concatenate_datasets([fold["test"] for fold in folds.leave_one_center_out(rows, seed=0).values()])
    return ImageTable(every), {name: row for row, name in enumerate(every["id"][:])}


def _site(predictions: Predictions, adapter: Path, images: tuple[ImageTable, dict[str, int]] | None) -> Site:
    """The site of some predictions, with its distances from the colors that an adapter folder holds, if there are."""
    colors = None if images is None else Sidecar.read(adapter).colors
    if images is None or colors is None:
        return Site(predictions)
    table, rows = images
    distances = [colors.distance(table[rows[name]]["image"]) for name in predictions["id"]]
    return Site(predictions, np.array(distances), colors.limit)


def _rows(measured: Mapping[str, Mapping[int, list[SiteStudy]]]) -> list[list[object]]:
    """A header, and a row for each site and number of images, the mean over runs."""
    ways = {"atc": "ATC", "importance": "importance weighting"}
    header = [title for name in ways.values() for title in (f"error of {name}", "in interval", "its width")]
    rows: list[list[object]] = [["site", "images", "drop in accuracy", "not accepted", "refused", *header]]
    every = [each for by_count in measured.values() for found in by_count.values() for each in found]
    has_colors = any(each.beyond is not None for each in every)
    rows[0] += ["colors beyond the limit", "alarms of color"] if has_colors else []
    for title, by_count in measured.items():
        for found in by_count.values():
            cells: list[object] = [statistics.fmean(each.drop for each in found)]
            cells += [statistics.fmean(each.alarms for each in found)]
            cells += [statistics.fmean(each.verdicts["refuse"] for each in found)]
            for name in ways:
                cells += [statistics.fmean(each.errors[name] for each in found)]
                cells += [statistics.fmean(each.inside[name] for each in found)]
                cells += [statistics.fmean(each.widths[name] for each in found)]
            if has_colors:
                cells += [spread(each.beyond for each in found).mean, spread(each.color_alarms for each in found).mean]
            rows.append([title, round(statistics.fmean(each.images for each in found)), *cells])
    return rows
