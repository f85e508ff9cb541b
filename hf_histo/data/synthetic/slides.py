"""Pyramidal slides of the synthetic tissue, with annotations as QuPath exports them: for demos and tests.

A slide is a section of tissue on glass, made of the patches of `tissue`: tumor within one region of a slide with tumor,
or in a few patches of it, normal tissue around it. Slides of a center have its stain, those of a patient nothing in
common but the name.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from hf_histo.data.readers import geojson
from hf_histo.data.synthetic import tissue
from hf_histo.errors import HistoError
from hf_histo.files import atomic_folder

MPP = 0.5
"""Micrometers per pixel of the patches of `tissue`: a nucleus of normal tissue is then about 6 micrometers across."""

NORMAL, TUMOR = "normal", "tumor"
TILE = 256
"""Height and width of a tile in pixels."""
QUALITY = 90
"""Of JPEG, 1 to 100."""

Image = NDArray[np.uint8]
Tile = Callable[[int, int, int], Image | None]
"""A tile, uint8 (TILE, TILE, 3), by level, row and column; None where nothing was scanned."""


@dataclass(frozen=True)
class Section:
    """A synthetic slide.

    Attributes:
        image: uint8 (H, W, 3) in RGB, a whole number of patches of `tissue` high and wide.
        labels: int64 (H / 96, W / 96), of each patch: 0 normal, 1 tumor, -1 glass.
    """

    image: Image
    labels: NDArray[np.int64]


def draw(
    rng: np.random.Generator, center: int, *, cells: int = 10, tumor: bool = True, tumor_patches: int | None = None
) -> Section:
    """Draw a slide of `center`, 0 to 4: `cells` x `cells` patches, with tissue in an ellipse, and tumor within it.

    The tumor is an ellipse as well, or the `tumor_patches` patches of tissue that are nearest to a point in the middle.
    """
    source = tissue.slide(rng, center)
    grid = (np.mgrid[:cells, :cells] + 0.5) / cells
    labels = np.where(_ellipse(grid, np.array([0.5, 0.5]), rng.uniform(0.38, 0.48, 2)), 0, -1)
    if tumor:
        middle = rng.uniform(0.42, 0.58, 2)
        if tumor_patches is None:
            labels[(labels == 0) & _ellipse(grid, middle, rng.uniform(0.22, 0.3, 2))] = 1
        else:
            rows, columns = np.nonzero(labels == 0)
            distance = np.hypot(*(grid[:, rows, columns] - middle[:, None]))
            nearest = np.argsort(distance, kind="stable")[:tumor_patches]
            labels[rows[nearest], columns[nearest]] = 1
    side = tissue.SIZE
    image = np.empty((cells * side, cells * side, 3), np.uint8)
    white = 255 * np.array(source.white) ** source.gamma
    image[:] = np.clip(white + 255 * source.noise * rng.normal(size=image.shape) + 0.5, 0, 255)
    # Each pair of patches gives one of each class, as long as both are needed.
    waiting: tuple[list[Image], list[Image]] = ([], [])
    for row, column in np.argwhere(labels >= 0):
        label = labels[row, column]
        if not waiting[label]:
            for patches, patch in zip(waiting, tissue.pair(rng, source), strict=True):
                patches.append(patch)
        place = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
        image[place] = waiting[label].pop().transpose(1, 2, 0)
    return Section(image, labels)


def annotated(section: Section) -> dict[str, Any]:
    """The regions of a slide as QuPath exports them: a GeoJSON FeatureCollection, in pixels of level 0."""
    import shapely

    side, features = tissue.SIZE, []
    for label, name in enumerate((NORMAL, TUMOR)):
        cells = np.argwhere(section.labels == label)
        if not len(cells):
            continue
        top, left = side * cells.T
        region = shapely.unary_union(shapely.box(left, top, left + side, top + side))
        features.append(geojson.feature(shapely.geometry.mapping(region), name, (200, 0, 0)))
    return {"type": "FeatureCollection", "features": features}


def generate(
    directory: str | Path,
    *,
    seed: int = 0,
    slides_per_center: int = 4,
    cells: int = 10,
    kind: str = "tiff",
    tumor_patches: int | None = None,
) -> None:
    """Write slides of the five centers, and `slides.csv`, into the new folder `directory`.

    The table has the columns slide, label, patient, center and split (by center, as of the built-in patches). Every
    second slide has tumor, with a GeoJSON file of both classes beside it; the others are normal and have none. Patients
    have two slides each. The same seed gives the same slides.

    Args:
        directory: the new folder.
        seed: of all that is drawn.
        slides_per_center: number of slides of each center.
        cells: patches of 96 pixels, 48 micrometers, along a side.
        kind: "tiff", "jpeg" (the same, compressed with loss), "ome-tiff", or "dicom" (a folder for each slide).
        tumor_patches: patches of tumor on a slide with tumor, see `draw`; by default a region of about a third.

    Raises `HistoError` for an unknown kind, a size that is not positive, and a folder that exists.
    """
    directory = Path(directory)
    writers = {"tiff": ".tif", "jpeg": ".tif", "ome-tiff": ".ome.tif", "dicom": ""}
    if kind not in writers:
        raise HistoError(f"kind={kind}: expected one of {', '.join(writers)}; choose one of these")
    for name, value in (("slides_per_center", slides_per_center), ("cells", cells), ("tumor_patches", tumor_patches)):
        if value is not None and value < 1:
            raise HistoError(f"{name}={value}: expected at least 1; pass a positive number")
    if directory.exists():
        raise HistoError(f"directory={directory}: exists, expected a new folder; remove it or choose another")
    splits = {center: split for split, centers in tissue.SPLITS.items() for center in centers}
    with (
        atomic_folder(directory) as folder,
        tqdm(total=slides_per_center * len(splits), unit="slide", desc="synthetic slides") as progress,
        (folder / "slides.csv").open("w", encoding="utf-8", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["slide", "label", "patient", "center", "split"])
        for center, split in sorted(splits.items()):
            for number in range(slides_per_center):
                name, has_tumor = f"center{center}_slide{number}", number % 2 == 0
                rng = np.random.default_rng([seed, center, number])
                section = draw(rng, center, cells=cells, tumor=has_tumor, tumor_patches=tumor_patches)
                path = folder / f"{name}{writers[kind]}"
                if kind == "dicom":
                    write_dicom(path, section.image, name=name)
                else:
                    write_tiff(path, section.image, quality=QUALITY if kind == "jpeg" else None, ome=kind == "ome-tiff")
                if has_tumor:
                    text = json.dumps(annotated(section)) + "\n"
                    (folder / f"{name}.geojson").write_text(text, encoding="utf-8")
                label = TUMOR if has_tumor else NORMAL
                table.writerow([path.name, label, f"patient{center}_{number // 2}", center, split])
                progress.update()


def write_tiff(path: Path, image: Image, *, mpp: float = MPP, quality: int | None = None, ome: bool = False) -> None:
    """Write a slide, uint8 (H, W, 3), as a tiled pyramidal TIFF with its resolution, or as OME-TIFF.

    Lossless (deflate), or with `quality` as JPEG. A level is half as large as the one below, down to one tile.
    """
    levels = _pyramid(image)
    write_tiles(path, [level.shape[:2] for level in levels], _tiles_of(levels), mpp=mpp, quality=quality, ome=ome)


def write_tiles(
    path: Path,
    shapes: list[tuple[int, int]],
    tile_at: Tile,
    *,
    mpp: float = MPP,
    quality: int | None = None,
    ome: bool = False,
) -> None:
    """Write a slide of any size tile by tile; a tile that is there already takes no room, and a missing one none.

    Args:
        path: of the file.
        shapes: height and width of each level.
        tile_at: gives each tile.
        mpp: micrometers per pixel of the first level.
        quality: of JPEG; None: deflate.
        ome: as OME-TIFF, with the smaller levels as SubIFDs.
    """
    import tifffile

    repeats: list[dict[int, int]] = []  # of each level, the first tile with the bytes of another
    with tifffile.TiffWriter(path, bigtiff=True, ome=ome) as writer:
        for level, (height, width) in enumerate(shapes):
            repeats.append({})
            resolution = 1e4 / (mpp * shapes[0][1] / width)
            about: dict[str, Any] = {"subifds": len(shapes) - 1} if ome and level == 0 else {}
            if ome and level == 0:
                sizes = {f"PhysicalSize{axis}": mpp for axis in "XY"}
                units = {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
                about["metadata"] = {"axes": "YXS", **sizes, **units}
            else:
                about["metadata"] = None
            writer.write(
                _encoded(level, (height, width), tile_at, quality, repeats[level]),
                shape=(height, width, 3),
                dtype="uint8",
                tile=(TILE, TILE),
                photometric="rgb" if quality is None else "ycbcr",
                subsampling=None if quality is None else (1, 1),
                compression="zlib" if quality is None else "jpeg",
                subfiletype=int(level > 0),
                resolution=(resolution, resolution),
                resolutionunit="CENTIMETER",
                **about,
            )
    _share(path, repeats)


def _tiles_of(levels: list[Image]) -> Tile:
    """The tiles of a pyramid in memory; those at the edge are filled up with white."""

    def tile_at(level: int, row: int, column: int) -> Image:
        part = levels[level][row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        missing = [(0, TILE - length) for length in part.shape[:2]]
        return np.pad(part, (*missing, (0, 0)), constant_values=255)

    return tile_at


def _encoded(
    level: int, shape: tuple[int, int], tile_at: Tile, quality: int | None, repeats: dict[int, int]
) -> Iterator[bytes]:
    """The tiles of a level; b"" for one that is missing, and one that repeats another, which goes into `repeats`."""
    rows, columns = (-(-length // TILE) for length in shape)
    seen: dict[bytes, int] = {}
    for number in range(rows * columns):
        tile = tile_at(level, *divmod(number, columns))
        if tile is None:
            yield b""
            continue
        first = seen.setdefault(xxhash.xxh3_128_digest(tile.tobytes()), number)
        if first != number:
            repeats[number] = first
            yield b""
        elif quality is None:
            yield zlib.compress(tile.tobytes(), 6)
        else:
            yield simplejpeg.encode_jpeg(np.ascontiguousarray(tile), quality, colorsubsampling="444")


def _share(path: Path, repeats: list[dict[int, int]]) -> None:
    """Let repeated tiles point at the bytes of the first one: TIFF allows any offsets (TIFF 6.0, section 15)."""
    import tifffile

    if not any(repeats):
        return
    with tifffile.TiffFile(path, mode="r+") as file:
        levels: Any = file.series[0].levels if file.is_ome else file.pages
        for level, of_level in zip(levels, repeats, strict=True):
            page = level.keyframe if file.is_ome else level
            for name in ("TileOffsets", "TileByteCounts"):
                values = list(page.tags[name].value)
                for number, first in of_level.items():
                    values[number] = values[first]
                page.tags[name].overwrite(values)


def write_dicom(folder: Path, image: Image, *, name: str = "slide", mpp: float = MPP) -> None:
    """Write a slide, uint8 (H, W, 3), as DICOM: a file without compression for each level, in the new `folder`.

    VL Whole Slide Microscopy Image, DICOM PS3.3 A.32.8, tiled in full; UIDs are derived from `name`.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.sequence import Sequence
    from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid

    folder.mkdir()
    levels = _pyramid(image)
    tiles = _tiles_of(levels)
    study, series, frame, dimension, specimen = (generate_uid(entropy_srcs=[name, kind]) for kind in "abcde")
    for level, pixels in enumerate(levels):
        height, width = pixels.shape[:2]
        rows, columns = (-(-length // TILE) for length in (height, width))
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = VLWholeSlideMicroscopyImageStorage
        uid = generate_uid(entropy_srcs=[name, str(level)])
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = uid
        data.ImageType = ["DERIVED" if level else "ORIGINAL", "PRIMARY", "VOLUME", "RESAMPLED" if level else "NONE"]
        data.Modality, data.Manufacturer, data.ManufacturerModelName = "SM", "hf_histo", "synthetic tissue"
        data.DeviceSerialNumber, data.SoftwareVersions = "0", "0"
        data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = name, "Synthetic", "", "O"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20260101", "000000", "", ""
        data.ReferringPhysicianName, data.PositionReferenceIndicator = "", "SLIDE_CORNER"
        data.SeriesNumber, data.InstanceNumber = 1, level + 1
        data.ContentDate, data.ContentTime, data.AcquisitionDateTime = "20260101", "000000", "20260101000000"
        data.ContainerIdentifier = name
        data.IssuerOfTheContainerIdentifierSequence = Sequence()
        data.ContainerTypeCodeSequence = Sequence([_code("433466003", "SCT", "Microscope slide")])
        sample = Dataset()
        sample.SpecimenIdentifier, sample.SpecimenUID = name, specimen
        sample.IssuerOfTheSpecimenIdentifierSequence = sample.SpecimenPreparationSequence = Sequence()
        data.SpecimenDescriptionSequence = Sequence([sample])
        data.AcquisitionContextSequence = Sequence()
        data.BurnedInAnnotation, data.VolumetricProperties, data.SpecimenLabelInImage = "NO", "VOLUME", "NO"
        data.FocusMethod, data.ExtendedDepthOfField, data.LossyImageCompression = "AUTO", "NO", "00"
        spacing = mpp / 1e3 * levels[0].shape[1] / width  # millimeters
        data.ImagedVolumeWidth, data.ImagedVolumeHeight = width * spacing, height * spacing
        data.ImagedVolumeDepth = 0.001
        data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = width, height
        data.TotalPixelMatrixFocalPlanes = 1
        origin = Dataset()
        origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0
        data.TotalPixelMatrixOriginSequence = Sequence([origin])
        data.ImageOrientationSlide = [0, 1, 0, 1, 0, 0]
        path = Dataset()
        path.OpticalPathIdentifier = "1"
        path.IlluminationTypeCodeSequence = Sequence([_code("111744", "DCM", "Brightfield illumination")])
        path.IlluminationColorCodeSequence = Sequence([_code("11744", "SCT", "Full Spectrum")])
        data.OpticalPathSequence = Sequence([path])
        data.NumberOfOpticalPaths = 1
        organization = Dataset()
        organization.DimensionOrganizationUID = dimension
        data.DimensionOrganizationSequence = Sequence([organization])
        data.DimensionOrganizationType = "TILED_FULL"
        measures, kind, shared = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = [spacing, spacing], 0.001
        kind.FrameType = data.ImageType
        shared.PixelMeasuresSequence = Sequence([measures])
        shared.WholeSlideMicroscopyImageFrameTypeSequence = Sequence([kind])
        data.SharedFunctionalGroupsSequence = Sequence([shared])
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
        data.Rows = data.Columns = TILE
        data.NumberOfFrames = rows * columns
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit, data.PixelRepresentation = 7, 0
        data.PixelData = b"".join(
            tile.tobytes()
            for row in range(rows)
            for column in range(columns)
            if (tile := tiles(level, row, column)) is not None
        )
        data.save_as(folder / f"level{level}.dcm", enforce_file_format=True)


def _code(value: str, scheme: str, meaning: str) -> Any:
    from pydicom.dataset import Dataset

    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _pyramid(image: Image) -> list[Image]:
    """The image, and means over 2 x 2 pixels of the level before, until one fits a tile."""
    levels = [image]
    while max(levels[-1].shape[:2]) > TILE and min(levels[-1].shape[:2]) > 1:
        height, width = (length // 2 for length in levels[-1].shape[:2])
        blocks = levels[-1][: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
        levels.append((blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8))
    return levels


def _ellipse(grid: NDArray[np.float64], middle: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.bool_]:
    distance: NDArray[np.bool_] = (((grid - middle[:, None, None]) / radii[:, None, None]) ** 2).sum(axis=0) <= 1
    return distance
