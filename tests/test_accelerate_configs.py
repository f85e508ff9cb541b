"""The files for `accelerate launch --config_file` are valid for accelerate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).parents[1]
SEVERAL_GPUS = ("multi_gpu", "fsdp", "deepspeed", "multi_node")
FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_the_files_are_found() -> None:
    names = {file.stem for file in FILES}
    assert names >= {"cpu", "cpu_2proc", "single_gpu", "single_gpu_fp16", "single_gpu_bf16", "multi_gpu"}
    assert names >= {"fsdp", "deepspeed", "multi_node"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.use_cpu is ("cpu" in file.stem)
    assert config.mixed_precision == {"fp16": "fp16", "bf16": "bf16"}.get(
        file.stem.split("_")[-1], "bf16" if file.stem in SEVERAL_GPUS else config.mixed_precision
    )
    several = config.distributed_type not in (DistributedType.NO, "NO")
    assert several is (config.num_processes > 1)
    assert f"accelerate_configs/{file.name}" in file.read_text(encoding="utf-8") or "torchrun" in file.read_text()


@pytest.mark.parametrize("name", SEVERAL_GPUS)
def test_the_launcher_makes_an_environment_of_it(name: str) -> None:
    """As far as `accelerate launch` goes before it starts processes on GPUs; a misspelled key stops it."""
    file = str(ROOT / "accelerate_configs" / f"{name}.yaml")
    arguments = launch.launch_command_parser().parse_args(["--config_file", file, "recipe.py"])
    arguments, *_ = launch._validate_launch_command(arguments)
    assert arguments.use_fsdp is (name == "fsdp")
    assert (arguments.use_deepspeed, arguments.num_machines) == (name == "deepspeed", 2 if name == "multi_node" else 1)
    if name == "fsdp":
        environment = prepare_multi_gpu_env(arguments)
        assert environment["FSDP_VERSION"] == "2"
        assert environment["ACCELERATE_USE_FSDP"] == "true"
    if name == "deepspeed":
        assert arguments.zero_stage == 2


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
