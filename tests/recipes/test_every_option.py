"""Each option of each recipe: a value other than the default has an effect, or is refused with the option's name.

Each recipe is run up to its training runs: an option reaches them, or changes their data. Small training runs show that
options that reach them are read and, in the slow tests, that they change the result.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import datasets
import h5py
import optuna
import pandas as pd
import pytest
import torch
from miniature import (
    SIZE,
    write_adapter,
    write_backbone,
    write_bags,
    write_centers,
    write_data,
    write_hf_vit,
    write_image_table,
    write_shards,
)
from recipe_mains import main_of
from safetensors.torch import load_file

from hf_histo import finetune, hub, library_warnings
from hf_histo.config import GROUPS, OPTIONS, Config, TableOptions, effective, parse
from hf_histo.config.options import RULES, SET, Except
from hf_histo.data import protocol
from hf_histo.data.load import fingerprint
from hf_histo.data.splits import folds
from hf_histo.errors import HistoError
from hf_histo.evaluation.figures import run as run_figures
from hf_histo.experiments import cross_validate, grid, sweep
from hf_histo.experiments.benchmark import measure
from hf_histo.files import read_json
from hf_histo.result import Result
from hf_histo.training import feature_cache, run_folder, trainer

RUN_CONFIG = finetune.run_config
PACKAGE = Path(finetune.__file__).parent
TRAINING = ("histo_lora", "mri_lora", "digits_lora", "cytology_lora")
EXPERIMENTS = ("compare", "cross_validate", "few_shot", "leave_one_center_out", "pareto", "sweep", "benchmark")
TYPES = {name: kind for group in GROUPS.values() for name, kind in get_type_hints(group).items()}

# Values beside the default; those that are not here follow from type, choices and bounds.
VALUES: dict[str, Any] = {
    "split": "clean",
    "family": "near",
    "image_column": "picture",
    "label_column": "finding",
    "id_column": "key",
    "split_column": "part",
    "center_column": "department",
    "group_column": "person",
    "slide_column": "scan",  # options of slides are refused for other data: see tests/data/readers/test_slide_table.py
    "annotations_column": "regions",
    "patch_size": 64,
    "stride": 112,
    "unannotated": "other",
    "page": 2,
    "window": "100,200",
    "test_centers": "3",
    "negative_class": "tumor",
    "percentage": 50.0,
    "shots": 2,
    "revision": "v1",
    "head_widths": "8",
    "bag_size": 2,
    "text_prompt": "a picture of {}",
    "fit": "squash",
    "image_size": 24,
    "resize_size": 48,
    "target_modules": "all-conv",
    "init_lora_weights": "gaussian",
    "update_scale": "0.5",
    "block_size": 8,
    "augmentation": "flips",
    "test_time_views": 8,
    "test_time_augmentation": "strong",
    "eval_steps": 3,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "lr_scheduler_type": "linear",
    "lr_scheduler_patience": 0,
    "warmup_steps": 3,
    "early_stopping_patience": 1,
    "metric_for_best_model": "loss",
    "class_balance": "sampling",
    "resume_from_checkpoint": "last",
    "cache_features": "off",
    "mixed_precision": "bf16",
    "hub_model_id": "me/other",
    "hub_base_model": "me/base",
    "hub_license": "mit",
    "hub_revision": "v2",
    "report_to": "tensorboard",
    "run_name": "mine",
}
# Options that an option needs, besides those that it declares.
NEEDS: dict[str, dict[str, Any]] = {
    "iterations_per_shot": {"shots": 2},
    "init_adapter": {"target_modules": "last-conv"},
    # Without progress, and with a log of each step.
    "lr_scheduler_patience": {"metric_for_best_model": "accuracy", "learning_rate": 1e-5, "logging_steps": 1},
}
# Options that a run on images of two classes in an HDF5 file, by a convolutional backbone on this machine, refuses.
REFUSED_IN_MINIATURE = {"level", "revision", "head_softmax", "text_prompt", "lora_blocks", "patch_dropout"}
REFUSED_IN_MINIATURE |= {"num_frequencies"}  # of methods for linear layers
# Options that decide which images a run is given, and in which splits.
ARRANGING = {option.name for option in dataclasses.fields(Config().data)} - {"negative_class", "num_workers"}
ARRANGING |= {"pool_centers"}
OF_A_TABLE = {option.name for option in dataclasses.fields(TableOptions)}
ON_AN_EARLIER_RUN = {"overwrite_output_dir", "resume_from_checkpoint"}  # see tests/training/test_run_folder.py


@dataclasses.dataclass(frozen=True)
class Source:
    """Small data and backbones for training runs."""

    folder: Path
    backbone: Path
    data: Path

    def options(self, **more: Any) -> list[str]:
        """The options of a short run, and `more`, as on a command line."""
        quick = {"image_size": SIZE, "resize_size": SIZE}
        places = {"backbone": self.backbone, "data": self.data}
        if more.get("method") != "pca":
            quick |= {"per_device_train_batch_size": 12, "learning_rate": 0.01, "num_train_epochs": 3}
        if "max_steps" in more or "iterations_per_shot" in more:
            del quick["num_train_epochs"]
        return [f"--{name}={value}" for name, value in (quick | places | more).items()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("source")
    backbone, data = write_centers(folder)
    write_centers(folder / "other")
    write_shards(folder / "shards")
    write_image_table(folder)
    write_bags(folder / "bags")
    write_adapter(folder / "adapter", backbone)
    write_backbone(folder / "other_backbone", seed=1)
    yield Source(folder, backbone, data)
    torch.set_num_threads(threads)  # as other test files in this process expect


def other_value(name: str, source: Source) -> Any:
    """A valid value of an option that is not its default."""
    places = {
        "data": source.folder / "other" / "data",
        "backbone": source.folder / "other_backbone",
        "init_adapter": source.folder / "adapter",
        "cache_dir": source.folder / "cache",
        "output_dir": source.folder / "output",
        "image_root": source.folder / "table" / "other",
    }
    if name in places:
        return str(places[name])
    if name in VALUES:
        return VALUES[name]
    default, kinds = OPTIONS[name].default, [kind for kind in get_args(TYPES[name]) if kind is not NoneType]
    choices = get_args(TYPES[name]) if get_origin(TYPES[name]) is Literal else [c for k in kinds for c in get_args(k)]
    if choices:
        return next(choice for choice in choices if choice != default)
    kind = kinds[0] if kinds else TYPES[name]
    if kind is bool:
        return not default
    assert kind in (int, float), f"--{name}: VALUES has no value for it"
    candidates = (kind((default or 0) + 1), kind(9), kind((default or 1) / 2))
    return next(value for value in candidates if value != default and RULES[name].allows(value))


def needed(name: str, source: Source) -> dict[str, Any]:
    """Options that another option needs to have an effect."""
    found: dict[str, Any] = {}
    for other, wanted in RULES[name].needs.items():
        if wanted == SET:
            wanted = other_value(other, source)
        elif isinstance(wanted, Except):
            wanted = OPTIONS[other].default
        elif isinstance(wanted, tuple):
            wanted = OPTIONS[other].default if OPTIONS[other].default in wanted else wanted[0]
        if wanted != OPTIONS[other].default:
            found |= needed(other, source) | {other: wanted}
    if "push_to_hub" in found:
        found["hub_model_id"] = "me/model"
    if name == "streaming":
        found["data"] = f"hub:{source.folder / 'shards'}"
    if name == "aggregation" or "aggregation" in found:
        found["data"] = source.folder / "bags" / "bags.csv"
    if name in OF_A_TABLE:
        found["data"] = source.folder / "table" / "images.csv"
    return found | NEEDS.get(name, {})


def variants(name: str, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a run in which `name` has an effect, without it and with it."""
    plain = needed(name, source)
    changed = plain | {name: other_value(name, source)}
    return plain, changed | ({"hub_model_id": "me/model"} if name == "push_to_hub" else {})


