"""Slides at a physical resolution: formats, levels, tissue, the grid of patches, and faults of files."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import slide_files
import tifffile

from hf_histo.data.readers import slides
from hf_histo.data.synthetic.slides import write_dicom, write_tiff, write_tiles
from hf_histo.errors import HistoError


def write(folder: Path, kind: str, image: np.ndarray, mpp: float = 0.5) -> Path:
    if kind == "dicom":
        write_dicom(folder / "dicom", image, mpp=mpp)
        return folder / "dicom"
    if kind == "svs":
        write_svs(folder / "slide.svs", image, mpp)
        return folder / "slide.svs"
    path = folder / ("slide.ome.tif" if kind == "ome-tiff" else "slide.tif")
    write_tiff(path, image, mpp=mpp, ome=kind == "ome-tiff")
    return path


def write_svs(path: Path, image: np.ndarray, mpp: float) -> None:
    """Levels in tiles and a thumbnail in strips, with the descriptions of Aperio's scanners, which state the mpp."""
    height, width = image.shape[:2]
    about = f"Aperio Image Library v12.0.15\r\n{width}x{height} [0,0 {width}x{height}] (240x240) JPEG/RGB Q=70"
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2, 4):
            level = f"{about}|AppMag = 20|MPP = {mpp}" if step == 1 else f"{about} -> {width // step}x{height // step}"
            pixels = image[::step, ::step][: height // step, : width // step]
            file.write(pixels, tile=(240, 240), photometric="rgb", compression="zlib", description=level, metadata=None)
            if step == 1:
                small = {"photometric": "rgb", "rowsperstrip": 16, "metadata": None}
                file.write(image[::8, ::8], description=f"{about} -> thumbnail", **small)


def noise(height: int = 300, width: int = 520) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["tiff", "ome-tiff", "dicom", "svs"])
def test_patches_have_the_pixels_of_the_file(tmp_path: Path, kind: str) -> None:
    image = noise()
    slide = slides.open_slide(write(tmp_path, kind, image))
    assert (slide.width, slide.height) == (520, 300)
    assert slide.mpp == pytest.approx(0.5, rel=1e-6)
    assert slide.downsamples == pytest.approx([1, 2, 4], rel=0.01)
    grid = slides.grid(slide, patch_size=96, min_tissue=0)
    assert grid.size == grid.step == 96
    assert grid.corners.tolist() == [[x, y] for y in (0, 96, 192) for x in (0, 96, 192, 288, 384)]
    for x, y in grid.corners:
        patch = slides.read_patch(slide, x, y, grid.size, grid.pixels)
        assert patch.dtype == np.uint8
        assert (patch == image[y : y + 96, x : x + 96]).all()


def test_a_level_of_the_wanted_resolution_is_read_as_it_is(tmp_path: Path) -> None:
    image = noise(512, 512)
    slide = slides.open_slide(write(tmp_path, "tiff", image))
    grid = slides.grid(slide, mpp=1.003, patch_size=64, min_tissue=0)  # within a percent of the second level
    assert grid.size == 128
    half = (image.reshape(256, 2, 256, 2, 3).mean(axis=(1, 3)) + 0.5).astype(np.uint8)
    assert (slides.read_patch(slide, 128, 256, grid.size, 64) == half[128:192, 64:128]).all()


def test_other_resolutions_are_resampled_from_the_next_finer_level(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.rint((np.arange(512) + 0.5) / 4)[None, :, None], (512, 512, 3))
    slide = slides.open_slide(write(tmp_path, "tiff", ramp.astype(np.uint8)))
    for mpp in (0.8, 1.5, 0.47):
        grid = slides.grid(slide, mpp=mpp, patch_size=64, stride=32, min_tissue=0)
        assert grid.size == pytest.approx(64 * mpp / 0.5)
        assert grid.step == pytest.approx(grid.size / 2)
        for x, y in grid.corners[[0, 1, -1]]:
            expected = (x + (np.arange(64) + 0.5) * mpp / 0.5) / 4
            found = slides.read_patch(slide, x, y, grid.size, 64)
            assert found.shape == (64, 64, 3)
            assert np.abs(found - expected[None, :, None]).max() < 1.3


def test_a_grid_covers_the_tissue_alone(tmp_path: Path) -> None:
    slide = slides.open_slide(write(tmp_path, "tiff", slide_files.pixels()))
    corners = slides.grid(slide, patch_size=64).corners.tolist()
    assert corners == [[x, y] for y in range(64, 448, 64) for x in range(64, 576, 64)]
    assert len(slides.grid(slide, patch_size=64, min_tissue=0).corners) == 80
    half = slides.grid(slide, patch_size=64, stride=32, min_tissue=0.6).corners
    assert half.min(axis=0).tolist() == [64, 64]  # one that is half on glass is left out
    assert half.max(axis=0).tolist() == [512, 384]


def test_a_slide_that_is_all_glass_or_smaller_than_a_patch_has_no_patches(tmp_path: Path) -> None:
    glass = np.random.default_rng(0).normal([232, 226, 235], 3, (512, 512, 3)).astype(np.uint8)
    slide = slides.open_slide(write(tmp_path, "tiff", glass))
    assert len(slides.grid(slide, patch_size=64).corners) == 0
    assert len(slides.grid(slide, patch_size=1024, min_tissue=0).corners) == 0


