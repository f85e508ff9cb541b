"""Commands that a benchmark starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from miniature import SIZE

from hf_histo.config import parse, parse_command
from hf_histo.config.commands import PredictOptions
from hf_histo.config.experiments import BenchmarkOptions
from hf_histo.errors import HistoError
from hf_histo.experiments.benchmark import jobs
from hf_histo.experiments.benchmark.bench import Bench
from hf_histo.files import write_json


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


@pytest.fixture
def bench(source: tuple[Path, Path], tmp_path: Path) -> Bench:
    folders = [f"--backbone={source[0]}", f"--data={source[1]}", "--target_modules=last-conv"]
    sizes = [f"--image_size={SIZE}", f"--resize_size={SIZE}", "--per_device_train_batch_size=4"]
    return Bench(parse(None, [*folders, *sizes]), BenchmarkOptions(quick=True, repetitions=1, steps=1), tmp_path)


@pytest.mark.slow
def test_commands_are_timed_from_their_start(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training and the finished one for real; for all, see tests/recipes/test_benchmark.py."""
    really, started = jobs.run, []

    def run(command: Sequence[str], launcher: Sequence[str] = ()) -> jobs.Job:
        started.append((command[0], *launcher[:2]))
        if command[0] == "predict":
            assert parse_command(PredictOptions, None, command[1:]).split == "val"
        return jobs.Job(1.0, [0.5], "") if launcher or command[0] == "predict" else really(command)

    monkeypatch.setattr(jobs, "run", run)
    found = jobs.jobs(bench)
    launched = ("fine-tune", "accelerate.commands.launch", "--num_processes=1")
    assert sorted(started) == [("fine-tune",), ("fine-tune",), launched, ("predict",)]
    assert 0 < found[jobs.BARE + jobs.TO_FIRST_STEP][0] < found[jobs.BARE][0]
    assert found[jobs.AGAIN][0] > 0
    assert found[jobs.LAUNCHED + jobs.TO_FIRST_STEP] == [0.5] and found[jobs.PREDICT] == [1.0]


@pytest.mark.parametrize("wrong", [False, True])
def test_two_processes_have_the_threads_and_images_of_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    started: dict[str, tuple[int, str]] = {}

    def run(command: Sequence[str], launcher: Sequence[str], **variables: str) -> jobs.Job:
        options, processes = parse(None, command[1:]), launcher[-1].split("=")[1]
        started[processes] = options.training.per_device_train_batch_size, variables["OMP_NUM_THREADS"]
        ran = {"processes": int(processes), "threads": int(variables["OMP_NUM_THREADS"]) + wrong}
        write_json(Path(str(options.output.output_dir)) / "cost.json", ran)
        return jobs.Job(9.0, [1.0, 3.0], "")

    monkeypatch.setattr(jobs, "run", run)
    torch.set_num_threads(2)
    if wrong:
        with pytest.raises(RuntimeError, match="expected 1 processes of 2 threads, found"):
            jobs.scaling(bench)
    else:
        assert jobs.scaling(bench) == {"1 process": [2.0], "2 processes": [2.0]}
        assert started == {"1": (4, "2"), "2": (2, "1")}
