"""How often a site is accepted that should be, and one that should not, from a leave-one-center-out's predictions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from hf_histo.config.commands import AcceptanceStudyOptions
from hf_histo.errors import HistoError
from hf_histo.evaluation import site_acceptance
from hf_histo.evaluation.prediction_sets import group_numbers
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting.report import table
from hf_histo.experiments import grid
from hf_histo.experiments.accept import weighed
from hf_histo.experiments.coverage import stored
from hf_histo.files import require_output


@dataclass(frozen=True)
class SiteStudy:
    """Verdicts on draws of `images` images of one site by one run.

    Attributes:
        images: in each draw.
        drop: accuracy on `val` minus that of all images of the site.
        verdicts: share of the draws with each verdict, of "accept", "recalibrate" and "refuse".
        errors: mean absolute error of each way to predict the accuracy of the site's images.
        inside: share of the draws in which that accuracy is in the interval of each.
    """

    images: int
    drop: float
    verdicts: Mapping[str, float]
    errors: Mapping[str, float]
    inside: Mapping[str, float]

    @property
    def alarms(self) -> float:
        """Share of the draws that were not accepted."""
        return 1 - self.verdicts["accept"]


def study(options: AcceptanceStudyOptions) -> None:
    """Print a table of sites and numbers of images, and write acceptance_study.md and acceptance_study.json.

    For each run, the draws of its held-out center measure the power, and draws of one half of the groups of `val`,
    against the other half, the false alarms. The colors are not stored in predictions, and not tested here.

    Raises HistoError as `coverage.stored` does, and for centers with too few images.
    """
    require_output(options.output_dir, [options.runs], folder=True)
    measured: dict[str, dict[int, list[SiteStudy]]] = {}
    for name, splits in stored(options.runs).items():
        (center,) = splits["test"].known_centers
        if splits["test"].labeled.empty:
            raise HistoError(f"{options.runs / name}: no label of its test center is known, expected labels to compare")
        for count in options.counts:
            for title, measure in ((f"center {center}", held_out), ("val, the other half", alike)):
                found = measure(splits["val"].labeled, splits["test"].labeled, count, options)
                measured.setdefault(title, {}).setdefault(count, []).append(found)
    text = table(_rows(measured))
    content = {
        "options": {key: value for key, value in asdict(options).items() if key not in ("runs", "output_dir")},
        "sites": {
            title: {count: [asdict(each) for each in found] for count, found in by_count.items()}
            for title, by_count in measured.items()
        },
    }
    grid.write(options.output_dir, "acceptance_study", content, text)
    print(f"\nwrote {options.output_dir / 'acceptance_study.json'}")


def held_out(validation: Predictions, test: Predictions, count: int, options: AcceptanceStudyOptions) -> SiteStudy:
    """Verdicts on `count` random images of the held-out center, against all of `val`."""
    if count > len(test):
        raise HistoError(f"--counts has {count}, but a held-out center has {len(test)} images; give fewer")
    draws = []
    for number in range(options.draws):
        random = np.random.default_rng([options.seed, count, number])
        draws.append((validation, test.iloc[random.permutation(len(test))[:count]]))
    return _judged(draws, accuracy(validation) - accuracy(test), accuracy(test), count, options)


def alike(validation: Predictions, test: Predictions, count: int, options: AcceptanceStudyOptions) -> SiteStudy:
    """Verdicts on images of random groups of `val`, up to `count` and half of them, against its other groups."""
    groups = group_numbers(validation)
    draws = []
    for number in range(options.draws):
        random = np.random.default_rng([options.seed, count, number])
        chosen = np.isin(groups, random.permutation(groups.max() + 1)[: (groups.max() + 1) // 2])
        rows = random.permutation(np.flatnonzero(chosen))[:count]
        draws.append((validation[~chosen], validation.iloc[rows]))
    return _judged(draws, 0.0, accuracy(validation), count, options)


def accuracy(predictions: Predictions) -> float:
    """Share of right ones among labeled predictions."""
    return float((predictions.predicted_classes() == predictions.labels).mean())


def _judged(
    draws: list[tuple[Predictions, Predictions]],
    drop: float,
    truth: float,
    count: int,
    options: AcceptanceStudyOptions,
) -> SiteStudy:
    verdicts = dict.fromkeys(("accept", "recalibrate", "refuse"), 0)
    errors: dict[str, list[float]] = {}
    inside: dict[str, list[float]] = {}
    for number, (reference, new) in enumerate(draws):
        evidence, predicted = weighed(reference, new, tolerance=options.tolerance, seed=number)
        verdicts[site_acceptance.decide(evidence)[0]] += 1
        for name, estimate in predicted.items():
            errors.setdefault(name, []).append(abs(estimate.value - truth))
            inside.setdefault(name, []).append(float(estimate.low <= truth <= estimate.high))
    return SiteStudy(
        images=count,
        drop=drop,
        verdicts={name: number / len(draws) for name, number in verdicts.items()},
        errors={name: statistics.fmean(values) for name, values in errors.items()},
        inside={name: statistics.fmean(values) for name, values in inside.items()},
    )


def _rows(measured: Mapping[str, Mapping[int, list[SiteStudy]]]) -> list[list[object]]:
    """A header, and a row for each site and number of images, the mean over runs."""
    ways = {"atc": "ATC", "importance": "importance weighting"}
    header = [title for name in ways.values() for title in (f"error of {name}", "in interval")]
    rows: list[list[object]] = [["site", "images", "drop in accuracy", "not accepted", "refused", *header]]
    for title, by_count in measured.items():
        for count, found in by_count.items():
            cells: list[object] = [statistics.fmean(each.drop for each in found)]
            cells += [statistics.fmean(each.alarms for each in found)]
            cells += [statistics.fmean(each.verdicts["refuse"] for each in found)]
            for name in ways:
                cells += [statistics.fmean(each.errors[name] for each in found)]
                cells += [statistics.fmean(each.inside[name] for each in found)]
            rows.append([title, count, *cells])
    return rows
