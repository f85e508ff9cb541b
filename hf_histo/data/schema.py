"""The schema of every data set, the decoding of image files, and fast reading of images from a table."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
import xxhash
from numpy.typing import NDArray

from hf_histo.data.readers import dicom, slides
from hf_histo.data.reading import (
    DEFAULT_READING,
    MAX_PIXELS,
    Reading,
    RefusedError,
    check_size,
    page_index,
    parse_window,
    window_text,
)
from hf_histo.errors import HistoError

if TYPE_CHECKING:
    import torch

    _MapStyle = torch.utils.data.Dataset["Sample"]
else:
    _MapStyle = object  # torch, which takes seconds to import, needs no more of a data set than its methods

# Formats that PIL decodes without another program: for EPS it would run Ghostscript.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000")
MAX_TEXT = 1000  # longest id, group and class name, in characters
GRAY_BITS = (8, 10, 12, 14, 16)  # bit depths of scanners: DICOM PS3.3 C.7.6.3, "Bits Stored"

MAX_PAGES = 10_000  # of a TIFF

# Start the lines of `info.description` about how the images were read.
_STARTS = {
    "gray_bits": "bits of 16-bit gray: ",
    "page": "page: ",
    "window": "window: ",
    "mpp": "micrometers per pixel: ",
    "patch_size": "patch size: ",
}
# TIFF 6.0, section 8: bit 0, a copy of lower resolution; bit 2, a transparency mask.
_NEW_SUBFILE_TYPE, _NO_PAGE = 254, 0b101
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_PPM = re.compile(rb"P6\s+([1-9]\d*)\s+([1-9]\d*)\s+255\s")


class Sample(TypedDict):
    """One row of a data set as a `Dataset` yields it.

    `image` is uint8 (3, H, W) in [0, 255], `label` the class (-1: hidden), `center` the acquisition center (-1:
    unknown), `index` the row in the table.
    """

    image: NotRequired[torch.Tensor]  # absent from an `ImageTable` without images
    label: int
    center: int
    index: int


def features(label_names: Sequence[str], center_names: Sequence[str] = ()) -> datasets.Features:
    """Columns of every data set, as `datasets.Features`.

    `id` is the key as the source spells it; `image` is stored as bytes inside the table; `label` is an index into
    `label_names`, -1 where the source hides it; `center` is the acquisition center, a number or an index into
    `center_names`, -1 where unknown; `group` is the patient, slide or tile family that must stay on one side of a
    split, "" where unknown.
    """
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(label_names)),
            "center": datasets.ClassLabel(names=list(center_names)) if center_names else datasets.Value("int64"),
            "group": datasets.Value("string"),
        }
    )


def holds(data: datasets.DatasetDict) -> bool:
    """Whether the splits of a data set have the columns of `features`, no others, and the same classes and centers."""
    first = next(iter(data.values()), None)
    if (
        first is None
        or not isinstance(first.features.get("label"), datasets.ClassLabel)
        or "center" not in first.features
    ):
        return False
    expected = features(first.features["label"].names, center_names(first))
    return all(rows.features == expected for rows in data.values())


def center_names(rows: datasets.Dataset) -> list[str]:
    """Names of the centers by number; none where centers have numbers alone."""
    kind = rows.features["center"]
    return list(kind.names) if isinstance(kind, datasets.ClassLabel) else []


def center_name(center: int, names: Sequence[str]) -> str:
    """A known center as tables show it: its name, or its number where `names` is empty."""
    return names[center] if names else str(center)


def check_texts(where: str, data: datasets.DatasetDict) -> None:
    """Raise HistoError, starting with `where`, for ids, groups and names that a table or terminal can't carry.

    Each must be printable and have at most `MAX_TEXT` characters, and an id must be unique in its split.
    """
    _check_texts(where, "class", pa.chunked_array([next(iter(data.values())).features["label"].names], pa.string()))
    _check_texts(where, "center", pa.chunked_array([center_names(next(iter(data.values())))], pa.string()))
    for split, rows in data.items():
        table = rows.select_columns(["id", "group"]).with_format("arrow")
        ids, groups = table["id"][:], table["group"][:]
        _check_texts(f"{where}: {split}", "id", ids)
        _check_texts(f"{where}: {split}", "group", groups)
        if pc.count_distinct(ids).as_py() < len(ids):
            counts = pc.value_counts(ids)
            twice = counts.filter(pc.greater(counts.field("counts"), 1))[0].as_py()
            found = f"{twice['counts']} images have the id {twice['values']!r}"
            raise HistoError(f"{where}: {split}: {found}, expected another one for each; correct or remove them")


def _check_texts(where: str, what: str, texts: pa.ChunkedArray) -> None:
    good = pc.and_(pc.utf8_is_printable(texts), pc.less_equal(pc.utf8_length(texts), MAX_TEXT))
    for text in texts.filter(pc.invert(good)).slice(0, 1).to_pylist():
        found = f"the {what} {text[:80]!r}{'...' if len(text) > 80 else ''}"
        raise HistoError(f"{where}: {found}, expected printable text of at most {MAX_TEXT} characters; rename it")


def encode_ppm(image: np.ndarray) -> bytes:
    """Pack a uint8 array (H, W, 3) as a binary PPM ("P6", https://netpbm.sourceforge.net/doc/ppm.html).

    Lossless and uncompressed: `datasets.Image` and PIL open it like any image file, and NumPy reads it without a copy.
    """
    height, width, _ = image.shape
    if not image.flags.c_contiguous:  # faster than `image.tobytes()`, which copies value by value
        planes, image = image, np.empty(image.shape, np.uint8)
        for channel in range(3):
            image[..., channel] = planes[..., channel]
    return b"P6\n%d %d\n255\n" % (width, height) + image.tobytes()


def decode(
    data: bytes | memoryview,
    source: str = "image",
    reading: Reading = DEFAULT_READING,
    *,
    strict: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """Decode the bytes of an image file into a contiguous uint8 RGB tensor (3, H, W) in [0, 255] that owns its memory.

    8-bit PPM is read by NumPy, DICOM by `dicom.decode`, any other format by PIL (see `rgb`). Of an animation, the first
    frame is decoded. The pages of a TIFF are its images without those marked as copies of lower resolution or as masks.

    Args:
        data: the whole file.
        source: names the image in errors.
        reading: bit depth of 16-bit gray, see `rgb`; page; window of DICOM.
        strict: decode a JPEG with libjpeg-turbo as well, which reports faults that PIL ignores: data that is missing,
            zeroed, or too short or long for the image's size. Pass False for bytes that were checked before.
        max_pixels: largest width x height, checked in the header before anything else is read.

    Raises HistoError, starting with `source`, for a format other than `FORMATS` and DICOM (by content, not by file
    name), a damaged file, an image larger than `max_pixels`, several pages without `reading.page`, and as `rgb` and
    `dicom.decode` do.
    """
    with _refusing(source, f"{len(data)} bytes starting with {bytes(data[:8])!r}"):
        if header := _PPM.match(data):
            width, height = int(header[1]), int(header[2])
            check_size(width, height, max_pixels)
            pixels = np.frombuffer(data, np.uint8, 3 * height * width, header.end()).reshape(height, width, 3)
        elif dicom.is_dicom(data):
            pixels = dicom.decode(data, reading, max_pixels)
            pixels = pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1)
        else:
            with _opened(io.BytesIO(data), max_pixels) as image:
                _turn_to_page(image, reading.page)
                check_size(*image.size, max_pixels)
                pixels = _rgb(image, reading.gray_bits)
                if strict and image.format in ("JPEG", "MPO"):
                    _check_jpeg(data)
    return _tensor(pixels)


def _tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """An image (H, W, 3) as a contiguous tensor (3, H, W) that owns its memory."""
    import torch

    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def rgb(image: PIL.Image.Image, source: str = "image", reading: Reading = DEFAULT_READING) -> NDArray[np.uint8]:
    """A PIL image as uint8 (H, W, 3) in [0, 255], exactly as `decode` reads its file.

    EXIF orientation is applied and transparency dropped. 16-bit gray values are divided by 2^(gray_bits - 8), so that
    the range of `gray_bits` (8 to 16) bits becomes 0 to 255, inverted where a TIFF states that zero is white (a
    PIL copy of it does not); 16-bit color keeps its high byte. CMYK becomes RGB as PIL does it: each of C, M and Y
    darkens its complement, K all three, and a color profile is not used. An image that PIL opened but has not decoded
    yet is decoded from its file; one at another page than the first is that page.

    Raises HistoError, starting with `source`, for 16-bit gray without `gray_bits` or with values beyond that range, for
    pixels without a fixed range (32-bit integers, floats), and as `decode` does.
    """
    if (data := _undecoded(image)) is not None:
        return decode(data, source, reading).permute(1, 2, 0).numpy()
    with _refusing(source, f"a PIL image of mode {image.mode}"):
        return _rgb(image, reading.gray_bits)


def checked(data: bytes, source: str, reading: Reading = DEFAULT_READING) -> bytes:
    """Bytes to store for an image file: its own, or an 8-bit PNG of 16-bit gray, DICOM, and a page of several.

    Raises HistoError as `decode` does.
    """
    pixels = decode(data, source, reading)
    if _is_kept(data):
        return data
    is_gray = bool((pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all())
    buffer = io.BytesIO()
    PIL.Image.fromarray((pixels[0] if is_gray else pixels.permute(1, 2, 0)).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def refuse_dicom(data: bytes | memoryview, source: str) -> None:
    """Raise HistoError for DICOM within a table: `datasets` would copy it to the cache, with what names the patient."""
    if dicom.is_dicom(data):
        raise HistoError(
            f"{source}: a DICOM file within a table, expected it as a file, since a table is copied to the cache with "
            "all that names the patient; give a table of the files' paths"
        )


@dataclass(frozen=True)
class Facts:
    """What is found in an image file before it is decoded.

    Attributes:
        peak: the largest value of 16-bit gray, else None.
        pages: number of pages or frames.
        patient: issuer and id of a DICOM file's patient (see `dicom.header`), else None.
    """

    peak: int | None = None
    pages: int = 1
    patient: str | None = field(default=None, repr=False)


def facts(path: Path, page: int | None = None) -> Facts:
    """Facts of a file, by its header, or of 16-bit gray by its (chosen) page; no fault of it is reported."""
    if dicom.is_dicom_file(path):
        frames, patient = dicom.header(path)
        return Facts(pages=frames, patient=patient)
    try:
        with _opened(path) as image:
            pages = _turn_to_page(image, page)
            return Facts(_peak(image), pages)
    except Exception:  # PIL's readers can raise any exception; `decode` reports it
        return Facts()


def brightest(file: Path | io.BytesIO, page: int | None = None) -> int | None:
    """The largest value of a 16-bit gray image; None for other images (by the header) and those `decode` refuses."""
    try:
        with _opened(file) as image:
            _turn_to_page(image, page)
            return _peak(image)
    except Exception:  # PIL's readers can raise any exception; `decode` reports it
        return None


def bits_for(peaks: Iterable[int | None], gray_bits: int | None = None) -> int | None:
    """Bit depth of a data set's 16-bit gray images: `gray_bits`, or the smallest of `GRAY_BITS` that holds every value.

    Args:
        peaks: `brightest` of each image.
        gray_bits: value of `--gray_bits`, or None.

    Returns None if no image is 16-bit gray.
    """
    found = [peak for peak in peaks if peak is not None]
    return (gray_bits or next(bits for bits in GRAY_BITS if max(found) < 2**bits)) if found else None


def record(info: datasets.DatasetInfo, reading: Reading) -> None:
    """Record in a data set's description how its images were read."""
    for name, start in _STARTS.items():
        if (value := getattr(reading, name)) is not None:
            info.description += f"\n{start}{window_text(value) if name == 'window' else value}"


def recorded(dataset: datasets.Dataset) -> Reading:
    """How the images of a loaded data set were read; a field is None where it had no effect on them."""
    lines = (dataset.info.description or "").splitlines()
    bits, page, window, mpp, size = (
        next((line.removeprefix(start).split(";")[0] for line in lines if line.startswith(start)), None)
        for start in _STARTS.values()
    )
    bits, page, size = (int(value) if value else None for value in (bits, page, size))
    return Reading(bits, page, parse_window(window), float(mpp) if mpp else None, size)


@contextmanager
def _refusing(source: str, found: str) -> Iterator[None]:
    try:
        yield
    except RefusedError as error:
        raise HistoError(f"{source}: {error}") from None
    # PIL's readers raise almost any exception for broken bytes: SyntaxError, struct.error, zlib.error, MemoryError...
    except Exception as error:
        raise HistoError(f"{source}: not a readable image ({found}: {error}); repair or remove it") from error


@contextmanager
def _opened(file: Path | io.BytesIO, max_pixels: int = MAX_PIXELS) -> Iterator[PIL.Image.Image]:
    """Open an image, reading only its header, and check its format and size."""
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False  # other packages set it, for the whole process
    with warnings.catch_warnings():
        # PIL warns above 89 megapixels and refuses above 179, both by the header alone.
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", message="Palette images with Transparency")  # transparency is dropped
        try:
            with PIL.Image.open(file, formats=FORMATS) as image:
                check_size(*image.size, max_pixels)
                yield image
        except PIL.Image.DecompressionBombError as error:
            found = f"{error}, expected at most {MAX_PIXELS:,} in all; scale it down or cut it up"
            raise RefusedError(found) from None


def _pages(image: PIL.Image.Image) -> list[int]:
    """Indices of the pages of a TIFF: without copies of lower resolution and masks, if others are there; else [0]."""
    kinds: list[int] = []
    try:
        while len(kinds) <= MAX_PAGES:
            image.seek(len(kinds))
            kinds.append(image.tag_v2.get(_NEW_SUBFILE_TYPE, 0))  # type: ignore[attr-defined]  # of TIFF
    except EOFError:
        image.seek(0)
        return [place for place, kind in enumerate(kinds) if not kind & _NO_PAGE] or [0]
    raise RefusedError(f"over {MAX_PAGES:,} pages, expected at most as many; divide it")


def _turn_to_page(image: PIL.Image.Image, page: int | None) -> int:
    """Seek to the chosen page of a TIFF, or the only one; returns how many it has, 1 for other formats.

    Raises RefusedError as `reading.page_index` does.
    """
    if image.format != "TIFF":
        return 1
    pages = _pages(image)
    if (place := pages[page_index(len(pages), page, "pages" if len(pages) > 1 else "page")]) != image.tell():
        image.seek(place)
    return len(pages)


def _peak(image: PIL.Image.Image) -> int | None:
    return int(np.asarray(image).max()) if image.mode.startswith("I;16") else None


def _rgb(image: PIL.Image.Image, gray_bits: int | None) -> NDArray[np.uint8]:
    """The one place where pixels of any kind but DICOM become 8-bit RGB, uint8 (H, W, 3)."""
    check_size(*image.size)
    zero_is_white = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        gray = _to_8_bits(np.asarray(image), gray_bits)
        return np.stack([255 - gray if zero_is_white else gray] * 3, axis=-1)  # which PIL inverts in other modes alone
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode} has no fixed range, expected 8 or 16 bits")
    return np.asarray(image.convert("RGB"))


