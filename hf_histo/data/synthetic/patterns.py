"""Procedural patterns to pretrain a small backbone on, which need no photographs and no license.

Baradad et al. (2021, "Learning to See by Looking at Noise", NeurIPS) show that a network learns useful features from
images of simple random processes, such as spectral noise and dead leaves, by contrastive learning. Here the task is
supervised: predict which of 12 processes drew a gray image, at which of the 4 levels of its parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from hf_histo.errors import HistoError

Array = NDArray[np.float64]


def pattern(rng: np.random.Generator, label: int, size: int = 112) -> NDArray[np.uint8]:
    """Draw a gray pattern of class `label`, 0 to `CLASSES` - 1: uint8 (size, size), stretched to 0..255.

    The class is `4 * process + level`. Scale, rotation, sharpness and grain vary within a class. Raises `HistoError`
    for a label out of range.
    """
    if not 0 <= label < CLASSES:
        raise HistoError(f"label={label}: expected 0 to {CLASSES - 1}; choose a class in this range")
    process, level = divmod(label, 4)
    image = PROCESSES[process](rng, level, size)
    image = ndimage.gaussian_filter(image, rng.uniform(0.2, 0.8))
    image = (image - image.min()) / max(float(np.ptp(image)), 1e-9)
    image += rng.uniform(0, 0.08) * _noise(rng, size, rng.choice([0.4, 1.0, 3.0]))
    return (np.clip((image - image.min()) / np.ptp(image), 0, 1) * 255).astype(np.uint8)


def _spectrum(rng: np.random.Generator, level: int, size: int) -> Array:
    """Noise whose amplitude falls as 1 / frequency ** (0.5, 1, 1.5, 2)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1
    waves = np.fft.rfft2(rng.normal(size=(size, size))) / frequency ** (0.5 + 0.5 * level)
    return np.fft.irfft2(waves, s=(size, size))


def _fibers(rng: np.random.Generator, level: int, size: int) -> Array:
    """Noise stretched along wavy lines (1.5, 3, 6, 12 times)."""
    width = rng.uniform(0.9, 1.8)
    noise = ndimage.gaussian_filter(rng.normal(size=(size, size)), (width, width * 1.5 * 2**level), mode="wrap")
    return ndimage.map_coordinates(noise, _plane(rng, size, 4.0), order=1, mode="grid-wrap")


def _stripes(rng: np.random.Generator, level: int, size: int) -> Array:
    """Stripes of a period of about 4, 7, 12, 21 pixels."""
    wave = np.sin(2 * np.pi * _plane(rng, size, 3.0)[0] / (4 * 1.75**level * rng.uniform(0.85, 1.15)))
    return np.tanh(rng.uniform(0.5, 4) * wave)


def _warped(rng: np.random.Generator, level: int, size: int) -> Array:
    """Stripes, warped by 0, 3, 7, 14 pixels."""
    wave = np.sin(2 * np.pi * _plane(rng, size, (0.0, 3.0, 7.0, 14.0)[level])[0] / rng.uniform(6, 14))
    return np.tanh(rng.uniform(0.5, 4) * wave)


def _lattice(rng: np.random.Generator, level: int, size: int) -> Array:
    """Dots on a lattice, displaced more at each level."""
    spacing = rng.uniform(9, 20)
    points = _points(rng, size, spacing, (0.0, 0.15, 0.35, 0.9)[level])
    return _dots(rng, points, np.full(len(points), spacing * rng.uniform(0.22, 0.38)), size)


def _sizes(rng: np.random.Generator, level: int, size: int) -> Array:
    """Dots whose sizes vary more at each level."""
    spacing = rng.uniform(9, 20)
    points = _points(rng, size, spacing, 0.4)
    radii = spacing * rng.uniform(0.22, 0.34) * np.exp(rng.normal(0, (0.0, 0.2, 0.4, 0.7)[level], len(points)))
    return _dots(rng, points, radii, size)


def _lobes(rng: np.random.Generator, level: int, size: int) -> Array:
    """Shapes whose contours are more irregular at each level."""
    spacing = rng.uniform(13, 26)
    points = _points(rng, size, spacing, 0.3)
    radii = np.full(len(points), spacing * rng.uniform(0.28, 0.4))
    return _dots(rng, points, radii, size, (0.0, 0.12, 0.25, 0.45)[level])


def _clusters(rng: np.random.Generator, level: int, size: int) -> Array:
    """The same number of dots, more clustered at each level."""
    count, clusters = rng.integers(30, 70), (200, 24, 10, 4)[level]
    homes = rng.uniform(0, size, (clusters, 2))
    points = homes[rng.integers(0, clusters, count)] + rng.normal(0, 7, (count, 2))
    return _dots(rng, points, np.full(count, rng.uniform(1.8, 4.0)), size)


def _cells(rng: np.random.Generator, level: int, size: int) -> Array:
    """Voronoi cells in flat grays, of a spacing of about 6, 10, 17, 29 pixels."""
    points = _points(rng, size, 6 * 1.7**level * rng.uniform(0.85, 1.15), rng.uniform(0.1, 0.6))
    return rng.random(len(points))[_nearest(points, size, 1)[1]]


