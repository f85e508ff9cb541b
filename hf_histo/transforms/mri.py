"""Preparation of MRI slices, applied to each image when it is read, before it is resized."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from hf_histo.config import Contrast, PreparationOptions
from hf_histo.files import STRICT

CONTRASTS = get_args(Contrast)
MARGIN = 0.02  # margin around the head, as a share of the box's longer side
SMALLEST = 0.1  # smallest area of a head, as a share of the image's; below it, the image is not cropped
WINDOW = 1 / 3  # window of the mean that estimates the bias field, as a share of the shorter side
TISSUE = 0.3  # pixels above this share of Otsu's threshold are tissue: a bright scalp can raise it above the brain
FAINTEST = 0.2  # lower bound of the bias field, as a share of its mean, so that noise is not amplified
PERCENTILES = (1.0, 99.0)  # percentiles of the image that "stretch" maps to black and white
CLIP_LIMIT, TILES = 2.0, 8


@dataclass(frozen=True)
class Preparation:
    """Maps an image, uint8 (3, H, W), to a prepared one, uint8 (3, H', W'); the default leaves it unchanged.

    The steps are applied in the order of the attributes. With any of them, the result is gray in three channels.

    Attributes:
        gray: convert to gray, by the luma.
        crop_to_brain: crop to the box around the largest component that is brighter than Otsu's threshold (1979, "A
            threshold selection method from gray-level histograms", equation 18), with a margin.
        even_field: divide by the local mean of the tissue, to remove a coil's slow changes of brightness (the bias
            field): mean-based homomorphic unsharp masking with a wide window (Brinkmann, Manduca & Robb 1998,
            "Optimized homomorphic unsharp masking for MR grayscale inhomogeneity correction"). Unlike N4 it does not
            model the field, and it lowers the contrast of a bright region as large as its window.
        contrast: "clahe" (Zuiderveld 1994, "Contrast limited adaptive histogram equalization", 8 x 8 tiles, limit 2),
            "stretch" (the image's percentiles 1 and 99 become black and white), or "none".
    """

    __pydantic_config__ = STRICT

    gray: bool = False
    crop_to_brain: bool = False
    even_field: bool = False
    contrast: Annotated[str, Field(pattern=f"^({'|'.join(CONTRASTS)})$")] = "none"

    @classmethod
    def of(cls, options: PreparationOptions) -> Preparation:
        return cls(**dataclasses.asdict(options))

    @property
    def is_none(self) -> bool:
        """Whether images stay unchanged."""
        return self == Preparation()

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if self.is_none:
            return image
        luma = _luma(image)
        if self.crop_to_brain:
            luma = luma[_brain(luma)]
        if self.even_field:
            luma = _evened(luma)
        if self.contrast == "stretch":
            luma = _stretched(luma)
        gray = torch.from_numpy(np.rint(luma.clip(0, 255)) / 255).float()
        if self.contrast == "clahe" and min(gray.shape) >= 2 * TILES:  # a smaller tile has too few pixels to equalize
            from kornia.enhance import equalize_clahe

            gray = equalize_clahe(gray[None, None], CLIP_LIMIT, (TILES, TILES))[0, 0]
        return (gray * 255).round().to(torch.uint8).expand(3, -1, -1).contiguous()

    def box(self, image: torch.Tensor) -> tuple[slice, slice]:
        """Rows and columns of an image, uint8 (3, H, W), that are kept."""
        return _brain(_luma(image)) if self.crop_to_brain else (slice(0, image.shape[1]), slice(0, image.shape[2]))


def _luma(image: torch.Tensor) -> NDArray[np.float32]:
    luma: NDArray[np.float32] = image.float().mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0).numpy()
    return luma


def _brain(luma: NDArray[np.float32]) -> tuple[slice, slice]:
    """Rows and columns of the box around the head, or of the whole image if no head is found."""
    whole = slice(0, luma.shape[0]), slice(0, luma.shape[1])
    # Smoothed, so that text and noise outside the head fall below the threshold or into small components.
    smooth = ndimage.gaussian_filter(luma, min(luma.shape) / 100)
    labels, count = ndimage.label(smooth > _otsu(smooth))
    if not count:
        return whole
    # The largest by the area of its box: a scalp is a thin ring, and a tumor inside it may have more pixels.
    boxes = ndimage.find_objects(labels)
    rows, columns = max(boxes, key=lambda box: _extent(box[0]) * _extent(box[1]))
    if _extent(rows) * _extent(columns) < SMALLEST * luma.size:
        return whole
    margin = round(MARGIN * max(_extent(rows), _extent(columns)))
    return (
        slice(max(0, rows.start - margin), min(luma.shape[0], rows.stop + margin)),
        slice(max(0, columns.start - margin), min(luma.shape[1], columns.stop + margin)),
    )


def _extent(part: slice) -> int:
    return int(part.stop - part.start)


def _evened(luma: NDArray[np.float32]) -> NDArray[np.float32]:
    tissue = luma > TISSUE * _otsu(luma)
    if not tissue.any():
        return luma
    window = max(1, round(WINDOW * min(luma.shape)))
    # A mean over tissue only, so that the head's border is not taken for dark.
    total, weight = (ndimage.uniform_filter(x, window) for x in (luma * tissue, tissue.astype(np.float32)))
    mean = luma[tissue].mean()
    even: NDArray[np.float32] = luma * mean / np.maximum(total / np.maximum(weight, 1e-3), FAINTEST * mean)
    return even


def _stretched(luma: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = np.percentile(luma, PERCENTILES)
    return (luma - low) * 255 / (high - low) if high > low else luma


def _otsu(luma: NDArray[np.float32]) -> float:
    """Otsu's threshold between dark and bright gray levels; the maximum, which no pixel exceeds, if all are equal."""
    counts = np.bincount(luma.clip(0, 255).astype(np.uint8).ravel(), minlength=256) / luma.size
    below, total = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (total[-1] * below - total) ** 2 / (below * (1 - below))
    between[(below == 0) | (1 - below < 1e-9)] = 0
    return float(np.argmax(between)) + 1 if between.max() > 0 else 255.0
