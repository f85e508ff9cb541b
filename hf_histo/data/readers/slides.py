"""Whole-slide images at a physical resolution: opening one, its tissue, the grid of its patches, and reading a patch.

Training and prediction on slides both use `open_slide`, `grid` and `read_patch`. Coordinates are those of QuPath:
pixels of level 0, x to the right and y down, from the corner of the scanned area where the file states one
("openslide.bounds-x"), else from that of the file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageColor
from numpy.typing import NDArray

from hf_histo.errors import HistoError

VERSION = "1.1.0"  # part of cache keys: raise it where other patches are found, or a patch gets other pixels
# https://openslide.org/formats, and OME-TIFF
SUFFIXES = (".svs", ".ndpi", ".mrxs", ".tif", ".tiff", ".btf", ".scn", ".bif", ".svslide", ".vms", ".vmu", ".dcm")
MPP, PATCH_SIZE = 0.5, 224  # defaults: micrometers per pixel, and pixels on a side
MIN_TISSUE = 0.25  # default share of a patch that is tissue
NATIVE = 0.01  # a level whose resolution differs from the wanted one by less is read as it is
LARGEST_ZOOM = 1.1  # by how much a slide may be coarser than the wanted resolution
MASK_MPP, MASK_PIXELS = 16.0, 4  # of the tissue mask: micrometers per pixel, and the fewest pixels across a patch
# Least difference of the mean saturation, in [0, 1], between tissue and glass; noise and uneven light stay below.
MIN_CONTRAST = 0.05
BLOCK = 2048  # pixels on a side that are read of a slide at once
_SUFFIX = re.compile(rf"(\.ome)?({'|'.join(map(re.escape, SUFFIXES))})$", re.IGNORECASE)
_REFERENCE = re.compile(r"slide:(\d+),(\d+),([\d.e+-]+),(\d+):(.+)", re.DOTALL)
OPEN, TILE_CACHE = 32, 2**26  # slides that a process keeps open, and bytes of decoded tiles that it keeps


@dataclass(frozen=True)
class Slide:
    """An open slide.

    Attributes:
        path: of the file, or of one of the files.
        width, height: of the scanned area, in pixels of level 0.
        mpp: micrometers per pixel of level 0; None where the file does not state it.
        downsamples: of each level, from 1 up.
        handle: the slide of OpenSlide or TiffSlide, which have the same methods.
        origin: x and y of the scanned area within level 0.
    """

    path: Path
    width: int
    height: int
    mpp: float | None
    downsamples: tuple[float, ...]
    handle: Any
    origin: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Grid:
    """The patches of a slide.

    Attributes:
        corners: int64 (n, 2), x and y of each patch's upper left corner, row by row.
        size: side of a patch in pixels of level 0; not always a whole number.
        step: from one patch to the next, in the same unit.
        pixels: side of a patch as it is read.
        mpp: micrometers per pixel of level 0.
    """

    corners: NDArray[np.int64]
    size: float
    step: float
    pixels: int
    mpp: float


@dataclass(frozen=True)
class Mask:
    """Where a slide shows tissue: bool (h, w); a pixel covers `scale` x `scale` pixels of level 0."""

    is_tissue: NDArray[np.bool_]
    scale: float

    def shares(self, corners: NDArray[np.int64], size: float) -> NDArray[np.float64]:
        """Share (n,) of each square that is tissue, in [0, 1], to the nearest pixel of the mask."""
        sums = np.pad(self.is_tissue.cumsum(0, np.int32).cumsum(1, np.int32), ((1, 0), (1, 0)))
        most = np.array(self.is_tissue.shape[::-1])
        low = np.clip(np.rint(corners / self.scale).astype(int), 0, most - 1)
        high = np.clip(np.rint((corners + size) / self.scale).astype(int), low + 1, most)
        (left, top), (right, bottom) = low.T, high.T
        found = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        share: NDArray[np.float64] = found / np.prod(high - low, axis=1)
        return share


def open_slide(path: str | Path) -> Slide:
    """Open a slide, or return the one that this process has open.

    OpenSlide reads it, or TiffSlide where OpenSlide does not find the levels of an OME-TIFF. Each process, also a
    forked one, opens a slide itself, and keeps the latest `OPEN` ones open. A folder holds the files of a DICOM slide.

    Raises HistoError, naming the file, for one that is missing, in no known format, truncated or damaged, and for
    pixels that are not square.
    """
    path = Path(path)
    try:
        file = _dicom_of(path) if path.is_dir() else path
        state = file.stat()
    except FileNotFoundError:
        raise HistoError(f"{path}: no such file, expected a slide; correct the path") from None
    return _opened(str(file), state.st_mtime_ns, state.st_size, os.getpid())


def name_of(path: str) -> str:
    """A slide's name: its path without the suffix."""
    return _SUFFIX.sub("", path)


