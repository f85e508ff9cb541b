"""Coverage of prediction sets at held-out centers, from the stored predictions of a leave-one-center-out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_histo.config.commands import CoverageOptions
from hf_histo.errors import HistoError
from hf_histo.evaluation import prediction_sets
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting.report import table
from hf_histo.experiments import grid
from hf_histo.files import read_json, require_output
from hf_histo.training import run_folder

CERTAIN = 0.8  # share of the images, the most certain ones, whose errors are counted
RECORD = "leave_one_center_out.json"
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class SetQuality:
    """Quality of the sets of some labeled images, all in [0, 1], but for `size`.

    Attributes:
        coverage: share of images whose class is in their set.
        classes: the same of each class; None for one without images.
        size: mean number of classes in a set.
        decided: share of images with one class in their set.
        error: share of these whose class is another one; None without such images.
    """

    coverage: float
    classes: tuple[float | None, ...]
    size: float
    decided: float
    error: float | None

    @classmethod
    def of(cls, members: Bools, labels: NDArray[np.int64]) -> SetQuality:
        """Of sets as `PredictionSets.members`, (n, K), and labels in [0, K), (n,)."""
        holds = members[np.arange(len(labels)), labels]
        single = members.sum(axis=1) == 1
        return cls(
            float(holds.mean()),
            tuple(_mean(holds[labels == label]) for label in range(members.shape[1])),
            float(members.sum(axis=1).mean()),
            float(single.mean()),
            _mean(~holds[single]),
        )


@dataclass(frozen=True)
class HeldOutCenter:
    """What is measured at one held-out center by one run.

    Attributes:
        images: number of labeled images.
        accuracy: share of images whose most probable class is right.
        certain_error: share of wrong ones among the `CERTAIN` of images that the model is most certain of.
        before: sets that were calibrated on the run's `val`.
        after: those calibrated on images of the center, the means over draws; `error` over draws with decided images.
        fifth: the coverage that 95% of the draws exceed.
        withheld: share of draws without enough groups to claim a set; they count as sets of all classes.
    """

    images: int
    accuracy: float
    certain_error: float
    before: SetQuality
    after: SetQuality
    fifth: float
    withheld: float


def coverage(options: CoverageOptions) -> None:
    """Print a table of the held-out centers, and write coverage.md and coverage.json.

    Raises HistoError for a folder that holds no finished leave-one-center-out, for a center without labels, and if too
    few images are left beside those to calibrate on.
    """
    require_output(options.output_dir, [options.runs], folder=True)
    measured: dict[str, list[HeldOutCenter]] = {}
    for name, splits in stored(options.runs).items():
        (center,) = splits["test"].known_centers
        if splits["test"].labeled.empty:
            raise HistoError(f"{options.runs / name}: no label of its test center is known, expected labels to compare")
        measured.setdefault(center, []).append(measure(splits["val"], splits["test"].labeled, options))
    rows: list[list[object]] = [
        ["held out", "accuracy", *_headers("before"), *_headers(f"{options.labeled} labeled"), "of 95% of draws, above"]
    ]
    rows[0].append(f"error of the {CERTAIN:.0%} most certain")
    for center, runs in measured.items():
        rows.append([f"center {center}", *_cells(runs)])
    text = table(rows)
    if withheld := statistics.fmean(run.withheld for runs in measured.values() for run in runs):
        text += f"\n\nIn {withheld:.1%} of the draws there were too few groups for a set, and each had all classes."
    found = {center: [asdict(run) for run in runs] for center, runs in measured.items()}
    chosen = {key: value for key, value in asdict(options).items() if key not in ("runs", "output_dir")}
    grid.write(options.output_dir, "coverage", {"options": chosen, "centers": found}, text)
    print(f"\nwrote {options.output_dir / 'coverage.json'}")


def stored(runs: Path) -> Mapping[str, Mapping[str, Predictions]]:
    """The predictions of `val` and `test` of each run of a finished leave-one-center-out, by the run's name.

    Raises HistoError where the folder holds none.
    """
    try:
        names = list(read_json(runs / RECORD)["runs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise HistoError(
            f"--runs {runs}: holds no {RECORD}, expected the folder of a finished leave-one-center-out"
        ) from None
    places = {name: runs / name / run_folder.ADAPTER / run_folder.PREDICTIONS for name in names}
    return {
        name: {split: Predictions.read(place / f"{split}.parquet") for split in ("val", "test")}
        for name, place in places.items()
    }


def measure(validation: Predictions, held_out: Predictions, options: CoverageOptions) -> HeldOutCenter:
    """The quality of sets at a center, `held_out`, all labeled, before and after calibration there."""
    odds, labels, groups = held_out.class_log_odds, held_out.labels, prediction_sets.group_numbers(held_out)
    before = prediction_sets.calibrate(validation, options.coverage).members(held_out)
    certain = np.argsort(-odds.max(axis=1), kind="stable")[: round(CERTAIN * len(odds))]
    right = odds.argmax(axis=1) == labels
    after, withheld = [], 0
    for drawn, rest in _draws(groups, options):
        least, counts = prediction_sets.limits(odds[drawn], labels[drawn], groups[drawn], options.coverage)
        if counts.min() < prediction_sets.least_groups(options.coverage):
            least[:] = -np.inf
            withheld += 1
        after.append(SetQuality.of(odds[rest] >= least, labels[rest]))
    return HeldOutCenter(
        images=len(labels),
        accuracy=float(right.mean()),
        certain_error=float(1 - right[certain].mean()),
        before=SetQuality.of(before, labels),
        after=mean(after),
        fifth=float(np.quantile([each.coverage for each in after], 0.05)),
        withheld=withheld / len(after),
    )


def mean(qualities: list[SetQuality]) -> SetQuality:
    """The mean of each value that is defined."""
    return SetQuality(
        statistics.fmean(each.coverage for each in qualities),
        tuple(_mean(column) for column in zip(*(each.classes for each in qualities), strict=True)),
        statistics.fmean(each.size for each in qualities),
        statistics.fmean(each.decided for each in qualities),
        _mean([each.error for each in qualities]),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are defined; None without."""
    defined = [float(value) for value in values if value is not None]
    return statistics.fmean(defined) if defined else None


def _draws(groups: Rows, options: CoverageOptions) -> Iterator[tuple[Rows, Rows]]:
    """Rows to calibrate on, and the rows of the other groups; each draw depends on the seed and its number alone."""
    for number in range(options.draws):
        drawn = np.random.default_rng([options.seed, number]).permutation(len(groups))[: options.labeled]
        rest = np.flatnonzero(~np.isin(groups, groups[drawn]))
        if not len(rest):
            raise HistoError(
                f"--labeled is {options.labeled}, which leaves no other group among the {len(groups)} images of a "
                "held-out center; give fewer"
            )
        yield drawn, rest


def _headers(when: str) -> list[str]:
    return [f"coverage, {when}", "lowest class", "decided", "error of these"]


def _cells(runs: list[HeldOutCenter]) -> list[object]:
    before, after = mean([run.before for run in runs]), mean([run.after for run in runs])
    sets = [
        [each.coverage, min(value for value in each.classes if value is not None), each.decided, each.error]
        for each in (before, after)
    ]
    accuracy, fifth, error = (
        statistics.fmean(getattr(run, name) for run in runs) for name in ("accuracy", "fifth", "certain_error")
    )
    return [accuracy, *sets[0], *sets[1], fifth, error]