# 1. Options change the result of a training run.


@pytest.fixture(scope="module")
def outcome_of(source: Source) -> Iterator[Callable[..., dict[str, Any]]]:
    """A function from options to the outcome of a training run, which is cached."""
    known: dict[str, dict[str, Any]] = {}
    folders = (source.folder / f"run-{number}" for number in itertools.count())
    with pytest.MonkeyPatch.context() as patches:
        seen: dict[str, Any] = {}
        build, cached_prefix = trainer.build, feature_cache.cached_prefix

        def built(*args: Any, **kwargs: Any) -> trainer.Trainer:
            session = build(*args, **kwargs)
            seen["session"] = session
            seen["reported"], seen["verbose"] = session.args.run_name, library_warnings._shows_all
            return session

        def caching(session: trainer.Trainer, mode: str, cache_dir: str | None) -> Any:
            seen["caching"] = mode, cache_dir
            return cached_prefix(session, mode, cache_dir)

        def pushed(adapter: Path, *args: Any, **kwargs: Any) -> str:
            seen["pushed"] = args, kwargs
            return "address"

        patches.setattr(trainer, "build", built)
        patches.setattr(feature_cache, "cached_prefix", caching)
        patches.setattr(hub, "check_access", lambda *args, **kwargs: None)
        patches.setattr(hub, "push", pushed)
        patches.setattr(run_figures, "draw", lambda *args, **kwargs: {})  # most of the time, and of no option

        def outcome_of(**options: Any) -> dict[str, Any]:
            key = repr(sorted(options.items()))
            if key not in known:
                seen.clear()
                config = parse(None, source.options(**{"output_dir": next(folders), **options}))
                result = finetune.run_config(config, protocol.prepare(config))
                known[key] = outcome(result, seen)
            return known[key]

        yield outcome_of