def test_what_was_not_scanned_is_white_and_no_tissue(tmp_path: Path) -> None:
    tile = noise(256, 256)
    shapes = [(100_096, 100_096), (6_256, 6_256), (391, 391)]
    path = tmp_path / "sparse.tif"
    write_tiles(path, shapes, lambda level, row, column: tile if row == column == 7 >> (4 * level) else None)
    assert path.stat().st_size < 4e6
    slide = slides.open_slide(path)
    assert (slide.width, slide.height) == shapes[0]
    assert (slides.read_patch(slide, 7 * 256, 7 * 256, 256, 256) == tile).all()
    assert (slides.read_patch(slide, 50_000, 50_000, 256, 256) == 255).all()
    assert (slides.read_patch(slide, 50_000, 50_000, 300, 256) == 255).all()
    edge = slides.read_patch(slide, 6.5 * 256, 7 * 256, 256, 128)  # its left half was not scanned
    assert (edge[:, :63] == 255).all()
    assert edge[:, 65:].mean() == pytest.approx(tile[:, :128].mean(), abs=1)


def test_the_resolution_must_be_known(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "bare.tif", noise(), tile=(256, 256), photometric="rgb", compression="zlib")
    slide = slides.open_slide(tmp_path / "bare.tif")
    with pytest.raises(HistoError, match=r"bare.tif: states no micrometers per pixel.*--assume_mpp"):
        slides.grid(slide)
    grid = slides.grid(slide, mpp=0.5, patch_size=64, min_tissue=0, assume_mpp=0.25)
    assert (grid.size, grid.mpp) == (128, 0.25)


def test_a_coarser_slide_is_refused(tmp_path: Path) -> None:
    slide = slides.open_slide(write(tmp_path, "tiff", noise(), mpp=0.52))
    assert slides.grid(slide, patch_size=64, min_tissue=0).size == pytest.approx(64 * 0.5 / 0.52)
    coarse = slides.open_slide(write(tmp_path, "dicom", noise(), mpp=1.0))
    with pytest.raises(HistoError, match=r"1 micrometers per pixel, expected 0.5 or less"):
        slides.grid(coarse)


def test_damaged_and_other_files_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path, "tiff", noise()).read_bytes()
    for name, data in {
        "start.tif": whole[:100],
        "half.tif": whole[: len(whole) // 2],
        "end.tif": whole[:-10],
        "text.svs": b"no slide",
        "empty.ndpi": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(HistoError, match=name):
            slide = slides.open_slide(tmp_path / name)
            slides.read_patch(slide, 0, 0, 300, 300)
    with pytest.raises(HistoError, match=r"none\.tif: no such file"):
        slides.open_slide(tmp_path / "none.tif")
    with pytest.raises(HistoError, match="a folder without DICOM files"):
        slides.open_slide(tmp_path)


def test_a_damaged_tile_is_named_and_other_slides_stay_readable(tmp_path: Path) -> None:
    path = write(tmp_path, "tiff", noise())
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[1]
    data = bytearray(path.read_bytes())
    data[start : start + 1000] = bytes(1000)
    path.write_bytes(data)
    slide = slides.open_slide(path)
    with pytest.raises(HistoError, match=r"slide.tif: unreadable at x=256, y=0"):
        slides.read_patch(slide, 256, 0, 64, 64)
    assert slides.read_patch(slides.open_slide(path), 0, 0, 64, 64).shape == (64, 64, 3)  # not latched


def test_a_slide_that_was_replaced_is_opened_anew(tmp_path: Path) -> None:
    slides.open_slide(write(tmp_path, "tiff", noise()))
    assert slides.open_slide(write(tmp_path, "tiff", noise(400, 400))).width == 400


def _first_patch(path: Path) -> bytes:
    return slides.read_patch(slides.open_slide(path), 0, 0, 64, 64).tobytes()


def test_forked_processes_open_slides_themselves(tmp_path: Path) -> None:
    path = write(tmp_path, "tiff", noise())
    own, expected = slides.open_slide(path), _first_patch(path)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_first_patch, [path] * 8) == [expected] * 8
    assert slides.open_slide(path) is own


def test_a_reference_names_a_patch(tmp_path: Path) -> None:
    path = write(tmp_path, "tiff", noise())
    text = slides.reference(path, 32, 64, 100.5, 64)
    assert slides.pixels_of(text) == 64
    expected = slides.read_patch(slides.open_slide(path), 32, 64, 100.5, 64)
    assert (slides.read_reference(text) == expected).all()
    assert not slides.is_reference("/etc/passwd")
    with pytest.raises(HistoError, match="expected its bytes, or a patch of a slide"):
        slides.read_reference("/etc/passwd")


def test_files_of_a_slide(tmp_path: Path) -> None:
    folder = write(tmp_path, "dicom", noise())
    assert [file.name for file in slides.files_of(folder)] == [f"level{level}.dcm" for level in range(3)]
    assert slides.files_of(folder / "level1.dcm") == slides.files_of(folder)
    (tmp_path / "m").mkdir()
    for name in ("m.mrxs", "m/Slidedat.ini", "m/Data0000.dat"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in slides.files_of(tmp_path / "m.mrxs")] == ["m.mrxs", "Data0000.dat", "Slidedat.ini"]
    assert slides.name_of("case 1/A.b.ome.tif") == "case 1/A.b"
    assert slides.name_of("1.2.840") == "1.2.840"
