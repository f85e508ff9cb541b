"""What a run can be told: one dataclass per group of options, and the parser that fills them.

A YAML file (`--config`) sets values, the command line wins over it, and an unknown key is an error that names the
nearest known one. Both go through the same parser, so a value is checked the same way wherever it comes from.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_type_hints

import yaml
from transformers import HfArgumentParser

from hf_histo.errors import HistoError
from hf_histo.files import read_text

Extra = TypeVar("Extra")


def option(default: Any, help: str) -> Any:
    """A dataclass field with its default and its line in `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass
class DataOptions:
    _argument_group_name = "data"

    data: str = option("synthetic", "folder with the data set, hub:OWNER/NAME, or 'synthetic' for the built-in one")
    split: Literal["files", "published", "clean"] = option(
        "files",
        "'files': as they are; 'published': looked at for copies, val cut from train if there is none, and test_clean, "
        "the test images with no copy in training; 'clean': one image of each family of copies, split anew",
    )
    family: Literal["copies", "near"] | None = option(
        None,
        "with --split published or clean: images that stay on one side, copies, or near images as well, such as "
        "neighboring slices of a volume (default: copies; near in cross_validate.py)",
    )
    negative_class: str | None = option(None, "class that means 'nothing found', for sensitivity at a specificity")
    cache_dir: str | None = option(None, "folder of the converted data (default: the datasets library's cache)")
    on_bad_image: Literal["error", "skip"] = option(
        "error", "stop at an image file that can't be read, or leave it out"
    )
    gray_bits: int | None = option(
        None, "bits of 16-bit gray image files, 8 to 16 (default: the fewest of 8, 10, 12, 14, 16 that hold all images)"
    )
    slice_plane: Literal["axial", "coronal", "sagittal"] = option("axial", "how volumes (NIfTI) are cut into slices")
    slices: int | None = option(None, "of a volume, evenly spaced (default: all that the head fills well enough)")
    streaming: bool = option(False, "with hub:..., read training images as they are needed, and keep none")
    pixel_order: Literal["detect", "hwc", "chw"] = option("detect", "order of the columns in a table of pixels")
    pixel_range: Literal["detect", "1", "255"] = option("detect", "largest value in a table of pixels")
    num_workers: int = option(0, "processes that read batches beside each training process")


@dataclass
class ProtocolOptions:
    _argument_group_name = "protocol"

    shots: int | None = option(None, "train on so many images of each class, validate on at most 4 (default: all)")
    percentage: float | None = option(None, "train and validate on that share of each class, above 0 up to 100")
    level: int | None = option(None, "level of a hierarchy of classes, 1 for the coarsest (default: the deepest given)")
    iterations_per_shot: int | None = option(
        None, "with --shots: so many updates for each shot, and those of the warm-up, instead of passes"
    )


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    backbone: str = option("builtin", "'builtin', a local folder, a timm name, or a Hub name (owner/name)")
    revision: str | None = option(None, "branch, tag or commit of a backbone from the Hub")
    random_weights: bool = option(False, "build the backbone without its weights, for checks without a network")
    head: Literal["linear", "mlp"] = option("linear", "classifier: a linear layer, or hidden ones with ReLU before it")
    head_widths: str = option("512,256", "outputs of the hidden layers of an mlp")
    head_on: Literal["features", "logits"] = option("features", "replace the backbone's output layer, or keep it below")
    train_output_layer: bool = option(False, "with --head_on logits, train the backbone's output layer as well")
    head_softmax: bool = option(False, "end the classifier in a softmax before the loss, which has its own: to compare")
    text_prompt: str | None = option(
        None, "CLIP: start the classifier from this sentence about each class, e.g. 'a slide showing a {} cell'"
    )
    head_dropout: float = option(0.0, "dropout before each linear layer of the classifier, in [0, 1)")
    batch_norm: Literal["frozen", "track"] = option("frozen", "keep batch-norm statistics, or let them follow the data")
    image_size: int | None = option(None, "pixels on a side that the model sees (default: the backbone's)")
    resize_size: int | None = option(None, "pixels of the resize before the center crop (default: the backbone's)")
    fit: Literal["crop", "squash", "pad"] | None = option(None, "how images become square (default: the backbone's)")


@dataclass
class AdapterOptions:
    _argument_group_name = "adapter"

    method: Literal["linear", "lora", "full", "pca"] = option(
        "lora", "train the classifier, LoRA + classifier, or all; pca: logistic regression on principal components"
    )
    target_modules: str | None = option(None, "preset or regex of the layers with LoRA (default: by architecture)")
    lora_blocks: Literal["all", "bottom", "mid", "up", "half-bottom", "half-up", "top3"] = option(
        "all", "transformer blocks with LoRA: a third, a half, or the last three"
    )
    lora_rank: int = option(8, "rank of the update")
    lora_alpha: float = option(16.0, "scale of the update: alpha / rank, or alpha / sqrt(rank) with rsLoRA")
    lora_dropout: float = option(0.0, "dropout on the input of the update, in [0, 1)")
    use_rslora: bool = option(False, "rank-stabilized scale")
    use_dora: bool = option(False, "weight-decomposed update")
    init_adapter: str | None = option(
        None, "adapter of another data set whose LoRA weights to start from: folder or Hub"
    )
    init_lora_weights: str = option("default", "initializer: default (A Kaiming, B zero), gaussian, pissa, ...")


@dataclass
class PreparationOptions:
    """Of each image when it is read, in training and prediction alike: see `hf_histo.transforms.mri.Preparation`."""

    _argument_group_name = "preparation"

    gray: bool = option(False, "take out color")
    crop_to_brain: bool = option(False, "cut off the background around the head")
    even_field: bool = option(False, "divide out slow changes of brightness (bias field)")
    contrast: Literal["none", "clahe", "stretch"] = option("none", "equalize locally, or stretch the histogram")


@dataclass
class AugmentationOptions:
    _argument_group_name = "augmentation"

    augmentation: str = option("crop-jitter", "preset: none, flips, resized-crop, crop-jitter, affine, strong, mri")
    training_views: int | None = option(None, "views of an image that epochs take in turn (default: always a new one)")


@dataclass
class CenterOptions:
    _argument_group_name = "centers"

    normalization: Literal["none", "rgb", "reinhard", "macenko"] = option("none", "take out each center's color")
    stain_mixing: float = option(0.0, "probability of training on a mixture of the centers' colors, in [0, 1]")
    pool_centers: bool = option(False, "train on all labeled centers, validate on a tenth of their groups")
    balance_centers: bool = option(False, "draw every training center equally often")
    domain_loss: Literal["none", "group_dro", "coral", "dann"] = option(
        "none", "raise hard centers, or make their features alike"
    )
    domain_weight: float = option(
        1.0, "weight of the CORAL or DANN penalty; for GroupDRO, hundredths of a step of its weights"
    )


@dataclass
class PredictionOptions:
    """What changes nothing of the training: runs that differ in these alone could share an adapter."""

    _argument_group_name = "prediction"

    test_time_views: int = option(
        1, "views whose mean logit is a prediction: 1, or 8 of the square, or any number drawn"
    )
    test_time_augmentation: str = option("square", "every turn and flip of the square, or a preset of --augmentation")
    adapt_batch_norm: bool = option(False, "predict with batch-norm statistics of the images that are predicted")


@dataclass
class TrainingOptions:
    _argument_group_name = "training"

    seed: int = option(0, "seed of the head, the adapter, the order and the augmentation")
    num_train_epochs: float = option(10.0, "passes over the training set")
    max_steps: int | None = option(None, "updates, instead of passes")
    eval_steps: float | None = option(None, "updates between evaluations, or their share if below 1 (default: a pass)")
    per_device_train_batch_size: int = option(32, "training images per device and step")
    per_device_eval_batch_size: int = option(64, "evaluation images per device and step")
    gradient_accumulation_steps: int | None = option(None, "steps per update (default: the launcher's setting, or 1)")
    optimizer: Literal["adam", "adamw", "sgd"] = option("adam", "adam couples weight decay to the gradient")
    learning_rate: float = option(1e-3, "initial learning rate")
    weight_decay: float = option(1e-4, "weight decay")
    lr_scheduler_type: str = option("cosine", "any scheduler name of transformers, e.g. reduce_lr_on_plateau")
    lr_scheduler_patience: int = option(5, "epochs without progress before the plateau scheduler divides by 10")
    warmup_steps: float = option(0.1, "steps of warm-up, or a share of all steps if below 1")
    early_stopping_patience: int = option(10, "epochs without progress before training stops; 0: never")
    metric_for_best_model: str = option("auroc", "validation metric that chooses the checkpoint: auroc, accuracy, loss")
    class_balance: Literal["weights", "sampling", "none"] = option(
        "weights", "against class imbalance: weight the loss, or draw every class equally often"
    )
    resume_from_checkpoint: str | None = option(None, "folder of a checkpoint, or 'last' (the default in a begun run)")
    logging_steps: int = option(10, "updates between two lines of the training log")


@dataclass
class SpeedOptions:
    _argument_group_name = "speed"

    cache_features: Literal["auto", "on", "off"] = option(
        "auto",
        "run what is frozen below the first trained layer once per view, and train on what it gave; auto: if "
        "that is half of the work or more, and changes no result",
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "arithmetic of training; auto: what the launcher says, else bf16 on a GPU that has it, else float32"
    )
    activation_checkpointing: bool = option(False, "compute activations again for the gradient: less memory, more time")
    torch_compile: bool = option(False, "compile the model, for minutes, into faster steps")


@dataclass
class OutputOptions:
    _argument_group_name = "output"

    output_dir: str | None = option(None, "folder of the run (default: runs/DATA-BACKBONE-METHOD-seedN)")
    overwrite_output_dir: bool = option(False, "delete a finished run in the folder, or one with other options")
    preview: bool = option(False, "before training, draw preview.png: what training makes of some images")
    explain: bool = option(False, "draw explanations.png: where the model sees the class it predicts on val")
    push_to_hub: bool = option(False, "upload the adapter folder when the run is done")
    hub_model_id: str | None = option(None, "repository on the Hub: owner/name")
    hub_base_model: str | None = option(None, "name there (owner/name) of a backbone that was a local folder")
    hub_license: str = option("unknown", "license in the model card, by its identifier on the Hub, e.g. apache-2.0")
    hub_private: bool = option(False, "create the repository as private")
    hub_revision: str | None = option(None, "branch of it to write to, made where it is missing (default: main)")
    hub_create_pr: bool = option(False, "open a pull request there instead of writing")


@dataclass
class Config:
    """Everything that decides a run's result. `dataclasses.asdict` of it is what a run records."""

    data: DataOptions = field(default_factory=DataOptions)
    protocol: ProtocolOptions = field(default_factory=ProtocolOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    preparation: PreparationOptions = field(default_factory=PreparationOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    centers: CenterOptions = field(default_factory=CenterOptions)
    prediction: PredictionOptions = field(default_factory=PredictionOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def flat(self) -> dict[str, Any]:
        """All options in one mapping: what a YAML file for `--config` holds."""
        return {key: value for group in dataclasses.asdict(self).values() for key, value in group.items()}

    def at(self, output_dir: str | Path, seed: int) -> Config:
        """The same options for a run of its own: another folder and seed."""
        return dataclasses.replace(
            self,
            training=dataclasses.replace(self.training, seed=seed),
            output=dataclasses.replace(self.output, output_dir=str(output_dir)),
        )

    def parent_folder(self) -> Path:
        """`--output_dir`, where it is to hold several runs; raises `HistoError` for options that are of one run."""
        if self.output.output_dir is None:
            raise HistoError("--output_dir is not given, expected a folder for the runs")
        for name, value in (
            ("push_to_hub", self.output.push_to_hub),
            ("resume_from_checkpoint", self.training.resume_from_checkpoint),
        ):
            if value:
                raise HistoError(
                    f"--{name} is {value!r}, which is for one run and not for several; leave it out (begun runs go on "
                    "by themselves)"
                )
        return Path(self.output.output_dir)


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """The same options but for some, which are checked as on the command line; raises `HistoError` as `parse` does."""
    values = config.flat() | dict(options)
    return parse(None, [f"--{name}={value}" for name, value in values.items() if value is not None])


class _Refusing(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise HistoError(f"{message}; --help lists the options")


class _Parser(_Refusing, HfArgumentParser):
    pass


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The recipe's docstring as it is written; a default only where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """One spelling of an option, not also the one with hyphens."""
        spellings = [s for s in action.option_strings if "_" in s or "-" not in s.lstrip("-")]
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(spellings) + value


def parse(usage: str | None, arguments: Sequence[str] | None = None, **defaults: Any) -> Config:
    """Parse `arguments` (default: the command line) into a `Config`.

    `usage` is the recipe's docstring, shown by `--help`; `defaults` are options for which it has values of its
    own. YAML values go through the parser as if they stood first on the command line.

    Raises `HistoError` for an unknown option or YAML key (with the nearest known one), a value of the wrong type or
    out of range, and a file that is missing or not a mapping.
    """
    return _parse(usage, arguments, [], defaults)[0]


def parse_with(
    extra: type[Extra], usage: str | None, arguments: Sequence[str] | None = None, **defaults: Any
) -> tuple[Config, Extra]:
    """`parse` for a recipe with options of its own: `extra` is a dataclass like the groups of `Config`.

    A YAML file can't set these, so that it means the same to every recipe.
    """
    config, (own,) = _parse(usage, arguments, [extra], defaults)
    return config, own


def _parse(
    usage: str | None, arguments: Sequence[str] | None, extra: list[type], defaults: Mapping[str, Any]
) -> tuple[Config, list[Any]]:
    groups = [*get_type_hints(Config).values(), *extra]
    parser = _Parser(
        groups,
        usage="%(prog)s [--config YAML] [--OPTION VALUE ...]",
        description=usage,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**defaults)
    parser.add_argument("--config", metavar="YAML", help="file with any of these options; the command line wins")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = [f.name for group in groups for f in dataclasses.fields(group)]

    config_only = _Refusing(add_help=False, allow_abbrev=False)
    config_only.add_argument("--config")
    file = config_only.parse_known_args(arguments)[0].config
    *options, _, unknown = parser.parse_args_into_dataclasses(
        [*(_yaml_arguments(file, list(Config().flat())) if file else []), *arguments],
        return_remaining_strings=True,
        look_for_args_file=False,
    )
    if unknown:
        raise HistoError(_unknown("option", unknown[0], [f"--{name}" for name in known]))
    shared = len(options) - len(extra)
    return _validated(Config(*options[:shared])), options[shared:]


def _yaml_arguments(file: str, known: Sequence[str]) -> list[str]:
    try:
        content = yaml.safe_load(read_text(file))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise HistoError(f"--config {file}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if content is None:  # an empty file, or one of comments alone
        return []
    if not isinstance(content, dict):
        raise HistoError(f"--config {file}: expected a mapping of options, found {type(content).__name__}")
    arguments = []
    if content.get("overwrite_output_dir"):
        found = "overwrite_output_dir is true, by which each use of the file would delete a run"
        raise HistoError(f"--config {file}: {found}; give it on the command line")
    for key, value in content.items():
        if key not in known:
            raise HistoError(f"--config {file}: " + _unknown("key", str(key), list(known)))
        if isinstance(value, dict | list):
            # Not what it holds: a few lines of aliases can stand for more than fits into memory.
            raise HistoError(f"--config {file}: {key} takes one value, found a {type(value).__name__} of {len(value)}")
        if value is not None:
            arguments.append(f"--{key}={value}")
    return arguments


def _unknown(kind: str, name: str, known: list[str]) -> str:
    name = name.split("=")[0]
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}; " + (f"did you mean {near[0]!r}?" if near else "--help lists the options")


def _validated(config: Config) -> Config:
    values = config.flat()
    limits: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "at least 0": (
            "num_workers weight_decay domain_weight warmup_steps lr_scheduler_patience early_stopping_patience seed",
            lambda value: value >= 0,
        ),
        "more than 0": (
            "num_train_epochs per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
            "learning_rate lora_rank lora_alpha image_size resize_size logging_steps shots percentage level max_steps "
            "iterations_per_shot eval_steps training_views slices",
            lambda value: value > 0,
        ),
        "in [0, 1)": ("head_dropout lora_dropout", lambda value: 0 <= value < 1),
        "at most 100": ("percentage", lambda value: value <= 100),
        "from 8 to 16": ("gray_bits", lambda value: 8 <= value <= 16),
        "at most 4294967295": ("seed", lambda value: value < 2**32),  # NumPy's limit
    }
    for name, value in values.items():
        if isinstance(value, float) and math.isinf(value):
            raise HistoError(f"--{name} is {value}, expected a finite number")
    for expected, (names, holds) in limits.items():
        for name in names.split():
            if values[name] is not None and not holds(values[name]):
                raise HistoError(f"--{name} is {values[name]}, expected {expected}")
    if config.data.streaming:
        _check_streaming(config)
    if not 0 <= config.centers.stain_mixing <= 1:
        raise HistoError(f"--stain_mixing is {config.centers.stain_mixing}, expected in [0, 1]")
    if config.centers.stain_mixing and config.centers.normalization == "none":
        raise HistoError("--stain_mixing needs --normalization rgb, reinhard or macenko: the space it mixes in")
    output = config.output
    if output.push_to_hub and (output.hub_model_id or "").count("/") != 1:
        raise HistoError(f"--push_to_hub: --hub_model_id is {output.hub_model_id!r}, expected owner/name")
    if (base := output.hub_base_model) and (
        base.count("/") != 1 or not Path(config.model.backbone).expanduser().is_dir()
    ):
        raise HistoError(f"--hub_base_model is {base!r}, expected owner/name, with a --backbone that is a local folder")
    if output.hub_revision and output.hub_create_pr:
        raise HistoError("--hub_revision and --hub_create_pr exclude each other: a pull request has its own branch")
    return config


def _check_streaming(config: Config) -> None:
    if not config.data.data.startswith("hub:"):
        raise HistoError(f"--streaming needs --data hub:..., the name or folder of shards, not {config.data.data}")
    if config.data.num_workers > 1 or config.model.text_prompt or config.output.preview:
        raise HistoError("--streaming goes with --num_workers 0 or 1, and without --text_prompt and --preview")
    if (config.centers, config.protocol) != (CenterOptions(), ProtocolOptions()):
        raise HistoError("--streaming knows no centers and takes all images: leave out the options of both")
    if config.data.split != "files" or config.training.class_balance == "sampling" or config.adapter.method == "pca":
        raise HistoError("--streaming sees an image once: leave out --split, --class_balance sampling and --method pca")
