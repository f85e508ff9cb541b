"""Prediction on new images with nothing but an adapter folder and its backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import torch
from torch import nn

from hf_histo.data import schema
from hf_histo.errors import HistoError
from hf_histo.evaluation import predictions
from hf_histo.evaluation.forward import forward
from hf_histo.hub import Sidecar, load

Image = str | Path | PIL.Image.Image | np.ndarray | torch.Tensor


class Classifier:
    """A trained model with all that turns an image into a decision.

    >>> Classifier.from_pretrained("runs/demo/adapter")(["a.png", "b.png"])  # a predictions table
    """

    def __init__(self, model: nn.Module, sidecar: Sidecar) -> None:
        self.model = model
        self.sidecar = sidecar

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, backbone: str | None = None
    ) -> Classifier:
        """From an adapter folder or a Hub name; see `hf_histo.hub.load`."""
        model, sidecar, _ = load(source, revision=revision, backbone=backbone)
        return cls(model, sidecar)

    def __call__(self, images: Image | Sequence[Image], *, batch_size: int = 64) -> pd.DataFrame:
        """Classify images: paths, PIL images, uint8 arrays (H, W, 3) or (H, W), or uint8 tensors (3, H, W).

        Returns what `predict` does; `id` is the path, or the place in the sequence.
        """
        several = [images] if isinstance(images, str | Path | PIL.Image.Image | np.ndarray) else list(images)
        if isinstance(images, torch.Tensor | np.ndarray):
            several = list(images) if images.ndim == 4 else [images]
        if not several:
            raise HistoError("no image was given; pass at least one")
        rows = {
            "id": [str(image) if isinstance(image, str | Path) else str(i) for i, image in enumerate(several)],
            "image": [{"bytes": _as_bytes(image, i), "path": None} for i, image in enumerate(several)],
            "label": [-1] * len(several),
            "center": [-1] * len(several),
            "group": [""] * len(several),
        }
        features = schema.features(self.sidecar.label_names)
        return self.predict(datasets.Dataset.from_dict(rows, features=features), batch_size=batch_size)

    def predict(
        self,
        dataset: datasets.Dataset,
        *,
        views: int | None = None,
        adapt_batch_norm: bool | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        description: str = "Predicting",
    ) -> pd.DataFrame:
        """Predictions table of a schema table (see `hf_histo.evaluation.predictions`) with the column `predicted`.

        Where the adapter normalizes color, a center that training did not see is measured on `dataset` as a whole:
        give all its images at once, not one by one; likewise where batch norm is adapted. `views` (1 or 8) and
        `adapt_batch_norm` (take the batch-norm statistics from `dataset`) override what the adapter says of them.

        `probability` is calibrated by the stored temperature; `predicted` is the class's name at the stored threshold.
        """
        normalizer = self.sidecar.normalizer
        logits = forward(
            self.model,
            dataset,
            self.sidecar.preprocessing,
            normalizer=normalizer and normalizer.extended(self.sidecar.preprocessing.read(dataset)),
            views=views or self.sidecar.views,
            adapt_batch_norm=self.sidecar.adapt_batch_norm if adapt_batch_norm is None else adapt_batch_norm,
            batch_size=batch_size,
            num_workers=num_workers,
            description=description,
        )
        columns = dataset.select_columns(["id", "center", "group", "label"])[:]
        table = predictions.make(
            columns["id"], columns["center"], columns["group"], columns["label"], logits / self.sidecar.temperature
        )
        table.attrs["label_names"] = self.sidecar.label_names
        names = np.array(self.sidecar.label_names)
        return table.assign(predicted=names[predictions.predicted(table, self.sidecar.threshold)])


def _as_bytes(image: Image, place: int) -> bytes:
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise HistoError(f"{image}: can't be read ({error.strerror})") from None
    if isinstance(image, PIL.Image.Image):
        image = np.asarray(image.convert("RGB"))
    elif isinstance(image, torch.Tensor):
        image = image.movedim(0, -1).cpu().numpy()
    if image.ndim == 2:
        image = np.stack([image] * 3, axis=-1)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise HistoError(
            f"image {place} is {image.dtype} of shape {image.shape}; expected uint8 in [0, 255], (H, W, 3) as an array "
            "or (3, H, W) as a tensor"
        )
    return schema.encode_ppm(image)
