"""Color normalization: the effect of scanner and stain, measured for each acquisition center and removed.

A center's color is described by statistics in one of three color spaces. Normalization is an affine map in that space,
from the center's statistics to those of a reference:

| method | space | statistics |
|---|---|---|
| `rgb` | RGB in [0, 1] | mean and deviation of each channel |
| `reinhard` | CIELAB | mean and deviation of each channel |
| `macenko` | optical density | hematoxylin and eosin vectors, and the 99th percentile of their concentrations |

Sources: Reinhard et al. 2001, "Color transfer between images", equations 10-11; Macenko et al. 2009, "A method for
normalizing histology slides for quantitative analysis".

The reference is the mean over the training centers. Labels are never used: the statistics of a center that is not in
the training data are measured on its unlabeled images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import numpy as np
import torch
import torchstain
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from hf_histo.config import Normalization
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.files import STRICT

METHODS = get_args(Normalization)
PIXELS_PER_IMAGE = 256  # sampled from an image for a stain estimate: 400 images give 100,000 pixels
WHITE = 240.0  # intensity of unstained glass, from Macenko's published code
MIN_STD = 1e-3  # smallest deviation of a channel; below it, a center is blank, and dividing by it would amplify noise
Row = Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(min_length=3, max_length=3)]
Rows = Annotated[list[Row], Field(min_length=4, max_length=4)]


@dataclass(frozen=True)
class Statistics:
    """Color of one center: `location` (3,) and `scale` (3, 3), where color = location + scale @ standardized color.

    For `rgb` and `reinhard`, `location` is the mean, and `scale` has the standard deviations on its diagonal. For
    `macenko`, `location` is zero, and the columns of `scale` are the two stain vectors times their maximal
    concentrations and the unit vector normal to both, so that the map can be inverted.
    """

    location: tuple[float, ...]
    scale: tuple[tuple[float, ...], ...]

    def as_json(self) -> list[list[float]]:
        """Four rows of three numbers: `location`, then the rows of `scale`."""
        return [list(self.location), *map(list, self.scale)]

    @classmethod
    def _of_json(cls, rows: list[list[float]]) -> Statistics:
        if abs(np.linalg.det(rows[1:])) < 1e-12:
            raise ValueError("expected a scale that can be inverted")
        location, *scale = (tuple(map(float, row)) for row in rows)
        return cls(location, tuple(scale))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls._of_json, handler.generate_schema(Rows))


class StoredNormalizer(BaseModel):
    """JSON form of a `CenterNormalizer`: method, reference, and the statistics of each center by its number."""

    model_config = ConfigDict({**STRICT, "extra": "allow"})
    __pydantic_extra__: dict[str, Statistics] = Field(init=False)

    method: Annotated[str, Field(pattern=f"^({'|'.join(METHODS[1:])})$")]
    reference: Statistics


@dataclass(frozen=True)
class CenterNormalizer:
    """Maps the color of each center to a common reference.

    Attributes:
        method: "rgb", "reinhard" or "macenko".
        reference: statistics that each center's color is mapped to.
        centers: statistics by center; -1 is all images of unknown center.
        training: the centers whose mean is the reference.
    """

    method: str
    reference: Statistics
    centers: Mapping[int, Statistics]
    training: tuple[int, ...]

    @classmethod
    def fit(cls, images: ImageTable, method: str) -> CenterNormalizer:
        """Measure each center of a training set; the reference is their mean. Raises `HistoError` as `measure` does."""
        centers = measure(images, method)
        every = list(centers.values())
        reference = Statistics(
            tuple(np.mean([s.location for s in every], axis=0).tolist()),
            tuple(map(tuple, np.mean([s.scale for s in every], axis=0).tolist())),
        )
        return cls(method, reference, centers, tuple(centers))

    def extended(self, images: ImageTable) -> CenterNormalizer:
        """A copy that also has statistics of the centers of `images` that were unknown, measured on `images`."""
        unknown = sorted(set(images.centers) - set(self.centers))
        if not unknown:
            return self
        rows = np.flatnonzero(np.isin(images.centers, unknown))
        found = measure(images.select(rows.tolist()), self.method)
        return dataclasses.replace(self, centers={**self.centers, **found})

    def __call__(
        self, images: torch.Tensor, centers: NDArray[np.int64], targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalize images, uint8 (B, 3, H, W), of `centers` (B,) int64: float32 in [0, 1] on the same device.

        `targets` (B, 12) replaces the reference for each image: location, then scale row by row. Raises `HistoError`
        for a center without statistics.
        """
        location, scale = self._of(centers.tolist())
        goal = torch.tensor(_flat(self.reference)).expand(len(images), 12) if targets is None else targets
        goal_location, goal_scale = goal[:, :3], goal[:, 3:].reshape(-1, 3, 3)
        matrix = goal_scale @ torch.linalg.inv(scale)
        shift = goal_location - (matrix @ location[:, :, None])[:, :, 0]
        color = _into(self.method, images)
        moved = torch.einsum("bij,bjhw->bihw", matrix.to(color), color) + shift.to(color)[:, :, None, None]
        return _out_of(self.method, moved).clamp_(0, 1)

    def targets(self, mixed: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """`targets` (B, 12) of a call: a random mixture of the training centers where `mixed` (B,), else the reference.

        `draws` (B, number of training centers), uniform in [0, 1), become weights that are uniform over the simplex
        (normalized exponentials). Mixing statistics of real centers is a stain augmentation that stays within the
        colors of real scanners.
        """
        every = torch.tensor([_flat(self.centers[center]) for center in self.training])
        weights = -torch.log1p(-draws.float())
        mixtures = (weights / weights.sum(1, keepdim=True)) @ every
        return torch.where(mixed[:, None], mixtures, torch.tensor(_flat(self.reference)))

    def virtual(self, draws: torch.Tensor) -> torch.Tensor:
        """`targets` (B, 12) of a call: virtual stains, whose channel means and deviations are each normal.

        Shen et al. 2022, "RandStainNA: Learning stain-agnostic features from histology slides by bridging stain
        augmentation and normalization", section 2.2, for "rgb" and "reinhard" (their LAB). The normal distributions are
        fitted to the statistics of the training centers, of which there must be two or more, not to those of single
        images as in the paper: an image is moved from the color of its center here, not from its own. They reach beyond
        the colors of the centers, which `targets` stays within.

        `draws` (B, 6) are uniform in [0, 1): for the three means, and the three deviations, which are at least
        `MIN_STD`.
        """
        every = torch.tensor([_flat(self.centers[center]) for center in self.training], dtype=torch.float64)
        every = torch.cat([every[:, :3], every[:, 3::4]], dim=1)  # means, and the diagonal of the scale
        drawn = torch.special.ndtri(draws.double().clamp(min=2**-53)) * every.std(0) + every.mean(0)
        targets = torch.zeros(len(draws), 12)
        targets[:, :3] = drawn[:, :3]
        targets[:, 3::4] = drawn[:, 3:].clamp(min=MIN_STD)
        return targets

    def _of(self, centers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        missing = sorted(set(centers) - set(self.centers))
        if missing:
            raise HistoError(
                f"center {missing[0]} has no statistics, only {sorted(self.centers)}: measure its images first"
            )
        flat = torch.tensor([_flat(self.centers[center]) for center in centers])
        return flat[:, :3], flat[:, 3:].reshape(-1, 3, 3)

    def as_json(self) -> dict[str, Any]:
        """JSON for the sidecar, with the training centers only: others are measured when they are predicted."""
        centers = {str(center): self.centers[center].as_json() for center in self.training}
        return {"method": self.method, "reference": self.reference.as_json(), **centers}

    @classmethod
    def _of_json(cls, stored: StoredNormalizer) -> CenterNormalizer:
        centers = {int(center): statistics for center, statistics in (stored.__pydantic_extra__ or {}).items()}
        return cls(stored.method, stored.reference, centers, tuple(centers))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls._of_json, handler.generate_schema(StoredNormalizer))


def measure(images: ImageTable, method: str) -> dict[int, Statistics]:
    """Color statistics of each center of a table, measured in one pass over its images; labels are not used.

    Raises `HistoError` for an unknown method and for a center whose images are blank or show no two stains.
    """
    if method not in METHODS[1:]:
        raise HistoError(f"--normalization is {method!r}, expected one of {', '.join(METHODS)}")
    gathered: dict[int, Any] = {}
    for center, pixels in _pixels(images, method):
        if method == "macenko":
            gathered.setdefault(center, []).append(pixels)
        else:
            moments = np.array([np.ones(3) * len(pixels), pixels.sum(0), (pixels**2).sum(0)])
            gathered[center] = gathered.get(center, 0) + moments
    of = _stains if method == "macenko" else _moments
    return {center: of(images.center_name(center), found) for center, found in sorted(gathered.items())}


def _pixels(images: ImageTable, method: str, batch: int = 64) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield (center, pixels (n, 3)) of each image; for "macenko", an evenly spaced sample of uint8 values."""
    for start in range(0, len(images), batch):
        for sample in images.__getitems__(range(start, min(start + batch, len(images)))):
            image, center = sample["image"], sample["center"]
            if method == "macenko":
                flat = image.reshape(3, -1)
                step = max(1, flat.shape[1] // PIXELS_PER_IMAGE)
                yield center, flat[:, ::step].T.numpy()
            else:
                yield center, _into(method, image[None])[0].reshape(3, -1).T.double().numpy()


def _moments(center: str, sums: NDArray[np.float64]) -> Statistics:
    count, total, squares = sums
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    if std.min() < MIN_STD:
        raise HistoError(
            f"center {center}: its images are blank (channel deviations {std.tolist()}), nothing to measure"
        )
    return Statistics(tuple(mean.tolist()), tuple(map(tuple, np.diag(std).tolist())))


def _stains(center: str, pixels: list[NDArray[np.uint8]]) -> Statistics:
    every = torch.from_numpy(np.concatenate(pixels)).T[:, :, None]
    estimator = torchstain.normalizers.MacenkoNormalizer(backend="torch")
    try:
        estimator.fit(every, Io=WHITE)
        stains = estimator.HERef.double().numpy()
        maxima = estimator.maxCRef.double().numpy()
    except (RuntimeError, IndexError) as error:
        raise HistoError(
            f"center {center}: no stains were found in its images ({error}), expected two; use another method"
        ) from None
    normal = np.cross(stains[:, 0], stains[:, 1])
    if not np.isfinite(maxima).all() or maxima.min() <= 0 or np.linalg.norm(normal) < MIN_STD:
        raise HistoError(f"center {center}: no two stains were found in its images, expected two; use another method")
    columns = np.stack([stains[:, 0] * maxima[0], stains[:, 1] * maxima[1], normal / np.linalg.norm(normal)], axis=1)
    return Statistics((0.0, 0.0, 0.0), tuple(map(tuple, columns.tolist())))


def _into(method: str, images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 RGB to float32 in the color space of `method`."""
    if method == "macenko":
        return -torch.log((images.float() + 1) / WHITE)
    floats = images.float() / 255
    if method != "reinhard":
        return floats
    from kornia.color import rgb_to_lab

    return rgb_to_lab(floats)


def _out_of(method: str, color: torch.Tensor) -> torch.Tensor:
    """The inverse of `_into`: RGB in [0, 1], not yet clipped."""
    if method == "macenko":
        return (WHITE * torch.exp(-color) - 1) / 255
    if method != "reinhard":
        return color
    from kornia.color import lab_to_rgb

    return lab_to_rgb(color, clip=True)


def _flat(statistics: Statistics) -> list[float]:
    return [*statistics.location, *(value for row in statistics.scale for value in row)]
