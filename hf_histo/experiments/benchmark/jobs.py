"""Whole commands as a user starts them: from the start of Python to the end, and on several processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

from hf_histo.config import OPTIONS
from hf_histo.config.packaged import PROGRAM
from hf_histo.errors import HistoError
from hf_histo.experiments.benchmark.bench import Bench
from hf_histo.experiments.benchmark.timing import Timings
from hf_histo.files import read_json
from hf_histo.training import run_folder

BARE, LAUNCHED = "fine-tune", "fine-tune, by accelerate launch"
PREDICT, AGAIN = "predict", "fine-tune again, which was finished"
TO_FIRST_STEP = ", to the end of the first step"
PROCESSES = {1: "1 process", 2: "2 processes"}


@dataclass(frozen=True)
class Job:
    """A command that ended well: its seconds, those of each training step since its start, and what it printed."""

    seconds: float
    steps: list[float]
    output: str


def jobs(bench: Bench) -> Timings:
    """Seconds of commands in new processes, with nothing cached.

    The training is as short as a measurement of steps, so that its seconds are those of everything else.
    """
    accelerate = ["accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--dynamo_backend=no"]
    accelerate += ["--mixed_precision=no", *(["--cpu"] if bench.device.type == "cpu" else [])]
    found: dict[str, list[float]] = {}
    for _ in tqdm(range(bench.options.repetitions), desc="jobs"):
        with tempfile.TemporaryDirectory(dir=bench.folder) as temporary, _at_a_time(bench) as pool:
            bare, launched = Path(temporary) / "bare", Path(temporary) / "launched"
            again = fine_tuning(bench, bare)
            data = [f"--data={bench.config.data.data}", "--split=val", f"--cache_dir={temporary}/cache"]
            adapter, output = bare / run_folder.ADAPTER, Path(temporary) / "predictions.csv"
            predict = ["predict", f"--adapter={adapter}", f"--output={output}", *data]
            trained = list(pool.map(run, [again, fine_tuning(bench, launched)], [(), accelerate]))
            used = list(pool.map(run, [predict, again]))
            if "nothing was trained" not in used[1].output:
                raise RuntimeError("a finished run was trained again")
            for name, job in zip((BARE, LAUNCHED, PREDICT, AGAIN), [*trained, *used], strict=True):
                found.setdefault(name, []).append(job.seconds)
            for name, job in zip((BARE, LAUNCHED), trained, strict=True):
                found.setdefault(name + TO_FIRST_STEP, []).append(job.steps[0])
    return dict(found)


def scaling(bench: Bench) -> Timings:
    """Seconds for a step on one process and on two, by torchrun on CPUs, with as many threads and images in all."""
    threads = torch.get_num_threads()
    found: dict[str, list[float]] = {name: [] for name in PROCESSES.values()}
    for reason in (
        f"{threads} thread in all, expected 2 or more" if threads < 2 else None,
        f"a batch of {bench.batch} can't be shared by two processes" if bench.batch % 2 else None,
    ):
        if reason:
            return dict.fromkeys(found, reason)
    for _ in tqdm(range(bench.options.repetitions), desc="scaling"):
        with _at_a_time(bench) as pool:
            for name, seconds in zip(found, pool.map(partial(_step, bench), PROCESSES), strict=True):
                found[name].append(seconds)
    return dict(found)


def _step(bench: Bench, processes: int) -> float:
    """Seconds for a step on this many processes."""
    threads = torch.get_num_threads() // processes
    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:
        folder = Path(temporary) / "run"
        job = run(
            fine_tuning(bench, folder, processes, more_steps=1),
            ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"],
            OMP_NUM_THREADS=str(threads),
            ACCELERATE_USE_CPU="true",
        )
        ran = read_json(folder / run_folder.COST)
        if (ran["processes"], ran["threads"]) != (processes, threads):
            raise RuntimeError(f"expected {processes} processes of {threads} threads, found {ran}")
        return statistics.median(np.diff(job.steps))


def _at_a_time(bench: Bench) -> ThreadPoolExecutor:
    """One command at a time; with --quick, which measures nothing, two."""
    return ThreadPoolExecutor(2 if bench.options.quick else 1)


def fine_tuning(bench: Bench, folder: Path, processes: int = 1, *, more_steps: int = 0) -> list[str]:
    """The words behind the program's name of a short training on the generated images, which logs each step."""
    values = bench.config.flat() | {"cache_dir": str(folder) + "-cache", "output_dir": str(folder)}
    values |= {"max_steps": bench.options.steps + more_steps, "logging_steps": 1}
    values |= {"per_device_train_batch_size": bench.batch // processes}
    return ["fine-tune", *(f"--{name}={value}" for name, value in values.items() if value != OPTIONS[name].default)]


def run(command: Sequence[str], launcher: Sequence[str] = (), **variables: str) -> Job:
    """Run a command of this package in a new process, with the environment that this one was started with.

    Args:
        command: its name and options.
        launcher: a module that starts it, with its options.
        variables: of the environment, besides.

    Raises HistoError if the command fails.
    """
    words = [sys.executable, *(["-m", *launcher] if launcher else []), "-m", PROGRAM, *command]
    # Without its progress bars, Trainer prints each loss in a line.
    environment = psutil.Process().environ() | {"PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"} | variables
    steps, lines = [], []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        started = time.perf_counter()
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if "'loss':" in line:
                    steps.append(time.perf_counter() - started)
        seconds = time.perf_counter() - started
        errors.seek(0)
        if process.returncode:
            tqdm.write(errors.read(), file=sys.stderr)
            raise HistoError(f"{PROGRAM} {command[0]} ended with {process.returncode}, its message is above")
    return Job(seconds, steps, "".join(lines))
