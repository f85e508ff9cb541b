"""The parser of options: from a YAML file and the command line to a `Config`.

A YAML file (`--config`) sets values, the command line wins over it, and an unknown key is an error that names the
nearest known one. Both go through the same parser, so a value is checked the same way wherever it comes from.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from functools import cache
from numbers import Number
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from hf_histo.config.checks import (
    check_bounds,
    check_pairs,
    effective,
    ineffective,
    needed,
    require_data,
    require_effective,
)
from hf_histo.config.options import (
    BUILTIN_LEARNING_RATE,
    FOR_CENTERS,
    GROUPS,
    OPTIONS,
    RULES,
    Config,
    current,
    rule_of,
)
from hf_histo.config.packaged import PROGRAM, as_commands, config_file
from hf_histo.errors import HistoError, did_you_mean, idle_option
from hf_histo.files import read_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PATH = "PATH"  # in `--help`, for a value that a shell completes as a path
Extra = TypeVar("Extra")
Command = TypeVar("Command", bound="DataclassInstance")


def parse(usage: str | None, arguments: Sequence[str] | None = None, **defaults: Any) -> Config:
    """Parse `arguments` (default: the command line) into a `Config`.

    `usage` is the recipe's docstring, shown by `--help`; `defaults` are options for which it has values of its
    own. YAML values go through the parser as if they stood first on the command line. Where an option of the file
    cannot act because the command line chose otherwise (`lora_rank` with `--method linear`), it takes its default.

    Raises `HistoError` for an unknown option or YAML key (with the nearest known one), a value of the wrong type or
    out of bounds, an option that was given and cannot act, and a file that is missing or not a mapping.
    """
    return _parse(usage, arguments, [], defaults)[0]


def parse_fine_tuning(usage: str | None, arguments: Sequence[str] | None = None) -> Config:
    """`parse` for a fine-tuning, which without `--config` has the defaults that are best on validation.

    They are `FOR_CENTERS`, which the data may take back (see `Config.unchosen`), and `BUILTIN_LEARNING_RATE`. An option
    of them that cannot act beside those that are given takes its own default, as does `stain_mixing` beside
    `--augmentation none`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = _given(arguments)
    if "config" in given:
        return parse(usage, arguments)
    defaults = {name: value for name, value in FOR_CENTERS.items() if name not in given}
    if "virtual_stain" in given:  # a view gets one of them
        defaults.pop("stain_mixing", None)
    config = parse(usage, arguments, **defaults)
    if config.augmentation.augmentation == "none" and "stain_mixing" in defaults:
        config.centers.stain_mixing = 0.0
    config.unchosen = frozenset(name for name in defaults if config.flat()[name] != OPTIONS[name].default)
    if config.model.backbone == "builtin" and config.adapter.method == "lora" and "learning_rate" not in given:
        config.training.learning_rate = BUILTIN_LEARNING_RATE
    return config


def parse_options(options: Mapping[str, Any], config: str | Path | Config | None = None) -> Config:
    """The `Config` of options by name, as keyword arguments are: checked as on a command line; they win over `config`.

    Without `config`, the defaults are those of `parse_fine_tuning`.

    Args:
        options: their values; None is the default, as if the option was not given.
        config: what `--config` takes, a YAML file or the name of a packaged one; or a `Config`.

    Raises `HistoError` as `parse` does, and for None where `config` has another value.
    """
    arguments = _as_arguments(options, "")
    if config is None:
        return parse_fine_tuning(None, arguments)
    base = _as_arguments(config.flat(), "") if isinstance(config, Config) else _yaml_arguments(str(config))
    for argument in base:
        name, value = argument[2:].split("=", 1)
        if name in options and options[name] is None and value != str(OPTIONS[name].default):
            raise HistoError(f"{name} is None, and config has {value}; give a value, or leave it out")
    if isinstance(config, Config):
        return _parse(None, [*base, *arguments], [], {}, given=_given(arguments))[0]
    return parse(None, [f"--config={config}", *arguments])


