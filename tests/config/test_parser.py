"""Options as a user gives them: a YAML file, the command line, and what is wrong with either."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml
from recipe_mains import RECIPES

from hf_histo.config import (
    FOR_CENTERS,
    GROUPS,
    NON_RESULT_OPTIONS,
    OPTIONS,
    Config,
    current,
    effective,
    option,
    parse,
    parse_each,
    parse_fine_tuning,
    parse_with,
    with_options,
    with_role,
)
from hf_histo.config.options import BUILTIN_LEARNING_RATE, RULES
from hf_histo.errors import HistoError

CONFIGS = sorted((RECIPES / "configs").rglob("*.yaml"))
CONFIGS = [file for file in CONFIGS if file.name != "reported.yaml" and file.parent.name != "sweep"]


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
    file = write(tmp_path, "learning_rate: 0.5\nseed: 7\nmethod: linear\n")
    config = parse(None, ["--seed", "9", "--config", file])
    assert (config.training.learning_rate, config.adapter.method, config.training.seed) == (0.5, "linear", 9)
    assert parse(None, [f"--config={file}", "--method=lora"]).adapter.method == "lora"


def test_a_recorded_run_is_a_config(tmp_path: Path) -> None:
    config = parse(None, ["--use_rslora", "--learning_rate", "3e-5", "--target_modules", r".*\.(a|b): #'\""])
    assert parse(None, ["--config", write(tmp_path, yaml.safe_dump(config.flat()))]) == config


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_a_learning_rate_as_it_is_written(tmp_path: Path, text: str) -> None:
    assert parse(None, ["--config", write(tmp_path, f"learning_rate: {text}")]).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "expected"), [("true", True), ("false", False), ("yes", True), ("off", False), ("null", False)]
)
def test_booleans_in_yaml(tmp_path: Path, text: str, expected: bool) -> None:
    assert parse(None, ["--config", write(tmp_path, f"use_rslora: {text}")]).adapter.use_rslora is expected


def test_booleans_on_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, "use_rslora: true")
    assert parse(None, ["--use_rslora"]).adapter.use_rslora is True
    assert parse(None, ["--config", file, "--use_rslora", "false"]).adapter.use_rslora is False
    assert "perhaps" in refusal("--use_rslora", "perhaps")


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
    [("lora_rank", "high"), ("lora_rank", "2.5"), ("learning_rate", "fast"), ("method", "prompt"), ("use_rslora", "2")],
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
        ("head_dropout", "1", "at least 0 and below 1"),
        ("lora_dropout", "-0.1", "at least 0 and below 1"),
        ("lora_dropout", "1.0", "at least 0 and below 1"),
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
    """Code to run, and a few lines that expand to a hundred billion values."""
    assert len(refusal("--config", write(tmp_path, text))) < 10_000


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert parse(None, ["--config", write(tmp_path, "# all defaults\n")]) == Config()


def test_pushing_needs_a_name() -> None:
    assert "--hub_model_id" in refusal("--push_to_hub")
    assert "expected owner/name" in refusal("--push_to_hub", "--hub_model_id", "model")
    push = ("--push_to_hub", "--hub_model_id", "me/model")
    assert "exclude each other" in refusal(*push, "--hub_create_pr", "--hub_revision", "v2")
    for backbone, name in (("builtin", "timm/resnet18.a1_in1k"), (".", "resnet18")):
        assert "--hub_base_model is" in refusal(*push, "--backbone", backbone, "--hub_base_model", name)
    assert parse(None, ["--push_to_hub", "--hub_model_id", "me/model"]).output.push_to_hub


def test_help_is_grouped_and_mentions_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("What it does.\n\n    how to call it", ["--help_all"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "What it does.\n\n    how to call it" in text
    for group in GROUPS:
        assert re.search(rf"^{group}:", text, re.MULTILINE), group
    listed = re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)
    assert sorted(listed) == sorted([*Config().flat(), "config", "help", "help_all"])


@pytest.mark.parametrize("recipe", ["histo_lora", "mri_lora", "digits_lora", "cytology_lora"])
def test_help_is_one_screen_of_what_matters_first(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    usage = ast.get_docstring(ast.parse((RECIPES / f"{recipe}.py").read_text(encoding="utf-8")))
    with pytest.raises(SystemExit) as caught:
        parse(usage, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert usage is not None and usage in text
    assert len(text.splitlines()) <= 50
    assert "rank of the update (default: 8)" in text
    assert "--hub_private" not in text
    assert "--help_all" in text


def test_every_published_config_parses() -> None:
    assert len(CONFIGS) >= 40, CONFIGS
    for file in CONFIGS:
        assert parse(None, ["--config", str(file)]) != Config(), file


def test_a_recipe_with_defaults_of_its_own(tmp_path: Path) -> None:
    assert parse(None, [], split="published").data.split == "published"
    assert parse(None, ["--config", write(tmp_path, "split: clean")], split="published").data.split == "clean"
    assert parse(None, ["--split=files"], split="published").data.split == "files"


def test_a_fine_tuning_has_the_defaults_that_are_best_for_several_centers() -> None:
    config = parse_fine_tuning(None, [])
    assert config.flat() == {**Config().flat(), **FOR_CENTERS, "learning_rate": BUILTIN_LEARNING_RATE}
    assert config.unchosen == FOR_CENTERS.keys()
    assert parse_fine_tuning(None, ["--config=histo_ood"]) == parse(None, ["--config=histo_ood"])  # states its own


@pytest.mark.parametrize(
    ("given", "unchosen"),
    [
        ("--stain_mixing=0.5", {"normalization", "test_time_views"}),  # chosen, though no other value
        ("--normalization=none", {"test_time_views"}),  # without which no colors are mixed
        ("--normalization=none --test_time_views=1", set()),
        ("--virtual_stain=0.7", {"normalization", "test_time_views"}),  # which a view gets instead of a mixture
        ("--augmentation=none", {"normalization", "test_time_views"}),
        ("--method=pca", {"normalization", "test_time_views"}),
        ("--data=hub:a/b --streaming", {"test_time_views"}),
    ],
)
def test_defaults_for_several_centers_give_way_to_what_is_given(given: str, unchosen: set[str]) -> None:
    config = parse_fine_tuning(None, given.split())
    assert config.unchosen == unchosen
    chosen = {argument[2:].split("=")[0] for argument in given.split()}
    for name, value in FOR_CENTERS.items():
        if name not in chosen:
            assert config.flat()[name] == (value if name in unchosen else OPTIONS[name].default), name


def test_the_default_learning_rate_is_that_of_the_backbone() -> None:
    for given in ("--backbone=.", "--method=linear", "--learning_rate=0.001"):
        assert parse_fine_tuning(None, [given]).training.learning_rate == 1e-3


def test_other_options_are_checked_as_on_the_command_line() -> None:
    config = parse(None, ["--use_rslora=True", "--lora_rank=4"])
    assert with_options(config, {}) == config
    changed = with_options(config, {"lora_rank": 2, "learning_rate": 1e-5, "target_modules": r".*\.(a|b)"})
    assert (changed.adapter.lora_rank, changed.adapter.use_rslora, changed.training.learning_rate) == (2, True, 1e-5)
    assert changed.adapter.target_modules == r".*\.(a|b)"
    for options, message in (({"lora_rank": 0}, "--lora_rank is 0"), ({"lora_rnk": 1}, "did you mean 'lora_rank'")):
        with pytest.raises(HistoError, match=message):
            with_options(config, options)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ("--method=linear --lora_rank=4", "with --method lora"),
        ("--method=full --use_rslora", "with --method lora"),
        ("--method=pca --target_modules=all-conv", "with --method lora"),
        ("--method=pca --learning_rate=0.1", "with --method linear, lora or full"),
        ("--domain_weight=2", "with --domain_loss other than none"),
        ("--method=linear --lora_plus_ratio=4", "with --method lora"),
        ("--method=linear --probe_first", "with --method lora or full"),
        ("--head=mlp --probe_first", "with --head linear"),
        ("--head_on=logits --probe_first", "with --head_on features"),
        ("--text_prompt=a --probe_first", "without --text_prompt"),
        ("--normalization=macenko --virtual_stain=0.5", "with --normalization rgb or reinhard"),
        ("--ema_decay=0.9", "with --weight_averaging ema"),
        ("--weight_averaging=ema --averaging_start=0.5", "with --weight_averaging dense"),
        ("--method=pca --weight_averaging=ema", "with --method linear, lora or full"),
        ("--stain_mixing=0.5", "with --normalization other than none"),
        ("--head_widths=8", "with --head mlp"),
        ("--train_output_layer", "with --head_on logits"),
        ("--lr_scheduler_patience=2", "with --lr_scheduler_type reduce_lr_on_plateau"),
        ("--iterations_per_shot=5", "with --shots"),
        ("--training_views=2 --augmentation=none", "with --augmentation other than none, or with --stain_mixing"),
        ("--test_time_augmentation=flips", "with --test_time_views other than 1"),
        ("--hub_private", "with --push_to_hub"),
        ("--run_name=mine", "with --report_to other than none"),
        ("--method=pca --report_to=wandb", "with --method linear, lora or full"),
        ("--family=near", "with --split published or clean"),
        ("--max_steps=4 --num_train_epochs=2", "without --max_steps"),
        ("--revision=v1", "on a backbone from the Hub"),
    ],
)
def test_an_option_that_can_not_act_is_refused(tmp_path: Path, given: str, needed: str) -> None:
    message = refusal(*given.split())
    assert f"which acts only {needed}" in message
    assert message.startswith("--") and message.endswith("leave it out")


def test_probabilities_of_colors_sum_to_one_or_less() -> None:
    assert "--stain_mixing is 0.6 and --virtual_stain is 0.5" in refusal(
        "--normalization=rgb", "--stain_mixing=0.6", "--virtual_stain=0.5"
    )
    assert (
        parse(None, ["--normalization=rgb", "--stain_mixing=0.5", "--virtual_stain=0.5"]).centers.virtual_stain == 0.5
    )


def test_each_default_is_within_its_bounds_and_each_need_names_an_option() -> None:
    for name, rule in RULES.items():
        assert rule.allows(OPTIONS[name].default), name
        assert rule.needs.keys() <= OPTIONS.keys(), name
        assert not rule.common or OPTIONS[name].metadata["help"], name


def test_an_option_of_a_file_that_can_not_act(tmp_path: Path) -> None:
    """It is refused, unless the command line made the difference: then it takes its default."""
    file = write(tmp_path, "lora_rank: 4\nhub_private: true\nmethod: linear\n")
    message = refusal(f"--config={file}")
    assert message.startswith(f"--config {file}: --lora_rank is 4, which acts only with --method lora")
    push = ["--push_to_hub", "--hub_model_id=me/model"]
    config = parse(None, [f"--config={file}", "--method=lora", *push])
    assert (config.adapter.lora_rank, config.output.hub_private) == (4, True)

    lora = write(tmp_path, "lora_rank: 4\nnum_train_epochs: 3\n")
    config = parse(None, [f"--config={lora}", "--method=linear", "--max_steps=2"])
    assert config == parse(None, ["--method=linear", "--max_steps=2"])
    assert "--lora_rank is 2" in refusal(f"--config={lora}", "--method=linear", "--lora_rank=2")


def test_a_file_may_hold_iterations_for_runs_with_shots(tmp_path: Path) -> None:
    file = write(tmp_path, "iterations_per_shot: 50\n")
    assert parse(None, [f"--config={file}"]).protocol.iterations_per_shot == 50
    assert "--max_steps is 3" in refusal(f"--config={file}", "--shots=1", "--max_steps=3")


def test_options_that_cannot_act_make_no_other_run() -> None:
    linear = parse(None, ["--method=linear"])
    before = linear.flat() | {"lora_rank": 4, "test_time_augmentation": "flips"}
    assert effective(before) == linear.flat()
    assert with_options(linear, {"lora_rank": 4}) == linear


def test_one_command_line_for_several_configs(tmp_path: Path) -> None:
    files = []
    for method in ("linear", "lora"):
        files.append(str(tmp_path / f"{method}.yaml"))
        Path(files[-1]).write_text(f"method: {method}\n", encoding="utf-8")
    linear, lora = parse_each(Own, files, ["--lora_rank=4", "--seed=3", "--count=2"])
    assert (linear.adapter.lora_rank, lora.adapter.lora_rank, linear.training.seed) == (8, 4, 3)
    with pytest.raises(HistoError, match="--head_widths is '8', which acts only with --head mlp"):
        parse_each(Own, files, ["--head_widths=8"])
    config, own = parse_with(Own, None, ["--head_widths=8", "--count=2"], is_shared=True)
    assert (config, own) == (Config(), Own(2))
    with pytest.raises(HistoError, match="--count is 0, expected at least 1"):
        parse_with(Own, None, ["--count=0"])


@dataclasses.dataclass
class Own:
    _argument_group_name = "own"

    count: int = option(1, "a number", at_least=1)


def test_what_changes_no_result() -> None:
    """These names are part of the identity of runs on disk: with another set, old runs would not resume."""
    assert {
        *("cache_dir", "activation_checkpointing", "cache_features", "num_workers", "per_device_eval_batch_size"),
        *("resume_from_checkpoint", "output_dir", "overwrite_output_dir", "preview", "explain", "push_to_hub"),
        *("hub_model_id", "hub_base_model", "hub_private", "hub_revision", "hub_create_pr", "image_root"),
        *("report_to", "run_name", "verbose", "robustness", "store_patches", "chunk_size"),
    } == NON_RESULT_OPTIONS
    assert with_role("source") == {"data", "backbone", "revision"}


def test_options_of_earlier_versions_keep_their_meaning(tmp_path: Path) -> None:
    for text, adapter in (("use_dora: true", "dora"), ("use_dora: false", "lora")):
        assert parse(None, ["--config", write(tmp_path, text)]).adapter.adapter == adapter
    assert current({"use_dora": True, "lora_rank": 4}) == {"adapter": "dora", "lora_rank": 4}
