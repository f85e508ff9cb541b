"""DICOM files: one frame, as 8-bit gray or RGB. Needs pydicom and, for compressed pixels, pylibjpeg.

References are to the DICOM standard, e.g. PS3.3 C.7.6.3, https://dicom.nema.org/medical/dicom/current/output/html/.

Only the elements in `_TAGS` are parsed, and `header` alone reads the patient's id. No text of a file is in a message.
"""

from __future__ import annotations

import io
import logging
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_histo.data.reading import Reading, RefusedError, check_size, page_index

SUFFIXES = (".dcm", ".dicom")
MAX_INFLATED = 2**28  # bytes of a deflated data set
MAX_BITS = 16  # of a stored value
REMEDY = "export it again, or remove it"

_MARK = slice(128, 132)  # PS3.10 7.1: a preamble of 128 bytes, then this prefix
_PATIENT_TAGS = ["PatientID", "IssuerOfPatientID"]
_TAGS = [
    *("PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "FloatPixelData", "DoubleFloatPixelData"),
    *(f"{color}PaletteColorLookupTable{part}" for color in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
_GRAY = ("MONOCHROME1", "MONOCHROME2")
_COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # of three samples; pydicom makes them RGB
_UNREAD = ("YBR_PARTIAL_422", "YBR_PARTIAL_420", "HSV", "ARGB", "CMYK", "XYB")
# PS3.5 10 and A.4: the syntaxes that pylibjpeg decodes, beside those without compression and run lengths.
_COMPRESSED = {
    f"1.2.840.10008.1.2.4.{number}": name
    for number, name in {
        **{50: "JPEG", 51: "JPEG", 57: "lossless JPEG", 70: "lossless JPEG", 80: "JPEG-LS", 81: "JPEG-LS"},
        **{90: "JPEG 2000", 91: "JPEG 2000", 201: "JPEG 2000", 202: "JPEG 2000", 203: "JPEG 2000"},
    }.items()
}
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_DEFLATED, _EXPLICIT, _RUN_LENGTHS = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5"


def is_dicom(start: bytes | memoryview) -> bool:
    """Whether a file is DICOM, by its first 132 bytes."""
    return bytes(start[_MARK]) == b"DICM"


def is_dicom_file(path: Path) -> bool:
    """Whether a regular file is DICOM, by its content; False for one that can't be opened."""
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            return is_dicom(file.read(_MARK.stop))
    except OSError:
        return False


def header(path: Path) -> tuple[int, str]:
    """Number of frames of a DICOM file, and issuer and id of its patient: "" where they are blank.

    The patient is for comparison within the process alone: it must not be written or shown. A file that can't be read
    gives (1, ""); `decode` reports it.
    """
    try:
        with _quietly():
            dataset = _parsed(path.read_bytes(), ["NumberOfFrames", *_PATIENT_TAGS])
            name, issuer = (str(dataset.get(tag) or "").strip() for tag in _PATIENT_TAGS)
            return int(dataset.get("NumberOfFrames") or 1), f"{issuer}\0{name}" if name else ""
    except RefusedError:
        return 1, ""


def decode(data: bytes | memoryview, reading: Reading, max_pixels: int) -> NDArray[np.uint8]:
    """One frame of the bytes of a DICOM file: uint8, (H, W) if gray, else (H, W, 3).

    Gray values are those of PS3.3 C.11: modality LUT or rescale, then `reading.window`, or the file's first VOI LUT or
    window, inverted for MONOCHROME1. Without any window, the range of `BitsStored` (or of the modality LUT) becomes 0
    to 255 as in 16-bit PNG images. Color of more than 8 bits keeps its high byte.

    Raises RefusedError, also if pydicom or the decoder of a compressed file is missing.
    """
    with _quietly():
        dataset = _parsed(bytes(data), _TAGS)
        kind = _checked_kind(dataset)
        rows, columns = (int(dataset.get(name) or 0) for name in ("Rows", "Columns"))
        if rows < 1 or columns < 1:
            raise RefusedError(f"a DICOM file of {columns} x {rows} pixels, expected at least 1 x 1; {REMEDY}")
        check_size(columns, rows, max_pixels)
        count = dataset.get("NumberOfFrames")
        frames = 1 if count in (None, "") else int(count)
        if frames < 1:
            raise RefusedError(f"a DICOM file of {frames} frames, expected at least 1; {REMEDY}")
        frame = page_index(frames, reading.page, "frames")
        stored = _frame(dataset, frame, frames, max_pixels)
        if kind in _COLOR:
            return _high_byte(stored, int(dataset.BitsStored))
        if kind == "PALETTE COLOR":
            from pydicom.pixels.processing import apply_color_lut

            return _high_byte(apply_color_lut(stored, dataset), int(dataset.RedPaletteColorLookupTableDescriptor[2]))
        bits = int(dataset.BitsStored)
        table = _gray_table(dataset, frame, reading, bits)
        gray: NDArray[np.uint8] = table[stored.astype(np.int64, copy=False) & (2**bits - 1)]
        return gray


@contextmanager
def _quietly() -> Iterator[None]:
    """Refuse what pydicom can't read, without its messages, warnings and log records: they may quote a file's text."""
    logs = [logging.getLogger(name) for name in ("pydicom", "pylibjpeg")]
    before = [log.disabled for log in logs]
    try:
        for log in logs:
            log.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"not a readable DICOM file ({type(error).__name__}); {REMEDY}") from None
    finally:
        for log, disabled in zip(logs, before, strict=True):
            log.disabled = disabled


def _parsed(data: bytes, tags: Sequence[str]) -> Any:
    """The elements `tags` of a file, as a `pydicom.Dataset`."""
    try:
        import pydicom
    except ImportError:
        raise RefusedError(
            'a DICOM file, which needs pydicom, expected it to be installed: pip install "hf_histo[dicom]"'
        ) from None
    if not is_dicom(data):
        raise RefusedError(f"not a DICOM file: no DICM after 128 bytes, expected a file as of PS3.10; {REMEDY}")
    file = io.BytesIO(_inflated(data))
    return pydicom.dcmread(file, specific_tags=list(tags), stop_before_pixels="PixelData" not in tags)


def _inflated(data: bytes) -> bytes:
    """The file with its data set inflated (PS3.5 A.5), which pydicom would do without a bound."""
    syntax = re.search(rb"\x02\x00\x10\x00UI(..)([0-9.]+)", data[: 2**12], re.DOTALL)
    length = re.search(rb"^\x02\x00\x00\x00UL\x04\x00(....)", data[_MARK.stop : _MARK.stop + 12], re.DOTALL)
    if syntax is None or length is None or syntax[2].decode() != _DEFLATED:
        if syntax is not None and syntax[2].decode() == _DEFLATED:
            raise RefusedError(f"a deflated DICOM file without the length of its header, expected it; {REMEDY}")
        return data
    start = _MARK.stop + 12 + int.from_bytes(length[1], "little")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = unpacker.decompress(data[start:], MAX_INFLATED)
    if not unpacker.eof:
        found = f"more than {MAX_INFLATED:,} bytes" if len(inflated) == MAX_INFLATED else "no end"
        raise RefusedError(
            f"a deflated DICOM file with {found}, expected a whole one of at most {MAX_INFLATED:,}; {REMEDY}"
        )
    first, last = syntax.span(2)
    return data[:first] + _EXPLICIT.encode().ljust(last - first, b"\0") + data[last:start] + inflated


def _checked_kind(dataset: Any) -> str:
    """`PhotometricInterpretation`. Raises RefusedError for pixels that are not read."""
    if any(name in dataset for name in ("FloatPixelData", "DoubleFloatPixelData")):
        raise RefusedError("a DICOM file of float pixels, expected whole numbers; convert it")
    if "PixelData" not in dataset:
        raise RefusedError("a DICOM file without PixelData, expected an image (no report, plan or DICOMDIR); remove it")
    kind = str(dataset.get("PhotometricInterpretation", "")).strip()
    readable = (*_GRAY, *_COLOR, "PALETTE COLOR")
    if kind not in readable:
        found = kind if kind in _UNREAD else "none" if not kind else "an unknown one"
        raise RefusedError(f"PhotometricInterpretation {found}, expected one of {', '.join(readable)}; convert it")
    samples, expected = int(dataset.get("SamplesPerPixel") or 0), 3 if kind in _COLOR else 1
    allocated, stored = int(dataset.get("BitsAllocated") or 0), int(dataset.get("BitsStored") or 0)
    if samples != expected:
        raise RefusedError(f"SamplesPerPixel {samples}, expected {expected} for {kind}; {REMEDY}")
    if allocated not in (1, 8, 16) or not 1 <= stored <= allocated:
        found = f"BitsAllocated {allocated}, BitsStored {stored}"
        raise RefusedError(f"{found}, expected 1, 8 or 16, and at most as many stored; convert it")
    if int(dataset.get("HighBit", stored - 1)) != stored - 1:
        raise RefusedError(f"HighBit {int(dataset.HighBit)}, expected {stored - 1}, one below BitsStored; convert it")
    return kind


def _frame(dataset: Any, frame: int, frames: int, max_pixels: int) -> NDArray[Any]:
    """Stored values of one frame, (H, W) or RGB (H, W, 3); the size that the compressed data declare is checked."""
    from pydicom.pixels.decoders.base import get_decoder

    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    name = _COMPRESSED.get(syntax)
    if name is None and syntax not in (*_PLAIN, _RUN_LENGTHS):
        raise RefusedError(
            "a transfer syntax of DICOM that is not read, expected one without compression, run lengths, JPEG, JPEG-LS "
            "or JPEG 2000; convert it"
        )
    chosen: dict[str, Any] = {}
    if name is None and syntax != _RUN_LENGTHS:
        values = int(dataset.Rows) * int(dataset.Columns) * int(dataset.SamplesPerPixel) * frames
        if dataset.PhotometricInterpretation == "YBR_FULL_422":
            values = values * 2 // 3
        expected = math.ceil(values * int(dataset.BitsAllocated) / 8)
        if len(dataset.PixelData) < expected:
            raise RefusedError(
                f"PixelData of {len(dataset.PixelData):,} bytes, expected {expected:,} by its rows, columns and "
                f"frames; {REMEDY}"
            )
    elif name is not None:
        if "pylibjpeg" not in get_decoder(syntax).available_plugins:
            raise RefusedError(
                f"a DICOM file compressed as {name}, which needs pylibjpeg and its decoders, expected them to be "
                'installed: pip install "hf_histo[dicom]"'
            )
        chosen["decoding_plugin"] = "pylibjpeg"  # not gdcm, where it happens to be installed
        _check_codestream(dataset, frame, frames, name)
    else:
        chosen["decoding_plugin"] = "pydicom"
    array, _ = get_decoder(syntax).as_array(dataset, index=frame, **chosen)
    return np.asarray(array)


def _check_codestream(dataset: Any, frame: int, frames: int, name: str) -> None:
    """Raise RefusedError unless the compressed frame declares the size that the file does."""
    from pydicom.encaps import get_frame

    offsets = None
    if "ExtendedOffsetTable" in dataset:
        offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    data = get_frame(dataset.PixelData, frame, number_of_frames=frames, extended_offsets=offsets)
    found = _size_of_jpeg_2000(data) if name == "JPEG 2000" else _size_of_jpeg(data)
    expected = int(dataset.Columns), int(dataset.Rows)
    if found != expected:
        shown = "of no size" if found is None else f"of {found[0]:,} x {found[1]:,} pixels"
        raise RefusedError(f"a {name} frame {shown}, expected {expected[0]:,} x {expected[1]:,} as declared; {REMEDY}")


def _size_of_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height in the frame header of a JPEG or JPEG-LS (ITU-T T.81 B.2.2, T.87 C.2.2)."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            return width, height
        place += 2 + length
    return None


def _size_of_jpeg_2000(data: bytes) -> tuple[int, int] | None:
    """Width and height in the SIZ marker of a JPEG 2000 codestream (ITU-T T.800 A.5.1), perhaps in a JP2 file."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or start + 24 > len(data):
        return None
    right, bottom, left, top = struct.unpack(">4I", data[start + 8 : start + 24])
    return right - left, bottom - top


def _high_byte(color: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    return (color >> max(bits - 8, 0)).astype(np.uint8)


def _gray_table(dataset: Any, frame: int, reading: Reading, bits: int) -> NDArray[np.uint8]:
    """The gray level, uint8, of each stored value by its bits, (2^bits,)."""
    settings = _settings(dataset, frame)
    stored = np.arange(2**bits)
    if dataset.get("PixelRepresentation"):  # two's complement
        stored = np.where(stored < 2 ** (bits - 1), stored, stored - 2**bits)
    if sequence := settings.get("ModalityLUTSequence"):
        steps, bits = _looked_up(sequence[0], stored, dataset)
        values = steps.astype(np.float64)
    else:
        slope, intercept = _number(settings, "RescaleSlope", 1), _number(settings, "RescaleIntercept", 0)
        if slope == 0:
            raise RefusedError(f"RescaleSlope 0, expected another number; {REMEDY}")
        values = slope * stored + intercept
        steps = stored - stored.min()  # of the whole range, in the order of `values`
        steps = steps if slope > 0 else 2**bits - 1 - steps
    shares = _shares(settings, values, reading, dataset)
    if shares is not None:
        table = np.rint(255 * shares.clip(0, 1)).astype(np.uint8)
    elif bits >= 8:
        table = (steps >> (bits - 8)).astype(np.uint8)
    else:
        table = np.rint(255 * steps / (2**bits - 1)).astype(np.uint8)
    inverted: NDArray[np.uint8] = 255 - table
    return inverted if dataset.PhotometricInterpretation == "MONOCHROME1" else table


def _shares(
    settings: dict[str, Any], values: NDArray[np.float64], reading: Reading, dataset: Any
) -> NDArray[np.float64] | None:
    """Values as shares of the window or the VOI LUT, in [0, 1] after clipping; None where there is neither."""
    if reading.window is not None and reading.window != "file":
        return _windowed(values, *reading.window)
    if sequence := settings.get("VOILUTSequence"):
        looked_up, bits = _looked_up(sequence[0], np.rint(values).astype(np.int64), dataset)
        return np.asarray(looked_up / (2**bits - 1))
    if any(settings.get(name) in (None, "") for name in ("WindowCenter", "WindowWidth")):
        return None
    center, width = (_number(settings, name) for name in ("WindowCenter", "WindowWidth"))
    return _windowed(values, center, width, str(settings.get("VOILUTFunction") or "LINEAR").strip())


def _settings(dataset: Any, frame: int) -> dict[str, Any]:
    """Elements of the modality and VOI LUTs: the file's, or of the frame in an enhanced file (PS3.3 C.7.6.16)."""
    names = [*_TAGS[_TAGS.index("ModalityLUTSequence") : _TAGS.index("SharedFunctionalGroupsSequence")]]
    found = {name: dataset.get(name) for name in names}
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    own = (dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in (*shared, *own):
        for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in (group.get(sequence) or [])[:1]:
                found |= {name: item.get(name) for name in names if name in item}
    return found


def _number(settings: dict[str, Any], name: str, default: float = math.nan) -> float:
    """An element's value, the first of several. Raises RefusedError if it is not finite."""
    value = settings.get(name)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    number = default if value in (None, "") else float(value)
    if not math.isfinite(number):
        raise RefusedError(f"{name} is not a finite number, expected one; {REMEDY}, or give --window")
    return number


def _windowed(
    values: NDArray[np.float64], center: float, width: float, function: str = "LINEAR"
) -> NDArray[np.float64]:
    """Values as shares of a window, in [0, 1] after clipping: PS3.3 C.11.2.1.2.1 and C.11.2.1.3."""
    least = 1 if function == "LINEAR" else 0
    if width < least or width == 0:
        raise RefusedError(f"WindowWidth {width:g}, expected {'at least 1' if least else 'more than 0'}; give --window")
    if function == "LINEAR":
        middle = center - 0.5
        return (values - middle) / (width - 1) + 0.5 if width > 1 else (values > middle).astype(float)
    if function == "LINEAR_EXACT":
        return (values - center) / width + 0.5
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp((-4 * (values - center) / width).clip(-500, 500))))
    raise RefusedError("VOILUTFunction of an unknown kind, expected LINEAR, LINEAR_EXACT or SIGMOID; give --window")


def _looked_up(item: Any, values: NDArray[np.int64], dataset: Any) -> tuple[NDArray[np.int64], int]:
    """Values after a lookup table (PS3.3 C.11.1.1, C.11.2.1.1), and the number of bits of its entries."""
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = count or 2**16
    entries = item.LUTData
    if isinstance(entries, bytes):
        order = ">" if dataset.original_encoding[1] is False else "<"
        entries = np.frombuffer(entries, np.uint8 if len(entries) in (count, count + count % 2) else f"{order}u2")
    entries = np.atleast_1d(np.asarray(entries, np.int64))[:count]
    if len(entries) < count or not 8 <= bits <= MAX_BITS:
        found = f"a lookup table of {len(entries)} entries of {bits} bits"
        raise RefusedError(f"{found}, expected {count} of 8 to {MAX_BITS}; {REMEDY}")
    return entries[(values - first).clip(0, count - 1)], bits
