"""Hyperparameter sweeps of a training recipe: all points of a grid, or a search by Optuna."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import matplotlib.pyplot as plt
import optuna
import optuna.visualization.matplotlib as plots
import yaml
from filelock import AcquireReturnProxy, FileLock, Timeout
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_histo import launch
from hf_histo.config import NON_RESULT_OPTIONS, Config, DataOptions, OutputOptions, refuse_given, with_options
from hf_histo.config.experiments import SweepOptions
from hf_histo.config.packaged import config_file
from hf_histo.data.load import fingerprint
from hf_histo.data.protocol import SELECTING, prepare
from hf_histo.errors import HistoError
from hf_histo.evaluation.reporting.report import table
from hf_histo.experiments import grid
from hf_histo.files import atomic_file, read_text
from hf_histo.finetune import run_config

plt.switch_backend("Agg")


def sweep(config: Config, options: SweepOptions) -> None:
    """Run the remaining trials; print a table, and write sweep.md, sweep.json, best.yaml and plots.

    Raises HistoError for a study file that can't be read, a database that can't be used, a folder with another sweep,
    and if no trial finished.
    """
    folder = config.parent_folder()
    if launch.process().num_processes > 1:
        raise HistoError("a trial is of one process, found several; start the command several times instead")
    plan = read_plan(options.study, config)

    data = prepare(config)
    identity = {key: value for key, value in config.flat().items() if key not in NON_RESULT_OPTIONS}
    identity |= {"space": {name: distribution_to_json(d) for name, d in plan.distributions.items()}}
    trials = Sweep(folder, config, plan, {**identity, "images": fingerprint(data)}, options.storage)
    seen = datasets.DatasetDict({split: data[split] for split in ("train", "val") if split in data})
    while claimed := trials.next():
        trial, lock = claimed
        with lock:
            print(f"trial-{slot(trial)}: {trial.params}", flush=True)
            trials.run(trial, seen)

    best = trials.best()
    chosen = with_options(config, best.params).flat()
    left_out = {field.name for field in dataclasses.fields(OutputOptions)}
    with atomic_file(folder / "best.yaml") as temporary:
        kept = {key: value for key, value in chosen.items() if value is not None and key not in left_out}
        temporary.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    choice = f"Best: trial-{slot(best)}, chosen by {trials.metric} on val; no other split was used."
    found = {
        number: {"state": trial.state.name, "params": trial.params, "value": trial.value, **trial.user_attrs}
        for number, trial in trials.trials().items()
    }
    trials.draw()
    content = {"metric": trials.metric, "best": slot(best), "trials": found, **identity}
    grid.write(folder, "sweep", content, f"{trials.markdown()}\n\n{choice}")
    print(f"\nwrote best.yaml, sweep.md, .json and plots in {folder}")


@dataclass(frozen=True)
class Plan:
    """Content of a study file; `points` has a mapping for each trial: a grid point, or {} for a search."""

    distributions: dict[str, BaseDistribution]
    points: list[dict[str, Any]]
    prunes: bool


def read_plan(path: str, config: Config) -> Plan:
    """Read a study file. Raises HistoError if it can't be read, or for options and values that a run would refuse."""
    try:
        content = yaml.safe_load(read_text(config_file(path)))
        ranges = content["grid"] if set(content) == {"grid"} else content["space"]
        distributions = {name: _distribution(values) for name, values in ranges.items()}
        if "grid" in content:
            points = [dict(zip(ranges, point, strict=True)) for point in itertools.product(*ranges.values())]
        else:
            points = [{}] * int(content["trials"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise HistoError(f"--study {path}: {reason}; expected grid, or space and trials; see --help") from None
    refuse_given(config, dict.fromkeys(ranges, "the study varies it"))
    decided = {
        *(field.name for field in dataclasses.fields(DataOptions)),
        *SELECTING,
        "metric_for_best_model",
        "seed",
        *NON_RESULT_OPTIONS,
    }
    if fixed := sorted(decided & ranges.keys()):
        raise HistoError(f"--study {path}: {fixed[0]} is the same for all trials; give it on the command line")
    for name, values in ranges.items():
        for value in values if isinstance(values, list) else (values["low"], values["high"]):
            with_options(config, {name: value})
    return Plan(distributions, points, prunes="space" in content)


def _distribution(values: Any) -> BaseDistribution:
    if isinstance(values, list):
        return CategoricalDistribution(values)
    whole = isinstance(values["low"], int) and isinstance(values["high"], int)
    return (IntDistribution if whole else FloatDistribution)(**values)


class Reporting(TrainerCallback):
    """Reports the validation metric to the study after each evaluation; raises `TrialPruned` for a pruned trial."""

    def __init__(self, trial: Trial, metric: str) -> None:
        self.trial, self.metric = trial, metric

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trial.report(kwargs["metrics"][f"eval_{self.metric}"], round(state.epoch or 0))
        if self.trial.should_prune():
            raise optuna.TrialPruned


class Sweep:
    """The trials of a sweep, whose folder several processes may share.

    The process that runs a trial holds a lock on a file, which the operating system releases when the process ends: a
    trial in the state "running" without a lock was killed. It is marked as failed, and a new trial repeats it in the
    same folder, whose number is the trial's `slot`.
    """

    def __init__(self, folder: Path, config: Config, plan: Plan, identity: dict[str, Any], storage: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config, self.plan = folder, config, plan
        self.metric = config.training.metric_for_best_model
        self.lock = FileLock(folder / ".study.lock")
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1)
        with self.lock:
            self.study = optuna.create_study(
                # A database may hold several sweeps.
                study_name=str(folder.resolve()) if storage else "sweep",
                storage=open_storage(storage or f"sqlite:///{folder / 'study.db'}"),
                direction="minimize" if self.metric == "loss" else "maximize",
                pruner=pruner if plan.prunes else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
            before = self.study.user_attrs.get("identity", identity)
            if changed := [key for key in {**before, **identity} if before.get(key) != identity.get(key)]:
                raise HistoError(
                    f"--output_dir {folder}: holds a sweep of other {', '.join(changed)}; choose another folder"
                )
            self.study.set_user_attr("identity", identity)
            for point in plan.points[len(self.trials()) :]:
                self.study.enqueue_trial(point)

    def trials(self) -> dict[int, FrozenTrial]:
        """The trials by slot; of several in one slot, the last."""
        return {slot(trial): trial for trial in self.study.get_trials()}

    def next(self) -> tuple[Trial, AcquireReturnProxy[Any]] | None:
        """The next trial to run and its lock, which is held; None if all are finished or running."""
        with self.lock:
            for running in self.study.get_trials(states=[TrialState.RUNNING]):
                try:
                    with self._lock_of(running).acquire(blocking=False):
                        # A kill between these two calls leaves a redundant trial, which finds its run finished.
                        self.study.enqueue_trial(running.params, user_attrs={"slot": slot(running)})
                        self.study.tell(running.number, state=TrialState.FAIL)
                except Timeout:
                    continue
            if not self.study.get_trials(states=[TrialState.WAITING]):
                return None
            # Seeded by the number of trials, so that other processes and a resumed sweep don't repeat samples.
            begun = [trial for trial in self.study.get_trials() if trial.state != TrialState.WAITING]
            self.study.sampler = optuna.samplers.TPESampler(seed=self.config.training.seed + len(begun))
            trial = self.study.ask(self.plan.distributions)
            return trial, self._lock_of(trial).acquire()

    def run(self, trial: Trial, data: datasets.DatasetDict) -> None:
        """Train with the trial's settings and report the result to the study."""
        seed = self.config.training.seed
        try:
            config = with_options(self.config, trial.params).at(self.folder / f"trial-{slot(trial)}", seed)
            result = run_config(config, data, callbacks=[Reporting(trial, self.metric)])
            self.study.tell(trial, result.record["selection"]["value"])
        except optuna.TrialPruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        except HistoError as error:
            trial.set_user_attr("error", str(error))
            self.study.tell(trial, state=TrialState.FAIL)

    def best(self) -> FrozenTrial:
        """The best finished trial. Raises HistoError if there is none."""
        if not self.study.get_trials(states=[TrialState.COMPLETE]):
            errors = [trial.user_attrs["error"] for trial in self.trials().values() if "error" in trial.user_attrs]
            raise HistoError(f"no trial of {self.folder} finished; the first error: {(errors or ['none'])[0]}")
        return self.study.best_trial

    def markdown(self) -> str:
        """A Markdown table of all trials, with the best one first."""
        sign = 1 if self.metric == "loss" else -1
        header = ["trial", "state", *self.plan.distributions, f"val {self.metric}", "epochs", "seconds"]
        lines = []
        for number, trial in self.trials().items():
            value = trial.value if trial.state == TrialState.COMPLETE else None
            seconds = f"{trial.duration.total_seconds():.0f}" if trial.duration else None
            settings = [_short(trial.params.get(name)) for name in self.plan.distributions]
            line = [number, trial.state.name.lower(), *settings, value, len(trial.intermediate_values), seconds]
            lines.append((value is None, sign * (value or 0), line))
        return table([header, *(line for *_, line in sorted(lines, key=lambda line: line[:2]))])

    def draw(self) -> None:
        """Write Optuna's plots, as far as there are enough trials for them."""
        kinds = ["optimization_history", "intermediate_values", "slice", "parallel_coordinate"]
        values = {trial.value for trial in self.study.get_trials(states=[TrialState.COMPLETE])}
        if len(values) > 1:
            kinds.append("param_importances")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            for kind in kinds:
                getattr(plots, f"plot_{kind}")(self.study)
                with atomic_file(self.folder / f"{kind}.png") as temporary:
                    plt.gcf().savefig(temporary, dpi=150, bbox_inches="tight")
                plt.close("all")

    def _lock_of(self, trial: Trial | FrozenTrial) -> FileLock:
        # Not .trial-N.lock, which is the lock of the run in trial-N.
        return FileLock(self.folder / f".study-{trial.number}.lock")


def open_storage(url: str) -> BaseStorage:
    """Open an Optuna storage. Raises HistoError if it fails, without the URL, which may contain a password."""
    try:
        return optuna.storages.get_storage(url)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HistoError(
            f"--storage: the database can't be opened ({reason}); expected a URL that Optuna opens"
        ) from None


def slot(trial: Trial | FrozenTrial) -> int:
    """Number of the trial's folder: its own, or that of the first trial that it repeats."""
    return int(trial.user_attrs.get("slot", trial.number))


def _short(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value
