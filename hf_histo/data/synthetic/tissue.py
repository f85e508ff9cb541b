"""Synthetic H&E-like patches in the multi-center HDF5 layout: data for demos and tests, without download or license.

The class shows in the structure of the tissue, not in its color. In a tumor, nuclei are larger, more varied, more
irregular, denser and coarser inside, and glands lose the single row of nuclei around one lumen. Patches come in pairs
of normal and tumor tissue that have the same pixel values of the stains in different places (`recolored`), so that
color histograms can't separate the classes.

Each center has its own stain and scanner, and each slide differs a little from its center.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from tqdm import tqdm

from hf_histo.errors import HistoError
from hf_histo.files import atomic_folder

SIZE = 96
"""Height and width of a patch in pixels."""

SPLITS: dict[str, tuple[int, ...]] = {"train": (0, 3, 4), "val": (1,), "test": (2,)}
"""Centers of each split: validation and test are each from a center that is not in training."""

PATCHES_PER_SLIDE = 20

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Slide:
    """How one slide was stained and scanned.

    `hematoxylin` and `eosin` are optical densities per unit of stain in red, green, blue; `amounts` the units of the
    two stains relative to a well-stained slide; `white` the background's intensity in red, green, blue in (0, 1];
    `gamma` the exponent of the scanner's tone curve; `blur` the standard deviation of its point spread in pixels;
    `noise` the standard deviation of its sensor noise in units of the 0..1 intensity.
    """

    hematoxylin: tuple[float, ...]
    eosin: tuple[float, ...]
    amounts: tuple[float, ...]
    white: tuple[float, ...]
    gamma: float
    blur: float
    noise: float


# Stain vectors: center 1's hematoxylin is that of Ruifrok & Johnston (2001, Anal Quant Cytol Histol 23:291, as
# normalized by scikit-image); center 2's pair is the usual reference of Macenko et al.'s method (2009, ISBI p. 1107) in
# its public implementations. The others, and all other numbers of a center, were set by eye.
CENTERS: dict[int, Slide] = {
    0: Slide((0.62, 0.74, 0.30), (0.20, 0.80, 0.30), (1.00, 0.90), (0.90, 0.86, 0.93), 1.00, 0.60, 0.012),
    1: Slide((0.65, 0.70, 0.29), (0.30, 0.72, 0.24), (1.15, 0.90), (0.80, 0.76, 0.85), 1.05, 0.95, 0.010),
    2: Slide((0.56, 0.72, 0.41), (0.22, 0.80, 0.56), (0.75, 0.70), (0.99, 0.95, 0.97), 0.88, 0.45, 0.024),
    3: Slide((0.64, 0.70, 0.32), (0.26, 0.76, 0.28), (1.05, 0.80), (0.86, 0.85, 0.92), 1.05, 0.75, 0.010),
    4: Slide((0.58, 0.76, 0.30), (0.07, 0.85, 0.24), (0.95, 0.95), (0.97, 0.88, 0.96), 0.95, 0.65, 0.014),
}
"""The five centers. The test center differs most: pale, bright, sharp and grainy."""

ERYTHROCYTE: tuple[float, ...] = (0.12, 0.80, 0.62)
"""Optical density of red blood cells per unit, in red, green, blue (hemoglobin absorbs blue and green; set by eye)."""
ERYTHROCYTES = 0.9
"""Units of that optical density in a red blood cell."""


def slide(rng: np.random.Generator, center: int) -> Slide:
    """Draw a slide of `center`, 0 to 4: each number of the center's `Slide` is varied a little.

    Raises `HistoError` for any other center.
    """
    if center not in CENTERS:
        raise HistoError(f"center={center}: expected one of {sorted(CENTERS)}; choose one of these")
    base = CENTERS[center]

    def vary(values: tuple[float, ...], spread: float) -> tuple[float, ...]:
        return tuple(float(value) for value in np.asarray(values) * np.exp(rng.normal(0, spread, len(values))))

    return Slide(
        hematoxylin=vary(base.hematoxylin, 0.06),
        eosin=vary(base.eosin, 0.08),
        amounts=vary(base.amounts, 0.10),
        white=tuple(min(value, 1.0) for value in vary(base.white, 0.02)),
        gamma=vary((base.gamma,), 0.04)[0],
        blur=vary((base.blur,), 0.15)[0],
        noise=vary((base.noise,), 0.20)[0],
    )


def pair(rng: np.random.Generator, source: Slide) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a patch of normal and one of tumor tissue as scanned from a slide: RGB, uint8 (3, 96, 96) each.

    Both have the same composition, and both have the stain values of one of them, chosen at random.
    """
    composition, focus = Composition.draw(rng), _focus(rng, source.blur)
    # Stains are exchanged after the optical blur, which mixes them depending on the structure, and so on the class.
    normal, tumor = (
        ndimage.gaussian_filter(tissue(rng, composition, tumor=tumor), (0, focus, focus)) for tumor in (False, True)
    )
    colors = tumor if rng.integers(2) else normal
    return _scanned(rng, source, composition, recolored(normal, colors), focus), _scanned(
        rng, source, composition, recolored(tumor, colors), focus
    )


