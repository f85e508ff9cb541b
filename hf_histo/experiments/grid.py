"""Experiments of many runs: cells (config × seed × fold) that one or several processes train, each cell once.

The process that trains a cell holds a lock on a file beside its folder, which the operating system releases when the
process ends. Therefore the same command resumes an experiment, several commands on one folder share its cells, and the
cell of a process that was killed is continued by another one. Workers and cluster jobs of one command work the same.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import yaml

from hf_histo import launch
from hf_histo.config import Config
from hf_histo.config.experiments import Sharing
from hf_histo.data.schema import center_names
from hf_histo.errors import HistoError
from hf_histo.evaluation.reporting.summary import METRICS
from hf_histo.files import atomic_file, locked, write_json
from hf_histo.finetune import run_config
from hf_histo.result import Result
from hf_histo.training import run_folder

logger = logging.getLogger(__name__)

MINUTES = 24 * 60  # default time limit of a job; submitit's default is 5
MAX_NAME = 40  # characters of a center's name in a folder's name: file systems allow 255 bytes
POLL = 1.0  # seconds between checks of what other processes do

Item = TypeVar("Item")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Cell:
    """A run of an experiment: its name in reports, its options (which include its folder), and its data."""

    name: str
    config: Config
    data: datasets.DatasetDict


def cell(config: Config, data: datasets.DatasetDict, folder: Path, seed: int) -> Cell:
    """A cell that runs `config` with `seed` in `folder`, whose name is that of the cell."""
    return Cell(folder.name, config.at(folder, seed), data)


def center_folder(parent: Path, data: datasets.DatasetDict, center: int, seed: int) -> Path:
    """Folder of the run that holds out a center: "center-2-Leipzig-seed-0", or "center-2-seed-0" without names.

    Characters of a name that may not be portable become "_". One without the name, of an earlier version, is taken
    where it exists.
    """
    numbered = parent / f"center-{center}-seed-{seed}"
    names = center_names(next(iter(data.values())))
    if not names or numbered.exists():
        return numbered
    name = re.sub(r"[^\w.-]+", "_", names[center])[:MAX_NAME]
    return parent / f"center-{center}-{name}-seed-{seed}"


def train(
    cells: Sequence[Cell],
    folder: Path,
    sharing: Sharing,
    *,
    describe: Callable[[Cell, Result], str] | None = None,
) -> list[Result]:
    """Train all unfinished cells, and return the results of all cells in order.

    Args:
        cells: the cells, each with its own folder.
        folder: folder of the experiment, for the logs of jobs.
        sharing: the processes that train; by default, only this one, in the order of the cells.
        describe: returns the line that is printed when a cell is finished.

    Raises HistoError as `run_config` does, for the first cell at once and for others in the end, for invalid `sharing`,
    and if a worker ended without finishing its cells.
    """
    check(cells, sharing)
    if sharing.workers > 1 or sharing.cluster:
        (_submit if sharing.cluster else _start)(cells, folder, sharing)
        if missing := [cell.name for cell in cells if not run_folder.is_finished(run_folder.folder_of(cell.config))]:
            raise HistoError(
                f"{len(missing)} of {len(cells)} runs did not finish, the first is {missing[0]}: its worker's error is "
                f"{f'in {_logs(folder)}' if sharing.cluster else 'above'}; the same command resumes"
            )
    return _train(cells, describe)


def seeds(config: Config, count: int) -> range:
    """`count` consecutive seeds, starting with `--seed`. Raises HistoError for fewer than one."""
    if count < 1:
        raise HistoError(f"--seeds is {count}, expected at least 1")
    return range(config.training.seed, config.training.seed + count)


def on_test(result: Result) -> dict[str, float | None]:
    """The metrics of `summary.METRICS` on `test`, None if undefined."""
    overall = result.record["splits"]["test"]["overall"]
    return {metric: overall[metric]["value"] for metric in METRICS}


def write(folder: Path, name: str, content: Mapping[str, Any], text: str) -> None:
    """Print `text`, a table in Markdown, and write it to NAME.md and `content` to NAME.json in `folder`."""
    print("\n" + text)
    with atomic_file(folder / f"{name}.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(folder / f"{name}.json", content)


def _train(
    cells: Sequence[Cell], describe: Callable[[Cell, Result], str] | None = None, since: float | None = None
) -> list[Result]:
    """Train, in order, the cells that no other process trains, until all are finished.

    Once one is, the `HistoError` of another is raised when all others are finished as well. That of the first cell is
    raised at once, since the fault is often that of all. A cell that has failed in another process since the time
    `since`, by default now, is not tried again.
    """
    since = time.time() if since is None else since
    finished: list[Result] = []
    failed: dict[str, str] = {}

    def train(cell: Cell) -> Result | None:
        error_file = _beside(cell, "error")
        if known := failure(error_file, since):
            failed[cell.name] = known
            return None
        try:
            result = run_config(cell.config, cell.data)
        except HistoError as error:
            if launch.process().num_processes > 1:  # those of a launch have to end together
                raise
            error_file.write_text(str(error), encoding="utf-8")
            if not finished:
                raise
            failed[cell.name] = str(error)
            logger.error("%s failed: %s", cell.name, error)
            return None
        error_file.unlink(missing_ok=True)
        finished.append(result)
        if describe and launch.is_main_process():
            print(describe(cell, result), flush=True)
        return result

    results = each_once(cells, _claimed, train)
    for name, error in failed.items():
        raise HistoError(
            f"{len(failed)} of {len(cells)} runs failed, the others are finished; the first is {name}: {error}; the "
            "same command tries again what failed"
        )
    return [result for result in results if result is not None]


def each_once(
    items: Sequence[Item], claim: Callable[[Item], AbstractContextManager[bool]], work: Callable[[Item], Done]
) -> list[Done]:
    """What `work` returns for each item, in order; it is called while this process holds the claim to the item.

    `claim` yields whether no other process holds it. Items that others hold are waited for, so that `work` must return
    at once for those that are finished.
    """
    done: dict[int, Done] = {}
    while len(done) < len(items):
        before = len(done)
        for place, item in enumerate(items):
            if place not in done:
                with claim(item) as is_ours:
                    if is_ours:
                        done[place] = work(item)
        if len(done) == before:
            time.sleep(POLL)
    return [done[place] for place in range(len(items))]


def failure(file: Path, since: float) -> str | None:
    """The error that another process wrote into `file` after the time `since`; None if there is none."""
    return file.read_text(encoding="utf-8") if file.is_file() and file.stat().st_mtime > since else None


@contextmanager
def _claimed(cell: Cell) -> Iterator[bool]:
    """Yield whether this process has claimed the cell, until the end of the block.

    The processes of a distributed launch train a cell together and don't share cells with other launches; `run_config`
    refuses a second launch in the same folder.
    """
    if launch.process().num_processes > 1:
        yield True
        return
    with locked(_beside(cell, "cell.lock")) as is_ours:  # .NAME.lock is the run's own
        yield is_ours


def _beside(cell: Cell, suffix: str) -> Path:
    """A hidden file beside a cell's folder."""
    folder = run_folder.folder_of(cell.config).resolve()
    return folder.parent / f".{folder.name}.{suffix}"


