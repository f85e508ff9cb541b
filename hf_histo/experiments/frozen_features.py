"""Features of a frozen backbone, computed once for all probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_histo import launch
from hf_histo.config import Config
from hf_histo.data.load import fingerprint
from hf_histo.evaluation.figures.embedding import features
from hf_histo.evaluation.predictions import measured
from hf_histo.files import atomic_file
from hf_histo.models import backbones
from hf_histo.transforms.pipeline import Pipeline


class FrozenFeatures:
    """Features of a frozen backbone for the images of `data`, preprocessed as by `config`; the mean over all views.

    They are computed once and cached in the file `path`, unless color is normalized: its statistics depend on the
    images that are drawn.
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
        self.pipeline = Pipeline.of(config, self.model.config, backbones.locate(options.backbone))
        self.rows = {split: {name: row for row, name in enumerate(rows["id"])} for split, rows in data.items()}
        self.arrays: dict[str, np.ndarray] = {}
        if config.centers.normalization != "none":
            return
        given = (self.pipeline, config.prediction.adapt_batch_norm)
        key = f"{fingerprint(data)} {backbones.identity(self.model)} {given}"
        if not path.is_file() or str(np.load(path)["key"]) != key:
            found: dict[str, Any] = {split: self._computed(split, rows, self.pipeline) for split, rows in data.items()}
            if launch.is_main_process():
                with atomic_file(path) as temporary:
                    np.savez(temporary, key=key, **found)
            launch.process().wait_for_everyone()
        self.arrays = {split: array for split, array in np.load(path).items() if split != "key"}

    def transductive(self, drawn: datasets.DatasetDict) -> list[str]:
        """What was measured on the images of `test` for their features, see `Predictions.transductive`."""
        unknown = not set(drawn["test"]["center"][:]) <= set(drawn["train"]["center"][:])
        measures_color = self.config.centers.normalization != "none" and unknown
        return measured(colors=measures_color, batch_norm=self.config.prediction.adapt_batch_norm)

    def of(self, drawn: datasets.DatasetDict) -> dict[str, np.ndarray]:
        """Features (n, d) of each split of `drawn`, a subset of the images."""
        if self.arrays:
            return {
                split: self.arrays[split][[self.rows[split][i] for i in rows["id"]]] for split, rows in drawn.items()
            }
        images = self.pipeline.read_training(drawn["train"])
        pipeline = self.pipeline.fitted(images, self.config.centers.normalization)
        return {split: self._computed(split, rows, pipeline) for split, rows in drawn.items()}

    def _computed(self, split: str, rows: datasets.Dataset, pipeline: Pipeline) -> np.ndarray:
        is_training = split == "train"
        return features(
            self.model,
            rows,
            pipeline.single_view if is_training else pipeline,
            adapt_batch_norm=self.config.prediction.adapt_batch_norm and not is_training,
            description=f"Features of {split}",
        )
