"""The benchmark as a command: what it measures and writes, independent of speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from hf_histo.experiments.benchmark import ratios

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark.py"
FIXED = ["--image_size", "32", "--resize_size", "32", "--target_modules", "last-conv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    out = tmp_path_factory.mktemp("benchmark") / "out"
    command = [sys.executable, str(RECIPE), "--quick", "--backbone", str(backbone), *FIXED, "--output_dir", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "this package" in done.stdout
    return out


def test_every_side_is_measured_and_every_aim_reported(folder: Path) -> None:
    found = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    sides = {"stock, float32", "stock", "tuned peer", "this package", "full fine-tuning", "forward"}
    sides |= {"floor: forward, gradient to the input"}
    assert sides < found["step"].keys()
    assert sum(name.startswith("without ") for name in found["step"]) == 5
    for part in ("step", "reading", "augmenting", "probe"):
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found[part].values()), part
    assert [growth["rows"] for growth in found["growth"]] == [100, 1000]
    assert {"stock", "this package"} < found["memory"].keys()
    assert all(memory["host"] > 2**20 for memory in found["memory"].values())
    assert len(found["ratios"]) == 8
    assert found["quick"] is True
    assert {"torch", "transformers", "peft"} < found["versions"].keys()


def test_the_table_and_the_figure(folder: Path) -> None:
    text = (folder / "benchmark.md").read_text(encoding="utf-8")
    assert "| this package " in text
    assert "at least 2.5" in text
    with PIL.Image.open(folder / "benchmark.png") as image:
        assert image.width > 500


def test_ratios_are_those_of_the_medians() -> None:
    """A ratio of speeds is above 1 if this package is faster; one of times and bytes, if it needs more."""
    step = {"stock, float32": [8.0, 9.0, 30.0], "stock": [4.5], "tuned peer": [6.0], "this package": [3.0, 1.0, 7.0]}
    found = {
        "step": {**step, "floor: forward, gradient to the input": [2.0]},
        "reading": {"stock": [5.0], "this package": [0.5]},
        "augmenting": {"stock": [7.0], "this package": [2.0]},
        "probe": {"linear probe": [3.0], "forward pass": [4.0]},
        "memory": {"this package": {"device": 30}, "full fine-tuning": {"device": 40}},
    }
    expected = [2.0, 1.5, 3.0, 1.5, 10.0, 3.5, 0.75, 0.75]
    assert list(ratios(found).values()) == expected
    found["memory"]["this package"]["device"] = None
    assert list(ratios(found).values()) == [*expected[:-1], None]


def test_options_that_change_nothing_that_is_measured_are_refused(shown_by: Callable[..., str], tmp_path: Path) -> None:
    for option in ("--num_train_epochs=3", "--split=clean", "--gray"):
        shown = shown_by("benchmark.py", option, f"--output_dir={tmp_path / 'out'}")
        assert option.split("=")[0] in shown and "can't act here" in shown