def _scanned(
    rng: np.random.Generator, source: Slide, composition: Composition, tissue: Array, focus: float
) -> NDArray[np.uint8]:
    """Scanned image, uint8 (3, 96, 96), of hematoxylin and eosin amounts (2, 96, 96), with red blood cells added."""
    blood = ERYTHROCYTES * ndimage.gaussian_filter(_discs(rng, composition.blood, 4.2 * composition.zoom), focus)
    stains = np.stack([*(tissue * (1 - blood)), blood])
    vectors = np.array([source.hematoxylin, source.eosin, ERYTHROCYTE])
    amounts = np.array([*source.amounts, source.amounts[1]])
    # Beer-Lambert: light falls off exponentially with the amount of stain (Ruifrok & Johnston 2001, equation 1).
    density = np.einsum("sc,syx->cyx", vectors * amounts[:, None], stains)
    light = np.array(source.white)[:, None, None] * np.exp(-density)
    image = np.clip(light, 0, 1) ** source.gamma
    # Noise of a demosaiced and compressed image is correlated between neighboring pixels.
    image += source.noise * _normal(ndimage.gaussian_filter(rng.normal(size=image.shape), (0.5, 0.5, 0.5)))
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Composition:
    """What a patch consists of; it does not depend on the class.

    Attributes:
        zoom: scale factor of all structures, relative to the sizes in this module.
        lumen, nuclei: shares of the area in (0, 1).
        depth: thickness of the epithelium around a lumen in pixels; 0 is only stroma.
        lymphocytes: share of the nuclei in [0, 1).
        vacuoles, blood: number of vacuoles and of red blood cells.
        basophilia: amount of hematoxylin in the cytoplasm, relative to about 1 in nuclei.
        hematoxylin, eosin: mean amounts of stain; for hematoxylin, per share of the area that nuclei take.
    """

    zoom: float
    lumen: float
    nuclei: float
    depth: float
    lymphocytes: float
    vacuoles: int
    blood: int
    basophilia: float
    hematoxylin: float
    eosin: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Composition:
        zoom = float(np.exp(rng.uniform(np.log(0.85), np.log(1.5))))
        return cls(
            zoom=zoom,
            lumen=rng.choice([0.01, rng.uniform(0.04, 0.3)]),
            nuclei=rng.uniform(0.12, 0.34),
            depth=rng.choice([0.0, 13.0, 18.0, 200.0], p=[0.2, 0.3, 0.2, 0.3]) * zoom,
            lymphocytes=rng.choice([0.0, rng.uniform(0.1, 0.5)], p=[0.6, 0.4]),
            vacuoles=rng.poisson(rng.choice([0, 4], p=[0.65, 0.35])),
            blood=rng.poisson(rng.choice([0, 3], p=[0.7, 0.3])),
            basophilia=rng.uniform(0.05, 0.3),
            hematoxylin=rng.uniform(1.15, 1.75),
            eosin=rng.uniform(0.3, 0.62),
        )


def recolored(structure: Array, colors: Array) -> Array:
    """The `structure` of one tissue with the stain values of another one, `colors`; both are (2, H, W).

    The result is a permutation of the pixels of `colors`: the pixel with the most hematoxylin in `structure` gets the
    one with the most hematoxylin in `colors`, and so on; pixels with about the same hematoxylin are ordered by eosin.
    An exact histogram specification (Coltuc, Bolon & Chassery 2006, "Exact histogram specification", IEEE Trans. Image
    Process. 15(5):1143) in two dimensions.
    """
    target, source = structure.reshape(2, -1), colors.reshape(2, -1)
    result = np.empty_like(target)
    result[:, _ordered(target, len(structure[0]))] = source[:, _ordered(source, len(structure[0]))]
    return result.reshape(structure.shape)


