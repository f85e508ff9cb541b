"""Annotations of QuPath: classes, shapes, faults, and how much of a patch they cover."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slide_files import feature, square, write_geojson

from hf_histo.data.readers import geojson
from hf_histo.data.readers.slides import Slide
from hf_histo.errors import HistoError

SLIDE = Slide(Path("slide.tif"), 400, 300, 0.5, (1.0,), None)
CORNERS = np.array([[0, 0], [100, 0], [200, 0], [300, 0]])


def regions(folder: Path, *features: Any) -> geojson.Regions:
    return geojson.read(write_geojson(folder / "a.geojson", features), SLIDE)


def test_polygons_with_holes_and_multipolygons(tmp_path: Path) -> None:
    found = regions(
        tmp_path,
        feature("Tumor", square(0, 0, 100, 100), square(25, 25, 75, 75)),
        feature("Tumor", square(50, 50, 75, 75)),  # in the hole
        feature("Stroma", [square(100, 0, 150, 100)], [square(200, 0, 300, 10)], kind="MultiPolygon"),
    )
    assert list(found) == ["Stroma", "Tumor"]
    assert geojson.covered(found, CORNERS, 100).tolist() == [[0, 0.8125], [0.5, 0], [0.1, 0], [0, 0]]


def test_all_forms_of_a_file(tmp_path: Path) -> None:
    one = feature("Tumor", square(0, 0, 100, 100))
    path = tmp_path / "a.geojson"
    for content in (one, [one], {"type": "FeatureCollection", "features": [one]}):
        path.write_text(json.dumps(content), encoding="utf-8")
        assert geojson.classes(path) == ["Tumor"]
    derived = one | {"properties": {"classification": {"names": ["Tumor", "Positive"]}}}
    assert geojson.classes(write_geojson(path, [derived])) == ["Tumor: Positive"]


def test_what_is_no_region_of_a_class_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = regions(
        tmp_path,
        feature("Tumor", square(0, 0, 100, 100)),
        feature("Ignore*", square(0, 0, 100, 100)),
        feature(None, square(0, 0, 100, 100)),
        feature("Tumor", [1, 2], kind="LineString"),
        {"type": "Feature", "geometry": None, "properties": None},
    )
    assert list(found) == ["Tumor"]
    assert "1 with LineString, 1 with no class, 1 with no geometry" in caplog.text


def test_self_intersection_is_repaired_and_an_edge_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bow_tie = [[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]
        found = regions(tmp_path, feature("a", bow_tie), feature("b", square(300, 200, 500, 400)))
    assert geojson.covered(found, CORNERS[:1], 100)[0, 0] == pytest.approx(0.5)
    assert found["b"].bounds == (300, 200, 400, 300)
    assert "1 polygons intersect themselves, and were repaired" in caplog.text
    assert "1 regions reach beyond the slide, and were cut" in caplog.text


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (feature("a", square(500, 0, 600, 100)), "object 2: outside the slide, which has 400 x 300 pixels"),
        (feature("a", [[0, 0], [10, 0], [20, 0], [0, 0]]), "object 2: empty"),
        (feature("a", [[0, 0], [1, 1]]), "object 2: not a polygon"),
        (feature("a", [["x", 0], [1, 1], [2, 0]]), "object 2: not a polygon"),
        (feature("a", square(0, 0, 10**400, 1)), "object 2: not a polygon"),
        ("text", "object 2: 'text', expected a feature"),
    ],
)
def test_invalid_regions_are_named(tmp_path: Path, bad: Any, message: str) -> None:
    with pytest.raises(HistoError, match=rf"a\.geojson, {message}"):
        regions(tmp_path, feature("a", square(0, 0, 9, 9)), bad)


@pytest.mark.parametrize(
    "text", ["", "{", "[NaN]", "[" * 100_000, '{"type": "Polygon"}', "3", '{"type": "FeatureCollection"}']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.geojson").write_text(text, encoding="utf-8")
    with pytest.raises(HistoError, match=r"a\.geojson: (not readable GeoJSON|no features of GeoJSON)"):
        geojson.classes(tmp_path / "a.geojson")


def test_the_file_beside_a_slide(tmp_path: Path) -> None:
    assert geojson.beside(tmp_path / "s.ome.tif") is None
    for name in ("s.geojson", "s.ome.tif.geojson"):
        (tmp_path / name).touch()
        assert geojson.beside(tmp_path / "s.ome.tif") == tmp_path / name
