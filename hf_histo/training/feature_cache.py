"""Skips the frozen part of a training step: batch norm, folded, and all below the first trained layer, stored."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import timm
import torch
import transformers
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_histo.data.readers.streaming import Stream
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.models import batchnorm
from hf_histo.models.speed import activation_cut, folding
from hf_histo.training.trainer import Stored, Trainer
from hf_histo.transforms.augmentation import Augmentation
from hf_histo.transforms.pipeline import collate

logger = logging.getLogger(__name__)

WORTH_IT = 0.5  # share of a forward pass before the cut from which "auto" stores activations


@contextmanager
def folded_layers(session: Trainer) -> Iterator[None]:
    """Within the block, convolutions take in frozen batch norm and their low-rank update, see `folding.folded`."""
    assert session.model is not None
    if session.batch_norm == "track" or _is_sharded(session):
        yield
        return
    with folding.folded(session.model, _sample(session)) as count:
        logger.info("%d convolutions take in the batch norm behind them, or their low-rank update", count)
        yield


@contextmanager
def cached_prefix(session: Trainer, mode: str, cache_dir: str | None) -> Iterator[None]:
    """Within the block, `session` trains and validates on stored activations, computing what is missing.

    They are kept, for the next run of the same backbone on the same data. Same results as without: in float32, to the
    last bit wherever an image's activation does not depend on the others in its batch.

    Args:
        session: that is about to be trained.
        mode: of `--cache_features`: "on", "off", or "auto", which caches where that saves work.
        cache_dir: folder of the activations; None is the one of the `datasets` library.

    Every process of a launch calls it. Raises `HistoError` with "on" where it can't be done, which "auto" logs.
    """
    model = session.model
    assert model is not None
    cut, stored, reason = None, None, _unwanted(session, mode)
    if not reason:
        with session.accelerator.autocast():
            cut = activation_cut.find(model, _sample(session))
        reason = _unfit(cut, mode)
    if cut and not reason:
        stored = _stores(session, cache_dir, cut)
        reason = _without_space(session, stored)
    if reason and mode == "on":
        raise HistoError(f"--cache_features on: {reason}")
    if cut is None or stored is None or reason:
        logger.log(logging.WARNING if stored else logging.INFO, "activations are not cached: %s", reason)
        yield
        return
    _fill(session, cut, stored)
    train, validation = session.train_dataset, session.eval_dataset
    assert isinstance(train, ImageTable) and isinstance(validation, ImageTable)
    session.train_dataset, session.eval_dataset = train.without_images(), validation.without_images()
    session.stored = stored
    try:
        with cut.entered(model):
            yield
    finally:
        session.train_dataset, session.eval_dataset, session.stored = train, validation, None


def _is_random(session: Trainer) -> bool:
    """Whether training views differ from one another. Without augmentation, that is where a square is cut out."""
    assert isinstance(session.train_dataset, ImageTable)
    height, width = session.train_dataset[0]["image"].shape[1:]
    pipeline = session.pipeline
    return pipeline.augmentation != Augmentation() or pipeline.stain_mixing > 0 or height != width


def _views(session: Trainer) -> int | None:
    """Different views of a training image; None if there is a new one in every epoch."""
    return session.training_views if _is_random(session) else 1


def _unwanted(session: Trainer, mode: str) -> str | None:
    """Why the options leave nothing to store."""
    if isinstance(session.train_dataset, Stream):
        return "training images are streamed"
    views, epochs = _views(session), session.args.num_train_epochs
    if mode == "off":
        return "switched off"
    if views is None:
        return "every epoch draws new views; give their number, --training_views, or --augmentation none"
    if mode == "auto" and views >= epochs:
        return f"{epochs:g} epochs are no more than there are views, {views}"
    assert session.model is not None
    if session.batch_norm == "track" and batchnorm.layers(session.model):
        return "batch norm follows the data; expected --batch_norm frozen"
    if _is_sharded(session) or session.args.torch_compile:
        return "the model is compiled or divided among devices; expected one whole model in each process"
    return None


def _is_sharded(session: Trainer) -> bool:
    """Whether a process has less than a whole model, or more than one."""
    return session.is_fsdp_enabled or session.is_deepspeed_enabled or session.args.n_gpu > 1


def _sample(session: Trainer) -> torch.Tensor:
    """Noise of the model's input size."""
    size = session.pipeline.preprocessing.image_size
    noise = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(session.args.device).contiguous(memory_format=torch.channels_last)


