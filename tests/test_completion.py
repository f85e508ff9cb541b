"""Completion scripts, asked in the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_histo import completion
from hf_histo.cli import main
from hf_histo.config.packaged import COMMANDS, SHELLS
from hf_histo.errors import HistoError

BASH = """
source ./script
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_hf_histo hf_histo "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = "source ./script; complete -C (string join -- ' ' $argv)"
# Writes a line and Tab to an interactive zsh; Ctrl-A and `echo` make it print the line as it was completed.
ZSH = r"""
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "autoload -Uz compinit && compinit -u -D && eval \"\$(<./script)\" && echo RE''ADY"
zpty -r z out "*READY*"
zpty -w -n z "$*"$'\t\x01echo \x05 EN\'\'D\n'
zpty -r z out "*[^\']END*"
print -r -- $out
zpty -d z
"""
WORDS = (
    (["fi"], {"fine-tune"}),
    (["fine-tune", "--lora_r"], {"--lora_rank"}),
    (["fine-tune", "--method", ""], {"full", "linear", "lora", "pca"}),
    (["fine-tune", "--data", "images", "--config", "histo_o"], {"histo_ood"}),
    (["fine-tune", "--config", "ablation/lora_g"], {"ablation/lora_group_dro"}),
    (["compare", "--rows", "mri_m"], {"mri_mobilenetv2_linear", "mri_mobilenetv2_lora"}),
    (["predict", "--adapter", "my_ad"], {"my_adapter"}),
    (["fine-tune", "--lora_rank", ""], set()),
    (["completion", ""], set(SHELLS)),
)


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    return {shell: completion.script(shell) for shell in SHELLS}


def shell(name: str, code: str, script: str, folder: Path, *words: str) -> str:
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    (folder / "script").write_text(script, encoding="utf-8")
    (folder / "my_adapter").mkdir()
    options = {"bash": ["--norc", "-c", code, "bash"], "fish": ["-N", "-c", code], "zsh": ["-f", "-c", code, "zsh"]}
    call = [program, *options[name], "hf_histo", *words]
    return subprocess.run(call, capture_output=True, text=True, check=True, cwd=folder, timeout=30).stdout


@pytest.mark.parametrize(("words", "expected"), WORDS, ids=lambda value: " ".join(sorted(value)))
@pytest.mark.parametrize(("name", "code"), [("bash", BASH), ("fish", FISH)])
def test_what_a_shell_suggests(
    scripts: dict[str, str], tmp_path: Path, name: str, code: str, words: list[str], expected: set[str]
) -> None:
    found = {
        line.split("\t")[0].rstrip("/") for line in shell(name, code, scripts[name], tmp_path, *words).splitlines()
    }
    assert found - {""} == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fine-tune", "--lora_bl"], "hf_histo fine-tune --lora_blocks END"),
        (["fine-tune", "--config", "histo_o"], "hf_histo fine-tune --config histo_ood END"),
        (["predict", "--adapter", "my_ad"], "hf_histo predict --adapter my_adapter END"),
    ],
)
def test_what_zsh_completes(scripts: dict[str, str], tmp_path: Path, words: list[str], expected: str) -> None:
    assert shell("zsh", ZSH, scripts["zsh"], tmp_path, *words).splitlines()[-1] == expected


def test_every_command_and_its_options_are_there(scripts: dict[str, str]) -> None:
    for script in scripts.values():
        assert all(command in script for command in COMMANDS)
        assert all(option in script for option in ("test_time_views", "hub_create_pr", "space_dir", "gray_bits"))


def test_the_command_leaves_the_arguments_of_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.argv)
    main(["completion", "fish"])
    assert capsys.readouterr().out.strip() == completion.script("fish").strip()
    assert sys.argv == before


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "tcsh"])
    assert "hf_histo completion: found 'tcsh', expected one of bash, zsh, fish" in capsys.readouterr().err


def test_a_recipe_that_parses_nothing_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="parses its options first"):
        completion.parser_of(lambda: None)


def test_words_of_a_command_line_do_not_describe_it() -> None:
    from hf_histo.config import parse

    with pytest.raises(HistoError, match="unknown option 'describe the options'"):
        parse(None, ["".join(["describe", " the options"])])