def files_of(path: Path) -> list[Path]:
    """All files that belong to a slide, sorted: those of a DICOM series or MIRAX folder, else the one."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        folder = path.with_suffix("")
        return [path, *(sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else ())]
    if suffix in (".vms", ".vmu"):  # the names of the others stand in the file
        return sorted(file for file in path.parent.iterdir() if file.is_file())
    if suffix == ".dcm":
        return sorted(file for file in path.parent.iterdir() if file.suffix.lower() == ".dcm")
    return [path]


def grid(
    slide: Slide,
    *,
    mpp: float = MPP,
    patch_size: int = PATCH_SIZE,
    stride: int | None = None,
    min_tissue: float = MIN_TISSUE,
    assume_mpp: float | None = None,
) -> Grid:
    """The patches of a slide that show enough tissue.

    A level whose resolution differs from `mpp` by less than a percent is taken for it, so that its pixels are read
    unchanged. Patches are `stride` apart from the slide's corner on, and lie within it.

    Args:
        slide: an open slide.
        mpp: micrometers per pixel of the patches.
        patch_size: their side in pixels.
        stride: pixels from one to the next; None: `patch_size`.
        min_tissue: least share of a patch that is tissue, see `tissue`, in [0, 1]; 0 keeps all patches.
        assume_mpp: resolution of level 0 where the file does not state it.

    Raises HistoError for a slide that does not state its resolution, without `assume_mpp`, one that states another one,
    and one that is coarser than `mpp` by more than a tenth.
    """
    resolution = resolution_of(slide, assume_mpp)
    scale = mpp / resolution
    if scale * LARGEST_ZOOM < 1:
        raise HistoError(
            f"{slide.path}: {resolution:.4g} micrometers per pixel, expected {mpp:g} or less, as --mpp or the "
            "adapter asks for; leave it out, or train on all slides with a larger --mpp"
        )
    scale = next((level for level in slide.downsamples if abs(level / scale - 1) < NATIVE), scale)
    size, step = patch_size * scale, (stride or patch_size) * scale
    xs, ys = (
        np.rint(step * np.arange(max(0, math.floor((length - size) / step + 1e-6) + 1))).astype(np.int64)
        for length in (slide.width, slide.height)
    )
    corners = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    if min_tissue > 0 and len(corners):
        mask = tissue(slide, min(MASK_MPP / resolution, size / MASK_PIXELS))
        corners = corners[mask.shares(corners, size) >= min_tissue]
    return Grid(corners, size, step, patch_size, resolution)


def require_patches(grid: Grid, path: Path, kind: str) -> None:
    """Raise HistoError, naming the slide's `path`, for a grid without patches, which are called `kind`."""
    if not len(grid.corners):
        raise HistoError(
            f"{path}: no {kind} with tissue, expected a slide that is not all glass, and at least as large as a "
            f"{kind}; leave it out, or lower --min_tissue"
        )


def read_patch(slide: Slide, x: float, y: float, size: float, pixels: int) -> NDArray[np.uint8]:
    """A square of a slide, uint8 (`pixels`, `pixels`, 3) in RGB.

    It is read from the coarsest level that is no coarser than the patch, and scaled down with PIL's antialiased
    bilinear filter, unless the level has its resolution. What was not scanned has the background color that the file
    states, else white.

    Args:
        slide: an open slide.
        x, y, size: corner and side in pixels of level 0.
        pixels: side of the result.

    Raises HistoError, naming slide and place, for data that is missing or damaged.
    """
    rgb, _ = _read(slide, (x, y), size / pixels, (pixels, pixels))
    return rgb


def reference(path: Path, x: int, y: int, size: float, pixels: int) -> str:
    """What a table stores of a patch that is read when it is needed: the arguments of `read_patch`."""
    return f"slide:{x},{y},{size!r},{pixels}:{path}"


def is_reference(text: str | None) -> bool:
    """Whether a text is a `reference`."""
    return _REFERENCE.fullmatch(text or "") is not None


def read_reference(text: str) -> NDArray[np.uint8]:
    """The patch, uint8 (H, W, 3), of a `reference`. Raises HistoError as `open_slide` and `read_patch` do."""
    x, y, size, pixels, path = _parsed(text)
    return read_patch(open_slide(path), int(x), int(y), float(size), int(pixels))


