"""The generator of slides: annotations and table, formats, and the same slides by the same seed."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile

from hf_histo.data.readers import geojson
from hf_histo.data.readers.slides import grid, open_slide, read_patch
from hf_histo.data.synthetic import slides, tissue
from hf_histo.errors import HistoError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generated") / "slides"
    slides.generate(directory, slides_per_center=2, cells=3)
    return directory


def test_the_table_and_the_annotations(folder: Path) -> None:
    with (folder / "slides.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert {(row["center"], row["split"]) for row in rows} == {
        (str(center), split) for split, centers in tissue.SPLITS.items() for center in centers
    }
    for row in rows:
        path = folder / row["slide"]
        assert (geojson.beside(path) is not None) is (row["label"] == "tumor")
        slide = open_slide(path)
        assert (slide.width, slide.height, slide.mpp) == (288, 288, 0.5)


def test_annotations_are_where_the_tissue_is(folder: Path) -> None:
    path = folder / "center0_slide0.tif"
    section = slides.draw(np.random.default_rng([0, 0, 0]), 0, cells=3)
    slide = open_slide(path)
    assert (read_patch(slide, 0, 0, 288, 288) == section.image).all()  # and the same seed gives the same slide
    regions = geojson.read(path.with_suffix(".geojson"), slide)
    every = grid(slide, patch_size=96, min_tissue=0)
    shares = geojson.covered(regions, every.corners, every.size)
    expected = np.stack([section.labels.ravel() == label for label in (0, 1)], axis=1)
    assert (shares == expected).all()
    found = grid(slide, patch_size=96).corners // 96
    assert {tuple(place) for place in found} == {tuple(place[::-1]) for place in np.argwhere(section.labels >= 0)}


def test_repeated_tiles_take_no_room_and_missing_ones_none(tmp_path: Path) -> None:
    tile = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for ome in (False, True):
        path = tmp_path / ("many.ome.tif" if ome else "many.tif")
        slides.write_tiles(path, [(2560, 2560), (640, 640)], lambda level, row, column: tile if row else None, ome=ome)
        assert path.stat().st_size < 3 * tile.nbytes
        slide = open_slide(path)
        assert slide.downsamples == (1, 4)
        assert (read_patch(slide, 1024, 2048, 256, 256) == tile).all()
        if not ome:
            assert (read_patch(slide, 0, 0, 256, 256) == 255).all()


def test_the_formats_are_what_they_claim(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 520, 3), dtype=np.uint8)
    slides.write_tiff(tmp_path / "a.ome.tif", image, ome=True)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        assert file.is_ome
        assert [level.shape for level in file.series[0].levels] == [(300, 520, 3), (150, 260, 3), (75, 130, 3)]
    smooth = np.repeat(np.repeat(image[::20, ::20], 20, axis=0), 20, axis=1)
    slides.write_tiff(tmp_path / "a.tif", smooth, quality=95)
    found = read_patch(open_slide(tmp_path / "a.tif"), 0, 0, 256, 256)
    assert np.abs(found.astype(int) - smooth[:256, :256]).mean() < 5
    slides.write_dicom(tmp_path / "dicom", image, mpp=0.25)
    first = pydicom.dcmread(tmp_path / "dicom" / "level0.dcm")
    assert (first.TotalPixelMatrixRows, first.TotalPixelMatrixColumns, first.NumberOfFrames) == (300, 520, 6)
    assert first.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [0.00025, 0.00025]


def test_dicom_is_read_by_another_library_as_well(tmp_path: Path) -> None:
    wsidicom = pytest.importorskip("wsidicom", reason="wsidicom is not installed")
    image = np.random.default_rng(0).integers(0, 256, (300, 520, 3), dtype=np.uint8)
    slides.write_dicom(tmp_path / "dicom", image, mpp=0.25)
    with wsidicom.WsiDicom.open(tmp_path / "dicom") as slide:
        assert (np.asarray(slide.read_region((40, 20), 0, (200, 100)))[..., :3] == image[20:120, 40:240]).all()
        assert slide.mpp.width == pytest.approx(0.25)


def test_invalid_calls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HistoError, match=r"kind=svs: expected one of tiff"):
        slides.generate(tmp_path / "new", kind="svs")
    with pytest.raises(HistoError, match="cells=0: expected at least 1"):
        slides.generate(tmp_path / "new", cells=0)
    with pytest.raises(HistoError, match="exists, expected a new folder"):
        slides.generate(tmp_path)


def test_a_few_patches_of_tumor_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = np.zeros((3, tissue.SIZE, tissue.SIZE), np.uint8)
    monkeypatch.setattr(tissue, "pair", lambda rng, source: (patch, patch))  # takes most of the time
    for seed in range(5):
        labels = slides.draw(np.random.default_rng(seed), 1, cells=6, tumor_patches=2).labels
        first, second = np.argwhere(labels == 1)
        assert np.abs(first - second).sum() <= 2
        assert (labels == 0).sum() > 10
        assert not (
            slides.draw(np.random.default_rng(seed), 1, cells=6, tumor=False, tumor_patches=2).labels == 1
        ).any()
