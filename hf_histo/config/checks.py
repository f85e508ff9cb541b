"""What is wrong with a set of options: values out of bounds, options that cannot act, and pairs that contradict."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hf_histo.config.options import (
    HUB,
    OPTIONS,
    SET,
    SYNTHETIC,
    CenterOptions,
    Config,
    Except,
    ProtocolOptions,
    rule_of,
)
from hf_histo.errors import HistoError

Options = Mapping[str, dataclasses.Field[Any]]


def check_bounds(group: Any) -> None:
    """Raise `HistoError` for a value of an options dataclass that is outside its bounds, or not finite.

    Of a list, that is each value in it.
    """
    for option in dataclasses.fields(group):
        rule, given = rule_of(option), getattr(group, option.name)
        for value in (each for each in (given if isinstance(given, list) else [given]) if not rule.allows(each)):
            infinite = isinstance(value, float) and not abs(value) < float("inf")
            expected = " ".join(filter(None, ["a finite number" if infinite else "", rule.expected()]))
            raise HistoError(f"--{option.name} is {value}, expected {expected}")


def ineffective(values: Mapping[str, Any], options: Options = OPTIONS) -> dict[str, str]:
    """The options that are not at their default and cannot act beside the others, with the reason.

    Args:
        values: options by name; those that are absent are at their default.
        options: all that there are, by name.
    """
    found = {}
    for name in values.keys() & options.keys():
        rule = rule_of(options[name])
        if values[name] not in (_default_of(options[name]), *rule.exempt):
            for other, wanted in rule.needs.items():
                default = _default_of(options[other])
                if not _holds(default, values.get(other, default), wanted):
                    found[name] = f"acts only {needed(other, wanted, default)}"
    return {name: found[name] for name in options if name in found}


def require_effective(values: Mapping[str, Any], options: Options = OPTIONS) -> None:
    """Raise `HistoError` for the first option of `ineffective`."""
    for name, reason in ineffective(values, options).items():
        raise HistoError(f"--{name} is {values[name]!r}, which {reason}; leave it out")


def effective(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same options, with the default in place of each value that cannot act: equal where runs are the same."""
    return {**values, **{name: OPTIONS[name].default for name in ineffective(values)}}


def _default_of(option: dataclasses.Field[Any]) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _holds(default: Any, value: Any, wanted: Any) -> bool:
    if wanted == SET:
        return bool(value != default)
    if isinstance(wanted, Except):
        return value not in wanted.values
    return value in wanted if isinstance(wanted, tuple) else bool(value == wanted)


def needed(other: str, wanted: Any, default: Any = None) -> str:
    """An entry of `Rule.needs` in words, e.g. "with --method lora"; `default` is that of `other`."""
    if wanted is None or wanted is False:
        return f"without --{other}"
    if wanted == SET:
        return f"with --{other}" + (f" other than {default}" if default is not None else "")
    if isinstance(wanted, Except):
        return f"with --{other} other than {_listed(wanted.values)}"
    if isinstance(wanted, tuple):
        return f"with --{other} {_listed(wanted)}"
    return f"with --{other}" if wanted is True else f"with --{other} {wanted}"


def _listed(values: tuple[str, ...]) -> str:
    return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))


def check_pairs(config: Config, given: Collection[str] = ()) -> None:
    """Raise `HistoError` for options that contradict each other; `given` are the names on the command line."""
    if config.data.streaming:
        _check_streaming(config)
    _check_updates(config, given)
    _check_views(config, given)
    _check_colors(config)
    _check_revision(config, given)
    _check_hub(config)
    _check_update_scale(config.adapter.update_scale)
    if config.adapter.name == "ln_tuning" and config.model.batch_norm == "track":
        raise HistoError(
            "--batch_norm is track with --adapter ln_tuning, which trains scale and shift of the norms and saves their "
            "statistics as they were; leave it out"
        )


def _check_update_scale(text: str) -> None:
    try:
        fits = text == "auto" or 0 <= float(text) <= 1
    except ValueError:
        fits = False
    if not fits:
        raise HistoError(f"--update_scale is {text!r}, expected auto or a number from 0 to 1")


