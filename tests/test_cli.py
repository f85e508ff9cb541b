"""`hf_histo COMMAND`: every recipe as a command of the installed package."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_histo import launch
from hf_histo.cli import main
from hf_histo.config import parse
from hf_histo.config.packaged import COMMANDS, STUDIES, as_commands, config_file, config_files, recipes
from hf_histo.errors import HistoError

ROOT = Path(__file__).parents[1]
DEVELOPERS = {"pretrain_backbone"}  # a recipe that made a file of the package


def called(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("hf_histo")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_every_recipe_is_a_command() -> None:
    found = {file.stem for file in (ROOT / "recipes").glob("*.py")}
    assert found == {recipe for recipe, _ in COMMANDS.values()} | {*STUDIES} | DEVELOPERS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_commands_and_no_files_of_a_checkout(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.argv
    try:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
    finally:
        sys.argv = before
    shown = capsys.readouterr().out
    assert not end.value.code
    assert f"usage: hf_histo {command} " in shown
    assert shown.count(f"hf_histo {command}") > 1  # in the usage line, and in examples
    assert "recipes/" not in shown and "../shared" not in shown


def test_the_commands_are_listed_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    listed = called("--help", folder=tmp_path)
    assert listed.returncode == 0 and all(f"\n  {command} " in listed.stdout for command in COMMANDS)
    wrong = called("fine_tune", folder=tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr.strip() == "error: unknown command 'fine_tune'; did you mean 'fine-tune'?"


def test_a_run_from_the_command(source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, data = source
    options = f"--data {data} --backbone {backbone} --image_size 32 --max_steps 2 --cache_dir cache --output_dir run"
    done = called("fine-tune", "--config", "histo_ood", *shlex.split(options), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "adapter folder: run/adapter" in done.stdout
    recorded = parse(None, ["--config", str(tmp_path / "run" / "run.yaml")])
    assert recorded.centers.stain_mixing == parse(None, ["--config", "histo_ood"]).centers.stain_mixing > 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # which `main` sets
    main(["predict", "--adapter", "run/adapter", "--data", str(data), "--output", "p.csv"])
    assert (tmp_path / "p.csv").is_file()


def test_the_command_that_resumes_is_the_one_that_was_given(tmp_path: Path) -> None:
    started = "sys.argv = ['hf_histo fine-tune', *sys.argv[2:]]"
    code = f"import sys; from hf_histo import launch; {started}; print(launch.command())"
    given = [sys.executable, "-c", code, "fine-tune", "--data", "a b"]
    shown = subprocess.run(given, capture_output=True, text=True, check=True).stdout
    assert shlex.split(shown)[-3:] == ["fine-tune", "--data", "a b"]
    assert shlex.split(shown)[0] == sys.executable
    assert launch.command()


def test_a_packaged_config_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_file("ablation/lora") == recipes() / "configs" / "ablation" / "lora.yaml"
    assert config_file("missing.yaml") == Path("missing.yaml")
    assert [file.stem for file in config_files(["histo_ood", "sweep"])] == [
        "histo_ood",
        "mri_report_grid",
        "mri_search",
    ]
    with pytest.raises(HistoError, match=r"config histo_odd: .*did you mean 'histo_ood'\?"):
        config_file("histo_odd")
    Path("histo_ood").write_text("seed: 3\n", encoding="utf-8")  # a file of the user's comes first
    assert parse(None, ["--config", "histo_ood"]).training.seed == 3


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("accelerate launch recipes/mri_lora.py --data D", "accelerate launch -m hf_histo fine-tune --data D"),
        ("python recipes/predict.py --data D", "hf_histo predict --data D"),
        ("see recipes/few_shot.py.", "see hf_histo few-shot."),
        ("--config recipes/configs/ablation/lora.yaml", "--config ablation/lora"),
        ("--rows recipes/configs/report --data", "--rows report --data"),
    ],
)
def test_text_of_a_recipe_as_a_command(text: str, command: str) -> None:
    assert as_commands(text) == command


def test_no_message_names_a_file_of_a_checkout() -> None:
    """An installed package has none; commands work in a checkout as well."""
    found = set()
    for path in (ROOT / "hf_histo").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
        found |= {path.name for node in texts if isinstance(node.value, str) and "recipes/" in node.value}
    assert found == {"packaged.py", "pretraining.py"}  # the translation into commands; a record of how a file was made


@pytest.mark.slow
def test_the_wheel_has_all_that_a_command_needs(tmp_path: Path) -> None:
    """Built, installed apart from the checkout with nothing but its own files, and run from an empty folder."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    work = tmp_path / "work"
    work.mkdir()
    where = [sys.executable, "-c", "import hf_histo; print(hf_histo.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, check=True, env=environment, cwd=work).stdout
    assert Path(found.strip()).is_relative_to(target)
    run = [sys.executable, "-m", "hf_histo", "fine-tune", "--config", "histo_ood", "--backbone", "builtin"]
    run += ["--max_steps", "2", "--image_size", "64", "--resize_size", "64", "--output_dir", "run"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment, cwd=work)
    assert done.returncode == 0, done.stderr
    assert (work / "run" / "adapter" / "report.html").is_file()
