"""Skip frozen computation in training: fold batch norm, and cache activations below the first trained layer."""

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
from hf_histo.transforms.pipeline import collate, to_device

logger = logging.getLogger(__name__)

WORTH_IT = 0.5  # smallest share of a forward pass before the first trained layer at which "auto" caches activations


@contextmanager
def folded_layers(session: Trainer) -> Iterator[None]:
    """Within the block, fold frozen batch norm and low-rank updates into convolutions, see `folding.folded`."""
    assert session.model is not None
    if session.batch_norm == "track" or _is_sharded(session):
        yield
        return
    with folding.folded(session.model, _sample(session)) as count:
        logger.info("batch norm or a low-rank update is folded into %d layers", count)
        yield


@contextmanager
def cached_prefix(session: Trainer, mode: str, cache_dir: str | None) -> Iterator[None]:
    """Within the block, `session` trains and validates on cached activations; missing ones are computed first.

    They are kept for later runs of the same backbone on the same data. Results are the same as without the cache: in
    float32 they are bit-identical if an image's activation does not depend on the others in its batch.

    Args:
        session: trainer that is about to train.
        mode: value of `--cache_features`: "on", "off", or "auto", which caches if that saves work.
        cache_dir: folder of the activations; None is the cache folder of the `datasets` library.

    Each process of a launch must call it. If caching is impossible, "on" raises `HistoError`, and "auto" logs why.
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
    """Whether the views of an image differ. Without augmentation, the crop of an image that is not square is random."""
    assert isinstance(session.train_dataset, ImageTable)
    height, width = session.train_dataset[0]["image"].shape[1:]
    pipeline = session.pipeline
    is_recolored = pipeline.stain_mixing > 0 or pipeline.virtual_stain > 0
    return pipeline.augmentation != Augmentation() or is_recolored or height != width


def _views(session: Trainer) -> int | None:
    """Number of different views of a training image; None if each epoch draws a new one."""
    return session.training_views if _is_random(session) else 1


def _unwanted(session: Trainer, mode: str) -> str | None:
    """Why the options don't allow caching; None if they do."""
    if isinstance(session.train_dataset, Stream):
        return "training images are streamed"
    views, epochs = _views(session), session.args.num_train_epochs
    if mode == "off":
        return "switched off"
    if not session.pipeline.mixing.is_none:
        return "images are mixed; leave --mixup_alpha and --cutmix_alpha out"
    if views is None:
        return "each epoch draws new views; set --training_views, or --augmentation none without mixing of colors"
    if mode == "auto" and views >= epochs:
        return f"there are not more epochs ({epochs:g}) than views ({views})"
    assert session.model is not None
    if session.batch_norm == "track" and batchnorm.layers(session.model):
        return "batch norm follows the data; expected --batch_norm frozen"
    if _is_sharded(session) or session.args.torch_compile:
        return "the model is compiled or sharded; expected a whole model in each process"
    return None


def _is_sharded(session: Trainer) -> bool:
    """Whether the model is sharded over processes, or replicated on several devices of one process."""
    return session.is_fsdp_enabled or session.is_deepspeed_enabled or session.args.n_gpu > 1


def _sample(session: Trainer) -> torch.Tensor:
    """A random batch of the model's input size."""
    size = session.pipeline.preprocessing.image_size
    noise = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise.to(session.args.device).contiguous(memory_format=torch.channels_last)


def _unfit(cut: activation_cut.Cut | None, mode: str) -> str | None:
    """Why the model doesn't allow caching; None if it does."""
    if cut is None:
        return "no layer before the first trained one is the same in every pass; train fewer layers, or leave it off"
    if mode == "auto" and cut.share < WORTH_IT:
        return f"{cut.share:.0%} of a forward pass is before the first trained layer, expected at least {WORTH_IT:.0%}"
    return None


def _stores(session: Trainer, cache_dir: str | None, cut: activation_cut.Cut) -> Stored:
    """Files of the activations, whose names are a hash of everything that the activations depend on."""
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
    colors = (pipeline.stain_mixing, pipeline.virtual_stain)
    drawn = (pipeline.augmentation, *colors, pipeline.seed) if _is_random(session) else ()
    stores = []
    for table, kind, own in ((session.train_dataset, "training", drawn), (session.eval_dataset, "evaluation", ())):
        assert isinstance(table, ImageTable)
        key = activation_cut.key(cut, session.model, table.fingerprint(), kind, *own, *common)
        stores.append(activation_cut.Store(root / key, len(table), cut.activation, views if kind == "training" else 1))
    return Stored(*stores)


def _without_space(session: Trainer, stored: Stored) -> str | None:
    """Why there is not enough disk space, in any process; None if there is."""
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
    every = gather_object([found])  # no process writes before all have checked
    return next((reason for reason in every if reason), None)


def _fill(session: Trainer, cut: activation_cut.Cut, stored: Stored) -> None:
    """Compute missing activations, each process its share of the files."""
    model, state = session.model, session.accelerator.state
    assert model is not None
    training = model.training
    model.eval()
    with torch.random.fork_rng():
        for store, table in ((stored.training, session.train_dataset), (stored.validation, session.eval_dataset)):
            assert isinstance(table, ImageTable)
            is_training = store is stored.training
            missing = store.missing(state.process_index, state.num_processes)
            # The same batch size as in training: with another one, a convolution may round differently.
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
                        batch = to_device(next(computed), session.args.device)
                        pixels = session.pixel_values(batch, view if is_training else None)
                        parts.append(cut.activations(model, pixels))
                        bar.update(len(pixels))
                    store.write(view, rows, torch.cat(parts))
    model.train(training)
    session.accelerator.wait_for_everyone()