def parse_with(
    extra: type[Extra],
    usage: str | None,
    arguments: Sequence[str] | None = None,
    *,
    is_shared: bool = False,
    **defaults: Any,
) -> tuple[Config, Extra]:
    """`parse` for a recipe with options of its own: `extra` is a dataclass like the groups of `Config`.

    A YAML file can't set these, so that it means the same to every recipe. With `is_shared`, the command line holds
    for several configs, of which none is its `--config`: an option that cannot act with this one takes its default.

    Raises `HistoError` as `parse` does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if is_shared and "config" in _given(arguments):
        raise HistoError("--config is one config, expected the option that takes several; give it there")
    config, (own,) = _parse(usage, arguments, [extra], defaults, given=() if is_shared else None)
    _refuse_ineffective(own)
    return config, own


def parse_each(extra: type[Any], files: Sequence[str], arguments: Sequence[str] | None = None) -> list[Config]:
    """The config in each of `files`, with the options of the command line, which hold for all of them.

    An option that cannot act with one of them takes its default there. Raises `HistoError` as `parse` does, and for an
    option that acts with none of them.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    configs = [_read(None, ["--config", file, *arguments], [extra], {})[0] for file in files]
    idle = [ineffective(config.flat()) for config in configs]
    for name in _given(arguments):
        if idle and all(name in of_one for of_one in idle):
            raise HistoError(f"--{name} is {configs[0].flat()[name]!r}, which {idle[0][name]}; leave it out")
    return [_parse(None, ["--config", file, *arguments], [extra], {}, given=())[0] for file in files]


def refuse_given(config: Config, reasons: Mapping[str, str], arguments: Sequence[str] | None = None) -> None:
    """Raise `HistoError` for an option on the command line (or in `arguments`) that a recipe's own options decide.

    `reasons` are sentences by the names of such options. Those options win over a YAML file, as the command line does.
    """
    given = _given(sys.argv[1:] if arguments is None else arguments)
    for name, reason in reasons.items():
        if name in given:
            raise idle_option(name, config.flat()[name], reason)


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """The same options but for some, with bounds checked as on the command line; raises `HistoError` as `parse` does.

    An option that cannot act beside the others takes its default.
    """
    return _parse(None, _as_arguments(config.flat() | dict(options), ""), [], {}, given=())[0]


def parse_command(
    kind: type[Command], usage: str | None, arguments: Sequence[str] | None = None, *, first: str | None = None
) -> Command:
    """Parse `arguments` (default: the command line) into the options of a command that is no run.

    `usage` is the recipe's docstring, shown by `--help`; `first` is an option whose value, or values, may stand first,
    without its name. Raises `HistoError` for an unknown option (with the nearest known one), one that is missing, a
    value of the wrong type or out of bounds, and an option that cannot act.
    """
    groups: list[Any] = [kind]  # Any: the type of transformers is one
    parser = _Parser(groups, usage="%(prog)s [--OPTION VALUE ...]", description=_about(usage), **_STYLE)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if first and arguments and not arguments[0].startswith("-") and arguments[0] is not _DESCRIBE:
        arguments.insert(0, f"--{first}")
    (options,) = _fill(parser, groups, arguments)
    _refuse_ineffective(options)
    return options  # type: ignore[no-any-return]


def _refuse_ineffective(options: Any) -> None:
    """Raise `HistoError` for an option of a recipe's own dataclass that cannot act beside the others there."""
    require_effective(vars(options), {option.name: option for option in dataclasses.fields(options)})


def _about(usage: str | None) -> str | None:
    """A recipe's docstring, in the words of whoever started it."""
    return as_commands(usage) if usage and sys.argv[0].startswith(f"{PROGRAM} ") else usage


