"""Training augmentation of a uint8 batch on the training device, with one set of random parameters per sample.

All geometry of a sample is one affine map and all color one affine map, as in Karras et al. 2020, "Training Generative
Adversarial Networks with Limited Data", appendix B: a batch costs one resampling and one 3x3 product per pixel. The
parameters are a function of (seed, epoch, sample), so neither workers, nor processes, nor a resumed run change what a
sample looks like.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from hf_histo.errors import HistoError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights of torchvision's and PIL's gray conversion
RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))  # NTSC 1953


@dataclass(frozen=True)
class Augmentation:
    """Ranges from which each sample's parameters are drawn.

    Attributes:
        scale: share of the image's area that the random crop takes, (low, high) in (0, 1].
        ratio: width / height of the crop, (low, high), drawn uniformly in the logarithm.
        horizontal_flip, vertical_flip: probability in [0, 1].
        quarter_turns: whether to rotate by 0, 90, 180 or 270 degrees with equal chance.
        brightness, contrast, saturation: factor drawn from [1 - value, 1 + value].
        hue: rotation of the hue drawn from [-value, value], in turns (0.5 is half the circle).
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    quarter_turns: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


PRESETS = {
    "none": Augmentation(),
    "flips": Augmentation(horizontal_flip=0.5, vertical_flip=0.5),
    # The report's list: random resized crop, flips, color jitter. It gives no strengths; these keep at least half of
    # the tissue in view and move color about as much as one scanner differs from the next.
    "standard": Augmentation(
        scale=(0.5, 1.0),
        ratio=(3 / 4, 4 / 3),
        horizontal_flip=0.5,
        vertical_flip=0.5,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        hue=0.05,
    ),
}


def preset(name: str) -> Augmentation:
    """The augmentation of that name; `HistoError` lists the known ones."""
    if name not in PRESETS:
        raise HistoError(f"--augmentation is {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def augment(
    images: torch.Tensor, augmentation: Augmentation, size: int, *, seed: int, epoch: int, index: torch.Tensor
) -> torch.Tensor:
    """Augment uint8 (B, 3, H, W) into float32 (B, 3, size, size) in [0, 1] on the same device.

    `index` (B,) int64 holds each sample's place in the data set: with `seed` and `epoch` it decides the parameters.
    """
    draws = _uniform(seed, epoch, index.cpu().numpy(), count=11).T
    crops, levels = _geometry(draws[:7], augmentation, images.shape[-2:], size)
    floats = images.float().div_(255)
    views = torch.empty(len(images), 3, size, size, device=images.device)
    for level in np.unique(levels):  # a crop that shrinks is averaged down first, so that it does not alias
        chosen = torch.from_numpy(np.flatnonzero(levels == level)).to(images.device)
        source = F.avg_pool2d(floats[chosen], 2 ** int(level)) if level else floats[chosen]
        grid = F.affine_grid(crops.to(images.device)[chosen], [len(chosen), 3, size, size], align_corners=False)
        views[chosen] = F.grid_sample(source, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return _recolor(views, draws[7:], augmentation)


def _geometry(
    draws: np.ndarray, augmentation: Augmentation, shape: torch.Size, size: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Affine maps (B, 2, 3) from the view to the image, both in [-1, 1], and how often to halve the image before."""
    area = _between(draws[0], *augmentation.scale)
    aspect = np.exp(_between(draws[1], *np.log(augmentation.ratio)))
    height, width = shape
    # As in torchvision's RandomResizedCrop the ratio is that of pixels; a box that does not fit is cut to the image.
    box_width = np.minimum(np.sqrt(area * aspect * height / width), 1.0)
    box_height = np.minimum(np.sqrt(area / aspect * width / height), 1.0)
    center_x = (2 * draws[2] - 1) * (1 - box_width)
    center_y = (2 * draws[3] - 1) * (1 - box_height)
    flip_x = np.where(draws[4] < augmentation.horizontal_flip, -1.0, 1.0)
    flip_y = np.where(draws[5] < augmentation.vertical_flip, -1.0, 1.0)
    turn = np.floor(draws[6] * 4) * (math.pi / 2) * augmentation.quarter_turns
    cos, sin = np.round(np.cos(turn)), np.round(np.sin(turn))
    rows = [
        [box_width * flip_x * cos, -box_width * flip_x * sin, center_x],
        [box_height * flip_y * sin, box_height * flip_y * cos, center_y],
    ]
    maps = torch.from_numpy(np.array(rows, dtype=np.float32)).permute(2, 0, 1).contiguous()
    shrink = np.sqrt(box_width * width * box_height * height) / size
    return maps, np.maximum(np.floor(np.log2(shrink) + 1e-6), 0).astype(int)


def _recolor(views: torch.Tensor, draws: np.ndarray, augmentation: Augmentation) -> torch.Tensor:
    """Brightness b, contrast c, saturation and hue as x -> b c M x + b (1 - c) m, m being the view's mean luma.

    M mixes with the gray (saturation) and rotates in the IQ plane (hue); both keep the luma.
    """
    strengths = (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    if not any((*strengths, augmentation.hue)):
        return views
    bright, contrast, saturation = (_between(draws[i], 1 - s, 1 + s) for i, s in enumerate(strengths))
    angle = 2 * math.pi * _between(draws[3], -augmentation.hue, augmentation.hue)
    rotation = np.zeros((len(angle), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = saturation * np.cos(angle)
    rotation[:, 2, 1] = saturation * np.sin(angle)
    rotation[:, 1, 2] = -rotation[:, 2, 1]
    to_yiq = np.array(RGB_TO_YIQ)
    mix = (bright * contrast)[:, None, None] * (np.linalg.inv(to_yiq) @ rotation @ to_yiq)
    shift = torch.from_numpy(bright * (1 - contrast)).to(views)
    luma = torch.tensor(LUMA, device=views.device)
    mean = torch.einsum("bchw,c->b", views, luma) / views[0, 0].numel()
    mixed = torch.einsum("bij,bjhw->bihw", torch.from_numpy(mix).to(views), views)
    return mixed.add_((shift * mean).view(-1, 1, 1, 1)).clamp_(0, 1)


def _between(draw: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * draw


def _uniform(seed: int, epoch: int, index: np.ndarray, count: int) -> np.ndarray:
    """Numbers in [0, 1), (B, count), a pure function of (seed, epoch, index, place): a counter-based generator.

    SplitMix64's mixing function (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure
    17) is applied to each coordinate in turn.
    """
    state = _mix(np.array(seed, dtype=np.uint64))
    state = _mix(state ^ np.uint64(epoch))
    state = _mix(state ^ index.astype(np.uint64))
    state = _mix(state[:, None] ^ np.arange(1, count + 1, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
