from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch
from fixtures import images

from hf_histo.data.reading import Reading
from hf_histo.data.schema import ImageTable, bits_for, brightest, checked, decode, encode_ppm, features, rgb, size
from hf_histo.errors import HistoError


def file_bytes(pixels: np.ndarray, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def table(tmp_path: Path) -> datasets.Dataset:
    """250 PPM images over three record batches, mapped from disk."""
    rows = [
        {
            "id": str(i),
            "image": {"bytes": encode_ppm(image), "path": None},
            "label": i % 3 - 1,
            "center": i,
            "group": "",
        }
        for i, image in enumerate(images(250))
    ]
    datasets.Dataset.from_list(rows, features=features(["normal", "tumor"])).save_to_disk(tmp_path / "table")
    return datasets.load_from_disk(tmp_path / "table")


def test_ppm_is_lossless_and_what_pil_reads() -> None:
    image = images(1)[0]
    data = encode_ppm(image)
    assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(data))), image)
    assert np.array_equal(decode(data), image.transpose(2, 0, 1))
    assert encode_ppm(np.asfortranarray(image)) == data


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decodes_image_files_as_rgb(format: str, channels: int) -> None:
    image = images(1)[0]
    data = file_bytes(image if channels == 3 else image[..., 0], format)
    decoded = decode(data)
    assert decoded.dtype == torch.uint8 and decoded.is_contiguous()
    assert np.array_equal(decoded, np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1))


def test_decodes_a_ppm_of_other_writers() -> None:
    image = images(1)[0]
    height, width, _ = image.shape
    data = b"P6\n# by hand\n%d %d\n255\n" % (width, height) + image.tobytes()
    assert np.array_equal(decode(data), image.transpose(2, 0, 1))


