"""The options of the experiments, beside those of a run; one dataclass each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_histo.config.options import option, required

REPORTED = "reported.yaml"  # published results, beside the rows of a comparison
ALL_LABELS = "all"  # among the numbers of shots
WITHOUT_QUICK = {"quick": False}  # --quick sets its own numbers
BENCHMARK_PARTS = (
    *("training", "pieces", "prediction", "slides", "features", "jobs", "scaling", "reading", "growth", "memory"),
)
PROBES = ("prototype", "knn", "linear")  # of frozen features


@dataclass(kw_only=True)
class Sharing:
    """Options of every experiment: which processes train its cells."""

    workers: int = option(1, "processes, or jobs of --cluster, that share the runs; 1: this process, in order")
    cluster: Literal["slurm", "local"] | None = option(
        None, "run the workers as jobs of SLURM, or as processes of submitit: pip install 'hf_histo[slurm]'"
    )
    job_parameters: list[str] = option(
        [],
        "of the jobs, NAME=VALUE as submitit names them: timeout_min=240 slurm_partition=gpu gpus_per_node=1 "
        "cpus_per_task=8 (default: a day, and else submitit's)",
    )


@dataclass(kw_only=True)
class CompareOptions(Sharing):
    _argument_group_name = "comparison"

    rows: list[str] = required(
        f"configs to compare, or folders of them; a {REPORTED} among them is no row", is_path=True
    )
    seeds: int = option(2, "number of seeds for each row, counted up from --seed")
    protocol: Literal["validation", "leave_one_center_out"] = option("validation", "what rows are evaluated on")
    select: Literal["worst", "mean"] | None = option(None, "recommend a row by its worst or its mean held-out center")
    baseline: str | None = option(None, "name of a row, without .yaml: how much more accurate the others are, paired")


@dataclass(kw_only=True)
class FewShotOptions(Sharing):
    _argument_group_name = "grid"

    methods: list[str] = required(f"probes ({', '.join(PROBES)}) and configs", is_path=True)
    data_sets: list[str] = option([], "folders of data sets (default: the one of --data)", is_path=True)
    backbones: list[str] = option([], "their names or folders (default: --backbone)", is_path=True)
    shot_counts: list[str] = option(["1", "2", "4", "8", "16"], f"images of each class, or '{ALL_LABELS}'")
    seeds: int = option(3, "number of seeds, counted up from --seed")


@dataclass(kw_only=True)
class ParetoOptions(Sharing):
    _argument_group_name = "Pareto sweep"

    layers: list[str] = required("presets or regexes of the layers with LoRA, each one of a series")
    ranks: list[int] = option([1, 2, 4, 8, 16], "of the update", at_least=1)
    seeds: int = option(1, "number of seeds for each combination, counted up from --seed")
    front_split: Literal["val", "test"] = option("val", "whose accuracy is drawn")


@dataclass(kw_only=True)
class CrossValidateOptions(Sharing):
    _argument_group_name = "cross-validation"

    folds: int = option(5, "number of folds")
    seeds: int = option(1, "number of seeds, each with folds and runs of its own, counted up from --seed")


@dataclass(kw_only=True)
class LeaveOneCenterOutOptions(Sharing):
    _argument_group_name = "leave one center out"

    seeds: int = option(2, "number of seeds for each center, counted up from --seed")


@dataclass
class SweepOptions:
    _argument_group_name = "sweep"

    study: str = required("YAML file with a grid, or a space and the number of trials", is_path=True)
    storage: str | None = option(
        None, "URL of the database of Optuna that holds the trials (default: SQLite in OUT/study.db)"
    )


@dataclass
class BenchmarkOptions:
    _argument_group_name = "benchmark"

    backbones: list[str] = option(
        [], "their names or folders, measured one after the other (default: --backbone)", is_path=True
    )
    parts: list[str] = option(
        list(BENCHMARK_PARTS),
        "what to measure: training steps beside those of others and the floor; with each piece turned off; prediction; "
        "that of slides; features of a probe; jobs from start to end; scaling to two processes; reading; growth of the "
        "data; memory",
    )
    quick: bool = option(False, "few images, steps and repetitions: to see that it runs, not to measure")
    repetitions: int = option(5, "of each measurement", at_least=1, needs=WITHOUT_QUICK)
    steps: int = option(3, "training steps in each, after one that does not count", at_least=1, needs=WITHOUT_QUICK)
    images: int = option(
        512, "that are generated for training, and a fourth as many to predict", at_least=1, needs=WITHOUT_QUICK
    )
    rows: list[int] = option([1_000, 10_000, 100_000, 1_000_000], "of growing tables", at_least=1, needs=WITHOUT_QUICK)
