"""Preparation of MRI slices before the resize, applied to each image when it is read, in this order."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, get_args

import kornia.enhance
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from hf_histo.config import Contrast, PreparationOptions
from hf_histo.files import STRICT

CONTRASTS = get_args(Contrast)
MARGIN = 0.02  # of the box's longer side, around the head on each side
SMALLEST = 0.1  # share of the image's area; a component below is no head, and the image stays whole
WINDOW = 1 / 3  # of the mean that estimates the field, as a share of the shorter side
TISSUE = 0.3  # of Otsu's threshold: above it is tissue, which in a bright scalp may be below the threshold itself
FAINTEST = 0.2  # of the mean; no part of the field is taken for weaker, or noise would be amplified
PERCENTILES = (1.0, 99.0)  # of the image, that the stretch maps to black and white
CLIP_LIMIT, TILES = 2.0, 8


@dataclass(frozen=True)
class Preparation:
    """From uint8 (3, H, W) to uint8 (3, H, W), by default as it is; with any of the steps, gray in three channels.

    Attributes:
        gray: take out color, by the luma.
        crop_to_brain: cut the background off: the box around the largest component that is brighter than Otsu's
            threshold (1979, "A threshold selection method from gray-level histograms", equation 18), with a margin.
        even_field: divide by the local mean of the tissue, so that a coil's slow changes of brightness (the bias field)
            go: mean-based homomorphic unsharp masking with a wide window (Brinkmann, Manduca & Robb 1998, "Optimized
            homomorphic unsharp masking for MR grayscale inhomogeneity correction"). It tolerates the field rather
            than model it as N4 does, and lowers the contrast of a bright region as large as its window.
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
        """Whether images stay as they are."""
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
        if self.contrast == "clahe" and min(gray.shape) >= 2 * TILES:  # a tile needs pixels to equalize
            gray = kornia.enhance.equalize_clahe(gray[None, None], CLIP_LIMIT, (TILES, TILES))[0, 0]
        return (gray * 255).round().to(torch.uint8).expand(3, -1, -1).contiguous()

    def box(self, image: torch.Tensor) -> tuple[slice, slice]:
        """Rows and columns of uint8 (3, H, W) that are kept."""
        return _brain(_luma(image)) if self.crop_to_brain else (slice(0, image.shape[1]), slice(0, image.shape[2]))


def _luma(image: torch.Tensor) -> NDArray[np.float32]:
    luma: NDArray[np.float32] = image.float().mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0).numpy()
    return luma


def _brain(luma: NDArray[np.float32]) -> tuple[slice, slice]:
    """The box around the head, or all of the image where none stands out."""
    whole = slice(0, luma.shape[0]), slice(0, luma.shape[1])
    # Smoothed, so that text and noise outside the head fall apart or below the threshold.
    smooth = ndimage.gaussian_filter(luma, min(luma.shape) / 100)
    labels, count = ndimage.label(smooth > _otsu(smooth))
    if not count:
        return whole
    # By the area of its box: a scalp is a thin ring, and a tumor in it may have more pixels.
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
    # A mean over the tissue alone, so that the head's rim does not count as dark.
    total, weight = (ndimage.uniform_filter(x, window) for x in (luma * tissue, tissue.astype(np.float32)))
    mean = luma[tissue].mean()
    even: NDArray[np.float32] = luma * mean / np.maximum(total / np.maximum(weight, 1e-3), FAINTEST * mean)
    return even


def _stretched(luma: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = np.percentile(luma, PERCENTILES)
    return (luma - low) * 255 / (high - low) if high > low else luma


def _otsu(luma: NDArray[np.float32]) -> float:
    """The gray level that parts dark from bright pixels best; the highest one, which none exceeds, if all are alike."""
    counts = np.bincount(luma.clip(0, 255).astype(np.uint8).ravel(), minlength=256) / luma.size
    below, total = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (total[-1] * below - total) ** 2 / (below * (1 - below))
    between[(below == 0) | (1 - below < 1e-9)] = 0
    return float(np.argmax(between)) + 1 if between.max() > 0 else 255.0
