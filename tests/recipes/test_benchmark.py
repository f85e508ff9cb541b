"""The benchmark as a command: what it measures and writes, independent of speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from recipe_mains import RECIPES

from hf_histo.config.experiments import BENCHMARK_PARTS
from hf_histo.experiments.benchmark import prediction
from hf_histo.experiments.benchmark.ratios import RATIOS

RECIPE = RECIPES / "benchmark.py"
FIXED = ["--image_size", "32", "--resize_size", "32", "--target_modules", "last-conv"]


COMMANDS = {"jobs", "scaling"}  # parts that start other commands, see also tests/experiments/benchmark/test_jobs.py


def measured(parts: Collection[str], backbone: Path, out: Path) -> dict[str, Any]:
    """The content of benchmark.json."""
    command = [sys.executable, str(RECIPE), "--quick", "--backbone", str(backbone), *FIXED, "--output_dir", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([*command, "--parts", *parts], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "benchmark.md").read_text(encoding="utf-8") in done.stdout
    found: dict[str, Any] = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    return found


def require_times(sides: Mapping[str, Any], missing: Collection[str] = ()) -> None:
    for side, seconds in sides.items():
        assert side in missing or (len(seconds) == 1 and seconds[0] > 0), (side, seconds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    out = tmp_path_factory.mktemp("benchmark") / "out"
    measured(["training", "reading"], backbone, out)
    return out


@pytest.mark.slow
def test_whole_commands_are_measured(backbone: Path, tmp_path: Path) -> None:
    found = measured(sorted(COMMANDS), backbone, tmp_path / "out")["blocks"][str(backbone)]
    assert found.keys() == COMMANDS
    for part in COMMANDS:
        require_times(found[part])


def test_sides_of_the_parts_that_are_asked_for(folder: Path) -> None:
    found = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    (name, block), (_, images) = found["blocks"].items()
    assert block.keys() == {"training"} and images.keys() == {"reading", "augmenting"}
    assert list(block["training"])[:4] == ["tuned peer", "this package", "stock", "stock, float32"]
    for part in (*block.values(), *images.values()):
        require_times(part)
    assert found["ratios"][name] and found["quick"] is True
    assert {"torch", "transformers", "peft"} < found["versions"].keys()


@pytest.mark.slow
def test_every_side_is_measured_and_every_ratio_reported(backbone: Path, tmp_path: Path) -> None:
    found = measured([part for part in BENCHMARK_PARTS if part not in COMMANDS], backbone, tmp_path / "out")
    (name, block), (_, images) = found["blocks"].items()
    of_part = block | images
    assert of_part.keys() == {*BENCHMARK_PARTS, "augmenting"} - {"pieces"} - COMMANDS
    assert sum(side.startswith("without ") for side in of_part["training"]) == 5
    missing = {prediction.OPENVINO} if find_spec("openvino") is None else set()
    for part in of_part.keys() - {"growth", "memory"}:
        require_times(of_part[part], missing)
    assert all("not installed" in of_part["prediction"][side] for side in missing)
    assert [growth["rows"] for growth in of_part["growth"]] == [100, 1000]
    assert all(memory["host"] > 2**20 for memory in of_part["memory"].values())
    in_float32 = [ratio for ratio in RATIOS if not ratio.side.endswith("bf16") and ratio.part not in COMMANDS]
    assert len(found["ratios"][name] + found["ratios"]["images"]) == len(in_float32)


def test_the_table_and_the_figure(folder: Path) -> None:
    text = (folder / "benchmark.md").read_text(encoding="utf-8")
    assert "| this package " in text
    assert "at least 2.5" in text
    with PIL.Image.open(folder / "benchmark.png") as image:
        assert image.width > 500


def test_options_that_change_nothing_that_is_measured_are_refused(shown_by: Callable[..., str], tmp_path: Path) -> None:
    for option in ("--num_train_epochs=3", "--split=clean", "--gray"):
        shown = shown_by("benchmark.py", option, f"--output_dir={tmp_path / 'out'}")
        assert option.split("=")[0] in shown and "can't act here" in shown
