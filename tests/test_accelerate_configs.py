"""The files for `accelerate launch --config_file` are what accelerate itself reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_the_files_are_found() -> None:
    names = {file.stem for file in FILES}
    assert names >= {"cpu", "cpu_2proc", "single_gpu", "single_gpu_fp16", "single_gpu_bf16", "multi_gpu"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.use_cpu is ("cpu" in file.stem)
    assert config.mixed_precision == {"fp16": "fp16", "bf16": "bf16"}.get(
        file.stem.split("_")[-1], "bf16" if file.stem == "multi_gpu" else config.mixed_precision
    )
    several = config.distributed_type not in (DistributedType.NO, "NO")
    assert several is (config.num_processes > 1)
    assert f"accelerate_configs/{file.name}" in file.read_text(encoding="utf-8") or "torchrun" in file.read_text()


def test_the_recipe_starts_under_a_launcher() -> None:
    command = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    done = subprocess.run(
        [sys.executable, *command, "recipes/histo_lora.py", "--help"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--lora_rank" in done.stdout