def pixels_of(text: str) -> int:
    """Side in pixels of the patch of a `reference`."""
    return int(_parsed(text)[3])


def tissue(slide: Slide, scale: float) -> Mask:
    """Where a slide shows tissue: Otsu's threshold on the saturation (HSV), at `scale` pixels of level 0 per pixel.

    The threshold is taken over what was scanned (Otsu 1979, IEEE Trans. Syst. Man Cybern. 9:62). Where the saturation
    above and below it differs by less than `MIN_CONTRAST` on average, the slide is all glass and nothing is tissue.
    """
    import torch
    from kornia.filters import otsu_threshold

    scale = max(scale, 1.0)
    rgb, is_scanned = overview(slide, scale)
    low, high = rgb.min(axis=2).astype(np.float32), rgb.max(axis=2).astype(np.float32)
    saturation = (high - low) / np.maximum(high, 1)
    scanned = saturation[is_scanned]
    if not scanned.size or scanned.min() == scanned.max():
        return Mask(np.zeros_like(is_scanned), scale)
    # One row, since kornia thresholds each plane.
    _, threshold = otsu_threshold(torch.from_numpy(scanned)[None])
    is_tissue = is_scanned & (saturation > float(threshold))
    if scanned[scanned > float(threshold)].mean() - scanned[scanned <= float(threshold)].mean() < MIN_CONTRAST:
        is_tissue[:] = False
    return Mask(is_tissue, scale)