def _ordered(stains: Array, windows: int) -> NDArray[np.intp]:
    """Indices (n,) of the pixels of stains (2, n), by rising hematoxylin and, within each of `windows` equal parts of
    that order, by rising eosin."""
    order = stains[0].argsort(kind="stable").reshape(windows, -1)
    return np.take_along_axis(order, stains[1][order].argsort(axis=1, kind="stable"), axis=1).ravel()


def tissue(rng: np.random.Generator, composition: Composition, *, tumor: bool) -> Array:
    """Draw the amounts of hematoxylin and eosin: float64 (2, 96, 96), zero or more."""
    # One degree of atypia per patch; each trait is loosely correlated with it, so that no single trait decides.
    traits = np.clip((0.78 if tumor else 0.22) + rng.normal(0, 0.10) + rng.normal(0, 0.16, 7), 0, 1)
    size, variety, contour, crowding, disorder, chromatin, architecture = traits
    zoom, depth, share = composition.zoom, composition.depth, composition.nuclei
    warp = 7 * zoom * np.stack([_smooth(rng, 11 * zoom) for _ in range(2)])
    grid = np.mgrid[:SIZE, :SIZE].astype(float)

    # Architecture: the distance to the lumen in pixels, negative inside. Many narrow lumens have the area of one wide.
    lumens = 1 + rng.binomial(5, architecture**2)
    spots = rng.uniform(-20, SIZE + 20, (1, 2)) if lumens == 1 else rng.uniform(0, SIZE, (lumens, 2))
    away = np.min(np.hypot(*(grid + warp * (0.6 + architecture) - spots[:, :, None, None]).swapaxes(0, 1)), axis=0)
    distance = away - np.quantile(away, composition.lumen)
    lumen = _edge(-distance, 1.0)
    epithelium = _edge(depth + 4 * disorder * zoom * _smooth(rng, 6 * zoom) - distance, 1.5) * (1 - lumen)
    fibers, along = _fibers(rng, warp, zoom)

    # Nuclei: points with a minimum distance, in a row at the base of an ordered epithelium.
    radius = 4.6 * zoom * (1 + 0.45 * size)
    count = max(4, int(1.35 * share * SIZE**2 / (np.pi * radius**2)))
    radii = radius * np.exp(rng.normal(0, 0.06 + 0.26 * variety, 400))
    points = rng.uniform(-6, SIZE + 6, (400, 2))
    inside = tuple(np.clip(points, 0, SIZE - 1).astype(int).T)
    cellular = epithelium[inside] > 0.5
    row = np.exp(-(((distance[inside] - 0.65 * min(depth, 18 * zoom)) / (zoom * (2.5 + 14 * disorder))) ** 2))
    wish = np.where(cellular, row + 0.5 * (depth > 100) + 0.05, 0.12) * (distance[inside] > 2)
    kept = _spread(rng, points, radii * (1.22 - 0.42 * crowding), wish, count)
    points, radii, cellular = points[kept], radii[kept], cellular[kept]
    upright = np.arctan2(*(slope[inside][kept] for slope in np.gradient(ndimage.gaussian_filter(distance, 3))))
    # Lymphocytes come in both classes: small, round and dark. A mitosis is a dark, ragged plate.
    n = len(kept)
    immune = rng.random(n) < composition.lymphocytes
    mitosis = (rng.random(n) < (0.05 * chromatin if tumor else 0.0)) & ~immune
    plain = immune | mitosis
    nuclei = _Nuclei(
        points=points,
        radii=np.where(immune, 3.3 * zoom, radii),
        elongation=np.where(immune, 1.05, np.where(cellular, 1.25, 2.1 - 0.6 * disorder))
        * np.exp(rng.normal(0, 0.04 + 0.2 * variety, n)),
        angle=np.where(cellular, upright, along[inside][kept]) + rng.normal(0, 0.15 + 1.2 * disorder, n),
        lobes=rng.normal(0, 1, (2, n)) * (0.015 + 0.075 * contour + 0.12 * mitosis) * ~immune,
        phase=rng.uniform(0, 2 * np.pi, (2, n)),
        darkness=np.where(plain, 1.5, 1.0) * np.exp(rng.normal(0, 0.08 + 0.25 * variety, n)),
        clear=np.where(plain, 0.0, rng.uniform(0.1, 0.3) + 0.45 * chromatin * rng.random(n)),
        nucleolus=np.where(plain, 0.0, 1.2 * chromatin * (rng.random(n) < 0.2 + 0.6 * chromatin)),
    )
    mask, hematoxylin, border = _paint(rng, grid, nuclei, share, 0.10 + 0.35 * chromatin, zoom)

    # Cytoplasm, stroma, and vacuoles.
    fine = _smooth(rng, 1.2 * zoom)
    vacuoles = _discs(rng, composition.vacuoles, 6.5 * zoom) * (1 - mask)
    plasma = 0.55 + 0.09 * fine + 0.22 * border
    eosin = epithelium * plasma + (1 - epithelium) * (1 - lumen) * fibers + 0.05 * lumen
    eosin *= (1 - 0.55 * mask) * (1 - 0.8 * vacuoles)
    basophilia = composition.basophilia
    hematoxylin += (1 - mask) * (1 - lumen) * (1 - vacuoles) * (basophilia * epithelium + 0.05) * (1 + 0.25 * fine)

    hematoxylin *= (share * composition.hematoxylin + 0.6 * basophilia) / hematoxylin.mean()
    eosin *= composition.eosin / eosin.mean()
    return np.clip(np.stack([np.minimum(hematoxylin, 3.2), np.minimum(eosin, 1.6)]), 0, None)


