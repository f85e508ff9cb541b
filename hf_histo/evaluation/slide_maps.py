"""Predictions of a slide's tiles as one map: overlapping tiles averaged, areas by class, and objects for QuPath."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from scipy import ndimage

from hf_histo.data.readers import geojson
from hf_histo.data.readers.slides import Grid
from hf_histo.evaluation.figures.style import COLORS
from hf_histo.evaluation.predictions import decided
from hf_histo.files import atomic_file

NOWHERE = -1  # of `SlideMap.classes`: no tile


@dataclass(frozen=True)
class SlideMap:
    """Class probabilities of the places of a slide.

    Attributes:
        probabilities: float64 (rows, columns, K), the mean over the tiles that cover a place; NaN without one.
        classes: int64 (rows, columns), the class that the mean decides for, `NOWHERE` without a tile.
        cell: side of a place in pixels of level 0.
        mpp: micrometers per pixel of level 0.
    """

    probabilities: NDArray[np.float64]
    classes: NDArray[np.int64]
    cell: float
    mpp: float

    @property
    def cell_area(self) -> float:
        """Of a place, in mm²."""
        return (self.cell * self.mpp / 1000) ** 2

    def at(self, shape: tuple[int, int], scale: float) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
        """Row (h, w) and column (h, w) of the place under each pixel of an overview, and whether there is a tile.

        `shape` is (h, w) of the overview, `scale` its pixels of level 0 per pixel.
        """
        places = [((np.arange(length) + 0.5) * scale / self.cell).astype(np.intp) for length in shape]
        known = [of < length for of, length in zip(places, self.classes.shape, strict=True)]
        rows, columns = np.meshgrid(
            *(np.minimum(of, length - 1) for of, length in zip(places, self.classes.shape, strict=True)), indexing="ij"
        )
        inside = known[0][:, None] & known[1][None, :] & (self.classes[rows, columns] != NOWHERE)
        return rows, columns, inside


def slide_map(grid: Grid, probabilities: NDArray[np.float64], threshold: float) -> SlideMap:
    """The map of a slide's tiles by their probabilities (n, K); the tile size is a multiple of the grid's step."""
    overlap = round(grid.size / grid.step)
    columns, rows = np.rint(grid.corners / grid.step).astype(np.intp).T
    shape = rows.max() + overlap, columns.max() + overlap
    sums, counts = np.zeros((*shape, probabilities.shape[1])), np.zeros(shape)
    for down in range(overlap):
        for right in range(overlap):  # places differ within one shift, so that none is added twice at once
            sums[rows + down, columns + right] += probabilities
            counts[rows + down, columns + right] += 1
    with np.errstate(invalid="ignore"):
        means = sums / counts[..., None]
    classes = np.where(counts > 0, decided(means, threshold), NOWHERE)
    return SlideMap(means, classes, grid.step, grid.mpp)


def scores(
    found: SlideMap, probabilities: NDArray[np.float64], label_names: Sequence[str], top_k: int
) -> dict[str, float | int]:
    """Scores of a slide: number of tiles, and of each class the mean, that of the largest `top_k`, and the area in mm².

    Means are of the tiles' probabilities (n, K); the area is that of the places where the map decides for the class.
    """
    values: dict[str, float | int] = {"tiles": len(probabilities)}
    for place, name in enumerate(label_names):
        largest = np.sort(probabilities[:, place])[-top_k:]
        values[f"mean_{name}"] = float(probabilities[:, place].mean())
        values[f"top{top_k}_{name}"] = float(largest.mean())
        values[f"area_mm2_{name}"] = float((found.classes == place).sum() * found.cell_area)
    return values


def color_of(place: int) -> str:
    """Color of a class in heat maps and GeoJSON."""
    return COLORS[place % len(COLORS)]


def tiles(
    grid: Grid,
    probabilities: NDArray[np.float64],
    classes: NDArray[np.int64],
    label_names: Sequence[str],
    attention: NDArray[np.float64] | None = None,
) -> Iterator[dict[str, Any]]:
    """A GeoJSON feature for each tile, with its class, probabilities and, if given, attention (n,)."""
    for number, (corner, row, chosen) in enumerate(zip(grid.corners, probabilities, classes, strict=True)):
        left, top = corner.tolist()  # not of all tiles at once, which takes hundreds of MB
        right, bottom = left + grid.size, top + grid.size
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        measured = {f"probability {name}": value for name, value in zip(label_names, row.tolist(), strict=True)}
        if attention is not None:
            measured["attention"] = float(attention[number])
        yield _feature({"type": "Polygon", "coordinates": [ring]}, "tile", chosen, label_names, measured)


def regions(found: SlideMap, label_names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A GeoJSON feature for each connected region of a class, with its area in mm² and mean probability of the class.

    Places that share a side are connected.
    """
    import shapely

    edges = [np.rint(found.cell * np.arange(length + 1)) for length in found.classes.shape]
    for place, name in enumerate(label_names):
        labels, _ = ndimage.label(found.classes == place)
        for number, part in enumerate(ndimage.find_objects(labels), 1):
            is_in = labels[part] == number
            down, right = np.nonzero(is_in)
            down, right = down + part[0].start, right + part[1].start
            boxes = shapely.box(edges[1][right], edges[0][down], edges[1][right + 1], edges[0][down + 1])
            region = shapely.coverage_union_all(boxes)
            measured = {
                "area mm^2": float(is_in.sum() * found.cell_area),
                f"mean probability {name}": float(found.probabilities[down, right, place].mean()),
            }
            yield _feature(shapely.geometry.mapping(region), "annotation", place, label_names, measured)


def write_geojson(path: Path, features: Iterable[Mapping[str, Any]]) -> None:
    """Write features as a GeoJSON FeatureCollection (RFC 7946), one by one."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(features):
            file.write(f"{',' if number else ''}\n{json.dumps(feature, allow_nan=False)}")
        file.write("\n]}\n")


def _feature(
    geometry: Mapping[str, Any], kind: str, place: int, label_names: Sequence[str], measured: Mapping[str, float]
) -> dict[str, Any]:
    """An object of a class, in its color, with its measurements."""
    color = [round(255 * part) for part in to_rgb(color_of(place))]
    return geojson.feature(geometry, label_names[place], color, kind=kind, measurements=measured)
