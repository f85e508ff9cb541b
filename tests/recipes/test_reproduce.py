"""Published tables as a command: the plan of each row, a row that runs, and rows that can't."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from hf_histo.config import commands, parse_command
from hf_histo.config.commands import ReproduceOptions
from hf_histo.data.synthetic.miniature import write_digits
from hf_histo.experiments.reproduce import config_of
from hf_histo.experiments.studies import FOUNDATION_MODELS, study

STUDIES = get_args(get_type_hints(commands.ReproduceOptions)["study"])
ROWS = {"dlmi": 7, "brain-mri": 8, "cytology": 4 * 5 * 6 + 1, "mnist-cases": 4}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("name", STUDIES)
def test_the_plan_of_all_rows(name: str, tmp_path: Path) -> None:
    rows = study(name).rows
    assert len(rows) == ROWS[name]
    options = parse_command(
        ReproduceOptions, None, [name, f"--data={tmp_path}", f"--output_dir={tmp_path / 'out'}"], first="study"
    )
    configs = [config_of(row, options, tmp_path).flat() for row in rows]
    assert len({row.name for row in rows}) == len({row.published.name for row in rows}) == len(rows)
    assert len({json.dumps(config) for config in configs}) == len(rows)
    assert all(row.published.reported is None or row.published.source for row in rows)


def test_what_was_reported() -> None:
    found = {row.name: row.published.reported for name in STUDIES for row in study(name).rows}
    assert {name: value for name, value in found.items() if value is not None} == {
        "5_lora": 0.9451,
        "0.001-32-adam-10": 0.2919,
        "case1": 0.075,
        "case2": 0.965,
        "case3": 0.94,
        "case4": 0.715,
    }


def test_a_dry_run_shows_sizes_and_no_accuracy(in_process: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = in_process("reproduce.py", "mnist-cases", "--dry_run", "--rows", "case4", "--output_dir", out)
    assert done.returncode == 0, done.stderr
    text = (out / "mnist-cases.md").read_text()
    assert "Dry run" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| case 4"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:6] == ["0.715", "", "ran", "20,490", "20,490"]
    (row,) = json.loads((out / "mnist-cases.json").read_text())["rows"].values()
    assert "obtained" not in row and row["sizes"]["adapter_file"] > 4 * 20_490


def test_a_row_that_cannot_be_run_has_its_reason(in_process: Run, tmp_path: Path) -> None:
    given = ("--data", tmp_path / "none", "--rows", "mlcc-uni-linear", "bcfc-uni-linear", "--output_dir", tmp_path)
    done = in_process("reproduce.py", "cytology", *given)
    assert done.returncode == 1
    assert "2 of 2 rows were not run, the first is mlcc-uni-linear" in done.stderr
    text = (tmp_path / "cytology.md").read_text()
    assert text.count("not run: ") == 2 and "not recorded" in text


def check_obtained(in_process: Run, backbone: Path, folder: Path, *more: str) -> None:
    """A row whose backbone is in `--backbones_dir` is obtained, one without an output layer for its head is not run."""
    shutil.copytree(backbone, folder / "backbones" / "resnet50.tv_in1k")
    write_digits(folder / "data")
    given = ["--data", folder / "data", "--backbones_dir", folder / "backbones", "--output_dir", folder / "out", *more]
    done = in_process("reproduce.py", "mnist-cases", "--rows", "case2", "case4", *given)
    assert done.returncode == 1
    assert "1 of 2 rows were not run, the first is case2" in done.stderr
    out = folder / "out"
    rows = json.loads((out / "mnist-cases.json").read_text())["rows"]
    metrics = json.loads((out / "case4" / "seed-0" / "adapter" / "metrics.json").read_text())
    expected = {name: [split["overall"]["accuracy"]["value"]] for name, split in metrics["splits"].items()}
    assert rows["case4"]["obtained"] == expected and expected.keys() == {"val", "test"}
    text = (out / "mnist-cases.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| case 4")]
    assert len(lines) == 2 and any(f" {expected['test'][0]:.3f} " in line for line in lines)
    assert rows["case2"]["not_run"] in text


def test_obtained_beside_a_row_that_fails(in_process: Run, backbone: Path, tmp_path: Path) -> None:
    check_obtained(in_process, backbone, tmp_path)


@pytest.mark.slow
def test_obtained_by_two_workers(in_process: Run, backbone: Path, tmp_path: Path) -> None:
    check_obtained(in_process, backbone, tmp_path, "--workers", "2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["dlmi"], "--data is not given"),
        (["dlmi", "--data", "D", "--rows", "5_lore"], "did you mean '5_lora'"),
        (["dlmi", "--dry_run", "--data", "D"], "without --data"),
        (["dlmy"], "invalid choice: 'dlmy'"),
        (["dlmi", "--dry_run", "--workers", "0"], "--workers is 0"),
        (["dlmi", "--dry_run", "--job_parameters", "timeout_min=9"], "--job_parameters is for --cluster"),
    ],
)
def test_mistakes_are_one_line(in_process: Run, tmp_path: Path, given: list[str], message: str) -> None:
    done = in_process("reproduce.py", *given, "--output_dir", tmp_path / "out")
    assert done.returncode == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


# Of cytology's 121 rows, those that cover the models, methods and layouts; all of them take most of an hour.
COVERING = [
    *(f"sipakmed-{model}-{method}" for model in FOUNDATION_MODELS for method in ("linear", "lora-01")),
    *("bcfc-uni-lora-16", "mlcc-vit-b16-lora-02", "hicervix-vit-b16-lora-04", "hicervix-clip-b16-linear"),
    "hicervix-clip-b16-lora-70-percent",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_row_runs_dry(in_process: Run, tmp_path: Path, name: str) -> None:
    rows = ["--rows", *COVERING] if name == "cytology" else []
    done = in_process("reproduce.py", name, "--dry_run", *rows, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "not run" not in (tmp_path / "out" / f"{name}.md").read_text()