def overview(slide: Slide, scale: float) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A whole slide at a `scale`, pixels of level 0 per pixel: uint8 (h, w, 3), and what of it was scanned, (h, w).

    It is read in blocks, so that memory stays flat where the file has no small level.
    """
    width, height = (max(1, math.ceil(length / scale)) for length in (slide.width, slide.height))
    rgb, is_scanned = np.empty((height, width, 3), np.uint8), np.empty((height, width), bool)
    side = max(1, int(BLOCK * slide.downsamples[_level(slide, scale)] / scale))
    for top in range(0, height, side):
        for left in range(0, width, side):
            shape = min(side, width - left), min(side, height - top)
            block = np.s_[top : top + shape[1], left : left + shape[0]]
            rgb[block], is_scanned[block] = _read(slide, (left * scale, top * scale), scale, shape)
    return rgb, is_scanned


def resolution_of(slide: Slide, assume_mpp: float | None = None) -> float:
    """Micrometers per pixel of level 0. Raises HistoError as `grid` does."""
    if slide.mpp is None and assume_mpp is None:
        raise HistoError(
            f"{slide.path}: states no micrometers per pixel, expected them; give those of level 0 by --assume_mpp, "
            "if you know them"
        )
    return slide.mpp or assume_mpp or math.nan


def _parsed(text: str) -> tuple[str, ...]:
    if (found := _REFERENCE.fullmatch(text)) is None:
        raise HistoError(f"an image is {text[:200]}, expected its bytes, or a patch of a slide; load the data again")
    return found.groups()


def _read(
    slide: Slide, corner: tuple[float, float], scale: float, shape: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """RGB uint8 (h, w, 3) of a part of a slide, and a bool mask (h, w) of scanned pixels; `shape` is (w, h)."""
    level = _level(slide, scale)
    downsample = slide.downsamples[level]
    ratio = scale / downsample
    start = [(place + offset) / downsample for place, offset in zip(corner, slide.origin, strict=True)]
    if abs(ratio - 1) < 1e-6:
        image = _region(slide, level, [round(place) for place in start], shape)
    else:
        # A quarter of a level's pixel of rounding is less than what other viewers differ by.
        whole = [math.floor(place + 1e-6) for place in start]
        inner = [max(0.0, place - first) for place, first in zip(start, whole, strict=True)]
        ends = [first + length * ratio for first, length in zip(inner, shape, strict=True)]
        size = math.ceil(ends[0] - 1e-6), math.ceil(ends[1] - 1e-6)
        box = (inner[0], inner[1], min(ends[0], size[0]), min(ends[1], size[1]))
        # PIL takes the mean of what was scanned, and returns black where nothing was.
        image = _region(slide, level, whole, size).resize(shape, PIL.Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    rgb, is_scanned = pixels[..., :3], pixels[..., 3] >= 128
    if not is_scanned.all():
        background = slide.handle.properties.get("openslide.background-color", "ffffff")
        rgb = np.where(is_scanned[..., None], rgb, np.array(PIL.ImageColor.getrgb(f"#{background}"), np.uint8))
    return rgb, is_scanned


def _region(slide: Slide, level: int, start: list[int], shape: tuple[int, int]) -> PIL.Image.Image:
    """Part of a level as RGBA, transparent where it was not scanned."""
    place = [round(first * slide.downsamples[level]) for first in start]
    try:
        image: PIL.Image.Image = slide.handle.read_region((place[0], place[1]), level, shape)
        return image if image.mode == "RGBA" else image.convert("RGBA")  # TiffSlide's is RGB
    except Exception as error:  # OpenSlide's own, and whatever the decoders of TiffSlide raise
        _opened.cache_clear()  # OpenSlide keeps failing once it has failed
        reason = " ".join(str(error).split())[:200]
        raise HistoError(
            f"{slide.path}: unreadable at x={place[0]}, y={place[1]} ({reason}), expected a whole slide; copy it again"
        ) from None


def _level(slide: Slide, scale: float) -> int:
    """The coarsest level with at most `scale` pixels of level 0 per pixel."""
    fitting = [level for level, downsample in enumerate(slide.downsamples) if downsample <= scale * (1 + 1e-6)]
    return max(fitting, key=lambda level: slide.downsamples[level], default=0)


@lru_cache(maxsize=OPEN)
def _opened(path: str, changed: int, size: int, process: int) -> Slide:
    """`changed`, `size` and `process` only keep apart what must be opened anew."""
    handle = _handle(path)
    properties = handle.properties
    resolutions = [_number(properties, f"mpp-{axis}") for axis in "xy"]
    known = [value for value in resolutions if value]
    if len(known) == 2 and abs(known[0] / known[1] - 1) > NATIVE:
        raise HistoError(
            f"{path}: {known[0]:.4g} micrometers per pixel across and {known[1]:.4g} down, expected square pixels; "
            "convert it"
        )
    width, height = handle.dimensions
    left = top = 0
    if properties.get("openslide.vendor") != "generic-tiff":  # whose bounds are but the tiles that are there
        left, top = (int(_number(properties, f"bounds-{axis}") or 0) for axis in "xy")
        width = int(_number(properties, "bounds-width") or width - left)
        height = int(_number(properties, "bounds-height") or height - top)
    mpp = sum(known) / len(known) if known else None
    return Slide(Path(path), width, height, mpp, tuple(handle.level_downsamples), handle, (left, top))


def _handle(path: str) -> Any:
    """The slide of OpenSlide, or of TiffSlide where that finds more."""
    openslide = _openslide()
    try:
        vendor = openslide.OpenSlide.detect_format(path)
        if vendor is not None:
            handle = openslide.OpenSlide(path)
            is_ome = "<OME" in handle.properties.get("tiff.ImageDescription", "")
            if vendor != "generic-tiff" or handle.level_count > 1 or not is_ome:
                handle.set_cache(_tiles(os.getpid()))
                return handle
    except openslide.OpenSlideError as error:
        raise HistoError(f"{path}: unreadable ({error}), expected a whole slide; copy it again") from None
    try:
        import tiffslide

        if (ome := tiffslide.TiffSlide(path)).ts_tifffile.is_ome:
            return ome
        reason = "format unknown"
    except Exception as error:  # whatever tifffile and zarr raise of a damaged file
        reason = " ".join(str(error).split())[:200]
    raise HistoError(
        f"{path}: not a readable slide ({reason}), expected a whole one in a format of OpenSlide, such as .svs, .ndpi, "
        ".mrxs, tiled TIFF and DICOM, or OME-TIFF; copy or convert it"
    )


@lru_cache(maxsize=1)
def _tiles(process: int) -> Any:
    """The decoded tiles that a process keeps, of all its slides together."""
    return _openslide().OpenSlideCache(TILE_CACHE)


def _openslide() -> Any:
    try:
        import openslide
    except (ImportError, OSError):
        raise HistoError("slides need OpenSlide: pip install 'hf_histo[slides]'") from None
    return openslide


def _number(properties: Any, name: str) -> float | None:
    """A positive number among a slide's properties, by OpenSlide's or TiffSlide's name; else None."""
    for library in ("openslide", "tiffslide"):
        try:
            value = float(properties[f"{library}.{name}"])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value) and value > 0:
            return value
    return None


def _dicom_of(folder: Path) -> Path:
    """The first DICOM file in a folder, by name."""
    for file in _dicom_files(folder):
        return file
    raise HistoError(f"{folder}: a folder without DICOM files, expected those of a slide; name the slide's file")


def _dicom_files(folder: Path) -> Iterator[Path]:
    from hf_histo.data.readers import dicom

    return (file for file in sorted(folder.iterdir()) if file.is_file() and dicom.is_dicom_file(file))
