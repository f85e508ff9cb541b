"""Options of commands other than training runs, which are parsed as strictly."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hf_histo.config import commands, parse_command
from hf_histo.config.commands import (
    AcceptanceStudyOptions,
    EvaluateOptions,
    ExportOptions,
    ImportBackboneOptions,
    PredictOptions,
)
from hf_histo.config.options import rule_of
from hf_histo.errors import HistoError

NEEDED = ["--adapter", "A", "--data", "D", "--output", "O.csv"]
COMMANDS = [
    kind for name, kind in vars(commands).items() if name.endswith("Options") and kind.__module__ == commands.__name__
]


def test_values_have_their_types() -> None:
    options = parse_command(PredictOptions, None, [*NEEDED, "--batch_size", "8", "--explain", "E.png"])
    assert (options.output, options.explain, options.batch_size, options.split) == (
        Path("O.csv"),
        Path("E.png"),
        8,
        "test",
    )
    assert (options.balanced, options.adapt_batch_norm) == (None, None)


@pytest.mark.parametrize(("given", "balanced"), [(["--balanced"], 0.5), (["--balanced", "0.3"], 0.3)])
def test_an_option_whose_value_may_be_left_out(given: list[str], balanced: float) -> None:
    assert parse_command(PredictOptions, None, [*NEEDED, *given]).balanced == balanced


@pytest.mark.parametrize(("given", "adapts"), [([], True), (["false"], False)])
def test_a_choice_that_overrules_the_adapter(given: list[str], adapts: bool) -> None:
    assert parse_command(PredictOptions, None, [*NEEDED, "--adapt_batch_norm", *given]).adapt_batch_norm is adapts


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (PredictOptions, ["--adapter", "A"], "required: --data, --output"),
        (PredictOptions, [*NEEDED, "--batch_sise", "4"], "unknown option '--batch_sise'; did you mean '--batch_size'?"),
        (PredictOptions, [*NEEDED, "--batch_size", "0"], "--batch_size is 0, expected at least 1"),
        (
            AcceptanceStudyOptions,
            ["--runs", "R", "--output_dir", "O", "--counts", "20", "0"],
            "--counts is 0, expected at least 1",
        ),
        (PredictOptions, [*NEEDED, "--balanced", "--threshold", "0.4"], "--balanced is 0.5.* without --threshold"),
        (ExportOptions, ["--adapter", "A", "--output_dir", "O", "--format", "gguf"], "invalid choice: 'gguf'"),
        (EvaluateOptions, ["--predictions", "P", "--output_dir", "O", "--criterion", "f1"], "only with --threshold_on"),
        (ImportBackboneOptions, ["--list", "--backbone", "uni"], "--list is True.* without --backbone"),
    ],
)
def test_mistakes_are_one_line(kind: type, arguments: list[str], message: str) -> None:
    with pytest.raises(HistoError, match=message):
        parse_command(kind, None, arguments)


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_help_names_every_option(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_command(kind, "What it does.", ["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "What it does." in shown
    for option in dataclasses.fields(kind):
        assert re.search(rf"^  --{option.name}\b", shown, re.MULTILINE)


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_needs_name_options_of_the_command(kind: type) -> None:
    names = {option.name for option in dataclasses.fields(kind)}
    assert {other for option in dataclasses.fields(kind) for other in rule_of(option).needs} <= names