@dataclass(frozen=True)
class _Nuclei:
    """n nuclei: `points` (n, 2) and `radii` in pixels, `angle` in radians, `lobes` and `phase` (2, n) of the contour's
    harmonics, and for each nucleus its darkness, how clear its inside is, and its nucleolus (all about 0..1)."""

    points: Array
    radii: Array
    elongation: Array
    angle: Array
    lobes: Array
    phase: Array
    darkness: Array
    clear: Array
    nucleolus: Array


def _paint(
    rng: np.random.Generator, grid: Array, nuclei: _Nuclei, share: float, coarseness: float, zoom: float
) -> tuple[Array, Array, Array]:
    """Nuclear mask, hematoxylin, and cell borders, each (96, 96); the mask covers about `share` of the area."""
    pixels = grid.reshape(2, -1).T
    near = min(3, len(nuclei.radii))
    gaps, owners = cKDTree(nuclei.points).query(pixels, k=near)
    offset = pixels[:, None] - nuclei.points[owners]
    angle = np.arctan2(offset[..., 0], offset[..., 1]) - nuclei.angle[owners]
    stretch = np.sqrt(nuclei.elongation[owners])
    ring = np.hypot(np.cos(angle) / stretch, np.sin(angle) * stretch)
    contour = 1 + sum(
        nuclei.lobes[k][owners] * np.cos((k + 2) * angle + nuclei.phase[k][owners]) for k in range(len(nuclei.lobes))
    )
    reach = gaps * ring / (nuclei.radii[owners] * contour)  # 1 on the contour of a nucleus
    best = np.argmin(reach, axis=1)
    rows = np.arange(len(pixels))
    reach, owner, offset = reach[rows, best], owners[rows, best], offset[rows, best]
    reach /= np.clip(np.quantile(reach, share), 0.75, 1.3)

    radius = nuclei.radii[owner]
    mask = _edge((1 - reach) * radius, 0.7)
    inner = np.clip((0.92 - reach) * radius / (1.2 * zoom), 0, 1)  # 0 at the rim, 1 a little way inside
    seed = 0.35 * radius[:, None] * np.stack([np.cos(nuclei.phase[0]), np.sin(nuclei.phase[0])], axis=1)[owner]
    spot = np.exp(-np.sum((offset - seed) ** 2, axis=1) / (1.5 * zoom) ** 2)
    inside = 1 - nuclei.clear[owner] * inner + nuclei.nucleolus[owner] * spot * inner
    inside *= 1 + coarseness * np.clip(_smooth(rng, (0.6 + 2 * coarseness) * zoom).ravel(), -1.5, 1.5)
    hematoxylin = mask * nuclei.darkness[owner] * inside
    ordered = np.sort(gaps, axis=1)
    border = np.exp(-((ordered[:, min(1, near - 1)] - ordered[:, 0]) / (1.2 * zoom)))
    shape = (SIZE, SIZE)
    return mask.reshape(shape), hematoxylin.reshape(shape), border.reshape(shape)


def _spread(rng: np.random.Generator, points: Array, radii: Array, wish: Array, count: int) -> NDArray[np.intp]:
    """Indices of up to `count` points, drawn with weights `wish`, no two closer than the sum of their radii."""
    order = np.argsort(-np.log(wish + 1e-12) - rng.gumbel(size=len(wish)))
    order = order[wish[order] > 0]
    free = np.ones(len(points), bool)
    kept: list[int] = []
    for index in order:
        if free[index] and len(kept) < count:
            kept.append(index)
            free &= np.hypot(*(points - points[index]).T) >= radii + radii[index]
    return np.array(kept if len(kept) > 3 else order[:4], dtype=np.intp)


