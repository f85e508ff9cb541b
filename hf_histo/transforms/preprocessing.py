"""Evaluation preprocessing: resize, crop and normalization as the backbone declares them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, get_args

import datasets
import PIL.Image
import torch
from pydantic import Field
from timm.data import resolve_data_config
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from transformers import AutoImageProcessor, CLIPImageProcessor, PreTrainedConfig

from hf_histo.config import Fit
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.files import STRICT
from hf_histo.transforms.mri import Preparation

FITS = get_args(Fit)
MIN_SIZE = 8  # below is no picture, and torch fails to resize to a single pixel
MAX_SIZE = 1024  # pixels on a side of what a model sees: more than pretrained ones do, and a batch fits into memory
Size = Annotated[int, Field(ge=MIN_SIZE, le=MAX_SIZE)]
Deviation = Annotated[float, Field(gt=0)]
ResizeSize = Annotated[int, Field(ge=MIN_SIZE, le=2 * MAX_SIZE)]
_ELONGATED = 8  # longer than this times its width, an image is cropped before it is resized, or it might not fit memory


@dataclass(frozen=True)
class Preprocessing:
    """Resize, center crop and normalization of an evaluation batch.

    Attributes:
        image_size: pixels on a side of the square that the model sees, `MIN_SIZE` to `MAX_SIZE`.
        resize_size: pixels on a side of the square before the center crop, from `image_size` to twice `MAX_SIZE`.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos"; always antialiased.
        mean, std: per channel (red, green, blue), for values in [0, 1].
        fit: how an image that is not square becomes so. "crop": the shorter side is resized and the longer one loses
            its ends; "squash": both sides are resized; "pad": the longer side is resized and the shorter one gets
            borders of the color `mean`, which is zero after normalization (timm's "border").
        preparation: of each image when it is read, before all else.
        gray_bits: of the 16-bit gray images among those of training, 8 to 16, by which all others are read, see
            `hf_histo.data.schema.rgb`; None where there were none.
    """

    __pydantic_config__ = STRICT

    image_size: Size
    resize_size: ResizeSize
    interpolation: Annotated[str, Field(pattern="^(nearest|bilinear|bicubic|lanczos)$")]
    mean: tuple[float, float, float]
    std: tuple[Deviation, Deviation, Deviation]
    fit: Annotated[str, Field(pattern=f"^({'|'.join(FITS)})$")] = "crop"
    preparation: Preparation = field(default_factory=Preparation)
    gray_bits: Annotated[int, Field(ge=8, le=16)] | None = None

    def read(self, dataset: datasets.Dataset, at_least: int = 0) -> ImageTable:
        """The images of a schema table, prepared and ready to be put into batches.

        Where all have one size, they keep it, and the resize is left to the device. Otherwise each is made a square of
        `resize_size`, or `at_least` so many, pixels on a side when it is read. An evaluation view comes out the same
        either way: it does not depend on what else is in the table.
        """
        images = ImageTable(dataset)
        keeps_size = not self.preparation.crop_to_brain and images.is_of_one_size()
        if keeps_size and self.preparation.is_none:
            return images
        side = None if keeps_size else max(self.resize_size, at_least)
        return ImageTable(dataset, partial(self.prepared, side=side))

    def prepared(self, image: torch.Tensor, side: int | None) -> torch.Tensor:
        """One image as `read` gives it, uint8 (3, H, W), or (3, side, side) where `side` is given."""
        prepared = self.preparation(image)
        return prepared if side is None else self.square(prepared, side)

    def square(self, images: torch.Tensor, side: int) -> torch.Tensor:
        """Fit (..., 3, H, W), uint8 or float in [0, 1], into (..., 3, side, side) of the same type and device.

        The center crop of `image_size` that may follow finds the pixels that it would find in the whole image.
        """
        height, width = images.shape[-2:]
        if height == width == side:
            return images
        longer, shorter = max(height, width), min(height, width)
        size = [side, side]
        if self.fit == "crop":
            size = [side]
            if longer > _ELONGATED * shorter:
                images = functional.center_crop(images, [min(x, _ELONGATED * shorter) for x in (height, width)])
        if self.fit == "pad":
            size = [max(1, round(x * side / longer)) for x in (height, width)]
        mode = InterpolationMode(self.interpolation)
        resized = functional.resize(images, size, interpolation=mode, antialias=True)
        height, width = resized.shape[-2:]
        top, left = (self._crop_start(x) - self._crop_start(side) for x in (height, width))
        if self.fit == "pad":
            fill = [round(255 * x) for x in self.mean] if images.dtype == torch.uint8 else list(self.mean)
            square: torch.Tensor = functional.pad(
                resized, [-left, -top, side - width + left, side - height + top], fill=fill
            )
        else:
            square = functional.crop(resized, top, left, side, side)
        return square

    def _crop_start(self, extent: int) -> int:
        """Where the center crop starts in `extent` pixels, before them if it is larger; timm rounds like this."""
        rest = extent - self.image_size
        return round(rest / 2) if rest >= 0 else -(-rest // 2)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Evaluation view of (B, 3, H, W), uint8 or float in [0, 1]: normalized float32 (B, 3, image_size, image_size).

        It stays on the images' device, and is laid out as the model reads it, channels last.
        """
        cropped = functional.center_crop(self.square(images, self.resize_size), [self.image_size, self.image_size])
        floats = cropped.float() / 255 if cropped.dtype == torch.uint8 else cropped.clamp(0, 1)
        return self.normalize(floats).contiguous(memory_format=torch.channels_last)

    def back(self, maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Float maps (B, C, image_size, image_size) of evaluation views, laid on the images (B, C, height, width).

        What the crop took away is 0 there.
        """
        longer, shorter, side = max(height, width), min(height, width), self.resize_size
        kept = [min(x, _ELONGATED * shorter) for x in (height, width)] if self.fit == "crop" else [height, width]
        size = [side, side]
        if self.fit != "squash":
            size = [max(1, round(x * side / (shorter if self.fit == "crop" else longer))) for x in kept]
        resized = functional.resize(functional.center_crop(maps, size), kept, antialias=True)
        laid: torch.Tensor = functional.center_crop(resized, [height, width])
        return laid.clamp(0, 1)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Float (B, 3, H, W) in [0, 1] to zero mean and unit deviation of the backbone's training data."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return (images - mean).div_(std)

    def image_processor(self) -> CLIPImageProcessor | None:
        """transformers' image processor that gives the same view, for pipelines; None with "pad", which it lacks.

        CLIP's is the one of resize, center crop, rescale and normalization. Where an odd number of pixels is cropped,
        its crop may start one pixel earlier.
        """
        if self.fit == "pad":
            return None
        side = self.resize_size
        return CLIPImageProcessor(
            size={"shortest_edge": side} if self.fit == "crop" else {"height": side, "width": side},
            crop_size={"height": self.image_size, "width": self.image_size},
            resample=PIL.Image.Resampling[self.interpolation.upper()],
            image_mean=self.mean,
            image_std=self.std,
        )


def resolve(
    config: PreTrainedConfig,
    source: str,
    image_size: int | None = None,
    resize_size: int | None = None,
    fit: str | None = None,
) -> Preprocessing:
    """The preprocessing that a backbone declares, with the sizes and the fit overridden where they are given.

    Args:
        config: the backbone's configuration; a timm backbone declares its data there (`pretrained_cfg`).
        source: the backbone's local folder or Hub name, where a transformers backbone keeps its image processor.
        image_size, resize_size: pixels; without `resize_size`, the backbone's own ratio of crop to resize is kept.
        fit: "crop", "squash" or "pad".

    Raises `HistoError` if nothing is declared, or a size is out of bounds or `resize_size` smaller than `image_size`.
    """
    declared = getattr(config, "pretrained_cfg", None)
    own = _from_timm(declared, source) if declared else _from_image_processor(source)
    size = image_size or own.image_size
    resize = resize_size or math.floor(size * own.resize_size / own.image_size)
    for option, value, most in (("image", size, MAX_SIZE), ("resize", resize, 2 * MAX_SIZE)):
        if not MIN_SIZE <= value <= most:
            bounds = f"{MIN_SIZE} to {most} pixels"
            raise HistoError(f"--{option}_size is {value}, expected {bounds}; choose one between them")
    if resize < size:
        raise HistoError(f"--resize_size is {resize}, expected at least the image size, {size}")
    return replace(own, image_size=size, resize_size=resize, fit=fit or own.fit)


def _from_timm(declared: dict[str, Any], source: str) -> Preprocessing:
    absent = [key for key in ("input_size", "mean", "std") if not declared.get(key)]
    if absent:  # timm would fill in ImageNet's
        raise HistoError(f"backbone {source}: the pretrained_cfg in its config.json declares no {', '.join(absent)}")
    data = resolve_data_config(pretrained_cfg=declared)
    size = data["input_size"][-1]
    return Preprocessing(
        size,
        math.floor(size / data["crop_pct"]),
        data["interpolation"],
        tuple(data["mean"]),
        tuple(data["std"]),
        {"center": "crop", "squash": "squash", "border": "pad"}[data["crop_mode"]],
    )


def _from_image_processor(source: str) -> Preprocessing:
    try:
        declared = AutoImageProcessor.from_pretrained(source, trust_remote_code=False).to_dict()
        resize = declared["size"].get("shortest_edge") or declared["size"]["height"]
        size = declared["crop_size"]["height"] if declared.get("do_center_crop") else resize
        fit = "crop" if declared["size"].get("shortest_edge") else "squash"
        if declared.get("crop_pct"):  # ConvNextImageProcessor: `size` is that of the crop, and from 384 pixels on
            resize, fit = (int(size / declared["crop_pct"]), fit) if size < 384 else (size, "squash")  # there is none
        interpolation = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}[int(declared["resample"])]
        mean, std = (tuple(float(value) for value in declared[key]) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"image_mean is {mean} and image_std {std}")
        return Preprocessing(size, resize, interpolation, mean, std, fit)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HistoError(
            f"backbone {source}: no usable image processor ({type(error).__name__}: {reason}); expected a "
            "preprocessor_config.json with size, resample, image_mean and image_std beside its config.json"
        ) from None
