"""The one schema that every loader yields, and the fast way to read images back out of it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NotRequired, TypedDict

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
import xxhash

from hf_histo.errors import HistoError

MAX_PIXELS = 100_000_000  # of an image, looked at before it is decoded
# The formats that PIL decodes by itself; of its others, EPS would run Ghostscript.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000")

_PPM = re.compile(rb"P6\s+([1-9]\d*)\s+([1-9]\d*)\s+255\s")


class Sample(TypedDict):
    """One image as training sees it.

    uint8 (3, H, W) in [0, 255], its label (-1: hidden), its center (-1: unknown), its index in the table.
    """

    image: NotRequired[torch.Tensor]  # a table without images has none
    label: int
    center: int
    index: int


def features(label_names: Sequence[str]) -> datasets.Features:
    """The columns of every data set.

    `id` is the key as the source spells it; `image` is stored as bytes inside the table; `label` is an index into
    `label_names`, -1 where the source hides it; `center` is the acquisition center, -1 where unknown; `group` is the
    patient, slide or tile family that must stay on one side of a split, "" where unknown.
    """
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(label_names)),
            "center": datasets.Value("int64"),
            "group": datasets.Value("string"),
        }
    )


def encode_ppm(image: np.ndarray) -> bytes:
    """Pack a uint8 array (H, W, 3) as a binary PPM ("P6", https://netpbm.sourceforge.net/doc/ppm.html).

    Lossless and uncompressed: `datasets.Image` and PIL open it as any image file, and NumPy reads it where it lies.
    """
    height, width, _ = image.shape
    return b"P6\n%d %d\n255\n" % (width, height) + image.tobytes()


def decode(data: bytes | memoryview, source: str = "image") -> torch.Tensor:
    """Decode the bytes of an image file into a contiguous uint8 RGB tensor (3, H, W) in [0, 255] that owns its memory.

    8-bit PPM is read by NumPy, any other format by PIL with EXIF orientation applied, exactly as `datasets.Image` does
    (torchvision's decoders, deprecated since 0.29, give the same bytes). Transparency is dropped, and the first frame
    of an animation is taken. 16-bit gray values keep their high byte; an image that stays below 4,096 is of 12 bits, as
    scanners give them, and keeps the upper 8 of those.

    Raises HistoError, starting with `source`, for bytes in none of `FORMATS` (the name of a file says nothing), an
    image of over 100 megapixels, told from its header, or one with more than 8 bits in a way that has no fixed range
    (32-bit integers, floats).
    """
    try:
        if header := _PPM.match(data):
            width, height = int(header[1]), int(header[2])
            _check_size(width, height)
            pixels = np.frombuffer(data, np.uint8, 3 * height * width, header.end()).reshape(height, width, 3)
        else:
            pixels = _decode_with_pil(data)
    except _TooLargeError as error:
        raise HistoError(
            f"{source}: {error}, expected at most {MAX_PIXELS:,} in all; scale it down or cut it up"
        ) from None
    # PIL's readers let almost any exception out on broken bytes: SyntaxError, struct.error, zlib.error, MemoryError...
    except Exception as error:
        found = f"{len(data)} bytes starting with {bytes(data[:8])!r}"
        raise HistoError(f"{source}: not a readable image ({found}: {error}); repair or remove it") from error
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def checked(path: Path) -> bytes:
    """The bytes of an image file that `decode` takes. Raises HistoError as that does."""
    data = path.read_bytes()
    decode(data, str(path))
    return data


class _TooLargeError(Exception):
    """The message says how large."""


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _TooLargeError(f"{width:,} x {height:,} pixels")


@contextmanager
def _opened(data: bytes | memoryview) -> Iterator[PIL.Image.Image]:
    """The image by its header, no larger than `MAX_PIXELS`."""
    with warnings.catch_warnings():
        # PIL warns from 89 megapixels on and refuses from 179 on, both from the header alone.
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", message="Palette images with Transparency")  # which is dropped
        try:
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(*image.size)
                yield image
        except PIL.Image.DecompressionBombError as error:
            raise _TooLargeError(str(error)) from None


def _decode_with_pil(data: bytes | memoryview) -> np.ndarray:
    with _opened(data) as file:
        image = PIL.ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16"):
            pixels = np.asarray(image)
            image = PIL.Image.fromarray((pixels >> (8 if pixels.max() >= 4096 else 4)).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"pixel mode {image.mode} has no fixed range, expected 8 or 16 bits")
        return np.asarray(image.convert("RGB"))


def size(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width that `decode` will give, from the header wherever that tells them; raises whatever PIL does."""
    if header := _PPM.match(data):
        return int(header[2]), int(header[1])
    with _opened(data) as image:
        # Orientations from 5 on swap the sides, in some formats already here.
        turned = image.height != image.width and image.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= 5
    height, width = decode(data).shape[1:] if turned else (image.height, image.width)
    return height, width


class ImageTable(torch.utils.data.Dataset[Sample]):
    """The images and labels of a schema table as tensors, straight from its Arrow memory (the hot path).

    Works with `torch.utils.data.DataLoader`, which hands whole batches to `__getitems__`; pickles as the paths of the
    memory-mapped files, and holds no handle that a fork could break. Reads some 60 thousand PPM patches of 96x96 per
    second and core, where `datasets.Image` reads some 20 thousand.

    Args:
        dataset: of the one schema.
        prepare: from uint8 (3, H, W) to uint8 (3, H, W) of another size, say; applied to every image that is read.
    """

    def __init__(
        self, dataset: datasets.Dataset, prepare: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self._rows = dataset
        columns = [name for name in ("image", "label", "center") if name in dataset.column_names]
        self._table = dataset.select_columns(columns).with_format("arrow")
        self._prepare = prepare

    def without_images(self) -> ImageTable:
        """The same rows, each with its label, center and index alone."""
        return ImageTable(self._rows.remove_columns("image"))

    def fingerprint(self) -> str:
        """Content hash (xxh3, 128 bits) of the images and centers in their order, in 32 hexadecimal digits."""
        digest = xxhash.xxh3_128(np.array(self.centers, dtype=np.int64).tobytes())
        for image in self._stored():
            digest.update(image)
        return digest.hexdigest()

    @property
    def centers(self) -> list[int]:
        """Of every row."""
        return self._table["center"][:].to_pylist()

    @property
    def labels(self) -> list[int]:
        """Of every row."""
        return self._table["label"][:].to_pylist()

    def select(self, rows: Sequence[int]) -> ImageTable:
        """The images of these rows, in this order."""
        return ImageTable(self._rows.select(rows), self._prepare)

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Of these rows, in this order."""
        return self._rows.select_columns("id")[list(rows)]["id"]

    def is_of_one_size(self) -> bool:
        """Whether all images are stored with the same height and width, by their headers."""
        sizes = set()
        for row, image in enumerate(self._stored()):
            try:
                sizes.add(size(image))
            except Exception:
                decode(image, f"image {row}")  # tells what is wrong with it
                raise
            if len(sizes) > 1:
                return False
        return True

    def _stored(self) -> Iterator[memoryview]:
        for batch in self._table.iter(1000):
            yield from (memoryview(row["bytes"].as_buffer()) for row in batch["image"])

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
                sample["image"] = self._read(memoryview(row["bytes"].as_buffer()), sample["index"])
        return samples

    def _read(self, data: memoryview, index: int) -> torch.Tensor:
        image = decode(data, f"image {index}")
        return image if self._prepare is None else self._prepare(image)
