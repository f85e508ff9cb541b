"""Commands that a benchmark starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_histo.config import parse
from hf_histo.config.experiments import BenchmarkOptions
from hf_histo.errors import HistoError
from hf_histo.experiments.benchmark import jobs
from hf_histo.experiments.benchmark.bench import Bench


def test_a_command_that_fails_is_an_error_and_its_message_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HistoError, match="predict ended with 1"):
        jobs.run(["predict"])
    assert "arguments are required: --adapter" in capsys.readouterr().err


def test_a_job_has_the_options_of_the_benchmark_and_the_same_batch_in_all(tmp_path: Path) -> None:
    given = ["--lora_rank=4", "--mixed_precision=bf16", "--per_device_train_batch_size=6"]
    bench = Bench(parse(None, given), BenchmarkOptions(steps=2), tmp_path)
    name, *words = jobs.fine_tuning(bench, tmp_path / "run", 2)
    config = parse(None, words)
    assert name == "fine-tune"
    assert (config.adapter.lora_rank, config.speed.mixed_precision) == (4, "bf16")
    assert (config.training.per_device_train_batch_size, config.training.max_steps) == (3, 2)
    assert config.output.output_dir == str(tmp_path / "run")


def test_scaling_needs_threads_and_images_to_share(tmp_path: Path) -> None:
    """Else two processes would have more of either than one."""
    bench = Bench(parse(None, ["--per_device_train_batch_size=3"]), BenchmarkOptions(), tmp_path)
    torch.set_num_threads(2)
    assert set(jobs.scaling(bench).values()) == {"a batch of 3 can't be shared by two processes"}
    torch.set_num_threads(1)
    assert set(jobs.scaling(bench).values()) == {"1 thread in all, expected 2 or more"}
