from __future__ import annotations

import builtins
import io
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pydicom
import pytest
from dicom_files import SECRET, content, dicom, dicom_bytes, planted, write_dicom
from fixtures import images
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_windowing
from pydicom.uid import (
    HEVCMP51,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from hf_histo.config import DataOptions
from hf_histo.data.load import load
from hf_histo.data.readers import dicom as reader
from hf_histo.data.reading import Reading
from hf_histo.data.schema import ImageTable, checked, decode, recorded
from hf_histo.errors import HistoError

FILES = Path(pydicom.__file__).parent / "data/test_files"  # real ones, which pydicom ships
GRAY = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)  # 12 bits
LARGE = np.tile(GRAY, (4, 4))  # enough for the resolutions of JPEG 2000


def gray(data: bytes, **reading: Any) -> np.ndarray:
    """The levels of a gray image, (H, W)."""
    found = decode(data, "a.dcm", Reading(**reading)).numpy()
    assert (found == found[:1]).all()
    return found[0]


def refused(data: bytes, message: str, **reading: Any) -> None:
    with pytest.raises(HistoError, match=f"^a.dcm: {message}") as caught:
        decode(data, "a.dcm", Reading(**reading))
    assert "\n" not in str(caught.value)


def test_without_a_window_the_stored_bits_are_the_range() -> None:
    assert np.array_equal(gray(dicom_bytes(GRAY, BitsStored=12)), GRAY >> 4)
    eight = images(1)[0][..., 0]
    assert np.array_equal(gray(dicom_bytes(eight)), eight)
    inverted = gray(dicom_bytes(GRAY, BitsStored=12, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(inverted, 255 - (GRAY >> 4))
    signed = (GRAY.astype(np.int16) - 2048) & 0x0FFF  # two's complement of 12 bits, the other bits zero
    assert np.array_equal(gray(dicom_bytes(signed.astype(np.int16), BitsStored=12)), GRAY >> 4)
    falling = gray(dicom_bytes(GRAY, BitsStored=12, RescaleSlope=-2, RescaleIntercept=7))
    assert np.array_equal(falling, (4095 - GRAY) >> 4)


def test_bits_beyond_the_stored_ones_are_no_part_of_a_value() -> None:
    overlaid = GRAY | (np.uint16(1) << 13)  # as overlays of old files are
    assert np.array_equal(gray(dicom_bytes(overlaid, BitsStored=12)), GRAY >> 4)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_are_those_of_pydicom(function: str) -> None:
    file = dicom(GRAY, BitsStored=12, RescaleSlope=0.5, RescaleIntercept=-1000, VOILUTFunction=function)
    file.WindowCenter, file.WindowWidth = [-300, 40], [800, 400]  # the first one counts
    hounsfield = GRAY * 0.5 - 1000
    expected = apply_windowing(hounsfield, file)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert np.abs(gray(content(file)) - 255 * expected).max() <= (0.51 if function != "SIGMOID" else 8)
    chosen = gray(content(file), window=(100.0, 1000.0))
    assert np.array_equal(chosen == 0, hounsfield <= 100 - 0.5 - 999 / 2)
    assert np.array_equal(chosen == 255, np.rint((((hounsfield - 99.5) / 999) + 0.5) * 255) >= 255)


def test_values_of_a_window_by_hand() -> None:
    """PS3.3 C.11.2.1.2.1: of center 2048 and width 4096, the range 0 to 4095 becomes all of the output."""
    file = dicom_bytes(GRAY, BitsStored=12, WindowCenter=2048, WindowWidth=4096)
    assert np.array_equal(gray(file), np.rint(GRAY / 4095 * 255))
    assert set(gray(file, window=(1000.0, 1.0)).flat) == {0, 255}


def lookup(first: int, bits: int, entries: np.ndarray) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.add_new("LUTData", "US", entries.tolist())
    return item


def test_lookup_tables() -> None:
    """Of 8 bits with more than 256 entries, which pydicom's own function gets wrong."""
    voi = lookup(100, 8, np.arange(1000) // 4)
    expected = (GRAY.astype(int) - 100).clip(0, 999) // 4
    assert np.array_equal(gray(dicom_bytes(GRAY, BitsStored=12, VOILUTSequence=[voi])), expected)
    modality = lookup(0, 16, 65535 - 16 * np.arange(4096))
    found = gray(dicom_bytes(GRAY, BitsStored=12, ModalityLUTSequence=[modality]))
    assert np.array_equal(found, (65535 - 16 * GRAY.astype(int)) >> 8)


def test_color() -> None:
    color = images(1)[0]
    assert np.array_equal(decode(dicom_bytes(color)), color.transpose(2, 0, 1))
    planes = dicom(color, PlanarConfiguration=1, PixelData=color.transpose(2, 0, 1).tobytes())
    assert np.array_equal(decode(content(planes)), color.transpose(2, 0, 1))
    deep = dicom_bytes(color.astype(np.uint16) << 8 | 7)
    assert np.array_equal(decode(deep), color.transpose(2, 0, 1))
    luma = np.asarray(PIL.Image.fromarray(color).convert("YCbCr"))
    found = decode(dicom_bytes(luma, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(found.numpy().astype(int) - color.transpose(2, 0, 1)).max() <= 3


def test_palette() -> None:
    numbers, colors = np.arange(12, dtype=np.uint8).reshape(3, 4), images(1)[0].reshape(-1, 3)[:12]
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [12, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = (colors[:, channel].astype("<u2") * 257).tobytes()
    found = decode(dicom_bytes(numbers, **palette))
    assert np.array_equal(found, colors[numbers].transpose(2, 0, 1))


def test_frames_are_chosen() -> None:
    frames = np.stack([GRAY, GRAY // 2, GRAY // 4])
    file = dicom_bytes(frames, frames=3, BitsStored=12)
    refused(file, r"3 frames, expected one; choose it by --page \(1 to 3\)")
    refused(file, "3 frames, expected at least 4, which --page asks for", page=4)
    for page in (1, 2, 3):
        assert np.array_equal(gray(file, page=page), frames[page - 1] >> 4)


def test_the_window_of_a_frame() -> None:
    """Of an enhanced file: PS3.3 C.7.6.16."""

    def group(center: int) -> pydicom.Dataset:
        item, settings = pydicom.Dataset(), pydicom.Dataset()
        settings.WindowCenter, settings.WindowWidth = center, 100
        item.FrameVOILUTSequence = [settings]
        return item

    shared, rescale = pydicom.Dataset(), pydicom.Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, -1000
    shared.PixelValueTransformationSequence = [rescale]
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": [group(0), group(2000)]}
    file = dicom_bytes(np.stack([GRAY, GRAY]), frames=2, BitsStored=12, **groups)
    for page, center in ((1, 0), (2, 2000)):
        found = gray(file, page=page)
        assert np.array_equal(found == 0, GRAY.astype(int) - 1000 <= center - 0.5 - 99 / 2)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_encodings(syntax: str) -> None:
    pixels = GRAY.astype(">u2") if syntax == ExplicitVRBigEndian else GRAY
    file = dicom(pixels, BitsStored=12, syntax=syntax, WindowCenter=2048, WindowWidth=4096)
    assert np.array_equal(gray(content(file)), np.rint(GRAY / 4095 * 255))


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "MR_small_implicit.dcm"),
        ("SC_rgb_rle.dcm", "SC_rgb_gdcm_KY.dcm"),
    ],
)
def test_real_files_are_equal_in_every_lossless_encoding(name: str, same: str) -> None:
    assert np.array_equal(*(decode((FILES / file).read_bytes(), file) for file in (name, same)))


def test_jpeg_frames_are_as_pil_decodes_them() -> None:
    """Of baseline JPEG, which both decoders read; up to rounding."""
    buffer = io.BytesIO()
    smooth = np.asarray(PIL.Image.fromarray(images(1)[0]).resize((64, 48)))
    PIL.Image.fromarray(smooth).save(buffer, "JPEG", quality=95, subsampling=0)
    file = dicom(smooth, syntax=JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL_422")
    file.PixelData = encapsulate([buffer.getvalue()])
    file["PixelData"].is_undefined_length = True
    found, expected = decode(content(file)).numpy(), decode(buffer.getvalue()).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 4


def compressed(pixels: np.ndarray, syntax: str, **elements: Any) -> pydicom.FileDataset:
    file = dicom(pixels, **elements)
    file.compress(syntax, encoding_plugin={RLELossless: "pydicom"}.get(syntax, "pylibjpeg"))
    return file


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_a_frame_of_a_compressed_file(syntax: str) -> None:
    file = content(compressed(np.stack([LARGE, LARGE // 2]), syntax, frames=2, BitsStored=12))
    assert np.array_equal(gray(file, page=2), LARGE // 2 >> 4)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"PixelData": None}, r"a DICOM file without PixelData, expected an image"),
        ({"PixelData": GRAY.tobytes()[:-2]}, r"PixelData of 510 bytes, expected 512 by its rows, columns and frames"),
        ({"Rows": 0}, r"a DICOM file of 16 x 0 pixels, expected at least 1 x 1"),
        ({"Rows": 60000, "Columns": 60000}, r"60,000 x 60,000 pixels, expected at most 100,000,000 in all"),
        ({"NumberOfFrames": 2**31 - 1}, r"2,147,483,647 frames, expected one; choose it by --page"),
        ({"NumberOfFrames": 0}, r"a DICOM file of 0 frames, expected at least 1"),
        ({"PhotometricInterpretation": "HSV"}, r"PhotometricInterpretation HSV, expected one of MONOCHROME1, "),
        ({"PhotometricInterpretation": SECRET.upper()}, r"PhotometricInterpretation an unknown one, expected one of"),
        ({"PhotometricInterpretation": None}, r"PhotometricInterpretation none, expected"),
        ({"SamplesPerPixel": 3}, r"SamplesPerPixel 3, expected 1 for MONOCHROME2"),
        ({"BitsAllocated": 32}, r"BitsAllocated 32, BitsStored 16, expected 1, 8 or 16"),
        ({"HighBit": 11}, r"HighBit 11, expected 15, one below BitsStored"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, r"RescaleSlope 0, expected another number"),
        ({"WindowCenter": 0, "WindowWidth": 0}, r"WindowWidth 0, expected at least 1; give --window"),
        ({"WindowCenter": 0, "WindowWidth": 9, "VOILUTFunction": SECRET.upper()}, r"VOILUTFunction of an unknown kind"),
        ({"VOILUTSequence": [lookup(0, 40, np.arange(4))]}, r"a lookup table of 4 entries of 40 bits, expected 4 of 8"),
        ({"PixelData": None, "FloatPixelData": bytes(1024)}, r"a DICOM file of float pixels, expected whole numbers"),
    ],
)
def test_refused_files(elements: dict[str, Any], message: str) -> None:
    refused(dicom_bytes(GRAY, **elements), message)


def test_refused_encodings(monkeypatch: pytest.MonkeyPatch) -> None:
    file = dicom(GRAY, syntax=HEVCMP51)
    file.PixelData = encapsulate([b"1234"])
    refused(content(file), "a transfer syntax of DICOM that is not read, expected one without compression")
    data = content(compressed(LARGE, JPEG2000Lossless))
    with monkeypatch.context() as without:
        decoder = pydicom.pixels.get_decoder(JPEG2000Lossless)
        without.setattr(decoder, "_available", {})
        refused(data, r"a DICOM file compressed as JPEG 2000, which needs pylibjpeg .*hf_histo\[dicom\]")
    original = builtins.__import__

    def absent(name: str, *arguments: Any) -> Any:
        if name == "pydicom":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", absent)
    refused(data, r"a DICOM file, which needs pydicom, expected it to be installed: pip install \"hf_histo\[dicom\]\"")


@pytest.mark.parametrize("kept", [140, 200, 400, 600])
def test_cut_off_files_are_refused(kept: int) -> None:
    refused(dicom_bytes(GRAY)[:kept], "")


def test_a_compressed_frame_of_another_size_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codestream of 60,000 x 60,000 pixels in a file that declares 64 x 64."""
    file = compressed(LARGE, JPEG2000Lossless)
    start = file.PixelData.index(b"\xff\x4f\xff\x51")
    forged = bytearray(file.PixelData)
    forged[start + 8 : start + 16] = (60_000).to_bytes(4, "big") * 2
    file.PixelData = bytes(forged)
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.as_array", None)
    refused(content(file), "a JPEG 2000 frame of 60,000 x 60,000 pixels, expected 64 x 64 as declared")


def test_a_deflated_file_is_inflated_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(dicom(GRAY, syntax=DeflatedExplicitVRLittleEndian))
    refused(data[:-20], r"a deflated DICOM file with no end, expected a whole one")
    monkeypatch.setattr(reader, "MAX_INFLATED", 300)
    refused(data, r"a deflated DICOM file with more than 300 bytes, expected a whole one of at most 300")


BOMBS = """
import resource, sys
import pydicom, pydicom.pixels
from hf_histo.data.reading import Reading, RefusedError
from hf_histo.data.readers.dicom import decode
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for path in sys.argv[1:]:
    try:
        decode(open(path, "rb").read(), Reading(page=1), 10**8)
    except RefusedError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_take_little_memory(tmp_path: Path) -> None:
    """Each is below 4 MB and declares gigabytes; they are refused with 1 GiB of memory beyond what is loaded."""
    small = dicom(GRAY, syntax=DeflatedExplicitVRLittleEndian)
    packed = content(small)
    length = int.from_bytes(packed[140:144], "little")
    bomb = zlib.compressobj(wbits=-15)
    zeros = bomb.compress(bytes(2**24)) + bomb.flush(zlib.Z_FULL_FLUSH)
    packed = packed[: 144 + length] + zeros * 256
    files = {
        "deflated": packed,
        "frames": dicom_bytes(GRAY, NumberOfFrames=2**31 - 1),
        "rows": dicom_bytes(GRAY, Rows=65535, Columns=65535),
        "fits": dicom_bytes(GRAY, Rows=10_000, Columns=10_000),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", BOMBS, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(files), done.stderr
    expected = ("268,435,456 bytes", "PixelData of 512 bytes", "65,535 x 65,535 pixels", "PixelData of 512 bytes")
    assert all(text in line for line, text in zip(lines, expected, strict=True)), lines


def test_stored_bytes_are_pixels_alone() -> None:
    data = content(planted(dicom(GRAY, BitsStored=12), "7"))
    assert SECRET.encode() in data
    stored = checked(data, "a.dcm")
    assert stored.startswith(b"\x89PNG") and SECRET.encode() not in stored
    assert np.array_equal(decode(stored)[0], GRAY >> 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders of DICOM, three patients, with and without a suffix; one image is a PNG."""
    for number, image in enumerate(images(12)):
        gray = image[..., 0].astype(np.uint16) * 8
        name = f"{number}.dcm" if number % 3 else f"1.2.840.{number}"
        file = dicom(gray, BitsStored=12, PatientID=f"P{number // 2 % 3}", WindowCenter=1024, WindowWidth=2048)
        write_dicom(tmp_path / "data" / ("a", "b")[number % 2] / name, file)
    PIL.Image.fromarray(images(1)[0]).save(tmp_path / "data/a/plain.png")
    return tmp_path / "data"


def test_class_folders(folder: Path) -> None:
    rows = load(folder)["full"]
    by_id = dict(zip(rows["id"], rows["group"], strict=True))
    assert len(rows) == 13 and "a/1.2.840.0" in by_id and by_id["a/plain.png"] == ""
    assert by_id["b/1.2.840.3"] == by_id["a/2.dcm"] == by_id["a/8.dcm"] != by_id["a/4.dcm"]
    assert set(rows["group"]) == {"", "patient 1", "patient 2", "patient 3"}
    place = rows["id"].index("a/2.dcm")
    expected = np.rint(images(12)[2][..., 0].astype(int) * 8 / 2047 * 255)
    assert np.array_equal(ImageTable(rows)[place]["image"][1], expected.clip(0, 255))
    assert recorded(rows) == Reading(window="file") and "group: patient" in rows.info.description


def test_a_window_for_all_files(folder: Path) -> None:
    rows = load(DataOptions(data=str(folder), window="512,1024"))["full"]
    expected = np.rint(images(12)[2][..., 0].astype(int) * 8 / 1023 * 255).clip(0, 255)
    assert np.array_equal(ImageTable(rows)[rows["id"].index("a/2.dcm")]["image"][0], expected)
    assert recorded(rows).window == (512, 1024)
    for wrong in ("40", "a,b", "1,2,3", "40,0", "nan,5"):
        with pytest.raises(HistoError, match=r"--window is '.*', expected CENTER,WIDTH"):
            load(DataOptions(data=str(folder), window=wrong))


def test_options_that_can_not_act_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HistoError, match="--page is 1, which can't act here: no image has several pages or frames"):
        load(DataOptions(data=str(folder), page=1))
    for path in [*folder.rglob("*.dcm"), *folder.rglob("1.2*")]:
        path.unlink()
    for name in ("1", "2"):
        PIL.Image.fromarray(images(1)[0]).save(folder / f"b/{name}.png")
    with pytest.raises(HistoError, match="--window is '40,400', which can't act here: no image is DICOM"):
        load(DataOptions(data=str(folder), window="40,400"))


def test_one_patient_id_for_all_is_taken_for_a_placeholder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".png":
            write_dicom(path, dicom(GRAY, BitsStored=12, PatientID=f"{SECRET}0"))
    assert set(load(folder)["full"]["group"]) == {""}
    assert "all DICOM files have one patient id" in caplog.text and SECRET not in caplog.text


def test_a_fault_is_left_out_or_named(folder: Path) -> None:
    (folder / "a/2.dcm").write_bytes(dicom_bytes(GRAY, PixelData=GRAY.tobytes()[:100]))
    with pytest.raises(HistoError, match=r"a/2\.dcm: PixelData of 100 bytes, expected 512"):
        load(folder)
    rows = load(DataOptions(data=str(folder), on_bad_image="skip"))["full"]
    assert len(rows) == 12 and "a/2.dcm: PixelData of 100 bytes" in rows.info.description
