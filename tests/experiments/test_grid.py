"""Cells of an experiment: each is trained once by several processes, even if one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from miniature import SIZE, divide_training, write_backbone, write_data

from hf_histo.config import Config, parse_with
from hf_histo.config.experiments import LeaveOneCenterOutOptions, Sharing
from hf_histo.data import schema
from hf_histo.errors import HistoError
from hf_histo.experiments import grid
from hf_histo.experiments.leave_one_center_out import leave_one_center_out
from hf_histo.training import run_folder

fork = multiprocessing.get_context("fork")


def cells(folder: Path, count: int) -> list[grid.Cell]:
    return [grid.cell(Config(), datasets.DatasetDict(), folder / f"cell-{seed}", seed) for seed in range(count)]


def slow_training(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Replace training by a function that logs its start and end as lines of the cell's file `log`."""

    def run_config(config: Config, data: datasets.DatasetDict) -> str:
        folder = run_folder.folder_of(config)
        if not run_folder.is_finished(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "log").open("a") as log:
                log.write(f"{os.getpid()}\n")
            time.sleep(seconds)
            (folder / run_folder.ADAPTER).mkdir()
        return folder.name

    monkeypatch.setattr(grid, "run_config", run_config)
    monkeypatch.setattr(grid, "POLL", 0.05)


def starts(cell: grid.Cell) -> list[str]:
    return (run_folder.folder_of(cell.config) / "log").read_text().split()


def test_one_process_trains_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_training(monkeypatch, 0)
    every = cells(tmp_path, 3)
    found = grid.train(every, tmp_path, Sharing(), describe=lambda cell, result: f"{cell.name} {result}")
    assert found == ["cell-0", "cell-1", "cell-2"]
    assert capsys.readouterr().out.splitlines() == [f"cell-{n} cell-{n}" for n in range(3)]
    assert grid.train(every[::-1], tmp_path, Sharing()) == ["cell-2", "cell-1", "cell-0"]
    assert all(len(starts(cell)) == 1 for cell in every)


def test_a_cell_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_training(monkeypatch, 0)
    train, every = grid.run_config, cells(tmp_path, 3)

    def faulty(config: Config, data: datasets.DatasetDict) -> Any:
        if config.training.seed in (0, 1):
            raise HistoError(f"the loss is nan with seed {config.training.seed}")
        return train(config, data)

    monkeypatch.setattr(grid, "run_config", faulty)
    with pytest.raises(HistoError, match=r"^the loss is nan with seed 0$"):  # the first one: likely that of all
        grid.train(every, tmp_path, Sharing())
    with pytest.raises(
        HistoError, match=r"^2 of 3 runs failed, the others are .* cell-1: the loss is nan with seed 1;"
    ):
        grid.train(every[::-1], tmp_path, Sharing())
    assert run_folder.is_finished(run_folder.folder_of(every[2].config))
    monkeypatch.setattr(grid, "run_config", train)
    assert grid.train(every, tmp_path, Sharing()) == ["cell-0", "cell-1", "cell-2"]


def test_a_cell_that_failed_in_a_worker_is_not_tried_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_training(monkeypatch, 0)
    tried, train = [], grid.run_config

    def faulty(config: Config, data: datasets.DatasetDict) -> Any:
        tried.append(config.training.seed)
        if config.training.seed == 1:
            raise HistoError("the loss is nan")
        return train(config, data)

    monkeypatch.setattr(grid, "run_config", faulty)
    since = time.time() - 1
    for _ in range(2):
        with pytest.raises(HistoError, match=r"^1 of 3 runs failed, .* the first is cell-1: the loss is nan;"):
            grid._train(cells(tmp_path, 3), since=since)
    assert tried == [0, 1, 2, 0, 2]


def test_launches_on_one_folder_divide_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_training(monkeypatch, 0.2)
    every = cells(tmp_path, 8)
    other = fork.Process(target=grid.train, args=(every, tmp_path, Sharing()))
    other.start()
    assert len(grid.train(every, tmp_path, Sharing())) == 8
    other.join(60)
    assert other.exitcode == 0
    assert [len(starts(cell)) for cell in every] == [1] * 8
    by_process = [start for cell in every for start in starts(cell)]
    assert {str(os.getpid()), str(other.pid)} == set(by_process)


