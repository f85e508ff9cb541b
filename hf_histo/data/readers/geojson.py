"""Regions of a slide by class: annotations of QuPath in GeoJSON (RFC 7946), and how much of each patch they cover."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_histo.data.readers.slides import Slide, name_of
from hf_histo.errors import HistoError
from hf_histo.files import regular

logger = logging.getLogger(__name__)

LARGEST = 2**28  # bytes of a file
OUTSIDE = 0.01  # share of a region outside its slide above which there is a warning
REMEDY = "export it again from QuPath (File, Export objects as GeoJSON)"

Regions = Mapping[str, Any]  # a shapely Polygon or MultiPolygon for each class


def beside(slide: Path) -> Path | None:
    """The GeoJSON file beside a slide, of the same name, with or without the slide's suffix; None if there is none."""
    names = (f"{slide.name}.geojson", f"{name_of(slide.name)}.geojson")
    return next((slide.with_name(name) for name in names if slide.with_name(name).is_file()), None)


def classes(path: Path) -> list[str]:
    """Names of the classes of a file's polygons, sorted. Raises HistoError as `read` does for a file it can't parse."""
    return sorted({name for _, name, _ in _polygons(path, warn=False)})


def read(path: Path, slide: Slide) -> Regions:
    """The regions of each class, in pixels of level 0; regions of one class are united.

    A file holds a FeatureCollection, a list of features, or one feature, with polygons (also with holes) or
    multipolygons, and the class in `properties.classification.name`. As in QuPath, classes whose names end in "*" are
    for the display only, and ignored. Objects without a class, and points and lines, are left out with a warning.
    Polygons that intersect themselves are repaired by shapely's `make_valid`, with a warning.

    Raises HistoError, naming the file, for one that is no GeoJSON, and naming the object, for one with invalid
    coordinates or outside the slide.
    """
    shapely = _shapely()
    whole = shapely.box(0, 0, slide.width, slide.height)
    found: dict[str, list[Any]] = {}
    repaired = clipped = 0
    for where, name, region in _polygons(path):
        if not region.is_valid:
            repaired += 1
            region = shapely.make_valid(region, method="structure", keep_collapsed=False)
        inside = region.intersection(whole)
        if not region.area or not inside.area:
            raise HistoError(
                f"{where}: {'empty' if not region.area else f'outside the slide, which has {slide.width:,} x '}"
                f"{f'{slide.height:,} pixels' if region.area else ''}, expected a region of it; give the slide's own "
                "annotations, in pixels"
            )
        clipped += inside.area < (1 - OUTSIDE) * region.area
        found.setdefault(name, []).append(inside)
    if repaired:
        logger.warning("%s: %d polygons intersect themselves, and were repaired (make_valid)", path, repaired)
    if clipped:
        logger.warning("%s: %d regions reach beyond the slide, and were cut at its edge", path, clipped)
    return {name: shapely.unary_union(regions) for name, regions in sorted(found.items())}


def covered(regions: Regions, corners: NDArray[np.int64], size: float) -> NDArray[np.float64]:
    """Share of each square that the regions of each class cover: (n, classes) in [0, 1], classes as in `regions`."""
    shapely = _shapely()
    left, top = corners.T
    squares = shapely.box(left, top, left + size, top + size)
    shares = np.zeros((len(corners), len(regions)))
    for place, region in enumerate(regions.values()):
        shapely.prepare(region)
        shares[:, place] = shapely.contains(region, squares)
        edge = shapely.intersects(region, squares) & (shares[:, place] == 0)
        shares[edge, place] = shapely.area(shapely.intersection(region, squares[edge])) / size**2
    return shares


def feature(
    geometry: Mapping[str, Any],
    name: str,
    color: Sequence[int],
    *,
    kind: str = "annotation",
    measurements: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """An object as QuPath 0.4 and later exports it: a geometry, its class `name` and `color` (red, green, blue)."""
    properties: dict[str, Any] = {"objectType": kind, "classification": {"name": name, "color": list(color)}}
    if measurements is not None:
        properties["measurements"] = dict(measurements)
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def _polygons(path: Path, warn: bool = True) -> Iterator[tuple[str, str, Any]]:
    """Name of each object for errors, its class, and its polygon or multipolygon."""
    shapely = _shapely()
    left_out: Counter[str] = Counter()
    for number, feature in enumerate(_features(path), 1):
        where = f"{path}, object {number}"
        if not isinstance(feature, dict):
            raise HistoError(f"{where}: {str(feature)[:50]!r}, expected a feature of GeoJSON; {REMEDY}")
        geometry, name = feature.get("geometry"), _class_of(feature)
        kind = geometry.get("type") if isinstance(geometry, dict) else None
        if kind not in ("Polygon", "MultiPolygon"):
            left_out[f"{kind or 'no geometry'}"] += 1
        elif not name:
            left_out["no class"] += 1
        elif not name.endswith("*"):
            try:
                region = shapely.geometry.shape(geometry)
                if not np.isfinite(region.bounds).all():
                    raise ValueError("coordinates that are no numbers")
            except Exception as error:  # shapely raises many kinds for coordinates of another shape
                raise HistoError(f"{where}: not a polygon ({str(error)[:100]}), expected one; {REMEDY}") from None
            yield where, name, region
    if left_out and warn:
        found = ", ".join(f"{count} with {what}" for what, count in sorted(left_out.items()))
        logger.warning("%s: left out objects that are no polygon of a class: %s", path, found)


def _features(path: Path) -> list[Any]:
    try:
        if regular(path).stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST // 2**20} MiB")
        content = json.loads(path.read_bytes(), parse_constant=_refused)
    except FileNotFoundError:
        raise HistoError(f"{path}: no such file, expected annotations; correct the path, or leave it blank") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HistoError(f"{path}: not readable GeoJSON ({str(error)[:100]}), expected annotations; {REMEDY}") from None
    if isinstance(content, list):
        return content
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "Feature":
        return [content]
    if kind == "FeatureCollection" and isinstance(content.get("features"), list):
        features: list[Any] = content["features"]
        return features
    raise HistoError(f"{path}: no features of GeoJSON, expected a FeatureCollection or a list of features; {REMEDY}")


def _refused(text: str) -> None:
    raise ValueError(f"{text}, which is no number")


def _class_of(feature: Mapping[str, Any]) -> str:
    """The class of an object as QuPath writes it, "" where it has none."""
    properties = feature.get("properties")
    found = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(found, dict):
        names = found.get("names")
        found = found.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else None)
    return found.strip() if isinstance(found, str) else ""


def _shapely() -> Any:
    try:
        import shapely
    except ImportError:
        raise HistoError("annotations need shapely: pip install 'hf_histo[slides]'") from None
    return shapely
