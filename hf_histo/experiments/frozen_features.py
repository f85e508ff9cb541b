"""Features of a frozen backbone, computed once for every probe that is fitted on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_histo import launch
from hf_histo.config import Config
from hf_histo.data.load import fingerprint
from hf_histo.evaluation.figures.embedding import features
from hf_histo.files import atomic_file
from hf_histo.models import backbones
from hf_histo.transforms import augmentation, preprocessing
from hf_histo.transforms.augmentation import TestTimeViews
from hf_histo.transforms.mri import Preparation
from hf_histo.transforms.stain import CenterNormalizer


class FrozenFeatures:
    """Features of a frozen backbone for the images that a run of `config` sees: prepared, normalized, in all its views.

    Computed once and kept in a file, unless color is normalized, by statistics of the images that are drawn.
    """

    def __init__(self, config: Config, data: datasets.DatasetDict, path: Path) -> None:
        options = config.model
        self.config = config
        self.model = backbones.load(
            options.backbone,
            2,
            revision=options.revision,
            random_weights=options.random_weights,
            image_size=options.image_size,
        )
        source = backbones.locate(options.backbone)
        sizes = options.image_size, options.resize_size
        declared = preprocessing.resolve(self.model.config, source, *sizes, options.fit)
        self.preprocessing = replace(declared, preparation=Preparation.of(config.preparation))
        self.rows = {split: {name: row for row, name in enumerate(rows["id"])} for split, rows in data.items()}
        self.arrays: dict[str, np.ndarray] = {}
        if config.centers.normalization != "none":
            return
        given = (self.preprocessing, TestTimeViews.of(config), config.prediction.adapt_batch_norm)
        key = f"{fingerprint(data)} {backbones.identity(self.model)} {given}"
        if not path.is_file() or str(np.load(path)["key"]) != key:
            found: dict[str, Any] = {split: self._computed(split, rows, None) for split, rows in data.items()}
            if launch.is_main_process():
                with atomic_file(path) as temporary:
                    np.savez(temporary, key=key, **found)
            launch.process().wait_for_everyone()
        self.arrays = {split: array for split, array in np.load(path).items() if split != "key"}

    def of(self, drawn: datasets.DatasetDict) -> dict[str, np.ndarray]:
        """Features (n, d) of the images that are drawn from each split."""
        if self.arrays:
            return {
                split: self.arrays[split][[self.rows[split][i] for i in rows["id"]]] for split, rows in drawn.items()
            }
        side = augmentation.preset(self.config.augmentation.augmentation).side(self.preprocessing.image_size)
        images = self.preprocessing.read(drawn["train"], side)  # as training reads them
        normalizer = CenterNormalizer.fit(images, self.config.centers.normalization)
        return {split: self._computed(split, rows, normalizer) for split, rows in drawn.items()}

    def _computed(self, split: str, rows: datasets.Dataset, normalizer: CenterNormalizer | None) -> np.ndarray:
        color = normalizer and normalizer.extended(self.preprocessing.read(rows))
        options: dict[str, Any] = {"normalizer": color, "description": f"Features of {split}"}
        if split != "train":
            options |= {
                "views": TestTimeViews.of(self.config),
                "adapt_batch_norm": self.config.prediction.adapt_batch_norm,
            }
        return features(self.model, rows, self.preprocessing, **options)
