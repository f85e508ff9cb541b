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
from hf_histo.data.load import load as load_data
from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration, predictions
from hf_histo.evaluation.forward import forward
from hf_histo.hub import Sidecar, load
from hf_histo.transforms.augmentation import Views

Image = str | Path | PIL.Image.Image | np.ndarray | torch.Tensor


class Classifier:
    """A trained model with all that turns an image into a decision.

    >>> classifier = Classifier.from_pretrained("runs/demo/adapter")
    >>> classifier(["a.png", "b.png"])  # a predictions table
    >>> classifier("hospital.h5", threshold="balanced-test")
    """

    def __init__(self, model: nn.Module, sidecar: Sidecar) -> None:
        self.model = model
        self.sidecar = sidecar
        self._device: torch.device | None = None

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, backbone: str | None = None
    ) -> Classifier:
        """From an adapter folder or a Hub name; see `hf_histo.hub.load`."""
        model, sidecar, _ = load(source, revision=revision, backbone=backbone)
        return cls(model, sidecar)

    def to(self, device: str | torch.device) -> Classifier:
        """Predict on `device` from now on; without this, on the launcher's: an accelerator, where there is one."""
        self._device = torch.device(device)
        return self

    def __call__(
        self,
        images: Image | Sequence[Image] | datasets.Dataset,
        *,
        center: int = -1,
        threshold: str | float | None = None,
        batch_size: int = 64,
    ) -> pd.DataFrame:
        """Classify images, one or many, of any sizes.

        Args:
            images: paths; PIL images; arrays or tensors, (H, W, 3), (3, H, W) or (H, W), uint8 or float in [0, 1], or
                a batch of such; a column of images of a `datasets.Dataset`; the path of an HDF5 file with one group per
                image; or a table of the one schema (see `hf_histo.data.schema`).
            center: that all images are from, -1 where unknown; a file or table has its own. If the adapter normalizes
                color, a center that training saw has stored statistics, and another one is measured on `images`: give
                all its images at once, not one by one.
            threshold: as `Sidecar.threshold_named` takes it.
            batch_size: images at a time.

        Returns what `predict` does; `id` is the path, the key in the file, or the place in the sequence.

        Raises `HistoError`, which names the image, for what is none.
        """
        if isinstance(images, str | Path) and Path(images).suffix.lower() in (".h5", ".hdf5"):
            images = load_data(images)["test"]
        if not isinstance(images, datasets.Dataset):
            images = _table(images, center, self.sidecar.label_names)
        return self.predict(images, threshold=threshold, batch_size=batch_size)

    def predict(
        self,
        dataset: datasets.Dataset,
        *,
        threshold: str | float | None = None,
        views: Views | None = None,
        adapt_batch_norm: bool | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        description: str = "Predicting",
    ) -> pd.DataFrame:
        """Predictions table of a schema table (see `hf_histo.evaluation.predictions`), with two more columns.

        `calibrated` is the probability after division of the logits by the stored temperature, shaped like
        `probability`; `predicted` is the class's name: with two classes by `probability` at the threshold, else of the
        largest one.

        Where the adapter normalizes color, a center that training did not see is measured on `dataset` as a whole:
        give all its images at once, not one by one; likewise where batch norm is adapted. `views` and
        `adapt_batch_norm` (take the batch-norm statistics from `dataset`) override what the adapter says of them.
        """
        chosen = self.sidecar.threshold_named(threshold)
        if missing := [name for name in schema.features(self.sidecar.label_names) if name not in dataset.column_names]:
            raise HistoError(
                f"the table has the columns {dataset.column_names}, but no {missing[0]}; pass a column of images, "
                'such as table["image"], or a table of hf_histo.data.load'
            )
        if not len(dataset):
            raise HistoError("no image was given; pass at least one")
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
            device=self._device,
        )
        columns = dataset.select_columns(["id", "center", "group", "label"])[:]
        table = predictions.make(columns["id"], columns["center"], columns["group"], columns["label"], logits)
        table.attrs["label_names"] = self.sidecar.label_names
        names = np.array(self.sidecar.label_names)
        return table.assign(
            calibrated=calibration.apply(table, self.sidecar.temperature)["probability"],
            predicted=names[predictions.predicted(table, chosen)],
        )


def _table(images: Image | Sequence[Image], center: int, label_names: list[str]) -> datasets.Dataset:
    if isinstance(images, torch.Tensor | np.ndarray):
        several = list(images) if images.ndim == 4 else [images]
    else:
        several = [images] if isinstance(images, str | Path | PIL.Image.Image) else list(images)
    count = len(several)
    rows = {
        "id": [str(image) if isinstance(image, str | Path) else str(i) for i, image in enumerate(several)],
        "image": [{"bytes": _encoded(image, i), "path": None} for i, image in enumerate(several)],
        "label": [-1] * count,
        "center": [center] * count,
        "group": [""] * count,
    }
    return datasets.Dataset.from_dict(rows, features=schema.features(label_names))


def _encoded(image: Image, place: int) -> bytes:
    """The bytes of an image file."""
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise HistoError(f"{image}: can't be read ({error.strerror}); expected an image file") from None
    if isinstance(image, PIL.Image.Image):
        image = np.asarray(image.convert("RGB"))
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise HistoError(
            f"image {place} is of type {type(image).__name__}; expected a path, PIL image, array or tensor"
        )
    return schema.encode_ppm(_pixels(image, place))


def _pixels(image: np.ndarray, place: int) -> np.ndarray:
    """uint8 (H, W, 3) of an array that holds an image in any usual way."""
    first, last = (image.ndim == 3 and image.shape[side] == 3 for side in (0, -1))
    if (image.ndim != 2 and first == last) or 0 in image.shape:
        found = "which can be read in two ways" if first and last else "which is no image"
        raise HistoError(f"image {place} has shape {image.shape}, {found}; expected (H, W, 3), (3, H, W) or (H, W)")
    if image.dtype.kind == "f":
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise HistoError(
                f"image {place} has {image.dtype} values from {low:g} to {high:g}; expected [0, 1], or uint8: undo any "
                "normalization"
            )
        image = np.rint(image.astype(np.float32) * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise HistoError(f"image {place} is {image.dtype}; expected uint8 in [0, 255], or float in [0, 1]")
    if image.ndim == 2:
        return np.stack([image] * 3, axis=-1)
    return image.transpose(1, 2, 0) if first else image
