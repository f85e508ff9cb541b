"""What all parts of the benchmark share: a backbone, a batch, options, and generated images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import torch
import transformers
from torch import nn

from hf_histo import launch
from hf_histo.config import Config
from hf_histo.config.experiments import BenchmarkOptions
from hf_histo.data.load import load
from hf_histo.evaluation.metrics import classification
from hf_histo.models import adapters, backbones, batchnorm
from hf_histo.training import losses, trainer
from hf_histo.transforms import augmentation, preprocessing
from hf_histo.transforms.pipeline import Pipeline

PATCH = 96  # pixels on a side of a generated image, as in Camelyon17


@dataclass(frozen=True)
class Bench:
    """A backbone with the options of a run, and images to run it on.

    Attributes:
        config: options of a run; `data.data` and `data.cache_dir` are folders of the benchmark.
        options: options of the benchmark.
        folder: where the parts write.
    """

    config: Config
    options: BenchmarkOptions
    folder: Path

    @property
    def batch(self) -> int:
        return self.config.training.per_device_train_batch_size

    @property
    def changes(self) -> augmentation.Augmentation:
        return augmentation.preset(self.config.augmentation.augmentation)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if launch.use_cpu() else "cuda")

    @property
    def precision(self) -> str:
        return launch.mixed_precision(self.config.speed.mixed_precision)

    def data(self) -> datasets.DatasetDict:
        """The generated images, `train` and `val`."""
        return load(self.config.data.data, cache_dir=self.config.data.cache_dir)

    def backbone(self, outputs: int) -> transformers.PreTrainedModel:
        o = self.config.model
        size, weights = o.image_size, o.random_weights
        return backbones.load(o.backbone, outputs, revision=o.revision, random_weights=weights, image_size=size)

    def adapted(self) -> nn.Module:
        """The backbone with a new adapter, or as it is for full fine-tuning, on the CPU."""
        model: Any = self.backbone(1)
        return model if self.config.adapter.method == "full" else adapters.add(model, self.config.adapter)

    def preprocessing(self, model: nn.Module) -> preprocessing.Preprocessing:
        return self.pipeline(model, self.config).preprocessing

    def pipeline(self, model: nn.Module, config: Config) -> Pipeline:
        declared: Any = model.config
        return Pipeline.of(config, declared, backbones.locate(config.model.backbone))

    def pixels(self, model: nn.Module) -> torch.Tensor:
        """A batch of noise as the model takes it, on the device: float32 (B, 3, S, S), channels last."""
        size = self.preprocessing(model).image_size
        noise = torch.randn(self.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        return noise.to(self.device).contiguous(memory_format=torch.channels_last)

    def session(self, config: Config) -> trainer.Trainer:
        """What `hf_histo.stages` trains."""
        bench = replace(self, config=config)
        model: Any = bench.adapted()
        pipeline = self.pipeline(model, config)
        if config.model.batch_norm == "frozen":
            batchnorm.freeze(model)
        data = self.data()
        return trainer.build(
            config,
            self.folder / "ours",
            model=model,
            train=pipeline.read(data["train"]),
            validation=pipeline.read(data["val"]),
            pipeline=pipeline,
            loss=losses.classification(1),
            compute_metrics=classification.for_trainer(),
        )


def with_saved_weights(bench: Bench) -> Bench:
    """The same with random weights as a local folder, so that all sides, and other processes, have the same ones.

    Batch norm gets the statistics of its activations: with its initial ones, those of a deep network could vanish.
    """
    config = bench.config
    if not config.model.random_weights:
        return bench
    o = config.model
    model: Any = backbones.load(o.backbone, 2, revision=o.revision, random_weights=True)
    declared = replace(config, model=replace(o, image_size=None, resize_size=None))
    if norms := batchnorm.layers(model).values():
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            size = bench.pipeline(model, declared).preprocessing.image_size
            model.train()(pixel_values=torch.randn(8, 3, size, size))
    folder = bench.folder / "backbone"
    model.eval().save_pretrained(folder)
    saved = replace(o, backbone=str(folder), random_weights=False, revision=None)
    return replace(bench, config=replace(config, model=saved))


def write_images(folder: Path, counts: Mapping[str, int]) -> None:
    """Write an HDF5 file for each split: images of noise, two classes in turn, eight images in a group of their own."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number, (split, count) in enumerate(counts.items()):
        with h5py.File(folder / f"{split}.h5", "w") as file:
            for row in range(count):
                file[f"{row}/img"] = noise.integers(0, 256, (3, PATCH, PATCH), dtype=np.uint8)
                file[f"{row}/label"] = row % 2
                file[f"{row}/metadata"] = [0, 1_000_000 * number + row // 8, row % 2]