def _fibers(rng: np.random.Generator, warp: Array, zoom: float) -> tuple[Array, Array]:
    """Wavy stroma: its eosin in about 0..1 and the direction of its fibers in radians, both (96, 96)."""
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    grid = np.mgrid[:SIZE, :SIZE].astype(float) + 0.7 * warp
    across, length = np.einsum("ij,jyx->iyx", turn, grid)
    strands = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), (0.9 * zoom, 12 * zoom), mode="wrap")
    texture = ndimage.map_coordinates(_normal(strands), (across, length), order=1, mode="grid-wrap")
    slope_y, slope_x = np.gradient(across)
    return np.clip(0.6 + rng.uniform(0.1, 0.28) * texture, 0.05, None), np.arctan2(slope_x, -slope_y)


def _discs(rng: np.random.Generator, count: int, radius: float) -> Array:
    """A soft mask (96, 96) of `count` discs in a cluster."""
    if count == 0:
        return np.zeros((SIZE, SIZE))
    centers = rng.uniform(0, SIZE, 2) + rng.normal(0, 2.2 * radius, (count, 2))
    radii = radius * np.exp(rng.normal(0, 0.2, count))
    grid = np.mgrid[:SIZE, :SIZE].astype(float)
    away = np.hypot(*(grid[:, None] - centers.T[:, :, None, None]))
    return _edge(np.max(radii[:, None, None] - away, axis=0), 0.8)


def _focus(rng: np.random.Generator, blur: float) -> float:
    """Standard deviation of a patch's point spread in pixels: that of the scanner; one patch in eight is defocused."""
    return float(blur * np.exp(rng.normal(0, 0.2)) + rng.choice([0.0, rng.uniform(0.6, 2.0)], p=[0.88, 0.12]))


def _smooth(rng: np.random.Generator, scale: float) -> Array:
    """Gaussian noise (96, 96) of zero mean and unit variance with structure of `scale` pixels."""
    return _normal(ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), scale, mode="wrap"))


def _normal(values: Array) -> Array:
    return (values - values.mean()) / values.std()


def _edge(inside: Array, width: float) -> Array:
    """A soft step: 1 where `inside` is positive, 0 where negative, with an edge of about `width`."""
    return 1 / (1 + np.exp(np.clip(-inside / (0.5 * width), -50, 50)))


def generate(directory: str | Path, *, seed: int = 0, train: int = 1200, val: int = 400, test: int = 600) -> None:
    """Write `train.h5`, `val.h5` and `test.h5` with that many patches into the new folder `directory`.

    Each file holds one group per image ("0", "1", ...): `img` uint8 (3, 96, 96), `label` int64 () with 0 for normal and
    1 for tumor, and `metadata` int64 (3,) with center, slide and label. The images of a center are consecutive pairs
    (see `pair`), with up to 20 patches per slide; no slide is in two splits. The same seed gives the same arrays, and a
    larger split starts with the images of a smaller one.

    Raises `HistoError` if a size is not positive or the folder exists.
    """
    directory = Path(directory)
    sizes = {"train": train, "val": val, "test": test}
    for name, size in sizes.items():
        if size < 1:
            raise HistoError(f"{name}={size}: expected at least 1 image; pass a positive number")
    if directory.exists():
        raise HistoError(f"directory={directory}: exists, expected a new folder; remove it or choose another")
    with (
        atomic_folder(directory) as folder,
        tqdm(total=sum(sizes.values()), unit="patch", desc="synthetic tissue") as progress,
    ):
        for name, centers in SPLITS.items():
            with h5py.File(folder / f"{name}.h5", "w") as file:
                pairs = {}
                for index in range(sizes[name]):
                    turn, place = divmod(index, len(centers))
                    center, label = centers[place], turn % 2
                    number = turn // PATCHES_PER_SLIDE
                    # Each slide and pair has its own seed, so that it does not depend on what was drawn before.
                    if label == 0:
                        source = slide(np.random.default_rng([seed, center, number]), center)
                        pairs[center] = pair(np.random.default_rng([seed, center, number, turn]), source)
                    group = file.create_group(str(index))
                    group["img"] = pairs[center][label]
                    group["label"] = np.int64(label)
                    group["metadata"] = np.array([center, 1000 * center + number, label], dtype=np.int64)
                    progress.update()
