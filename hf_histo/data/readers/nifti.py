"""MRI volumes in NIfTI files, read as slices."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_histo.data import schema
from hf_histo.data.readers.builder import EXPANSION, SMALL
from hf_histo.data.readers.class_folders import ClassFolders, is_clutter, name_of, split_of
from hf_histo.errors import HistoError

MAX_VOXELS = 512**3  # largest volume, checked in the header before reading; up to about 2 GB in memory
SUFFIX = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
# The BIDS specification, https://bids-specification.readthedocs.io, "Filename template": a subject's label.
SUBJECT = re.compile(r"(?<![a-zA-Z0-9])sub-[a-zA-Z0-9]+")
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # axis normal to the plane, where axes point right, front and up
PERCENTILES = (0.5, 99.5)  # of the voxels; they become black and white
# Share of that range above which a voxel belongs to the head: Smith 2002, "Fast robust automated brain extraction",
# "Estimation of basic image and brain parameters".
HEAD = 0.1
FULL = 0.25  # a slice is kept if its head area is at least this share of the largest one


class VolumeFolders(ClassFolders):
    """NIfTI volumes (`.nii`, `.nii.gz`) in the folders of `ClassFolders`; each slice is an image. Needs nibabel.

    Volumes are reoriented to the nearest anatomical axes and sliced across one (`--slice_plane`). Slices are displayed
    as in radiology: front or top above, the patient's right on the left (sagittal: the front on the left). A pixel is a
    voxel, even where voxels are not cubes. Gray levels are scaled per volume, from its percentiles 0.5 to 99.5; NaN and
    minus infinity are black. Slices with less than a quarter of the largest head area are left out; `--slices` takes
    that many of the others, evenly spaced, or all if there are fewer.

    `group` is the patient: the first `sub-LABEL` (BIDS) in the path below the class folder, else the first folder
    there, else the file name. `id` is the path and the slice number, counted from 0 at the left, back or bottom.

    Raises HistoError as `ClassFolders` does, and, naming the file, for one that is not NIfTI-1 or NIfTI-2, is
    truncated, does not have three dimensions, has more than 512^3 voxels, holds colors or complex numbers, declares
    more data than it holds, declares no orientation, or has no contrast (unless `--on_bad_image skip` leaves it out).
    """

    LAYOUT = "volume_folders"
    OPTIONS = ("on_bad_image", "slice_plane", "slices")
    EXPECTED = "the same folders of NIfTI volumes (.nii, .nii.gz)"
    FILES = "NIfTI volumes"
    GROUP = "patient"

    @classmethod
    def matches(cls, directory: Path) -> bool:
        return any(map(cls.holds, directory.rglob("*")))

    @classmethod
    def holds(cls, path: Path) -> bool:
        return SUFFIX.search(path.name) is not None and not path.is_dir() and not is_clutter(path)

    def _generate_examples(self, classes: dict[str, list[Path]]) -> Iterator[tuple[str, dict[str, Any]]]:
        options = self.config.options
        for label, paths in classes.items():
            for path in paths:
                name = name_of(path, self.config.directory)
                with self.skipping():
                    for number, pixels in _slices(_gray(path), options.slice_plane, options.slices):
                        key = f"{name}:{number}"
                        image = {"bytes": schema.encode_ppm(pixels), "path": None}
                        group = self._patient(name)
                        yield key, {"id": key, "image": image, "label": label, "center": -1, "group": group}

    def _patient(self, name: str) -> str:
        first, *below = name.split("/")
        if split_of(self.config.directory / first):
            del below[0]
        subject = SUBJECT.search("/".join(below))
        return subject[0] if subject else SUFFIX.sub("", below[0])


def _slices(volume: NDArray[np.uint8], plane: str, count: int | None) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Number and pixels, (H, W, 3), of each chosen slice of a volume with axes (right, front, up)."""
    axis = PLANES[plane]
    others = tuple(other for other in PLANES.values() if other != axis)
    area = (volume > HEAD * 255).sum(axis=others)
    numbers = np.flatnonzero(area >= FULL * area.max())
    if count is not None and count < len(numbers):
        numbers = numbers[((np.arange(count) + 0.5) * len(numbers) / count).astype(int)]  # centers of equal parts
    for number in numbers.tolist():
        gray = np.flip(volume.take(number, axis)).T
        yield number, np.stack([gray] * 3, axis=-1)


def _gray(path: Path) -> NDArray[np.uint8]:
    """The volume as gray levels, uint8, with axes (right, front, up)."""
    volume = _read(path)
    finite = volume[np.isfinite(volume)]
    low, high = np.percentile(finite, PERCENTILES).tolist() if len(finite) else (0.0, 0.0)
    if not low < high:
        raise HistoError(f"{path}: almost no voxel differs from {low:g}, expected different values; export it again")
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (volume - low) / (high - low)
    gray: NDArray[np.uint8] = np.rint(np.nan_to_num(scaled, nan=0, posinf=1, neginf=0).clip(0, 1) * 255).astype(
        np.uint8
    )
    return gray


def _read(path: Path) -> NDArray[np.float32]:
    """The volume, float32, with axes (right, front, up).

    The header is checked before anything else is read. Its extensions, whose lengths have no bound, are not read.
    """
    try:
        import nibabel
        from nibabel.arrayproxy import ArrayProxy
    except ImportError:
        raise HistoError('NIfTI volumes need nibabel: pip install "hf_histo[nifti]"') from None
    broken = (nibabel.spatialimages.HeaderDataError, nibabel.orientations.OrientationError)
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            with gzip.open(plain) if packed else plain as file:
                start = file.read(nibabel.Nifti2Header.sizeof_hdr)
                kinds = (nibabel.Nifti1Header, nibabel.Nifti2Header)
                kind = next((kind for kind in kinds if kind.may_contain_header(start)), None)
                if kind is None:
                    raise ValueError(f"starts with {start[:8]!r}")
                header = kind(start[: kind.sizeof_hdr])  # type: ignore[no-untyped-call]  # untyped in nibabel
                shape, dtype = header.get_data_shape(), header.get_data_dtype()
                if len(shape) < 3 or min(shape) < 1 or math.prod(shape) != math.prod(shape[:3]):
                    raise HistoError(f"{path}: shape {shape}, expected three dimensions; export one volume of it")
                if dtype.kind not in "iuf" or dtype.itemsize > 8:
                    raise HistoError(f"{path}: {dtype}, expected numbers of up to 8 bytes; convert it")
                if not header["qform_code"] and not header["sform_code"]:
                    raise HistoError(
                        f"{path}: qform_code and sform_code are 0, which states no orientation, expected one above 0; "
                        "export it with its orientation, or set it by nibabel's set_sform"
                    )
                if math.prod(shape) > MAX_VOXELS:
                    raise HistoError(f"{path}: shape {shape}, expected at most {MAX_VOXELS:,} voxels; resample it")
                offset, stored = header.get_data_offset(), path.stat().st_size
                declared = offset + math.prod(shape) * dtype.itemsize
                if offset < kind.sizeof_hdr or declared > (SMALL + EXPANSION * stored if packed else stored):
                    raise ValueError(f"declares {declared:,} bytes and has {stored:,}")
                volume = np.asarray(ArrayProxy(file, header, mmap=False), dtype=np.float32).reshape(shape[:3])
                file.read(1)  # checks the checksum at the end of a gzip file
        image = nibabel.Nifti1Image(volume, header.get_best_affine())
        return np.asarray(nibabel.as_closest_canonical(image).dataobj)
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, *broken) as error:
        raise HistoError(f"{path}: not a readable NIfTI volume ({error}); copy or export it again") from None