def _to_8_bits(pixels: NDArray[np.uint16], gray_bits: int | None) -> NDArray[np.uint8]:
    if gray_bits is None:
        raise RefusedError(
            "16-bit gray of unknown range, expected 8 bits, or gray_bits, which a data set's images and an adapter "
            "trained on such have; convert it to 8 bits as the training images were"
        )
    if pixels.max() >= 2**gray_bits:
        found = f"value {pixels.max()} in 16-bit gray"
        raise RefusedError(
            f"{found}, expected at most {2**gray_bits - 1}, the range of gray_bits {gray_bits}; scale it like the rest"
        )
    return (pixels >> (gray_bits - 8)).astype(np.uint8)


def _is_kept(data: bytes) -> bool:
    """Whether a file that `decode` reads is stored as it is: any decoder then gives the same pixels."""
    if _PPM.match(data):
        return True
    if dicom.is_dicom(data):
        return False
    with _opened(io.BytesIO(data)) as image:
        several = image.format == "TIFF" and getattr(image, "n_frames", 1) > 1
        return not several and not image.mode.startswith("I;16")


def _check_jpeg(data: bytes | memoryview) -> None:
    """Raise ValueError for a JPEG on which libjpeg warns: for missing, surplus or invalid data."""
    content = bytes(data)
    space = simplejpeg.decode_jpeg_header(content)[2]
    kinds = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}
    simplejpeg.decode_jpeg(content, kinds.get(space, "RGB"), strict=True)


