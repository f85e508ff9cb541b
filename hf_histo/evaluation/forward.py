"""One pass of a model over a table, in full precision, shared among the processes of a launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_histo import launch
from hf_histo.models import adapters, batchnorm
from hf_histo.models.speed import folding
from hf_histo.models.speed.token_merging import merged_tokens
from hf_histo.transforms.pipeline import Batch, Pipeline, collate, to_device

FEW = 16  # images, for which merging the adapter would take longer than it saves


@torch.no_grad()
def forward(
    model: nn.Module,
    dataset: datasets.Dataset,
    pipeline: Pipeline,
    *,
    adapt_batch_norm: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    mixed_precision: Literal["no", "bf16"] = "no",
    token_merging: int = 0,
    description: str = "Predicting",
    device: torch.device | None = None,
    is_shared: bool = True,
) -> NDArray[np.float64]:
    """Logits (n, outputs) of the schema table `dataset`, in its order, the same in every process.

    Each is the mean over the pipeline's test-time views. Of more than `FEW` images, it is that of the adapter merged
    into the backbone, the same up to rounding (`folding.merged`). Computed in float32 whatever the launcher's mixed
    precision, so that a saved prediction can be reproduced, unless `mixed_precision` asks for bfloat16. `model` is
    moved to the device and left in evaluation mode.

    Args:
        model: takes `pixel_values` and returns an object with `logits` (B, outputs).
        dataset: of the one schema; images may differ in size.
        pipeline: from stored pixels to `pixel_values`; color statistics of a center that it does not know are measured
            on `dataset`.
        adapt_batch_norm: use batch-norm statistics of `dataset`'s own unlabeled images (see `batchnorm.adapted`); every
            process measures them on all images.
        batch_size, num_workers: of the loader in each process.
        mixed_precision: "bf16" runs the model under autocast to bfloat16.
        token_merging: pairs of patches that each block of a vision transformer merges, see `merged_tokens`.
        description: of the progress bar.
        device: to compute on, by default this process's own in the launch.
        is_shared: share the images among the processes of a launch, which all call this; else this process alone
            predicts them.
    """
    # Of the launch; the model is not prepared, so the launch's mixed precision stays out.
    accelerator = Accelerator(cpu=launch.use_cpu())
    device = device or accelerator.device
    model = adapters.channels_last(model.to(device)).eval()  # as it was trained
    pipeline = pipeline.extended(dataset)
    images = pipeline.read(dataset)
    loader = DataLoader(
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )

    def batches(loader: DataLoader[Any], description: str) -> Iterator[Batch]:  # Any: a loader of samples gives batches
        hidden = not accelerator.is_local_main_process
        for batch in tqdm(loader, desc=description, disable=hidden, leave=False):
            yield to_device(batch, device)

    gathered = []
    adaptation = map(pipeline.evaluate, batches(loader, "Adapting batch norm"))

    def sample() -> torch.Tensor:
        return pipeline.evaluate(to_device(collate([images[0]]), device))

    with (
        batchnorm.adapted(model, adaptation) if adapt_batch_norm else nullcontext(),
        folding.merged(model, sample()) if len(images) > FEW else nullcontext(),
        merged_tokens(model, token_merging),
    ):
        if is_shared:
            loader = accelerator.prepare(loader, device_placement=[False])
        for batch in batches(loader, description):
            views = pipeline.test_time(batch)
            with torch.autocast(device.type, torch.bfloat16) if mixed_precision == "bf16" else nullcontext():
                logits = torch.stack([model(pixel_values=view).logits.float() for view in views]).mean(0)
            index = torch.from_numpy(batch["index"]).to(device)
            parts = accelerator.gather_for_metrics((logits, index)) if is_shared else (logits, index)
            gathered.append([part.cpu() for part in parts])
    every, order = (torch.cat(parts).numpy() for parts in zip(*gathered, strict=True))
    if not np.array_equal(np.sort(order), np.arange(len(dataset))):
        raise RuntimeError(f"{len(order)} predictions for {len(dataset)} images: each must come once")
    return every[np.argsort(order)].astype(np.float64)
