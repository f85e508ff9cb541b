"""The features of a linear probe: writing them, and all of the probe, beside a forward pass."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from hf_histo.data.schema import ImageTable
from hf_histo.experiments.benchmark.bench import Bench
from hf_histo.experiments.benchmark.timing import quiet
from hf_histo.training import feature_cache
from hf_histo.training.trainer import Trainer
from hf_histo.transforms.pipeline import collate

EPOCHS = 10  # of the linear probe
WRITING, PROBE = "this package, writing features", f"this package, a linear probe of {EPOCHS} epochs"
READ, FED = "forward pass, with reading", "forward pass, fed from memory"


def sides(bench: Bench) -> dict[str, Callable[[], float]]:
    """Seconds for an image of `train` and `val`, with nothing stored yet."""
    return {
        WRITING: partial(_cached, bench, lambda session: None),
        FED: partial(fed, bench),
        PROBE: partial(_cached, bench, lambda session: session.train()),
        READ: partial(read, bench),
    }


def _cached(bench: Bench, then: Callable[[Trainer], object]) -> float:
    """Features are computed, written and, by `then`, used."""
    session = _session(bench)
    cache = bench.config.data.cache_dir
    shutil.rmtree(Path(str(cache)) / "hf_histo_features", ignore_errors=True)
    started = time.perf_counter()
    with feature_cache.folded_layers(session), feature_cache.cached_prefix(session, "on", cache):
        then(session)
    return (time.perf_counter() - started) / _count(session)


def read(bench: Bench) -> float:
    session = _session(bench)
    started = time.perf_counter()
    with _forward(session) as forward:
        for rows in (session.train_dataset, session.eval_dataset):
            assert isinstance(rows, ImageTable)
            for batch in DataLoader(rows, batch_size=bench.batch, collate_fn=collate):
                forward(session._prepare_inputs(batch)["pixel_values"])
    return (time.perf_counter() - started) / _count(session)


def fed(bench: Bench) -> float:
    session = _session(bench)
    assert session.model is not None
    pixels, count = bench.pixels(session.model), _count(session)
    with _forward(session) as forward:
        forward(pixels)  # does not count
        started = time.perf_counter()
        for start in range(0, count, bench.batch):
            forward(pixels[: count - start])
        return (time.perf_counter() - started) / count


@contextmanager
def _forward(session: Trainer) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A forward pass as features are computed, to logits on the CPU."""
    assert session.model is not None
    model = session.model.eval()
    with feature_cache.folded_layers(session), torch.no_grad(), session.accelerator.autocast():
        yield lambda pixels: model(pixel_values=pixels).logits.cpu()


def _count(session: Trainer) -> int:
    assert isinstance(session.train_dataset, ImageTable) and isinstance(session.eval_dataset, ImageTable)
    return len(session.train_dataset) + len(session.eval_dataset)


def _session(bench: Bench) -> Trainer:
    config = bench.config
    adapter = replace(config.adapter, method="linear")
    training = replace(config.training, num_train_epochs=float(EPOCHS), per_device_eval_batch_size=bench.batch)
    changes = replace(config.augmentation, augmentation="none")
    speed = replace(config.speed, cache_features="on")
    session = bench.session(replace(config, adapter=adapter, training=training, augmentation=changes, speed=speed))
    quiet(session)
    return session
