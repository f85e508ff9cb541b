"""From a uint8 batch to what the backbone expects, as the backbone itself declares it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_data_config
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from transformers import AutoImageProcessor, PreTrainedConfig

from hf_histo.errors import HistoError


@dataclass(frozen=True)
class Preprocessing:
    """Resize, center crop and normalization of an evaluation batch.

    Attributes:
        image_size: pixels on a side of the square that the model sees.
        resize_size: pixels of the shorter side before the center crop, at least `image_size`.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        mean, std: per channel (red, green, blue), for values in [0, 1].
    """

    image_size: int
    resize_size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Evaluation view of (B, 3, H, W), uint8 or float in [0, 1]: normalized float32 (B, 3, image_size, image_size).

        It stays on the images' device.
        """
        resized = images
        if min(images.shape[-2:]) != self.resize_size or images.shape[-2] != images.shape[-1]:
            mode = InterpolationMode(self.interpolation)
            resized = functional.resize(images, [self.resize_size], interpolation=mode, antialias=True)
        cropped = functional.center_crop(resized, [self.image_size, self.image_size])
        return self.normalize(cropped.float() / 255 if cropped.dtype == torch.uint8 else cropped.clamp(0, 1))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Float (B, 3, H, W) in [0, 1] to zero mean and unit deviation of the backbone's training data."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def resolve(
    config: PreTrainedConfig, source: str, image_size: int | None = None, resize_size: int | None = None
) -> Preprocessing:
    """The preprocessing that a backbone declares, with the sizes overridden where they are given.

    Args:
        config: the backbone's configuration; a timm backbone declares its data there (`pretrained_cfg`).
        source: the backbone's local folder or Hub name, where a transformers backbone keeps its image processor.
        image_size, resize_size: pixels; without `resize_size`, the backbone's own ratio of crop to resize is kept.

    Raises `HistoError` if nothing is declared, or `resize_size` is smaller than `image_size`.
    """
    declared = getattr(config, "pretrained_cfg", None)
    own = _from_timm(declared, source) if declared else _from_image_processor(source)
    size = image_size or own.image_size
    resize = resize_size or math.floor(size * own.resize_size / own.image_size)
    if resize < size:
        raise HistoError(f"--resize_size is {resize}, expected at least the image size, {size}")
    return Preprocessing(size, resize, own.interpolation, own.mean, own.std)


def _from_timm(declared: dict[str, Any], source: str) -> Preprocessing:
    absent = [key for key in ("input_size", "mean", "std") if not declared.get(key)]
    if absent:  # timm would fill in ImageNet's
        raise HistoError(f"backbone {source}: the pretrained_cfg in its config.json declares no {', '.join(absent)}")
    data = resolve_data_config(pretrained_cfg=declared)
    size = data["input_size"][-1]
    return Preprocessing(
        size, math.floor(size / data["crop_pct"]), data["interpolation"], tuple(data["mean"]), tuple(data["std"])
    )


def _from_image_processor(source: str) -> Preprocessing:
    try:
        declared = AutoImageProcessor.from_pretrained(source).to_dict()
        resize = declared["size"].get("shortest_edge") or declared["size"]["height"]
        size = declared["crop_size"]["height"] if declared.get("do_center_crop") else resize
        if declared.get("crop_pct") and size < 384:  # ConvNextImageProcessor: `size` is that of the crop, and from 384
            resize = int(size / declared["crop_pct"])  # pixels on there is none
        interpolation = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}[int(declared["resample"])]
        mean, std = (tuple(float(value) for value in declared[key]) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"image_mean is {mean} and image_std {std}")
        return Preprocessing(size, resize, interpolation, mean, std)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HistoError(
            f"backbone {source}: no usable image processor ({type(error).__name__}: {reason}); expected a "
            "preprocessor_config.json with size, resample, image_mean and image_std beside its config.json"
        ) from None
