from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from fixtures import images

from hf_histo.data.schema import ImageTable, decode, encode_ppm, features, size
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
def test_the_size_is_told_before_decoding(format: str, orientation: int) -> None:
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


def test_a_header_that_tells_no_size_is_named() -> None:
    rows = {"image": [{"bytes": b"no image", "path": None}], "id": ["x"], "label": [0], "center": [7], "group": [""]}
    with pytest.raises(HistoError, match=r"^image 0: not a readable image"):
        ImageTable(datasets.Dataset.from_dict(rows, features=features(["a", "b"]))).is_of_one_size()


def test_what_is_read_can_be_prepared_and_selected(table: datasets.Dataset) -> None:
    read = ImageTable(table, torch.flipud).select([7, 3])
    assert read.centers == [7, 3] and [sample["index"] for sample in read.__getitems__([0, 1])] == [0, 1]
    assert torch.equal(read[1]["image"], torch.flipud(ImageTable(table)[3]["image"]))


def test_sixteen_bits_keep_the_high_byte() -> None:
    gray = np.array([[0, 255], [256, 65535]], np.uint16)
    assert decode(file_bytes(gray, "PNG"))[0].tolist() == [[0, 0], [1, 255]]
    gray = np.array([[0, 255], [256, 4095]], np.uint16)  # 12 bits
    assert decode(file_bytes(gray, "PNG"))[0].tolist() == [[0, 15], [16, 255]]


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
    """PIL would hand this to Ghostscript, which is an interpreter."""
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
