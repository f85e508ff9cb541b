"""The one path from stored pixels to model input: training, evaluation, prediction, probes and explanations call it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from hf_histo.config import Config
from hf_histo.data.reading import DEFAULT_READING, Reading
from hf_histo.data.schema import ImageTable, Sample
from hf_histo.transforms.augmentation import PRESETS, SINGLE_VIEW, Augmentation, TestTimeViews, augment, preset, uniform
from hf_histo.transforms.mixing import UNMIXED, Mixing
from hf_histo.transforms.mri import Preparation
from hf_histo.transforms.preprocessing import Preprocessing, resolve
from hf_histo.transforms.stain import CenterNormalizer

# "image": uint8 (B, 3, H, W), "labels": int64 (B,), tensors on the device of the model; "center", "index": int64 (B,),
# arrays: what is looked up or drawn by them is computed on the host, which must not wait for the device.
Batch = dict[str, Any]  # Any: a tensor or an array


@dataclass(frozen=True)
class Pipeline:
    """Prepares each image when it is read, and turns a batch of `collate` into a view on the batch's device.

    A view is a normalized batch, float32 (B, 3, image_size, image_size), in the memory format channels last.

    Attributes:
        preprocessing: resize, crop and normalization of an evaluation view, and the preparation of each image.
        augmentation: augmentation of a training view.
        normalizer: color normalization by center; None keeps the stored colors.
        stain_mixing: probability in [0, 1] that the color of a training view is moved to a random mixture of the
            training centers' colors.
        virtual_stain: probability in [0, 1] that it is moved to a virtual stain instead, drawn around these colors.
        mixing: MixUp and CutMix of training views.
        seed: seed of training views.
        test_time_views: the views of an image whose mean logit is its prediction.
    """

    preprocessing: Preprocessing
    augmentation: Augmentation = PRESETS["none"]
    normalizer: CenterNormalizer | None = None
    stain_mixing: float = 0.0
    virtual_stain: float = 0.0
    mixing: Mixing = UNMIXED
    seed: int = 0
    test_time_views: TestTimeViews = SINGLE_VIEW

    @classmethod
    def of(
        cls, config: Config, backbone: PreTrainedConfig, source: str, reading: Reading = DEFAULT_READING
    ) -> Pipeline:
        """The pipeline that the options ask for, its color normalization not yet fitted (see `fitted`).

        Args:
            config: all options of a run.
            backbone: configuration of the backbone, see `preprocessing.resolve`.
            source: the backbone's local folder or Hub name.
            reading: how the training images were read, see `schema.recorded`.

        Raises `HistoError` as `preprocessing.resolve` does, and for an unknown augmentation.
        """
        options = config.model
        declared = resolve(backbone, source, options.image_size, options.resize_size, options.fit)
        return cls(
            replace(declared, preparation=Preparation.of(config.preparation), **vars(reading)),
            preset(config.augmentation.augmentation),
            stain_mixing=config.centers.stain_mixing,
            virtual_stain=config.centers.virtual_stain,
            mixing=Mixing(config.augmentation.mixup_alpha, config.augmentation.cutmix_alpha),
            seed=config.training.seed,
            test_time_views=TestTimeViews.of(config),
        )

    def fitted(self, images: ImageTable, method: str) -> Pipeline:
        """A copy with the color normalization `method`, or "none", fitted on training images."""
        return self if method == "none" else replace(self, normalizer=CenterNormalizer.fit(images, method))

    @property
    def single_view(self) -> Pipeline:
        """A copy with the evaluation view as the only test-time view."""
        return replace(self, test_time_views=SINGLE_VIEW)

    def extended(self, rows: datasets.Dataset) -> Pipeline:
        """A copy that also has color statistics of the centers of a schema table, if unknown so far, measured on it."""
        if self.normalizer is None or set(rows["center"][:]) <= self.normalizer.centers.keys():
            return self
        return replace(self, normalizer=self.normalizer.extended(self.read(rows)))

    def read(self, rows: datasets.Dataset) -> ImageTable:
        """An `ImageTable` of a schema table for evaluation views, whose images are prepared when they are read."""
        return self.preprocessing.read(rows)

    def read_training(self, rows: datasets.Dataset) -> ImageTable:
        """As `read`, for training views: images of different sizes keep enough pixels for the smallest crop."""
        return self.preprocessing.read(rows, self.augmentation.side(self.preprocessing.image_size))

    def train(self, batch: Batch, epoch: int, *, normalize: bool = True) -> torch.Tensor:
        """Training view of a batch, drawn from (seed, epoch, index); without `normalize`, its values are in [0, 1]."""
        return augment(
            self._in_color(batch, self.stain_targets(batch["index"], epoch)),
            self.augmentation,
            self.preprocessing.image_size,
            seed=self.seed,
            epoch=epoch,
            index=batch["index"],
            normalize=self.preprocessing.normalize if normalize else None,
        )

    def mixed(
        self, views: torch.Tensor, batch: Batch, epoch: int
    ) -> tuple[torch.Tensor, NDArray[np.int64], NDArray[np.float32]]:
        """Training views (B, 3, S, S) of a batch mixed within centers, with partners and own shares: see `Mixing`."""
        return self.mixing(views, batch["center"], seed=self.seed, epoch=epoch, index=batch["index"])

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Evaluation view of a batch: resized, center-cropped and normalized, without randomness."""
        return self.preprocessing(self._in_color(batch))

    def test_time(self, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield each test-time view of a batch; by default only the evaluation view."""
        return self.test_time_views(self._in_color(batch), self.preprocessing, batch["index"])

    def stain_targets(self, index: NDArray[np.int64], epoch: int) -> torch.Tensor | None:
        """Color statistics (B, 12) that each training view is moved to: a mixture, a virtual stain, or the reference.

        None if all views are moved to the reference, or color is not normalized.
        """
        if self.normalizer is None or not (self.stain_mixing or self.virtual_stain):
            return None
        centers = len(self.normalizer.training)
        # Epochs beyond any real one give a random stream that differs from that of the augmentation.
        draws = torch.from_numpy(uniform(self.seed, 2**32 + epoch, index, 1 + centers + 6))
        kind, mixture, template = draws.split([1, centers, 6], dim=1)
        targets = self.normalizer.targets(mixed=kind[:, 0] < self.stain_mixing, draws=mixture)
        if not self.virtual_stain:
            return targets
        is_virtual = (kind >= self.stain_mixing) & (kind < self.stain_mixing + self.virtual_stain)
        return torch.where(is_virtual, self.normalizer.virtual(template), targets)

    def back(self, view: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Map values of an evaluation view, (image_size, image_size), back to the stored image (3, H, W): (H, W).

        Pixels that preparation or crop removed get 0.
        """
        placed = torch.zeros(image.shape[-2:])
        kept = placed[self.preprocessing.preparation.box(image)]
        kept.copy_(self.preprocessing.back(view[None, None], *kept.shape)[0, 0])
        return placed

    def _in_color(self, batch: Batch, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Images of a batch as stored, or with color moved to the reference or to `targets`: float32 in [0, 1]."""
        return batch["image"] if self.normalizer is None else self.normalizer(batch["image"], batch["center"], targets)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; pinned ones are copied without waiting."""
    return {
        name: part.to(device, non_blocking=True) if isinstance(part, torch.Tensor) else part
        for name, part in batch.items()
    }


def collate(samples: list[Sample]) -> Batch:
    """Collate samples into a `Batch`: tensors "image", uint8 (B, 3, H, W), and "labels", arrays "center" and "index".

    All images must have the same size. For samples without images, "image" is missing.
    """
    images = [sample["image"] for sample in samples if "image" in sample]
    return {
        **({"image": torch.stack(images)} if images else {}),
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "center": np.array([sample["center"] for sample in samples]),
        "index": np.array([sample["index"] for sample in samples]),
    }