def test_transparency_is_dropped_and_orientation_applied() -> None:
    image = images(1)[0]
    alpha = np.zeros((*image.shape[:2], 1), np.uint8)
    assert np.array_equal(decode(file_bytes(np.concatenate([image, alpha], 2), "PNG")), image.transpose(2, 0, 1))
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6  # turn by 90 degrees clockwise to show
    turned = decode(file_bytes(image, "PNG", exif=exif))
    assert np.array_equal(turned, np.rot90(image, -1).transpose(2, 0, 1))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_is_known_before_decoding(format: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = orientation
    data = file_bytes(images(1)[0], format, **({} if format == "PPM" else {"exif": exif}))
    assert (3, *size(data)) == tuple(decode(data).shape)


def test_images_of_one_size(table: datasets.Dataset) -> None:
    assert ImageTable(table).is_of_one_size()
    for other, expected in ((images(1, size=13)[0], False), (images(2)[1], True)):
        extra = {"id": ["x"], "label": [0], "center": [7], "group": [""]}
        rows = {"image": [{"bytes": file_bytes(other, "PNG"), "path": None}], **extra}
        more = datasets.concatenate_datasets([table, datasets.Dataset.from_dict(rows, features=table.features)])
        assert ImageTable(more).is_of_one_size() is expected


def test_an_image_without_a_size_in_its_header_is_named() -> None:
    rows = {"image": [{"bytes": b"no image", "path": None}], "id": ["x"], "label": [0], "center": [7], "group": [""]}
    with pytest.raises(HistoError, match=r"^image 0: not a readable image"):
        ImageTable(datasets.Dataset.from_dict(rows, features=features(["a", "b"]))).is_of_one_size()


def test_what_is_read_can_be_prepared_and_selected(table: datasets.Dataset) -> None:
    read = ImageTable(table, torch.flipud).select([7, 3])
    assert read.centers == [7, 3] and [sample["index"] for sample in read.__getitems__([0, 1])] == [0, 1]
    assert torch.equal(read[1]["image"], torch.flipud(ImageTable(table)[3]["image"]))


@pytest.mark.parametrize(("bits", "expected"), [(16, [[0, 0], [1, 15]]), (12, [[0, 15], [16, 255]])])
def test_sixteen_bits_are_scaled_by_what_is_stated(bits: int, expected: list[list[int]]) -> None:
    gray = file_bytes(np.array([[0, 255], [256, 4095]], np.uint16), "PNG")
    assert decode(gray, reading=Reading(gray_bits=bits))[0].tolist() == expected
    assert decode(checked(gray, "a.png", Reading(gray_bits=bits)))[0].tolist() == expected  # of 8 bits from then on


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_of_another_range_are_refused(format: str) -> None:
    gray = file_bytes(np.array([[0, 4096]], np.uint16), format)
    with pytest.raises(HistoError, match=r"^a: 16-bit gray of unknown range, expected 8 bits"):
        decode(gray, "a")
    with pytest.raises(HistoError, match=r"^a: value 4096 in 16-bit gray, expected at most 4095"):
        decode(gray, "a", Reading(gray_bits=12))


def test_the_bits_of_a_data_set() -> None:
    peaks = [brightest(io.BytesIO(file_bytes(np.array([[7, peak]], np.uint16), "PNG"))) for peak in (300, 4095, 20)]
    assert peaks == [300, 4095, 20]
    assert (bits_for(peaks), bits_for([*peaks, 4096]), bits_for([255]), bits_for(peaks, 16)) == (12, 14, 8, 16)
    others = [brightest(io.BytesIO(data)) for data in (file_bytes(images(1)[0], "PNG"), encode_ppm(images(1)[0]), b"")]
    assert others == [None] * 3 and bits_for(others) is None and bits_for(others, 12) is None


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.gif", "a.bmp", "a.ppm"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("opened", ["lazily", "loaded", "in memory"])
def test_a_pil_image_is_read_as_its_file(tmp_path: Path, name: str, orientation: int, opened: str) -> None:
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = orientation
    PIL.Image.fromarray(images(1)[0]).save(tmp_path / name, **({"exif": exif} if name[2] in "pjtw" else {}))
    with PIL.Image.open(tmp_path / name) as image:
        if opened != "lazily":
            image.load()
        found = rgb(image.copy() if opened == "in memory" else image)
        assert np.array_equal(found, decode((tmp_path / name).read_bytes()).permute(1, 2, 0))
        assert np.array_equal(np.asarray(image), np.asarray(PIL.Image.open(tmp_path / name)))  # it is left as it was


@pytest.mark.parametrize("opened", ["lazily", "loaded"])
def test_a_pil_image_of_many_bits_is_read_as_its_file(tmp_path: Path, opened: str) -> None:
    (tmp_path / "a.png").write_bytes(file_bytes(np.array([[0, 4095]], np.uint16), "PNG"))
    (tmp_path / "a.tif").write_bytes(file_bytes(np.zeros((2, 2), np.float32), "TIFF"))
    deep, floats = (PIL.Image.open(tmp_path / name) for name in ("a.png", "a.tif"))
    if opened == "loaded":
        deep.load(), floats.load()
    assert rgb(deep, reading=Reading(gray_bits=12))[..., 0].tolist() == [[0, 255]]
    with pytest.raises(HistoError, match=r"^image 3: 16-bit gray of unknown range"):
        rgb(deep, "image 3")
    with pytest.raises(HistoError, match=r"^image 3: not a readable image \(.*pixel mode F has no fixed range"):
        rgb(floats, "image 3")


def test_a_pil_image_of_another_format_is_not_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(HistoError, match=r"^image 0: not a readable image"):
        rgb(PIL.Image.open(tmp_path / "a.png"), "image 0")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}, {"optimize": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_whole_jpegs_pass_and_damaged_ones_do_not(mode: str, options: dict[str, object]) -> None:
    smooth = PIL.Image.fromarray(images(1)[0]).resize((200, 160), PIL.Image.Resampling.BICUBIC).convert(mode)
    flat = PIL.Image.new(mode, (200, 160))  # whose data may be runs of zeros
    for image in (smooth, flat):
        whole = file_bytes(np.asarray(image), "JPEG", **options) if mode != "CMYK" else saved(image, **options)
        for data in (whole, whole + b"more"):
            assert decode(data).shape == (3, 160, 200)
    whole = saved(smooth, **options)
    middle = (len(whole) + whole.index(b"\xff\xda")) // 2
    damaged = {
        "second half zeroed": whole[:middle] + bytes(len(whole) - middle),
        "second half zeroed, with an end": whole[:middle] + bytes(len(whole) - middle - 2) + b"\xff\xd9",
        "cut off, with an end": whole[:middle] + b"\xff\xd9",
    }
    for what, data in damaged.items():
        with pytest.raises(HistoError, match=r"^a\.jpg: not a readable image"):
            decode(data, "a.jpg")
            pytest.fail(what)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["brain-tumor-mri", "herlev-papsmear", "lbc-papsmear"])