def test_the_cell_of_a_killed_process_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = cells(tmp_path, 2)
    slow_training(monkeypatch, 600)
    killed = fork.Process(target=grid.train, args=(every, tmp_path, Sharing()))
    killed.start()
    while not (tmp_path / "cell-0" / "log").is_file() or not starts(every[0]):
        time.sleep(0.02)
    slow_training(monkeypatch, 0)
    other = fork.Process(target=grid.train, args=(every, tmp_path, Sharing()))
    other.start()
    while not run_folder.is_finished(tmp_path / "cell-1"):
        time.sleep(0.02)
    time.sleep(0.3)
    assert other.is_alive() and len(starts(every[0])) == 1  # waits for the first cell
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    other.join(60)
    assert other.exitcode == 0
    assert starts(every[0]) == [str(killed.pid), str(other.pid)]
    assert starts(every[1]) == [str(other.pid)]


@pytest.mark.parametrize(
    ("sharing", "message"),
    [
        (Sharing(workers=0), "--workers is 0"),
        (Sharing(job_parameters=["timeout_min=1"]), "--job_parameters is for --cluster"),
        (Sharing(cluster="local", job_parameters=["timeout_min"]), "expected NAME=VALUE"),
        (Sharing(cluster="local", job_parameters=["speed=1"]), "--cluster local: .*speed"),
        (Sharing(cluster="slurm"), "--cluster slurm: .*srun"),
    ],
)
def test_impossible_sharing_is_one_line(tmp_path: Path, sharing: Sharing, message: str) -> None:
    if sharing.cluster:
        pytest.importorskip("submitit")
    with pytest.raises(HistoError, match=message):
        grid.train(cells(tmp_path, 1), tmp_path, sharing)


def test_workers_do_not_overwrite_each_other(tmp_path: Path) -> None:
    config = Config.of({**Config().flat(), "overwrite_output_dir": True})
    cell = grid.cell(config, datasets.DatasetDict(), tmp_path / "cell", 0)
    with pytest.raises(HistoError, match="--overwrite_output_dir would delete"):
        grid.train([cell], tmp_path, Sharing(workers=2))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run leave-one-center-out over three centers; return the bytes of the results by file."""
    folder = tmp_path_factory.mktemp("study")
    data = write_data(folder / "mini", {"train": 24, "val": 12})
    divide_training(data)
    backbone = write_backbone(folder / "model")

    def study(name: str, *more: str) -> dict[str, Any]:
        quick = f"--image_size={SIZE} --resize_size={SIZE} --num_train_epochs=1 --method=linear --seeds=1"
        out = folder / name
        places = [f"--data={data}", f"--backbone={backbone}", f"--output_dir={out}"]
        config, options = parse_with(LeaveOneCenterOutOptions, None, [*quick.split(), *places, *more])
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:  # sums in another order differ in their last bits
            patch.setenv("OMP_NUM_THREADS", "1")
            torch.set_num_threads(1)
            leave_one_center_out(config, options)
            torch.set_num_threads(threads)
        files = [*out.glob("*/adapter/*.safetensors"), *out.glob("*/adapter/predictions/*"), *out.glob("*.json")]
        return {str(file.relative_to(out)): file.read_bytes().replace(name.encode(), b"OUT") for file in files}

    return study


@pytest.fixture(scope="module")
def alone(study: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return study("alone")


@pytest.mark.parametrize(
    "more",
    [
        "--workers=2",
        pytest.param("--cluster=local --workers=2 --job_parameters timeout_min=10", marks=pytest.mark.slow),
    ],
)
def test_workers_and_jobs_give_the_same_bytes(
    study: Callable[..., dict[str, Any]], alone: dict[str, Any], more: str
) -> None:
    if "cluster" in more:
        pytest.importorskip("submitit")
    name = "jobs-" if "cluster" in more else "works"
    assert len(alone) == 1 + 3 * 3
    found = study(name, *more.split())
    assert [file for file in found | alone if found.get(file) != alone.get(file)] == []


def test_the_folder_of_a_held_out_center(tmp_path: Path) -> None:
    def rows(names: list[str]) -> datasets.DatasetDict:
        empty: dict[str, list[object]] = {name: [] for name in ("id", "image", "label", "center", "group")}
        return datasets.DatasetDict(test=datasets.Dataset.from_dict(empty, features=schema.features(["a", "b"], names)))

    assert grid.center_folder(tmp_path, rows([]), 3, 0).name == "center-3-seed-0"
    named = rows(["Halle", "../Köln Süd/" + 80 * "x"])
    assert grid.center_folder(tmp_path, named, 0, 1) == tmp_path / "center-0-Halle-seed-1"
    folder = grid.center_folder(tmp_path, named, 1, 1)
    assert folder.parent == tmp_path and folder.name == f"center-1-.._Köln_Süd_{28 * 'x'}-seed-1"
    (tmp_path / "center-0-seed-1").mkdir()  # begun by an earlier version
    assert grid.center_folder(tmp_path, named, 0, 1) == tmp_path / "center-0-seed-1"
