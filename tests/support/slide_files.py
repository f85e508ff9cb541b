"""Small slides in the real formats, and annotations as QuPath exports them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_histo.data.synthetic import slides

GLASS = 240


def pixels(height: int = 512, width: int = 640, seed: int = 0) -> np.ndarray:
    """Glass with a block of colored noise, of tissue's saturation, 64 pixels from each edge; uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), GLASS, np.uint8)
    image[64:-64, 64:-64] = rng.integers([120, 40, 120], [200, 120, 200], (height - 128, width - 128, 3))
    return image


def square(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    """The ring of a rectangle."""
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(name: str | None, *rings: Any, kind: str = "Polygon") -> dict[str, Any]:
    """An annotation of QuPath with the class `name`."""
    properties = {"objectType": "annotation"} | ({"classification": {"name": name, "color": [0, 0, 9]}} if name else {})
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": list(rings)},
        "properties": properties,
    }


def write_geojson(path: Path, features: Sequence[Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    return path


def write_slides(folder: Path, count: int = 6) -> Path:
    """`slides.csv` with slides of two centers and of a patient each, annotated as "normal" (left) and "tumor" (right).

    Every third slide has no annotations, and the label "normal".
    """
    folder.mkdir()
    rows = ["slide,label,patient,center"]
    for number in range(count):
        slides.write_tiff(folder / f"s{number}.tif", pixels(seed=number))
        annotated = number % 3 < 2
        if annotated:
            regions = [feature("normal", square(64, 64, 320, 448)), feature("tumor", square(320, 64, 576, 448))]
            write_geojson(folder / f"s{number}.geojson", regions)
        rows.append(f"s{number}.tif,{'' if annotated else 'normal'},p{number},{'AB'[number % 2]}")
    (folder / "slides.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "slides.csv"


def write_sparse(path: Path, side: int, share: float) -> Path:
    """A slide of `side` pixels, with a disk of noise of tissue's saturation on that share of it, and nothing else."""
    noise = np.random.default_rng(0).integers([120, 40, 120], [200, 120, 200], (slides.TILE, slides.TILE, 3), np.uint8)
    shapes = [(side, side)]
    while shapes[-1][0] > slides.TILE:
        shapes.append((shapes[-1][0] // 2,) * 2)

    def tile_at(level: int, row: int, column: int) -> np.ndarray | None:
        y, x = ((place + 0.5) * slides.TILE / shapes[level][0] - 0.5 for place in (row, column))
        return noise if np.pi * (x**2 + y**2) <= share else None

    slides.write_tiles(path, shapes, tile_at)
    return path