def parser_of(main: Callable[[], object]) -> argparse.ArgumentParser:
    """The parser of the options of a recipe, by its `main`, which is not run."""
    before = sys.argv
    sys.argv = [before[0], _DESCRIBE]
    try:
        main()
    except _DescribedError as described:
        return described.parser
    finally:
        sys.argv = before
    raise AssertionError("a recipe parses its options first")


_DESCRIBE = "describe the options"  # recognized by its identity, which no argument of a process has


class _DescribedError(Exception):
    """The parser of a program whose arguments are `_DESCRIBE`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def spellings(action: argparse.Action) -> list[str]:
    """How an option is written: with underscores, not also with hyphens."""
    return [text for text in action.option_strings if "_" in text or "-" not in text.lstrip("-")]


class _Refusing(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise HistoError(f"{message}; --help lists the options")


class _Help(argparse.Action):
    """Print the common options, or, as `--help_all`, every option, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        shows_all = "--help_all" in self.option_strings
        for action in parser._actions:
            if action.dest in RULES:
                action.help = _every_help(action.dest) if shows_all else _common_help(action.dest)
        about, options, groups = parser.format_help().partition("\noptions:\n")
        print(about + options + (groups if shows_all else groups.replace("\n\n", "\n")), end="")  # one screen
        parser.exit()


def _common_help(name: str) -> str:
    return str(OPTIONS[name].metadata["help"]) if RULES[name].common else argparse.SUPPRESS


def _every_help(name: str) -> str:
    """The help text of an option, with the bounds of its values and what it acts with."""
    rule = RULES[name]
    notes = [
        rule.details,
        rule.expected(),
        *(needed(other, wanted, OPTIONS[other].default) for other, wanted in rule.needs.items()),
    ]
    return "; ".join([OPTIONS[name].metadata["help"], *filter(None, notes)])


class _Parser(_Refusing, HfArgumentParser):
    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
        bare = copy.copy(field)
        value = rule_of(field).bare
        optional = {} if value is None else {"nargs": "?", "const": value}
        # argparse takes no other entries.
        bare.metadata = MappingProxyType({"help": field.metadata["help"], **optional})
        HfArgumentParser._parse_dataclass_field(parser, bare)
        action = parser._actions[-1]
        if rule_of(field).is_path or action.type is Path:
            action.metavar = PATH


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The recipe's docstring as it is written; a default only where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """One spelling of an option, not also the one with hyphens; its choices, or what kind of value it takes."""
        kind = "" if action.nargs == 0 or action.const is True else f" {_kind(action)}"
        kind = f" [{kind[1:]}]" if kind and action.const else kind
        return ", ".join(spellings(action)) + kind + (" ..." if action.nargs == "+" else "")


_STYLE: dict[str, Any] = {"formatter_class": _HelpFormatter, "allow_abbrev": False}  # Any: arguments of argparse


def _kind(action: argparse.Action) -> str:
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return {int: "N", float: "X"}.get(action.type, action.metavar or "TEXT")  # type: ignore[call-overload,no-any-return]


@cache
def _parser(program: str, usage: str | None, groups: tuple[Any, ...], defaults: tuple[tuple[str, Any], ...]) -> _Parser:
    """The parser of a command, kept since an experiment reads many configs; argparse takes its name from `program`."""
    usage_line = "%(prog)s [--config YAML] [--OPTION VALUE ...]"
    parser = _Parser(groups, usage=usage_line, description=_about(usage), add_help=False, **_STYLE)
    parser.set_defaults(**dict(defaults))
    parser.add_argument("--config", metavar="YAML", help="file or packaged name; the command line wins")
    parser.add_argument("-h", "--help", action=_Help, help="show the main options")
    parser.add_argument("--help_all", action=_Help, help="show every option")
    return parser


