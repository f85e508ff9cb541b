"""Evaluation preprocessing: resize, crop and normalization as the backbone declares them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, get_args

import datasets
import PIL.Image
import torch
from pydantic import Field
from timm.data import resolve_data_config
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from transformers import AutoImageProcessor, CLIPImageProcessor, PreTrainedConfig

from hf_histo.config import Fit
from hf_histo.data.reading import Reading
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.files import STRICT
from hf_histo.transforms.mri import Preparation

FITS = get_args(Fit)
MIN_SIZE = 8  # smallest image_size in pixels; torch fails to resize to a single pixel
MAX_SIZE = 1024  # largest image_size in pixels: above that of pretrained models, and a batch fits into memory
Size = Annotated[int, Field(ge=MIN_SIZE, le=MAX_SIZE)]
Deviation = Annotated[float, Field(gt=0)]
ResizeSize = Annotated[int, Field(ge=MIN_SIZE, le=2 * MAX_SIZE)]
_ELONGATED = 8  # ratio of sides above which an image is cropped before it is resized, to bound the memory


@dataclass(frozen=True)
class Preprocessing:
    """Resize, center crop and normalization of an evaluation batch.

    Attributes:
        image_size: side in pixels of the square that the model sees, `MIN_SIZE` to `MAX_SIZE`.
        resize_size: side in pixels of the square before the center crop, from `image_size` to twice `MAX_SIZE`.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos"; always antialiased.
        mean, std: mean and standard deviation of red, green and blue, for values in [0, 1].
        fit: how an image becomes square. "crop": the shorter side is resized and the longer one cropped at both ends;
            "squash": both sides are resized; "pad": the longer side is resized and the shorter one padded with the
            color `mean`, which is zero after normalization (timm's "border").
        preparation: applied to each image when it is read, before everything else.
        gray_bits: bit depth, 8 to 16, of the 16-bit gray training images, by which other 16-bit gray images are read as
            well, see `hf_histo.data.schema.rgb`; None if there were no such images.
        page: page, from 1, of training files that had several, which is read of other files with several; else None.
        window: center and width by which gray DICOM images were read, as other ones are, or "file" where each had its
            own; None if there were no DICOM images.
        mpp, patch_size: micrometers per pixel, and side in pixels, of the patches of slides that it was trained on, by
            which other slides are read as well; None if it was trained on image files.
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
    page: Annotated[int, Field(ge=1)] | None = None
    window: tuple[float, Annotated[float, Field(ge=1)]] | Literal["file"] | None = None
    mpp: Annotated[float, Field(gt=0)] | None = None
    patch_size: Annotated[int, Field(ge=16, le=4096)] | None = None

    @property
    def reading(self) -> Reading:
        """How image files are read: as those of training."""
        return Reading(self.gray_bits, self.page, self.window, self.mpp, self.patch_size)

    def read(self, dataset: datasets.Dataset, at_least: int = 0) -> ImageTable:
        """An `ImageTable` of a schema table whose images are prepared and have one size, so that they can be batched.

        If all images have the same size, they keep it, and are resized on the device. Otherwise each is resized, when
        it is read, to a square with a side of `resize_size` or `at_least`, whichever is larger. The evaluation view is
        the same either way: it does not depend on the other images in the table.
        """
        images = ImageTable(dataset)
        keeps_size = not self.preparation.crop_to_brain and images.is_of_one_size()
        if keeps_size and self.preparation.is_none:
            return images
        side = None if keeps_size else max(self.resize_size, at_least)
        return ImageTable(dataset, partial(self.prepared, side=side))

    def prepared(self, image: torch.Tensor, side: int | None) -> torch.Tensor:
        """Prepare one image, uint8 (3, H, W); with `side`, also resize it to (3, side, side)."""
        prepared = self.preparation(image)
        return prepared if side is None else self.square(prepared, side)

    def square(self, images: torch.Tensor, side: int) -> torch.Tensor:
        """Fit images (..., 3, H, W), uint8 or float in [0, 1], into (..., 3, side, side) of the same type and device.

        A center crop of `image_size` that follows takes the same pixels as it would from the whole image.
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
        """Start of the center crop within `extent` pixels, negative if the crop is larger; rounded as in timm."""
        rest = extent - self.image_size
        return round(rest / 2) if rest >= 0 else -(-rest // 2)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Evaluation view of (B, 3, H, W), uint8 or float in [0, 1]: normalized float32 (B, 3, image_size, image_size).

        The result is on the same device, in the memory format channels last.
        """
        cropped = functional.center_crop(self.square(images, self.resize_size), [self.image_size, self.image_size])
        floats = cropped.float() / 255 if cropped.dtype == torch.uint8 else cropped.clamp(0, 1)
        return self.normalize(floats).contiguous(memory_format=torch.channels_last)

    def back(self, maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Map floats of evaluation views, (B, C, image_size, image_size), back to the images: (B, C, height, width).

        Pixels that the crop removed get 0.
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
        """Normalize float images (B, 3, H, W) in [0, 1]: subtract `mean`, divide by `std`."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return (images - mean).div_(std)

    def image_processor(self) -> CLIPImageProcessor | None:
        """The image processor of transformers that gives the same view; None for `fit` "pad", which it does not have.

        `CLIPImageProcessor` does resize, center crop, rescaling and normalization. If an odd number of pixels is
        cropped, its crop may start one pixel earlier.
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
    """The preprocessing that a backbone declares, with sizes and fit replaced by the given ones.

    Args:
        config: the backbone's configuration, which declares the preprocessing of a timm backbone (`pretrained_cfg`).
        source: the backbone's local folder or Hub name, which holds the image processor of a transformers backbone.
        image_size, resize_size: pixels; without `resize_size`, the backbone's ratio of the two is kept.
        fit: "crop", "squash" or "pad".

    Raises `HistoError` if no preprocessing is declared, a size is out of bounds, or `resize_size` is smaller than
    `image_size`.
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
        if declared.get("do_resize") is False or declared.get("do_rescale") is False:
            raise ValueError("do_resize or do_rescale is false")
        if not math.isclose(factor := declared.get("rescale_factor", 1 / 255), 1 / 255):
            raise ValueError(f"rescale_factor is {factor}")
        declared |= {} if declared.get("do_normalize", True) else {"image_mean": (0,) * 3, "image_std": (1,) * 3}
        mean, std = (tuple(float(value) for value in declared[key]) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"image_mean is {mean} and image_std {std}")
        return Preprocessing(size, resize, interpolation, mean, std, fit)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HistoError(
            f"backbone {source}: no usable image processor ({type(error).__name__}: {reason}); expected a "
            "preprocessor_config.json with size, resample, image_mean and image_std, which resizes and divides by 255, "
            "beside its config.json"
        ) from None