def require_data(data: str) -> None:
    """Raise `HistoError` for a `--data` that is a path, and neither a file nor a folder."""
    if data != SYNTHETIC and not data.startswith(HUB) and not (Path(data).is_dir() or Path(data).is_file()):
        raise HistoError(f"{data}: no such folder; give the folder that holds the data set")


def _check_streaming(config: Config) -> None:
    if not config.data.data.startswith(HUB):
        raise HistoError(f"--streaming needs --data hub:..., the name or folder of shards, not {config.data.data}")
    if config.data.num_workers > 1 or config.model.text_prompt or config.output.preview:
        raise HistoError("--streaming goes with --num_workers 0 or 1, and without --text_prompt and --preview")
    if (config.centers, config.protocol) != (CenterOptions(), ProtocolOptions()):
        raise HistoError("--streaming knows no centers and takes all images: leave out the options of both")
    if config.data.split != "files" or config.training.class_balance == "sampling" or config.adapter.method == "pca":
        raise HistoError("--streaming sees an image once: leave out --split, --class_balance sampling and --method pca")


def _check_updates(config: Config, given: Collection[str]) -> None:
    """A config may hold `iterations_per_shot` for the runs with `--shots` alone; the command line may not."""
    protocol = config.protocol
    if protocol.shots is None and "iterations_per_shot" in given and protocol.iterations_per_shot:
        raise HistoError(
            f"--iterations_per_shot is {protocol.iterations_per_shot}, which acts only with --shots; leave it out"
        )
    training, counts = config.training, protocol.shots and protocol.iterations_per_shot
    if counts and "num_train_epochs" in given:
        raise HistoError(
            f"--num_train_epochs is {training.num_train_epochs:g}, which acts only without "
            f"--iterations_per_shot, and that is {protocol.iterations_per_shot}; leave it out"
        )
    if counts and training.max_steps:
        raise HistoError(
            f"--max_steps is {training.max_steps} and --iterations_per_shot is {protocol.iterations_per_shot}, "
            "which both set the number of updates; leave one out"
        )


def _check_views(config: Config, given: Collection[str]) -> None:
    views, changes = config.augmentation.training_views, config.augmentation.augmentation != "none"
    colors = config.centers.stain_mixing or config.centers.virtual_stain
    if views and "training_views" in given and not (changes or colors):
        reason = "which acts only with --augmentation other than none, or with --stain_mixing or --virtual_stain"
        raise HistoError(f"--training_views is {views}, {reason}; leave it out")


def _check_colors(config: Config) -> None:
    mixed, virtual = config.centers.stain_mixing, config.centers.virtual_stain
    if mixed + virtual > 1:
        raise HistoError(
            f"--stain_mixing is {mixed:g} and --virtual_stain is {virtual:g}, but a view gets one of them: expected "
            "probabilities that sum to 1 or less; lower one"
        )


def _check_revision(config: Config, given: Collection[str]) -> None:
    model = config.model
    is_local = model.backbone == "builtin" or Path(model.backbone).expanduser().is_dir()
    if model.revision and "revision" in given and is_local:
        raise HistoError(
            f"--revision is {model.revision!r}, which acts only on a backbone from the Hub, and {model.backbone} is on "
            "this machine; leave it out"
        )


def _check_hub(config: Config) -> None:
    output = config.output
    if not output.push_to_hub:
        return
    if (output.hub_model_id or "").count("/") != 1:
        raise HistoError(f"--push_to_hub: --hub_model_id is {output.hub_model_id!r}, expected owner/name")
    if (base := output.hub_base_model) and (
        base.count("/") != 1 or not Path(config.model.backbone).expanduser().is_dir()
    ):
        raise HistoError(f"--hub_base_model is {base!r}, expected owner/name, with a --backbone that is a local folder")
    if output.hub_revision and output.hub_create_pr:
        raise HistoError("--hub_revision and --hub_create_pr exclude each other: a pull request has its own branch")
