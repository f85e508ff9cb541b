"""Session setup: no network, no cache outside the session, a thread for each process, and no figures."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

gc.disable()  # while modules are imported, none of which is garbage, until `pytest_collection_finish`
# Before anything imports `datasets` or `huggingface_hub`, which read these once.
_cache = tempfile.TemporaryDirectory(prefix="hf_histo_tests_")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _cache.name
# Also of processes that tests start: pytest itself runs a process on each core.
os.environ["OMP_NUM_THREADS"] = "1"

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from miniature import write_backbone, write_data  # noqa: E402

# Files that take longest, by `--durations=0`; they start first, so that no process works alone on one at the end.
LONGEST = (
    *("recipes/test_benchmark.py", "training/test_trainer.py", "training/test_feature_cache.py"),
    *("recipes/test_multiprocess.py", "training/test_preemption.py", "recipes/test_cytology_recipe.py"),
    *("models/speed/test_folding.py", "training/test_trackers.py", "recipes/test_compare.py", "adapter/test_folder.py"),
    *("recipes/test_every_option.py", "recipes/test_bad_input.py", "recipes/test_sweep.py", "experiments/test_grid.py"),
    *("data/readers/test_pixel_tables.py", "test_push.py", "test_kill.py", "recipes/test_app.py", "test_cli.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the `LONGEST` files first; the order within a file stays."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Exempt what was imported from garbage collection, one of which Trainer asks for in every run."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _session() -> Iterator[None]:
    torch.set_num_threads(1)
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # 5 seconds after each pass over streamed parquet
    yield
    _cache.cleanup()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restore the number of threads, which a recipe called in this process changes."""
    before = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    yield
    os.environ.pop("OMP_NUM_THREADS", None)
    if before[0] is not None:
        os.environ["OMP_NUM_THREADS"] = before[0]
    torch.set_num_threads(before[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A backbone and a data set in miniature."""
    folder = tmp_path_factory.mktemp("source")
    return write_backbone(folder / "backbone"), write_data(folder / "data")


@pytest.fixture(autouse=True)
def _without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw figures, most of the time of a run in miniature, only in tests marked `figures`."""
    if "figures" not in request.keywords:
        monkeypatch.setattr("hf_histo.evaluation.figures.run.draw", lambda *arguments, **options: {})
