"""A run that is killed at any point and resumed by the same command ends in the same bytes as an undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from killable import run
from miniature import SIZE

NAME = "ana/tumor"
RESULTS = ("adapter_model.safetensors", "metrics.json", "predictions/val.parquet")
QUICK = f"""--image_size={SIZE} --resize_size={SIZE} --per_device_train_batch_size=8 --num_train_epochs=2
    --learning_rate=0.01 --lora_dropout=0.1""".split()


@dataclass(frozen=True)
class Job:
    """A recipe with its options, and the phases to kill it in, which are identified by their events."""

    recipe: str
    options: tuple[str, ...]
    phases: dict[str, tuple[str, str]]  # kind and part of the path; "" is any


JOBS = {
    "run": Job(
        "histo_lora.py",
        ("--target_modules=last-conv", "--push_to_hub", f"--hub_model_id={NAME}"),
        {
            "conversion": ("", "/cache/"),
            "training": ("backward", ""),
            "half a checkpoint file": ("torch.save", "/checkpoint-"),
            "begin": ("", "/run/.run"),
            "checkpoint": ("", "/checkpoint-"),
            "adapter": ("", "/.adapter."),
            "push": ("open", "/adapter/"),
        },
    ),
    "cached": Job(
        "histo_lora.py",
        ("--target_modules=last-conv", "--training_views=2", "--cache_features=on"),
        {"feature caching": ("", "/hf_histo_features/"), "training on cached features": ("backward", "")},
    ),
    "pareto": Job(
        "pareto.py",
        ("--layers", "last-conv", "--ranks", "2", "4", "--seeds=1"),
        {"pareto": ("", ""), "pareto, training": ("backward", "")},
    ),
    "sweep": Job(
        "sweep.py",
        (f"--study={Path(__file__).parent / 'support' / 'grid.yaml'}", "--target_modules=last-conv"),
        {"sweep": ("", ""), "sweep, training": ("backward", "")},
    ),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as started:
        yield started


def start(
    job: Job, root: Path, source: tuple[Path, Path], server: Hub, kill: int | None = None
) -> tuple[int, str, list[tuple[str, str]]]:
    backbone, data = source
    folders = f"--output_dir={root / 'run'} --cache_dir={root / 'cache'} --backbone={backbone} --data={data}"
    return run(job.recipe, [*QUICK, *folders.split(), *job.options], root, kill=kill, hub=server.address)


def results(root: Path) -> dict[str, bytes]:
    """Content of the adapter folders of all runs in a folder."""
    adapters = sorted((root / "run").rglob("adapter"))
    assert adapters
    files = [path for a in adapters for path in (*(a / name for name in RESULTS), *(a / "predictions").iterdir())]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(
    source: tuple[Path, Path], server: Hub, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[tuple[str, str]], dict[str, bytes]]]:
    """Events and results of each job, computed on first use."""

    class Made(dict[str, tuple[list[tuple[str, str]], dict[str, bytes]]]):
        def __missing__(self, name: str) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
            root = tmp_path_factory.mktemp(name)
            code, output, events = start(JOBS[name], root, source, server)
            assert code == 0, output
            self[name] = events, results(root)
            return self[name]

    return Made()


def check(
    job: str,
    phase: str,
    seed: int,
    root: Path,
    source: tuple[Path, Path],
    server: Hub,
    undisturbed: dict[str, tuple[list[tuple[str, str]], dict[str, bytes]]],
) -> None:
    events, expected = undisturbed[job]
    kind, part = JOBS[job].phases[phase]
    moments = [n for n, (k, path) in enumerate(events) if kind in ("", k) and part in path]
    assert moments, f"nothing happens in {phase}"
    kill = random.Random(seed).choice(moments)
    shutil.rmtree(server.folder / NAME, ignore_errors=True)
    code, output, _ = start(JOBS[job], root, source, server, kill)
    assert code == -9, f"event {kill} of {len(events)}, {events[kill]}: {output}"
    for adapter in (root / "run").rglob("adapter"):  # whole, or not there
        assert all((adapter / name).is_file() for name in RESULTS)
    for file in (root / "run").rglob("adapter/*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    code, output, _ = start(JOBS[job], root, source, server)
    assert code == 0, f"after event {kill} of {len(events)}, {events[kill]}: {output}"
    assert results(root) == expected, f"after event {kill} of {len(events)}, {events[kill]}"
    if "--push_to_hub" in JOBS[job].options:
        pushed = server.files(NAME)
        assert all(pushed[name] == (root / "run" / "adapter" / name).read_bytes() for name in RESULTS)
    assert not [path for path in (root / "run").rglob("*.incomplete*") if path.parent == root / "run"]


ALL = [(job, phase) for job in JOBS for phase in JOBS[job].phases]


@pytest.mark.parametrize(("job", "phase"), [("run", "adapter")])
def test_killed_and_started_again(
    job: str,
    phase: str,
    tmp_path: Path,
    source: tuple[Path, Path],
    server: Hub,
    undisturbed: dict[str, tuple[list[tuple[str, str]], dict[str, bytes]]],
) -> None:
    check(job, phase, 0, tmp_path, source, server, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("job", "phase"), ALL)
def test_killed_anywhere_and_started_again(
    job: str,
    phase: str,
    seed: int,
    tmp_path: Path,
    source: tuple[Path, Path],
    server: Hub,
    undisturbed: dict[str, tuple[list[tuple[str, str]], dict[str, bytes]]],
) -> None:
    check(job, phase, seed, tmp_path, source, server, undisturbed)


def test_two_at_once_on_a_cold_cache(source: tuple[Path, Path], server: Hub, tmp_path: Path) -> None:
    """One converts the data, the other waits for it; the token that they push with is in no file or output."""
    backbone, data = source

    def train(name: str) -> tuple[int, str, list[tuple[str, str]]]:
        folders = f"--output_dir={tmp_path / name / 'run'} --cache_dir={tmp_path / 'cache'}"
        target = f"--backbone={backbone} --data={data} --push_to_hub --hub_model_id=ana/{name}"
        (tmp_path / name).mkdir()
        return run("histo_lora.py", [*QUICK, *folders.split(), *target.split()], tmp_path / name, hub=server.address)

    with ThreadPoolExecutor(2) as threads:
        ended = list(threads.map(train, ("one", "other")))
    for code, output, _ in ended:
        assert code == 0, output
        assert TOKEN not in output
    one, other = (results(tmp_path / name) for name in ("one", "other"))
    assert one == other
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


def test_a_token_is_not_shown_when_the_hub_refuses(source: tuple[Path, Path], server: Hub, tmp_path: Path) -> None:
    backbone, data = source
    options = f"--output_dir={tmp_path / 'run'} --backbone={backbone} --data={data} --push_to_hub"
    arguments = [*QUICK, *options.split(), "--hub_model_id=somebody_else/model"]
    code, output, _ = run("histo_lora.py", arguments, tmp_path, hub=server.address)
    assert code == 1
    assert "error: " in output
    assert TOKEN not in output
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