def _read(
    usage: str | None, arguments: Sequence[str], extra: list[type], defaults: Mapping[str, Any]
) -> tuple[Config, list[Any], str | None]:
    """The options as they are given, the recipe's own ones, and the file; values are within their bounds."""
    groups = (*GROUPS.values(), *extra)
    parser = _parser(sys.argv[0], usage, groups, tuple(defaults.items()))
    config_only = _Refusing(add_help=False, allow_abbrev=False)
    config_only.add_argument("--config")
    file = config_only.parse_known_args(list(arguments))[0].config
    *options, _ = _fill(parser, groups, [*(_yaml_arguments(file) if file else []), *arguments])
    shared = len(options) - len(extra)
    return Config(*options[:shared]), options[shared:], file


def _fill(parser: HfArgumentParser, groups: Sequence[type[DataclassInstance]], arguments: Sequence[str]) -> list[Any]:
    """An instance of each of the groups, within their bounds, then what else the parser knows."""
    if arguments and arguments[-1] is _DESCRIBE:
        raise _DescribedError(parser)
    *options, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [f"--{option.name}" for group in groups for option in dataclasses.fields(group)]
        raise HistoError(_unknown("option", unknown[0], known))
    for group in options[: len(groups)]:
        check_bounds(group)
    return options


def _parse(
    usage: str | None,
    arguments: Sequence[str] | None,
    extra: list[type],
    defaults: Mapping[str, Any],
    given: Collection[str] | None = None,
) -> tuple[Config, list[Any]]:
    """As `parse`. `given` are the options that are refused where they cannot act; by default, those of `arguments`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = _given(arguments) if given is None else given
    config, own, file = _read(usage, arguments, extra, defaults)
    values = config.flat()
    if idle := ineffective(values):
        in_file = ineffective(_read(None, [f"--config={file}"], [], defaults)[0].flat()) if file else {}
        for name, reason in idle.items():
            if name in given or name in in_file:
                where = "" if name in given else f"--config {file}: "
                raise HistoError(f"{where}--{name} is {values[name]!r}, which {reason}; leave it out")
        config = Config.of(effective(values))
    check_pairs(config, given)
    if usage is not None:  # a command line, which this machine runs; before the libraries are imported
        require_data(config.data.data)
    return config, own


def _given(arguments: Sequence[str]) -> set[str]:
    """The names of the options on a command line."""
    return {argument[2:].split("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")}


def _yaml_arguments(file: str) -> list[str]:
    try:
        content = yaml.safe_load(read_text(config_file(file)))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise HistoError(f"--config {file}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if content is None:  # an empty file, or one of comments alone
        return []
    if not isinstance(content, dict):
        raise HistoError(f"--config {file}: expected a mapping of options, found {type(content).__name__}")
    if content.get("overwrite_output_dir"):
        found = "overwrite_output_dir is true, by which each use of the file would delete a run"
        raise HistoError(f"--config {file}: {found}; give it on the command line")
    return _as_arguments(content, f"--config {file}: ")


def _as_arguments(values: Mapping[Any, Any], where: str) -> list[str]:
    """Options by name as a command line; `where` starts the message of a `HistoError`."""
    arguments = []
    for key, value in current(values).items():
        if key not in OPTIONS:
            raise HistoError(where + _unknown("key" if where else "option", str(key), list(OPTIONS)))
        if value is None:
            continue
        if isinstance(value, bool) and not isinstance(OPTIONS[key].default, bool):
            raise HistoError(f"{where}{key} is {value}, expected text or a number, not yes or no; correct it")
        if not isinstance(value, str | Path | Number):
            # Not what it holds: a few lines of aliases can stand for more than fits into memory.
            raise HistoError(f"{where}{key} takes one value, found a {_shape(value)}; give text or a number")
        arguments.append(f"--{key}={value}")
    return arguments


def _shape(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, Sized) else kind


def _unknown(kind: str, name: str, known: list[str]) -> str:
    name = name.split("=")[0]
    return f"unknown {kind} {name!r}; {did_you_mean(name, known, '--help_all lists the options')}"
