"""Distance of an image's color from the colors of the training centers, to warn about unusual images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from hf_histo.data.schema import ImageTable
from hf_histo.files import STRICT

MOST = 1000  # most images measured per center, evenly spread: enough for a mean, a deviation and a 99th percentile
QUANTILE = 0.99
BATCH = 64
VALUES = np.arange(256) / 255
LEAST_DEVIATION = 1 / 255  # smallest deviation of a statistic within a center: one step of a stored value

Means = Annotated[Sequence[float], Field(min_length=6, max_length=6)]
Deviations = Annotated[Sequence[Annotated[float, Field(gt=0)]], Field(min_length=6, max_length=6)]


@dataclass(frozen=True)
class ColorRange:
    """Color statistics of the training images, and the distance from them that is unusual.

    An image is described by six statistics: the mean and the standard deviation of each channel, for values in [0, 1].
    Its distance to a center is the root mean square of their z-scores among the center's training images; its distance
    to the training data is the one to the nearest center.

    Attributes:
        centers: means and standard deviations of the six statistics for each center, by its number as text.
        limit: distance that 99% of the training images do not exceed.
    """

    __pydantic_config__ = STRICT

    centers: Annotated[Mapping[str, tuple[Means, Deviations]], Field(min_length=1)]
    limit: Annotated[float, Field(ge=0)]

    @classmethod
    def fit(cls, images: ImageTable) -> ColorRange:
        """Measure up to `MOST` images of each center; labels are not used."""
        every, centers = np.array(images.centers), {}
        measured = []
        for center in np.unique(every):
            rows = np.flatnonzero(every == center)
            chosen = rows[np.linspace(0, len(rows) - 1, min(MOST, len(rows))).round().astype(int)]
            statistics = _measured(images, chosen.tolist())
            measured.append(statistics)
            deviation = np.maximum(statistics.std(0), LEAST_DEVIATION)
            centers[str(center)] = statistics.mean(0).tolist(), deviation.tolist()
        distances = _distances(np.concatenate(measured), centers)
        return cls(centers, float(np.quantile(distances, QUANTILE)))

    def distance(self, image: torch.Tensor) -> float:
        """Distance of a uint8 image (3, H, W) to the nearest training center, in standard deviations."""
        return float(_distances(_statistics(image)[None], self.centers)[0])


def _measured(images: ImageTable, rows: list[int]) -> NDArray[np.float64]:
    """Statistics (n, 6) of the images in `rows`, of which `BATCH` are in memory at a time."""
    batches = (images.__getitems__(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH))
    return np.stack([_statistics(sample["image"]) for batch in batches for sample in batch])


def _statistics(image: torch.Tensor) -> NDArray[np.float64]:
    """Means and standard deviations (6,) of the channels of a uint8 image (3, H, W), by how often each value occurs."""
    counts = np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in image.numpy()]) / image[0].numel()
    mean = counts @ VALUES
    return np.concatenate([mean, np.sqrt((counts * (VALUES - mean[:, None]) ** 2).sum(1))])


def _distances(
    statistics: NDArray[np.float64], centers: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> NDArray[np.float64]:
    """Distances (n,) of statistics (n, 6) to the nearest center."""
    scores = [(statistics - np.array(mean)) / np.array(deviation) for mean, deviation in centers.values()]
    nearest: NDArray[np.float64] = np.sqrt((np.stack(scores) ** 2).mean(axis=2)).min(axis=0)
    return nearest
