"""Pages of TIFF files, 16-bit gray and CMYK: what `schema.decode` chooses, scales and refuses."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from fixtures import images

from hf_histo.config import DataOptions
from hf_histo.data import protocol
from hf_histo.data.load import load
from hf_histo.data.reading import Reading
from hf_histo.data.schema import ImageTable, checked, decode, facts, recorded, rgb
from hf_histo.errors import HistoError

REDUCED, MASK = 1, 4  # TIFF 6.0, NewSubfileType


def tiff(pages: list[np.ndarray], kinds: list[int] | None = None) -> bytes:
    """A TIFF of several pages, with their NewSubfileType."""
    buffer = io.BytesIO()
    with PIL.TiffImagePlugin.AppendingTiffWriter(buffer) as writer:
        for page, kind in zip(pages, kinds or [0] * len(pages), strict=True):
            PIL.Image.fromarray(page).save(writer, "TIFF", tiffinfo={254: kind})
            writer.newFrame()
    return buffer.getvalue()


def test_a_page_is_chosen() -> None:
    pages = list(images(3))
    data = tiff(pages)
    with pytest.raises(HistoError, match=r"^a: 3 pages, expected one; choose it by --page \(1 to 3\)"):
        decode(data, "a")
    with pytest.raises(HistoError, match=r"^a: 3 pages, expected at least 4, which --page asks for"):
        decode(data, "a", Reading(page=4))
    for number, page in enumerate(pages, 1):
        assert np.array_equal(decode(data, reading=Reading(page=number)), page.transpose(2, 0, 1))
        stored = checked(data, "a", Reading(page=number))  # of which no page needs to be chosen
        assert np.array_equal(decode(stored), page.transpose(2, 0, 1))
    with pytest.raises(HistoError, match=r"^a: 1 page, expected at least 2"):
        decode(tiff(pages[:1]), "a", Reading(page=2))
    assert decode(encoded(pages[0], "PNG"), "a", Reading(page=2)).shape == (3, 12, 14)  # formats without pages


def encoded(image: np.ndarray | PIL.Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("first", [True, False], ids=["thumbnail last", "thumbnail first"])
def test_copies_of_lower_resolution_and_masks_are_no_pages(first: bool) -> None:
    whole = images(1)[0]
    others = [(whole[::2, ::2], REDUCED), (whole[..., 0] // 255 * 255, MASK)]
    pages = [(whole, 0), *others] if first else [*others, (whole, 0)]
    data = tiff([page for page, _ in pages], [kind for _, kind in pages])
    for bytes_ in (data, checked(data, "a")):
        assert np.array_equal(decode(bytes_, "a"), whole.transpose(2, 0, 1))
    two = tiff([whole, whole[::2, ::2], whole // 2], [0, REDUCED, 0])
    assert np.array_equal(decode(two, "a", Reading(page=2)), whole.transpose(2, 0, 1) // 2)
    with pytest.raises(HistoError, match=r"^a: 2 pages, expected one"):
        decode(two, "a")


def test_a_pil_image_at_a_page_is_that_page(tmp_path: Path) -> None:
    pages = list(images(2))
    (tmp_path / "a.tif").write_bytes(tiff(pages))
    with PIL.Image.open(tmp_path / "a.tif") as image:
        with pytest.raises(HistoError, match=r"^image: 2 pages, expected one"):
            rgb(image)
        image.seek(1)
        assert np.array_equal(rgb(image), pages[1])


def test_pages_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_histo.data.schema.MAX_PAGES", 3)
    with pytest.raises(HistoError, match=r"^a: over 3 pages, expected at most as many; divide it"):
        decode(tiff(list(images(4))), "a")
    single = bytearray(tiff(list(images(1))))
    place = struct.unpack("<I", single[4:8])[0]
    count = struct.unpack("<H", single[place : place + 2])[0]
    single[place + 2 + 12 * count :][:4] = b""
    single[place + 2 + 12 * count : place + 6 + 12 * count] = struct.pack("<I", place)  # the next page is this one
    assert decode(bytes(single), "a").shape == (3, 12, 14)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_of_either_byte_order(format: str, order: str) -> None:
    values = np.array([[0, 4095, 256]], np.uint16)
    if format == "TIFF":
        mode = {"<": "I;16", ">": "I;16B"}[order]
        data = encoded(PIL.Image.frombytes(mode, (3, 1), values.astype(f"{order}u2").tobytes()), "TIFF")
    else:
        data = encoded(values, "PNG")
    assert decode(data, reading=Reading(gray_bits=12))[0].tolist() == [[0, 255, 16]]


def test_sixteen_bits_of_which_zero_is_white(tmp_path: Path) -> None:
    """TIFF 6.0, PhotometricInterpretation 0: WhiteIsZero."""
    white = encoded(np.array([[0, 4095, 256]], np.uint16), "TIFF", tiffinfo={262: 0})
    reading = Reading(gray_bits=12)
    for data in (white, checked(white, "a", reading)):
        assert decode(data, "a", reading)[0].tolist() == [[255, 0, 239]]
    (tmp_path / "a.tif").write_bytes(white)
    with PIL.Image.open(tmp_path / "a.tif") as image:
        assert rgb(image, "a", reading)[..., 0].tolist() == [[255, 0, 239]]
        image.load()
        assert rgb(image, "a", reading)[..., 0].tolist() == [[255, 0, 239]]


def test_sixteen_bits_of_a_chosen_page(tmp_path: Path) -> None:
    pages = [np.array([[0, peak]], np.uint16) for peak in (1000, 60000)]
    (tmp_path / "a.tif").write_bytes(tiff(pages))
    assert [facts(tmp_path / "a.tif", page).peak for page in (None, 1, 2)] == [None, 1000, 60000]
    assert decode(tiff(pages), reading=Reading(gray_bits=10, page=1))[0].tolist() == [[0, 250]]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_is_converted_without_a_profile(format: str) -> None:
    """Black takes light from all, the others from their complement: of plain areas, up to JPEG's rounding."""
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (100, 0, 0, 50)]
    colors = [(255,) * 3, (0, 255, 255), (255, 0, 255), (255, 255, 0), (0,) * 3, (125, 205, 205)]
    pixels = np.repeat(np.repeat(np.array([inks], np.uint8), 16, 0), 16, 1)
    found = decode(encoded(PIL.Image.fromarray(pixels, "CMYK"), format)).permute(1, 2, 0).numpy()
    assert np.abs(found[8, 8::16].astype(int) - colors).max() <= 3


def test_pages_of_a_folder(tmp_path: Path) -> None:
    pages = images(16)
    for number in range(8):
        path = tmp_path / "data" / ("a", "b")[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiff(list(pages[2 * number : 2 * number + 2])))
    with pytest.raises(HistoError, match=r"0\.tif: 2 pages, expected one; choose it by --page \(1 to 2\)"):
        load(tmp_path / "data")
    rows = load(tmp_path / "data", page=2)["full"]
    assert recorded(rows) == Reading(page=2)
    place = rows["id"].index("b/3.tif")
    assert np.array_equal(ImageTable(rows)[place]["image"], pages[7].transpose(2, 0, 1))


def test_what_is_recorded_stays_beside_notes_on_splits(tmp_path: Path) -> None:
    for number in range(24):
        path = tmp_path / "data" / ("train", "test")[number > 15] / ("a", "b")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 4096, (40, 40)).astype(np.uint16)
        path.write_bytes(encoded(pixels, "PNG"))
    data = protocol.arranged(DataOptions(data=str(tmp_path / "data"), split="published"))
    assert {recorded(rows) for rows in data.values()} == {Reading(gray_bits=12)}
