"""Options as a user gives them: a YAML file, the command line, and what is wrong with either."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml

from hf_histo.config import Config, parse, with_options
from hf_histo.errors import HistoError

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> str:
    file = folder / "options.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def refusal(*arguments: str) -> str:
    """The message with which `arguments` are refused, which is one line."""
    with pytest.raises(HistoError) as caught:
        parse(None, arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_given_is_the_defaults() -> None:
    assert parse(None, []) == Config()


def test_yaml_sets_and_the_command_line_wins(tmp_path: Path) -> None:
    file = write(tmp_path, "lora_rank: 4\nseed: 7\nmethod: linear\n")
    config = parse(None, ["--seed", "9", "--config", file])
    assert (config.adapter.lora_rank, config.adapter.method, config.training.seed) == (4, "linear", 9)
    assert parse(None, [f"--config={file}", "--method=lora"]).adapter.method == "lora"


def test_a_recorded_run_is_a_config(tmp_path: Path) -> None:
    config = parse(None, ["--use_dora", "--learning_rate", "3e-5", "--target_modules", r".*\.(a|b): #'\""])
    assert parse(None, ["--config", write(tmp_path, yaml.safe_dump(config.flat()))]) == config


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_a_learning_rate_as_it_is_written(tmp_path: Path, text: str) -> None:
    assert parse(None, ["--config", write(tmp_path, f"learning_rate: {text}")]).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "expected"), [("true", True), ("false", False), ("yes", True), ("off", False), ("null", False)]
)
def test_booleans_in_yaml(tmp_path: Path, text: str, expected: bool) -> None:
    assert parse(None, ["--config", write(tmp_path, f"use_dora: {text}")]).adapter.use_dora is expected


def test_booleans_on_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, "use_dora: true")
    assert parse(None, ["--use_dora"]).adapter.use_dora is True
    assert parse(None, ["--config", file, "--use_dora", "false"]).adapter.use_dora is False
    assert "perhaps" in refusal("--use_dora", "perhaps")


def test_null_is_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, "target_modules: null\nrevision:\ngradient_accumulation_steps: null\nseed: null\n")
    assert parse(None, ["--config", file]) == Config()


def test_numbers_and_switches_for_a_text_option_stay_text(tmp_path: Path) -> None:
    assert parse(None, ["--config", write(tmp_path, "revision: 1234567")]).model.revision == "1234567"


def test_a_value_that_looks_like_an_option(tmp_path: Path) -> None:
    assert parse(None, ["--config", write(tmp_path, "data: --seed")]).data.data == "--seed"


def test_an_unknown_key_suggests_the_nearest(tmp_path: Path) -> None:
    message = refusal("--config", write(tmp_path, "lora_rang: 4"))
    assert "options.yaml" in message
    assert "'lora_rang'" in message
    assert "'lora_rank'" in message
    assert "--help" in refusal("--config", write(tmp_path, "xyzzy: 4"))
    assert "unknown key '7'" in refusal("--config", write(tmp_path, "7: 4"))


@pytest.mark.parametrize("given", [["--lora_rang", "4"], ["--lora_rang=4"], ["--seed", "1", "--lora_rang"]])
def test_an_unknown_option_suggests_the_nearest(given: list[str]) -> None:
    message = refusal(*given)
    assert "'--lora_rang'" in message
    assert "'--lora_rank'" in message


def test_an_abbreviation_is_no_option() -> None:
    assert "'--learning'" in refusal("--learning", "1")


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_rank", "high"), ("lora_rank", "2.5"), ("learning_rate", "fast"), ("method", "prompt"), ("use_dora", "2")],
)
def test_a_value_of_the_wrong_type(tmp_path: Path, key: str, value: str) -> None:
    for message in (refusal(f"--{key}", value), refusal("--config", write(tmp_path, f"{key}: {value}"))):
        assert value in message
        assert key in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lora_rank", "0", "more than 0"),
        ("lora_alpha", "-1", "more than 0"),
        ("learning_rate", "0", "more than 0"),
        ("learning_rate", "nan", "more than 0"),
        ("learning_rate", "inf", "finite"),
        ("num_train_epochs", "0", "more than 0"),
        ("per_device_train_batch_size", "-8", "more than 0"),
        ("gradient_accumulation_steps", "0", "more than 0"),
        ("image_size", "0", "more than 0"),
        ("weight_decay", "-0.1", "at least 0"),
        ("num_workers", "-1", "at least 0"),
        ("seed", "-1", "at least 0"),
        ("seed", "4294967296", "at most"),
        ("head_dropout", "1", "in [0, 1)"),
        ("lora_dropout", "-0.1", "in [0, 1)"),
        ("lora_dropout", "1.0", "in [0, 1)"),
    ],
)
def test_a_value_out_of_range(key: str, value: str, expected: str) -> None:
    message = refusal(f"--{key}={value}")
    assert message.startswith(f"--{key} is ")
    assert expected in message


def test_a_list_is_refused(tmp_path: Path) -> None:
    assert "target_modules" in refusal("--config", write(tmp_path, "target_modules: [fc1, fc2]"))
    assert "data" in refusal("--config", write(tmp_path, "data: {train: a}"))


def test_a_file_that_is_missing_or_not_a_mapping(tmp_path: Path) -> None:
    assert "none.yaml" in refusal("--config", str(tmp_path / "none.yaml"))
    assert str(tmp_path) in refusal("--config", str(tmp_path))
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "pipe.yaml: a pipe, expected a file" in refusal("--config", str(tmp_path / "pipe.yaml"))
    assert "/dev/zero: a device, expected a file" in refusal("--config", "/dev/zero")
    assert "expected a mapping of options, found list" in refusal("--config", write(tmp_path, "- seed"))
    assert "cannot be read as YAML" in refusal("--config", write(tmp_path, "seed: [1\nmethod: lora\n"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00seed")
    assert "cannot be read as YAML" in refusal("--config", str(tmp_path / "binary.yaml"))
    assert "config" in refusal("--config")


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['exit 3']",
        "seed: " + "[" * 100_000,
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
        "seed: &a0 [x]\n" + "".join(f"lora_rank: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
        "? [a, b]\n: 1",
        "seed: " + "9" * 5000,
        "&a [*a]",
    ],
)
def test_yaml_made_to_do_harm(tmp_path: Path, text: str) -> None:
    """Code to run, and a few lines that stand for a hundred billion values."""
    assert len(refusal("--config", write(tmp_path, text))) < 10_000


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert parse(None, ["--config", write(tmp_path, "# all defaults\n")]) == Config()


def test_pushing_needs_a_name() -> None:
    assert "--hub_model_id" in refusal("--push_to_hub")
    assert "expected owner/name" in refusal("--push_to_hub", "--hub_model_id", "model")
    assert "exclude each other" in refusal("--hub_create_pr", "--hub_revision", "v2")
    for backbone, name in (("builtin", "timm/resnet18.a1_in1k"), (".", "resnet18")):
        assert "--hub_base_model is" in refusal("--backbone", backbone, "--hub_base_model", name)
    assert parse(None, ["--push_to_hub", "--hub_model_id", "me/model"]).output.push_to_hub


def test_help_is_grouped_and_mentions_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("What it does.\n\n    how to call it", ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "What it does.\n\n    how to call it" in text
    for group in dataclasses.fields(Config):
        assert re.search(rf"^{group.name}:", text, re.MULTILINE), group.name
    listed = re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)
    assert sorted(listed) == sorted([*Config().flat(), "config", "help"])


def test_every_published_config_parses() -> None:
    assert len(CONFIGS) >= 4, CONFIGS
    for file in CONFIGS:
        assert parse(None, ["--config", str(file)]) != Config(), file


def test_a_recipe_with_defaults_of_its_own(tmp_path: Path) -> None:
    assert parse(None, [], split="published").data.split == "published"
    assert parse(None, ["--config", write(tmp_path, "split: clean")], split="published").data.split == "clean"
    assert parse(None, ["--split=files"], split="published").data.split == "files"


def test_other_options_are_checked_as_on_the_command_line() -> None:
    config = parse(None, ["--use_dora=True", "--lora_rank=4"])
    assert with_options(config, {}) == config
    changed = with_options(config, {"lora_rank": 2, "learning_rate": 1e-5, "target_modules": r".*\.(a|b)"})
    assert (changed.adapter.lora_rank, changed.adapter.use_dora, changed.training.learning_rate) == (2, True, 1e-5)
    assert changed.adapter.target_modules == r".*\.(a|b)"
    for options, message in (({"lora_rank": 0}, "--lora_rank is 0"), ({"lora_rnk": 1}, "did you mean '--lora_rank'")):
        with pytest.raises(HistoError, match=message):
            with_options(config, options)
