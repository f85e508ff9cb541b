"""One pass of a model over a table, in full precision, shared among the processes of a launch."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_histo.data.schema import ImageTable, Sample
from hf_histo.transforms.preprocessing import Preprocessing


@torch.inference_mode()
def forward(
    model: nn.Module,
    dataset: datasets.Dataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    description: str = "Predicting",
) -> NDArray[np.float64]:
    """Logits (n, outputs) of the schema table `dataset`, in its order, the same in every process.

    Computed in float32 whatever the launcher's mixed precision, so that a saved prediction can be reproduced. `model`
    is moved to this process's device and left in evaluation mode.
    """
    accelerator = Accelerator()  # of the launch; the model is not prepared, so its mixed precision stays out
    model = model.to(accelerator.device).eval()
    loader = accelerator.prepare(
        DataLoader(
            ImageTable(dataset),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=_stack,
            pin_memory=torch.cuda.is_available(),
        )
    )
    gathered = []
    for images, index in tqdm(loader, desc=description, disable=not accelerator.is_local_main_process, leave=False):
        logits = model(pixel_values=preprocessing(images)).logits.float()
        gathered.append([part.cpu() for part in accelerator.gather_for_metrics((logits, index))])
    logits, index = (torch.cat(parts).numpy() for parts in zip(*gathered, strict=True))
    if not np.array_equal(np.sort(index), np.arange(len(dataset))):
        raise RuntimeError(f"{len(index)} predictions for {len(dataset)} images: each must come once")
    return logits[np.argsort(index)].astype(np.float64)


def _stack(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([s["image"] for s in samples]), torch.tensor([s["index"] for s in samples])