def _borders(rng: np.random.Generator, level: int, size: int) -> Array:
    """Borders of Voronoi cells of lattice points, displaced more at each level."""
    points = _points(rng, size, rng.uniform(9, 22), (0.0, 0.2, 0.4, 0.9)[level])
    gaps, _ = _nearest(points, size, 2)
    return np.exp(-(gaps[..., 1] - gaps[..., 0]) / rng.uniform(0.8, 3.0))


def _leaves(rng: np.random.Generator, level: int, size: int) -> Array:
    """Dead leaves: opaque discs over one another, of a median radius of about 4, 7, 12, 21 pixels."""
    count = (600, 240, 100, 50)[level]
    radii = 4 * 1.75**level * np.exp(rng.normal(0, 0.35, count))
    gray, image = rng.random(count), np.full((size, size), 0.5)
    for (y, x), radius, value in zip(rng.uniform(0, size, (count, 2)), radii, gray, strict=True):
        top, left = max(int(y - radius), 0), max(int(x - radius), 0)
        window = image[top : int(y + radius) + 2, left : int(x + radius) + 2]
        rows, columns = np.ogrid[top : top + window.shape[0], left : left + window.shape[1]]
        window[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = value
    return image


def _rings(rng: np.random.Generator, level: int, size: int) -> Array:
    """Concentric shapes around a few points: a filled disc, then 1, 2 and 4 rings."""
    spacing = rng.uniform(22, 40)
    gaps, _ = _nearest(_points(rng, size, spacing, 0.3), size, 1)
    reach = gaps / (spacing * rng.uniform(0.35, 0.48))
    if level == 0:
        return 1 / (1 + np.exp(np.clip((reach - 1) * 15, -50, 50)))
    rings = (1, 2, 4)[level - 1]
    return np.where(reach < 1, 0.5 - 0.5 * np.cos(2 * np.pi * rings * reach), 0.0)


PROCESSES: tuple[Callable[[np.random.Generator, int, int], Array], ...] = (
    _spectrum,
    _fibers,
    _stripes,
    _warped,
    _lattice,
    _sizes,
    _lobes,
    _clusters,
    _cells,
    _borders,
    _leaves,
    _rings,
)
"""The random processes; each takes (rng, level in 0..3, size) and returns an image (size, size) in any range."""

CLASSES = 4 * len(PROCESSES)
"""The number of classes, 48."""


def _points(rng: np.random.Generator, size: int, spacing: float, jitter: float) -> Array:
    """Points (n, 2) of a rotated hexagonal lattice, each displaced by `jitter` x `spacing` (standard deviation)."""
    reach = np.arange(-1.0, 1.0, spacing / size) * size
    rows, columns = np.meshgrid(reach * np.sqrt(0.75), reach, indexing="ij")
    columns = columns + 0.5 * spacing * (np.arange(len(reach)) % 2)[:, None]
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = np.stack([rows.ravel(), columns.ravel()], axis=1) @ turn + size / 2 + rng.uniform(0, spacing, 2)
    points += rng.normal(0, max(jitter, 1e-3) * spacing, points.shape)
    return points[np.all((points > -spacing) & (points < size + spacing), axis=1)]


def _nearest(points: Array, size: int, k: int) -> tuple[Array, NDArray[np.intp]]:
    """Distances to and indices of the `k` nearest points of each pixel: (size, size), with a last axis k if k > 1."""
    distances, indices = cKDTree(points).query(_grid(size), k=k)
    return distances, indices


def _dots(rng: np.random.Generator, points: Array, radii: Array, size: int, lobes: float = 0.0) -> Array:
    """Soft-edged dots of random grays on black; `lobes` is the relative amplitude of two waves along each contour."""
    gaps, owner = _nearest(points, size, 1)
    offset = _grid(size) - points[owner]
    angle = np.arctan2(offset[..., 0], offset[..., 1])
    contour = np.ones((size, size))
    for wave in (3, 5):
        phase = rng.uniform(0, 2 * np.pi, len(points))[owner]
        contour += lobes * rng.normal(0, 1, len(points))[owner] * np.cos(wave * angle + phase)
    inside = radii[owner] * np.clip(contour, 0.2, 2) - gaps
    gray = rng.uniform(rng.choice([0.2, 0.9]), 1, len(points))[owner]
    return gray / (1 + np.exp(np.clip(-inside * 2.5, -50, 50)))


def _plane(rng: np.random.Generator, size: int, warp: float) -> Array:
    """Rotated coordinates (2, size, size) in pixels, displaced by smooth noise with a deviation of `warp` pixels."""
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    noise = np.stack([_noise(rng, size, 14.0), _noise(rng, size, 14.0)])
    turned: Array = np.einsum("ij,jyx->iyx", turn, np.mgrid[:size, :size] + warp * noise)
    return turned


def _grid(size: int) -> Array:
    return np.moveaxis(np.mgrid[:size, :size].astype(float), 0, -1)


def _noise(rng: np.random.Generator, size: int, scale: float) -> Array:
    noise: Array = ndimage.gaussian_filter(rng.normal(size=(size, size)), scale, mode="wrap")
    return noise / noise.std()