def check(cells: Sequence[Cell], sharing: Sharing) -> None:
    """Raise HistoError for invalid `sharing`, and for cells that several processes can't share."""
    if sharing.workers < 1:
        raise HistoError(f"--workers is {sharing.workers}, expected at least 1")
    if sharing.job_parameters and not sharing.cluster:
        raise HistoError("--job_parameters is for --cluster, which is missing: add it, or leave them out")
    if sharing.workers == 1 and not sharing.cluster:
        return
    if launch.process().num_processes > 1:
        raise HistoError("--workers and --cluster start processes of one run each, found a launch of several; use one")
    if any(cell.config.output.overwrite_output_dir for cell in cells):
        raise HistoError("--overwrite_output_dir would delete what other workers finished; delete the folder instead")


def _start(cells: Sequence[Cell], folder: Path, sharing: Sharing) -> None:
    """Train the cells in several processes on this machine, which share its GPUs, and wait for them."""
    context = multiprocessing.get_context("spawn")
    threads, now = launch.thread_count(sharing.workers), time.time()
    workers = [context.Process(target=_work, args=(cells, now, number, threads)) for number in range(sharing.workers)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()  # it writes a checkpoint
                worker.join()


def _work(cells: Sequence[Cell], since: float, number: int = 0, threads: int | None = None) -> None:
    """Main function of a worker process of `_start`, with `threads` CPU threads, or of a job, started at `since`."""
    launch.use_gpu(number)
    launch.run(partial(_train, cells, since=since), threads=threads)


def _submit(cells: Sequence[Cell], folder: Path, sharing: Sharing) -> None:
    """Train the cells in jobs of a cluster, and wait for them."""
    try:
        from submitit import AutoExecutor
    except ImportError:
        raise HistoError("--cluster needs submitit: pip install 'hf_histo[slurm]'") from None
    try:
        executor = AutoExecutor(_logs(folder), cluster=sharing.cluster)
        executor.update_parameters(**{"timeout_min": MINUTES} | _parameters(sharing.job_parameters))
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise HistoError(f"--cluster {sharing.cluster}: {' '.join(str(error).split())}") from None
    worker = Job(cells, time.time())
    jobs = [executor.submit(worker) for _ in range(sharing.workers)]
    print(f"jobs {', '.join(job.job_id for job in jobs)}, logs in {_logs(folder)}", flush=True)
    try:
        for job in jobs:
            job.wait()
    except BaseException:
        for job in jobs:
            job.cancel(check=False)
        raise


@dataclass(frozen=True)
class Job:
    """The callable of a cluster job, submitted at `since`: a worker, queued again at a timeout or preemption."""

    cells: Sequence[Cell]
    since: float

    def __call__(self) -> None:
        _work(self.cells, self.since)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _logs(folder: Path) -> Path:
    return folder / ".jobs"


def _parameters(given: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE into a mapping, with values read as YAML."""
    found = dict(parameter.partition("=")[::2] for parameter in given)
    if wrong := [parameter for parameter in given if "=" not in parameter]:
        raise HistoError(f"--job_parameters {wrong[0]}: expected NAME=VALUE, such as timeout_min=240")
    return {name: yaml.safe_load(value) for name, value in found.items()}