def test_real_jpegs_pass(name: str) -> None:
    folder = Path(__file__).parents[3] / "shared/data" / name
    if not folder.is_dir():
        pytest.skip(f"the real data are not at {folder}")
    paths = sorted(folder.rglob("*.jpg"))
    assert paths
    for path in paths:
        checked(path.read_bytes(), str(path))


def saved(image: PIL.Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_truncated_images_are_refused_whatever_other_packages_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(HistoError, match="not a readable image"):
        decode(file_bytes(images(1)[0], "PNG")[:-60])


@pytest.mark.parametrize("width", [10_001, 30_000])
def test_giants_are_refused_by_their_header(width: int) -> None:
    ppm = b"P6\n%d 10000\n255\n" % width
    png = bytearray(file_bytes(images(1)[0], "PNG"))
    png[16:24] = struct.pack(">II", width, 10_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    for data in (ppm, bytes(png)):
        with pytest.raises(HistoError, match=r"^image: .*pixels.*, expected at most 100,000,000 in all"):
            decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image at all",
        b"P6\n12 14\n255\nshort",
        file_bytes(images(1)[0], "PNG")[:200],
        file_bytes(images(1)[0], "JPEG")[:200],
        file_bytes(np.zeros((2, 2), np.float32), "TIFF"),
    ],
)
def test_refuses_undecodable_bytes(data: bytes) -> None:
    with pytest.raises(HistoError, match=r"slide\.png: not a readable image .*repair or remove"):
        decode(data, "slide.png")


def test_an_image_is_what_its_bytes_are_and_never_a_program() -> None:
    """PIL would pass this file to Ghostscript, which runs it."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(touched) (w) file closefile\nshowpage\n"
    assert PIL.Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(HistoError, match=r"slide\.png: not a readable image"):
        decode(eps, "slide.png")


@pytest.mark.parametrize("size", [(10_001, 10_000), (99_999_999_999, 99_999_999_999)])
def test_a_giant_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(HistoError, match=r"slide\.png: [\d,]+ x [\d,]+ pixels, expected at most 100,000,000"):
        decode(b"P6\n%d %d\n255\n" % size, "slide.png")


def test_table_equals_the_decoder_of_datasets(table: datasets.Dataset) -> None:
    indices = [249, 0, 101, 0, 100]
    for sample, index in zip(ImageTable(table).__getitems__(indices), indices, strict=True):
        assert np.array_equal(sample["image"], np.asarray(table[index]["image"]).transpose(2, 0, 1))
        assert (sample["label"], sample["index"]) == (table[index]["label"], index)


def test_table_follows_a_selection(table: datasets.Dataset) -> None:
    tensors = ImageTable(table.select([7, 3]))
    assert len(tensors) == 2
    assert torch.equal(tensors[1]["image"], ImageTable(table)[3]["image"])
    assert tensors[1]["index"] == 1


def test_table_keeps_hidden_labels(table: datasets.Dataset) -> None:
    assert [ImageTable(table)[i]["label"] for i in range(3)] == [-1, 0, 1]


def test_images_own_their_memory(table: datasets.Dataset) -> None:
    tensors = ImageTable(table)
    tensors[5]["image"].zero_()  # would end the process if it were the read-only file mapping
    assert tensors[5]["image"].any()


def test_table_pickles_as_paths(table: datasets.Dataset) -> None:
    data = pickle.dumps(ImageTable(table))
    assert len(data) < 10_000
    assert torch.equal(pickle.loads(data)[42]["image"], ImageTable(table)[42]["image"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_table_in_worker_processes(table: datasets.Dataset, context: str) -> None:
    tensors = ImageTable(table)
    expected = tensors[33]["image"]  # opened in the parent, too
    loader = torch.utils.data.DataLoader(tensors, batch_size=32, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(250))
    assert torch.equal(batches[1]["image"][1], expected)


def test_table_names_the_broken_image(table: datasets.Dataset) -> None:
    broken = [{**table[0], "image": {"bytes": b"broken", "path": None}}]
    with pytest.raises(HistoError, match="image 0: not a readable image"):
        ImageTable(datasets.Dataset.from_list(broken, features=table.features))[0]
