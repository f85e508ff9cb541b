"""The process: all cores that are its own, unless a person chose a number; imports without garbage collection."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import joblib
import psutil
import pytest

from hf_histo import launch

CORES = joblib.cpu_count(only_physical_cores=True)
several_cores = pytest.mark.skipif(CORES < 2, reason="this machine has one core")

# A recipe that prints its number of threads, and a launcher that starts it as accelerate does.
RECIPE = "import os\nfrom hf_histo.launch import run\nrun(lambda: print('threads', os.environ['OMP_NUM_THREADS']))\n"
LAUNCHER = """
import os, subprocess, sys
environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
sys.exit(subprocess.run([sys.executable, sys.argv[-1]], env=environment).returncode)
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("scripts")
    recipe, launcher = folder / "recipe.py", folder / "accelerate"
    recipe.write_text(RECIPE)
    launcher.write_text(LAUNCHER)
    return recipe, launcher


def started(command: Sequence[str | Path], prepare: Callable[[], None] | None = None, **environment: str) -> str:
    """What the recipe prints, or its error."""
    bare = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, env=bare | environment, capture_output=True, text=True, preexec_fn=prepare)
    return (done.stdout + done.stderr).strip()


@several_cores
def test_a_process_uses_the_cores_that_are_its_own(scripts: tuple[Path, Path]) -> None:
    recipe, _ = scripts
    assert started([recipe]) == f"threads {CORES}"
    assert started([recipe], LOCAL_WORLD_SIZE="2") == f"threads {CORES // 2}"
    assert started([recipe], SLURM_CPUS_PER_TASK="1") == "threads 1"
    one = min(os.sched_getaffinity(0))
    assert started([recipe], prepare=lambda: os.sched_setaffinity(0, {one})) == "threads 1"


@several_cores
def test_the_default_of_a_launcher_is_no_choice(scripts: tuple[Path, Path]) -> None:
    recipe, launcher = scripts
    assert started([launcher, "launch", recipe]) == f"threads {CORES}"


def test_accelerate_itself(scripts: tuple[Path, Path]) -> None:
    recipe, _ = scripts
    assert f"threads {CORES}" in started(["-m", "accelerate.commands.launch", recipe]).splitlines()


def test_a_number_that_a_person_chose_holds(scripts: tuple[Path, Path]) -> None:
    recipe, launcher = scripts
    assert started([recipe], OMP_NUM_THREADS="1") == "threads 1"
    assert started([recipe], OMP_NUM_THREADS="3") == "threads 3"
    assert started([launcher, "launch", recipe], OMP_NUM_THREADS="1") == "threads 1"
    assert started([launcher, "--num-cpu-threads-per-process=1", recipe]) == "threads 1"


def test_processes_that_the_system_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(process: psutil.Process) -> NoReturn:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(sys, "argv", ["recipes/histo_lora.py", "--seed", "1"])
    monkeypatch.setattr(psutil.Process, "cmdline", hidden)
    assert launch.command() == "recipes/histo_lora.py --seed 1"
    monkeypatch.setattr(psutil.Process, "environ", lambda process: {"OMP_NUM_THREADS": "1"})
    assert launch.thread_count() == 1
    monkeypatch.setattr(psutil.Process, "parent", hidden)
    assert launch.command() == "recipes/histo_lora.py --seed 1"
    assert launch.thread_count() == 1


def test_what_is_no_number_is_refused(scripts: tuple[Path, Path]) -> None:
    recipe, _ = scripts
    assert started([recipe], OMP_NUM_THREADS="many").startswith("error: OMP_NUM_THREADS is 'many', expected a number")


@pytest.mark.parametrize(("rank", "shown"), [("0", "something to know"), ("1", "")])
def test_warnings_of_this_package_come_from_the_first_process(tmp_path: Path, rank: str, shown: str) -> None:
    recipe = tmp_path / "recipe.py"
    log = "import logging; logging.getLogger('hf_histo.module').warning('something to know')"
    recipe.write_text(f"from hf_histo.launch import run\nrun(lambda: exec({log!r}))\n", encoding="utf-8")
    assert started([recipe], RANK=rank) == shown


# Huge pages behind a tensor of 64 MiB, in KiB, after torch was imported by a recipe.
TENSOR = """
from hf_histo.launch import run

def main():
    import torch
    tensor = torch.ones(2**24)
    [line] = [line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
    print("huge", line.split()[1])

run(main)
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
    or "[madvise]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="the kernel gives huge pages always or never, asked or not",
)
def test_large_tensors_lie_in_huge_pages_unless_a_person_refuses_them(tmp_path: Path) -> None:
    """Without them most of a training step on a CPU may be spent on page faults."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(TENSOR)
    assert int(started([recipe]).split()[1]) > 32 * 1024
    assert int(started([recipe], THP_MEM_ALLOC_ENABLE="0").split()[1]) < 32 * 1024


IMPORTING = """
import gc
from hf_histo.launch import importing, run

def frozen():
    with importing():
        assert not gc.isenabled()
        import wave
    assert gc.isenabled()
    return gc.get_freeze_count()

print(frozen())
del sys.modules["wave"]
run(lambda: print(*(frozen() > 10_000, frozen() == frozen())))
"""


def test_imports_are_not_collected_and_in_a_process_of_its_own_never_will_be() -> None:
    words = [sys.executable, "-c", f"import sys{IMPORTING}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "True", "True"], done.stderr


@pytest.mark.parametrize(("on_cpu", "cores", "expected"), [(True, 16, 1), (False, 1, 1), (False, 4, 3), (False, 64, 8)])
def test_one_process_reads_for_a_model_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, cores: int, expected: int
) -> None:
    monkeypatch.setattr(launch, "use_cpu", lambda: on_cpu)
    monkeypatch.setattr(launch, "thread_count", lambda processes: cores // processes)
    monkeypatch.setenv("WORLD_SIZE", "8")  # on other machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert launch.reading_processes() == expected