def _undecoded(image: PIL.Image.Image) -> bytes | None:
    """Content of the file behind an image that PIL opened but has not decoded; None unless it is at the first frame."""
    file = getattr(image, "fp", None)
    if file is None or not getattr(image, "tile", None) or image.tell():
        return None
    place = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(place)
    return data


def size(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width in pixels of the image `decode` returns, by the header where possible; raises as PIL does."""
    if header := _PPM.match(data):
        return int(header[2]), int(header[1])
    with _opened(io.BytesIO(data)) as image:
        # EXIF orientations 5 to 8 swap height and width; for some formats PIL has swapped them already.
        turned = image.height != image.width and image.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= 5
    height, width = decode(data).shape[1:] if turned else (image.height, image.width)
    return height, width


class ImageTable(_MapStyle):
    """Map-style `Dataset` of `Sample`s over a table of the schema, decoding images straight from Arrow memory.

    `torch.utils.data.DataLoader` passes whole batches of indices to `__getitems__`. It is pickled as the paths of the
    memory-mapped files and holds no open handle, so workers may be forked or spawned. Reads about 60,000 PPM patches of
    96x96 pixels per second and core, `datasets.Image` about 20,000.

    Args:
        dataset: a table with the columns of `features`.
        prepare: function from uint8 (3, H, W) to uint8 (3, H', W'), applied to each image when it is read.
    """

    def __init__(
        self, dataset: datasets.Dataset, prepare: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self._rows = dataset
        columns = [name for name in ("image", "label", "center") if name in dataset.column_names]
        self._table = dataset.select_columns(columns).with_format("arrow")
        self._prepare = prepare

    def without_images(self) -> ImageTable:
        """The same rows without `image`: label, center and index only."""
        return ImageTable(self._rows.remove_columns("image"))

    def fingerprint(self) -> str:
        """Content hash (xxh3, 128 bits) of all images and centers in row order, 32 hexadecimal digits.

        Of patches that are read from slides, of their places and the content of the files.
        """
        digest = xxhash.xxh3_128(np.array(self.centers, dtype=np.int64).tobytes())
        for image in self._stored():
            place = f"{slides.VERSION}{self._rows.info.config_name}{image}"
            digest.update(place.encode() if isinstance(image, str) else image)
        return digest.hexdigest()

    def center_name(self, center: int) -> str:
        """Name of a center, or its number as text."""
        return center_name(center, center_names(self._rows)) if center >= 0 else str(center)

    @property
    def centers(self) -> list[int]:
        """Acquisition center of each row, -1 where unknown."""
        centers: list[int] = self._table["center"][:].to_pylist()
        return centers

    @property
    def labels(self) -> list[int]:
        """Class index of each row, -1 where hidden."""
        labels: list[int] = self._table["label"][:].to_pylist()
        return labels

    def select(self, rows: Sequence[int]) -> ImageTable:
        """A table of `rows` only, in that order."""
        return ImageTable(self._rows.select(rows), self._prepare)

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Ids of `rows`, in that order."""
        ids: list[str] = self._rows.select_columns("id")[list(rows)]["id"]
        return ids

    def is_of_one_size(self) -> bool:
        """Whether all stored images have the same height and width, by their headers."""
        sizes = set()
        for row, image in enumerate(self._stored()):
            try:
                sizes.add((slides.pixels_of(image),) * 2 if isinstance(image, str) else size(image))
            except Exception:
                if not isinstance(image, str):
                    decode(image, f"image {row}")  # raises an error that names the image
                raise
            if len(sizes) > 1:
                return False
        return True

    def _stored(self) -> Iterator[memoryview | str]:
        for batch in self._table.iter(1000):
            yield from map(_content, batch["image"])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples at `indices`, in that order. Raises HistoError for an image that can't be decoded."""
        table = self._table[list(indices)]
        labels, centers = table["label"].to_pylist(), table["center"].to_pylist()
        samples: list[Sample] = [
            {"label": label, "center": center, "index": index}
            for label, center, index in zip(labels, centers, indices, strict=True)
        ]
        if "image" in table.column_names:
            for sample, row in zip(samples, table["image"], strict=True):
                sample["image"] = self._read(_content(row), sample["index"])
        return samples

    def _read(self, data: memoryview | str, index: int) -> torch.Tensor:
        if isinstance(data, str):
            image = _tensor(slides.read_reference(data))
        else:
            image = decode(data, f"image {index}", strict=False)  # checked when it was stored
        return image if self._prepare is None else self._prepare(image)


def _content(image: pa.StructScalar) -> memoryview | str:
    """The bytes of a stored image, or the place of a patch that is read from its slide (see `slides.reference`)."""
    data = image["bytes"]
    return memoryview(data.as_buffer()) if data.is_valid else str(image["path"].as_py())
