"""The benchmark as a command: what it measures and writes, not how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

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


def test_every_side_is_measured_and_every_aim_told(folder: Path) -> None:
    found = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    sides = {"stock", "this package", "full fine-tuning", "forward", "floor: forward, gradient to the input"}
    assert sides < found["step"].keys()
    assert sum(name.startswith("without ") for name in found["step"]) == 5
    for part in ("step", "reading", "augmenting", "probe"):
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found[part].values()), part
    assert [growth["rows"] for growth in found["growth"]] == [100, 1000]
    assert {"stock", "this package"} < found["memory"].keys()
    assert all(memory["host"] > 2**20 for memory in found["memory"].values())
    assert len(found["ratios"]) == 6
    assert found["quick"] is True
    assert {"torch", "transformers", "peft"} < found["versions"].keys()


def test_the_table_and_the_figure(folder: Path) -> None:
    text = (folder / "benchmark.md").read_text(encoding="utf-8")
    assert "| this package " in text
    assert "at least 2.5" in text
    with PIL.Image.open(folder / "benchmark.png") as image:
        assert image.width > 500