def outcome(result: Result, seen: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a training run, without its options and duration."""
    run, arguments = result.adapter.parent, seen["session"].args
    sidecar = read_json(result.adapter / "hf_histo.json")
    timed = ("runtime", "per_second")
    return {
        "weights": {k: v.tolist() for k, v in load_file(result.adapter / "adapter_model.safetensors").items()},
        "predictions": {
            path.name: pd.read_parquet(path).to_csv() for path in sorted(result.adapter.glob("predictions/*"))
        },
        "metrics": {key: value for key, value in result.record.items() if key != "options"},
        "prediction": {key: sidecar.get(key) for key in ("preprocessing", "views", "adapt_batch_norm")},
        "license": next(line for line in (result.adapter / "README.md").read_text().splitlines() if "license" in line),
        "log": [
            {key: value for key, value in line.items() if not key.endswith(timed)}
            for line in seen["session"].state.log_history
        ],
        "speed": (
            arguments.dataloader_num_workers,
            arguments.per_device_eval_batch_size,
            any(getattr(module, "grad_checkpointing", False) for module in seen["session"].model.modules()),
            seen.get("caching"),
            getattr(seen["session"], "chunk_size", None),
        ),
        "written": sorted(str(path.relative_to(run)) for path in [*run.glob("*.png"), *run.glob("*/figures/*")]),
        "reported": (seen.get("reported"), (run / run_folder.TENSORBOARD).is_dir(), seen.get("verbose")),
        "folder": str(run) if run.name == "output" else None,
        "pushed": seen.get("pushed"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "pca"])
@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - ARRANGING - ON_AN_EARLIER_RUN))
def test_an_option_changes_what_comes_out(
    name: str, method: str, source: Source, outcome_of: Callable[..., dict[str, Any]]
) -> None:
    plain, changed = variants(name, source)
    if method == "pca":
        needs_steps = any("method" in RULES[other].needs for other in (name, *RULES[name].needs))
        if needs_steps or name.startswith("head") or name in {"method", "train_output_layer", "output_dir"}:
            return  # it is refused, see test_parser.py and test_finetune.py; the last is tried by the other method
        plain, changed = plain | {"method": "pca"}, changed | {"method": "pca"}
    if name in REFUSED_IN_MINIATURE:
        with pytest.raises(HistoError, match=f"--{name}"):
            outcome_of(**changed)
    elif name == "torch_compile":  # minutes
        config = parse(None, source.options(torch_compile=True))
        assert trainer.training_arguments(config, source.folder).torch_compile
    else:
        assert outcome_of(**changed) != outcome_of(**plain), f"--{name} {changed[name]} changes nothing"


def test_every_option_is_read_in_a_training(
    source: Source, outcome_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option is read in one of a few runs, which differ in options that others need."""
    read: set[str] = set()

    def recording(options: Any, name: str) -> Any:
        frame = sys._getframe(1)
        while frame.f_code.co_filename == dataclasses.__file__ and frame.f_back is not None:  # by `asdict`
            frame = frame.f_back
        place = Path(frame.f_code.co_filename)
        if name in OPTIONS and place.is_relative_to(PACKAGE) and not place.is_relative_to(PACKAGE / "config"):
            read.add(name)
        return object.__getattribute__(options, name)

    for group in GROUPS.values():
        monkeypatch.setattr(group, "__getattribute__", recording, raising=False)
    outcome_of(**variants("iterations_per_shot", source)[1], seed=1)  # of no other test, which would be remembered
    chosen = ("head_widths", "domain_weight", "lr_scheduler_patience", "hub_private")
    options = {key: value for name in chosen for key, value in variants(name, source)[1].items()}
    outcome_of(**options, num_train_epochs=1, seed=1)
    outcome_of(**variants("bag_size", source)[1], num_train_epochs=1, seed=1)
    for option in ("block_size", "num_frequencies"):  # with other methods of peft, of which one does not fit
        with pytest.raises(HistoError) if option in REFUSED_IN_MINIATURE else nullcontext():
            outcome_of(**variants(option, source)[1], num_train_epochs=1, seed=1)
    assert OPTIONS.keys() - read == {"hub_license"}  # which the model card takes from the record of options


# 2. Options reach the training runs of each recipe.


@dataclasses.dataclass
class Reached(BaseException):
    """Raised to end a recipe at its first training run; holds what it did until then.

    Attributes:
        runs: options with an effect of its runs, without those of the data.
        data: images of each run's splits.
        arranged: data that was read, and how it was arranged.
        sharing: the processes that would train.
    """

    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    data: list[Any] = dataclasses.field(default_factory=list)
    arranged: list[Any] = dataclasses.field(default_factory=list)
    sharing: Any = None

    def add(self, config: Config, data: datasets.DatasetDict | None) -> None:
        self.runs.append({k: v for k, v in effective(config.flat()).items() if k not in ARRANGING})
        if data is not None:
            self.data.append([fingerprint(data), {split: rows["id"] for split, rows in data.items()}])


@pytest.fixture(scope="module")
def own_options(source: Source) -> dict[str, list[str]]:
    """Required options of each recipe."""
    config, study = source.folder / "config.yaml", source.folder / "study.yaml"
    config.write_text("augmentation: none\n", encoding="utf-8")
    study.write_text("grid: {lora_dropout: [0.1]}\n", encoding="utf-8")
    return {
        "compare": [f"--rows={config}", "--seeds=1"],
        "cross_validate": ["--folds=3"],
        "few_shot": [f"--methods={config}", "--shot_counts=all", "--seeds=1"],
        "leave_one_center_out": ["--seeds=1"],
        "pareto": ["--layers=last-conv", "--ranks=2"],
        "sweep": [f"--study={study}"],
        "benchmark": ["--quick"],
    }


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """Cache of data, by what it was made from."""
    return {}


@pytest.fixture
def reached(
    monkeypatch: pytest.MonkeyPatch, source: Source, own_options: dict[str, list[str]], known: dict[str, Any]
) -> Callable[..., Reached]:
    """Run a recipe up to its first training run."""
    seen = Reached()

    def stopped_at_a_run(config: Config, data: datasets.DatasetDict, **_: Any) -> None:
        seen.add(config, data)
        raise seen

    def stopped_at_cells(cells: list[grid.Cell], folder: Path, sharing: grid.Sharing, **_: Any) -> None:
        grid.check(cells, sharing)
        seen.sharing = [getattr(sharing, option.name) for option in dataclasses.fields(grid.Sharing)]
        for cell in cells:
            seen.add(cell.config, cell.data)
        raise seen

    def stopped_at_measurements(bench: Any, parts: Any) -> None:
        seen.add(bench.config, None)
        raise seen

    def remembered(made: Callable[..., Any]) -> Callable[..., Any]:
        """The same splits of the same data are made once."""

        def remembering(data: Any, *args: Any, **how: Any) -> Any:
            key = f"{made.__name__} {id(data)} {args} {how}"
            if key not in known:
                known[key] = made(data, *args, **how), data  # which is kept, and so is its id
            return known[key][0]

        return remembering

    load, grouped = protocol.load, remembered(protocol.grouped)

    def loading(options: Any) -> datasets.DatasetDict:
        seen.arranged.append(dataclasses.asdict(options))
        key = str(dataclasses.replace(options, negative_class=None, num_workers=0))  # which change no image
        if key not in known:
            known[key] = load(options)
        return known[key]

    def grouping(files: datasets.DatasetDict, *args: Any, **kwargs: Any) -> datasets.DatasetDict:
        seen.arranged.append([args, kwargs])
        return grouped(files, *args, **kwargs)

    monkeypatch.setattr(finetune, "run_config", stopped_at_a_run)
    monkeypatch.setattr(sweep, "run_config", stopped_at_a_run)
    monkeypatch.setattr(grid, "train", stopped_at_cells)
    monkeypatch.setattr(measure, "measure", stopped_at_measurements)
    monkeypatch.setattr(sweep, "open_storage", lambda url: optuna.storages.InMemoryStorage())
    monkeypatch.setattr(folds, "leave_one_center_out", remembered(folds.leave_one_center_out))
    monkeypatch.setattr(cross_validate, "k_folds", remembered(folds.k_folds))
    for module in (protocol, cross_validate):
        monkeypatch.setattr(module, "load", loading)
        monkeypatch.setattr(module, "grouped", grouping)

    def reached(recipe: str, *arguments: str, **options: Any) -> Reached:
        nonlocal seen
        seen = Reached()
        quick = {"output_dir": source.folder / "out", "data": source.data, "backbone": source.backbone}
        if recipe == "benchmark":
            del quick["data"]
        if recipe == "histo_lora":  # the defaults of the options, not its own: see tests/config/test_parser.py
            quick |= {name: OPTIONS[name].default for name in ("normalization", "test_time_views")}
        given = [f"--{name}={value}" for name, value in (quick | options).items()]
        monkeypatch.setattr(sys, "argv", [recipe, *own_options.get(recipe, []), *given, *arguments])
        main = main_of(f"{recipe}.py")
        with pytest.raises(Reached):
            main()
        return seen

    return reached


@pytest.mark.parametrize("recipe", [*TRAINING, *EXPERIMENTS])
def test_every_option_reaches_a_training(recipe: str, source: Source, reached: Callable[..., Reached]) -> None:
    """Or the recipe refuses it, with its name."""
    idle: list[str] = []
    plain_ones: dict[str, Reached] = {}
    for name in OPTIONS:
        plain, changed = variants(name, source)
        try:
            found = reached(recipe, **changed)
        except HistoError as error:
            if not set(re.findall(r"--(\w+)", str(error))) & ({name} | plain.keys()):
                idle.append(f"--{name} {changed[name]} is refused without its name: {error}")
            continue
        if (key := str(plain)) not in plain_ones:
            plain_ones[key] = reached(recipe, **plain)
        before = plain_ones[key]
        if name in ARRANGING:
            acts = (found.arranged, found.data) != (before.arranged, before.data)
        else:
            acts = found.runs != before.runs
        if not acts:
            idle.append(f"--{name} {changed[name]} changes nothing")
    assert not idle, "\n".join(idle)


# 3. Options without effect because of other options, the data, or the backbone.


@pytest.fixture(scope="module")
def other_sources(source: Source) -> dict[str, list[str]]:
    """Options for data of one center, or a backbone without batch norm."""
    for path in write_data(source.folder / "one_center").glob("*.h5"):
        with h5py.File(path, "r+") as file:
            for group in file.values():
                group["metadata"][0] = 0
    write_hf_vit(source.folder / "vit")
    (source.folder / "published.yaml").write_text("split: published\n", encoding="utf-8")
    return {
        "one center": [f"--data={source.folder / 'one_center'}"],
        "no batch norm": [f"--backbone={source.folder / 'vit'}"],
        "streamed": [f"--data=hub:{source.folder / 'shards'}"],
        "published": ["--methods", str(source.folder / "published.yaml")],
        "two backbones": ["--methods", str(source.folder / "config.yaml"), "--backbones", str(source.backbone)],
    }


@pytest.mark.parametrize(
    ("recipe", "given", "idle"),
    [
        ("histo_lora", ["one center", "--pool_centers"], "--pool_centers is True"),
        ("histo_lora", ["one center", "--balance_centers"], "--balance_centers is True"),
        ("histo_lora", ["one center", "--domain_loss=coral"], "--domain_loss is 'coral'"),
        ("histo_lora", ["one center", "--normalization=rgb", "--stain_mixing=0.5"], "--stain_mixing is 0.5"),
        ("histo_lora", ["one center", "--normalization=rgb", "--virtual_stain=0.5"], "--virtual_stain is 0.5"),
        ("histo_lora", ["no batch norm", "--batch_norm=track"], "--batch_norm is 'track'"),
        ("histo_lora", ["no batch norm", "--adapt_batch_norm"], "--adapt_batch_norm is True"),
        ("histo_lora", ["--level=1"], "--level is 1"),
        ("histo_lora", ["--lr_scheduler_type=constant", "--warmup_steps=5"], "--warmup_steps is 5"),
        ("histo_lora", ["--lr_scheduler_type=reduce_lr_on_plateau", "--warmup_steps=5"], "--warmup_steps is 5"),
        ("histo_lora", ["--init_adapter=a", "--init_lora_weights=pissa"], "--init_lora_weights is 'pissa'"),
        ("histo_lora", ["--shots=2", "--iterations_per_shot=3", "--num_train_epochs=4"], "--num_train_epochs is 4"),
        ("histo_lora", ["--method=linear", "--activation_checkpointing"], "--activation_checkpointing is True"),
        ("histo_lora", ["--method=pca", "--augmentation=flips"], "--augmentation is 'flips'"),
        ("histo_lora", ["--method=pca", "--class_balance=sampling"], "--class_balance is 'sampling'"),
        ("histo_lora", ["--method=pca", "--batch_norm=track"], "--batch_norm is 'track'"),
        ("histo_lora", ["--method=pca", "--mixed_precision=bf16"], "--mixed_precision is 'bf16'"),
        ("histo_lora", ["--method=pca", "--torch_compile"], "--torch_compile is True"),
        ("histo_lora", ["--method=pca", "--preview"], "--preview is True"),
        ("histo_lora", ["--method=pca", "--text_prompt=a {}"], "--text_prompt is 'a {}'"),
        ("histo_lora", ["--label_column=finding"], "--label_column is 'finding'"),
        ("histo_lora", ["--split=clean", "--test_centers=3"], "--test_centers is '3'"),
        ("leave_one_center_out", ["--test_centers=3"], "--test_centers is '3'"),
        ("cross_validate", ["--test_centers=3"], "--test_centers is '3'"),
        ("leave_one_center_out", ["--pool_centers"], "--pool_centers is True"),
        ("leave_one_center_out", ["streamed", "--streaming"], "--streaming is True"),
        ("cross_validate", ["--pool_centers"], "--pool_centers is True"),
        ("cross_validate", ["streamed", "--split=files", "--streaming"], "--streaming is True"),
        ("few_shot", ["streamed", "--streaming"], "--streaming is True"),
        ("pareto", ["--target_modules=all-conv"], "--target_modules is 'all-conv'"),
        ("pareto", ["--method=linear"], "--method is 'linear'"),
        ("sweep", ["--lora_dropout=0.2"], "--lora_dropout is 0.2"),
        ("few_shot", ["--aggregation=mean"], "--aggregation is 'mean'"),
        ("benchmark", ["--aggregation=mean"], "--aggregation is 'mean'"),
        ("benchmark", ["--init_adapter=a"], "--init_adapter is 'a'"),
        ("benchmark", ["--method=pca"], "--method is 'pca'"),
        ("benchmark", ["--steps=9"], "--steps is 9"),
        ("benchmark", ["--per_device_train_batch_size=9"], "--per_device_train_batch_size is 9"),
        ("few_shot", ["--methods", "knn", "--learning_rate=0.1"], "--learning_rate is 0.1"),
        ("few_shot", ["published"], "split is 'published', expected 'files'"),
        ("few_shot", ["two backbones"], "--backbone is "),
    ],
)
def test_an_idle_option_is_refused(
    recipe: str,
    given: list[str],
    idle: str,
    source: Source,
    other_sources: dict[str, list[str]],
    reached: Callable[..., Reached],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(finetune, "run_config", RUN_CONFIG)  # which looks at the data and the backbone first
    arguments = [argument for one in given for argument in other_sources.get(one, [one])]
    with pytest.raises(HistoError) as caught:
        reached(recipe, *arguments, output_dir=tmp_path / "out")
    assert idle in str(caught.value)