def _unfit(cut: activation_cut.Cut | None, mode: str) -> str | None:
    """Why the model leaves nothing to store."""
    if cut is None:
        return "no layer before the first trained one does the same in every pass; train fewer layers, or off"
    if mode == "auto" and cut.share < WORTH_IT:
        return f"{cut.share:.0%} of a forward pass is before the first trained layer, expected at least {WORTH_IT:.0%}"
    return None


def _stores(session: Trainer, cache_dir: str | None, cut: activation_cut.Cut) -> Stored:
    """Where the activations are, keyed by all that they depend on."""
    assert session.model is not None
    views = _views(session)
    assert views is not None
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_histo_features"
    pipeline = session.pipeline
    common = (
        pipeline.preprocessing,
        pipeline.normalizer,
        session.accelerator.mixed_precision,
        session.args.device.type,
        *(module.__version__ for module in (torch, timm, transformers)),
    )
    drawn = (pipeline.augmentation, pipeline.stain_mixing, pipeline.seed) if _is_random(session) else ()
    stores = []
    for table, kind, own in ((session.train_dataset, "training", drawn), (session.eval_dataset, "evaluation", ())):
        assert isinstance(table, ImageTable)
        key = activation_cut.key(cut, session.model, table.fingerprint(), kind, *own, *common)
        stores.append(activation_cut.Store(root / key, len(table), cut.activation, views if kind == "training" else 1))
    return Stored(*stores)


def _without_space(session: Trainer, stored: Stored) -> str | None:
    """Why there is no room, seen from any process."""
    root = stored.training.folder.parent
    root.mkdir(parents=True, exist_ok=True)
    stores = (stored.training, stored.validation)
    needed = sum(len(rows) * store.row_bytes for store in stores for _, rows in store.missing())
    left = shutil.disk_usage(root).free
    found = None
    if needed > left:
        found = (
            f"{root} has {left / 2**20:,.0f} MiB left, and activations take {needed / 2**20:,.0f} MiB for "
            f"{stored.training.rows:,} images, {stored.training.views} views; make room, or give another --cache_dir"
        )
    every = gather_object([found])  # and nobody writes before all have looked
    return next((reason for reason in every if reason), None)


def _fill(session: Trainer, cut: activation_cut.Cut, stored: Stored) -> None:
    """Compute the activations that are missing, each process its share of the files."""
    model, state = session.model, session.accelerator.state
    assert model is not None
    training = model.training
    model.eval()
    with torch.random.fork_rng():
        for store, table in ((stored.training, session.train_dataset), (stored.validation, session.eval_dataset)):
            assert isinstance(table, ImageTable)
            is_training = store is stored.training
            missing = store.missing(state.process_index, state.num_processes)
            # Batches as large as they will be in training: in another size, a convolution may round otherwise.
            size = session.args.train_batch_size if is_training else session.args.eval_batch_size
            batches = [list(rows[i : i + size]) for _, rows in missing for i in range(0, len(rows), size)]
            loader = DataLoader(
                table,
                batch_sampler=batches,
                collate_fn=collate,
                num_workers=session.args.dataloader_num_workers,
                pin_memory=torch.cuda.is_available(),
            )
            images = sum(len(rows) for _, rows in missing)
            bar = tqdm(total=images, desc="Caching activations", unit="image", leave=False, disable=not images)
            computed = iter(loader)
            with bar, session.accelerator.autocast(), torch.no_grad():
                for view, rows in missing:
                    parts = []
                    for _ in range(math.ceil(len(rows) / size)):
                        batch = {name: part.to(session.args.device) for name, part in next(computed).items()}
                        pixels = session.pixel_values(batch, view if is_training else None)
                        parts.append(cut.activations(model, pixels))
                        bar.update(len(pixels))
                    store.write(view, rows, torch.cat(parts))
    model.train(training)
    session.accelerator.wait_for_everyone()
