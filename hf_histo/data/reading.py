"""How images and slides are read: what options and adapters decide about it, and the refusals that decoders share."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, Protocol

from hf_histo.errors import HistoError

MAX_PIXELS = 100_000_000  # largest width x height of an image, checked in the header before decoding

# Center and width of gray values, or "file": those of each DICOM file.
Window = tuple[float, float] | Literal["file"]


class ReadingOptions(Protocol):
    """The options that decide how an image file is read."""

    gray_bits: int | None
    page: int | None
    window: str | None
    mpp: float | None
    patch_size: int | None


@dataclass(frozen=True)
class Reading:
    """How the pixels of image files become 8 bits.

    Attributes:
        gray_bits: bit depth, 8 to 16, of 16-bit gray PNG and TIFF images; None refuses them.
        page: which page of a TIFF, or frame of a DICOM file, from 1; None refuses files with several.
        window: window of gray DICOM images; None: as "file".
        mpp, patch_size: micrometers per pixel, and side in pixels, of the patches of slides; None for other images.
    """

    gray_bits: int | None = None
    page: int | None = None
    window: Window | None = None
    mpp: float | None = None
    patch_size: int | None = None

    @classmethod
    def of(cls, options: ReadingOptions) -> Reading:
        """What the options ask for. Raises HistoError for a `--window` that is none."""
        return cls(options.gray_bits, options.page, parse_window(options.window), options.mpp, options.patch_size)

    def difference(self, other: Reading) -> str | None:
        """Name of the first field that is set in both and differs; None if the two agree."""
        for name in (field.name for field in fields(self)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if None not in (ours, theirs) and ours != theirs:
                return name
        return None

    def text(self, name: str) -> str:
        """A field as its option, e.g. "--page 3"."""
        value = getattr(self, name)
        return f"--{name}={window_text(value) if name == 'window' else value}"


DEFAULT_READING = Reading()


class RefusedError(Exception):
    """An image is refused; the message gives the value found, what was expected, and the remedy."""


def parse_window(text: str | None) -> Window | None:
    """The window that `--window` names as "CENTER,WIDTH"; raises HistoError for any other text."""
    if text is None:
        return None
    if text == "file":
        return "file"
    try:
        center, width = map(float, text.split(","))
    except ValueError:
        center = width = math.nan
    if not (math.isfinite(center) and math.isfinite(width) and width >= 1):
        raise HistoError(
            f"--window is {text!r}, expected CENTER,WIDTH, two numbers, the width at least 1, e.g. --window=-600,1500"
        )
    return center, width


def window_text(window: Window) -> str:
    """The value of `--window` that means `window`."""
    return window if window == "file" else ",".join(format(number, ".15g") for number in window)


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise RefusedError for an image with more than `max_pixels`."""
    if width * height > max_pixels:
        found = f"{width:,} x {height:,} pixels"
        raise RefusedError(f"{found}, expected at most {max_pixels:,} in all; scale it down or cut it up")


def page_index(count: int, page: int | None, what: str) -> int:
    """Index from 0 of the chosen page of a file with `count` of `what`, e.g. "frames".

    Raises RefusedError for a page that is not there, and for several pages without a choice.
    """
    if page is None and count > 1:
        raise RefusedError(f"{count:,} {what}, expected one; choose it by --page (1 to {count})")
    if page is not None and page > count:
        raise RefusedError(f"{count:,} {what}, expected at least {page}, which --page asks for; choose a smaller one")
    return (page or 1) - 1
