from __future__ import annotations

import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from fixtures import images, truncate

from hf_histo.config import DataOptions
from hf_histo.data.load import fingerprint, load
from hf_histo.data.schema import ImageTable, decode, recorded
from hf_histo.errors import HistoError

SPLITS = ("train", "val", "test")


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with 3 PNG in each split."""
    for number, image in enumerate(images(18)):
        split, name = SPLITS[number // 6], ("cat", "ant")[number % 2]
        write(tmp_path / "data" / split / name / f"{number}.png", image)
    return tmp_path / "data"


def refused(directory: Path, message: str) -> None:
    with pytest.raises(HistoError, match=message) as caught:
        load(directory)
    assert "\n" not in str(caught.value)


def test_rows_follow_the_sorted_paths(folder: Path) -> None:
    data = load(folder)
    assert list(data) == list(SPLITS)
    assert data["train"].features["label"].names == ["ant", "cat"]
    assert data["train"]["id"][:] == [f"train/ant/{i}.png" for i in (1, 3, 5)] + [
        f"train/cat/{i}.png" for i in (0, 2, 4)
    ]
    assert data["train"]["label"][:] == [0, 0, 0, 1, 1, 1]
    assert set(data["val"]["center"]) == {-1} and set(data["test"]["group"]) == {""}
    assert np.array_equal(ImageTable(data["val"])[0]["image"], images(18)[11].transpose(2, 0, 1))


def deep(folder: Path, *peaks: int) -> None:
    """Write 16-bit gray images with these maxima, into the splits in turn."""
    for i, peak in enumerate(peaks):
        write(folder / SPLITS[i % 3] / "ant" / f"deep{i}.png", np.array([[0, peak // 2, peak]], np.uint16))


@pytest.mark.parametrize(
    ("peaks", "bits"), [((300, 4095, 4000), 12), ((300, 4095, 4096), 14), ((200,), 8), ((7, 65535), 16)]
)
def test_sixteen_bits_are_scaled_alike_all_over_the_data_set(folder: Path, peaks: tuple[int, ...], bits: int) -> None:
    deep(folder, *peaks)
    data = load(folder)
    for i, peak in enumerate(peaks):
        rows = data[SPLITS[i % 3]]
        image = ImageTable(rows)[rows["id"][:].index(f"{SPLITS[i % 3]}/ant/deep{i}.png")]["image"]
        assert image[:, 0].tolist() == [[0, (peak // 2) >> (bits - 8), peak >> (bits - 8)]] * 3
    assert all(recorded(rows).gray_bits == bits for rows in data.values())
    assert recorded(data["train"].select([0]).remove_columns("group")).gray_bits == bits


def test_the_bits_may_be_stated_and_must_hold(folder: Path) -> None:
    deep(folder, 300)
    data = load(DataOptions(data=str(folder), gray_bits=12))
    assert recorded(data["train"]).gray_bits == 12 and recorded(load(folder)["train"]).gray_bits == 10
    with pytest.raises(HistoError, match=r"deep0\.png: value 300 in 16-bit gray, expected at most 255"):
        load(DataOptions(data=str(folder), gray_bits=8))
    skipped = load(DataOptions(data=str(folder), gray_bits=8, on_bad_image="skip"))
    assert recorded(skipped["train"]).gray_bits == 8 and len(skipped["train"]) == 6


def test_names_that_a_terminal_would_obey_are_escaped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train/ant/\x1b[31mnotes.txt").touch()
    (folder / "\x1b[31mother").mkdir()
    load(folder)
    assert r"\x1b[31mnotes.txt" in caplog.text and r"\x1b[31mother" in caplog.text and "\x1b" not in caplog.text
    (folder / "train/\x1b[31mnone").mkdir()
    refused(folder, r"train/\\x1b\[31mnone: no images in this folder")


def test_without_such_images_nothing_is_recorded(folder: Path) -> None:
    assert recorded(load(DataOptions(data=str(folder), gray_bits=12))["train"]).gray_bits is None


def test_a_jpeg_with_its_second_half_zeroed_is_named(folder: Path) -> None:
    path = write(folder / "train/ant/zeros.jpg", np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + bytes(path.stat().st_size // 2))
    refused(folder, r"train/ant/zeros\.jpg: not a readable image")


@pytest.mark.parametrize("names", [("Training", "Validation", "Testing"), ("TRAIN", "valid", "Test")])
def test_spellings_of_the_splits(folder: Path, names: tuple[str, ...]) -> None:
    for old, new in zip(SPLITS, names, strict=True):
        (folder / old).rename(folder / f"{new}_")
        (folder / f"{new}_").rename(folder / new)
    data = load(folder)
    assert {name: len(split) for name, split in data.items()} == {"train": 6, "val": 6, "test": 6}
    assert data["val"]["id"][0] == f"{names[1]}/ant/11.png"


def test_a_split_may_be_missing(folder: Path) -> None:
    shutil.rmtree(folder / "val")
    assert list(load(folder)) == ["train", "test"]
    shutil.rmtree(folder / "train")
    data = load(folder)
    assert list(data) == ["test"] and data["test"].features["label"].names == ["ant", "cat"]


def test_class_folders_alone_are_one_split(folder: Path) -> None:
    data = load(folder / "train")
    assert list(data) == ["full"]
    assert data["full"]["id"][:] == [f"ant/{i}.png" for i in (1, 3, 5)] + [f"cat/{i}.png" for i in (0, 2, 4)]


def test_folders_below_a_class(folder: Path) -> None:
    write(folder / "train/ant/patient 7/a.tif", images(1)[0])
    assert load(folder)["train"]["id"][3] == "train/ant/patient 7/a.tif"


@pytest.mark.parametrize(
    ("name", "pixels", "mode"),
    [
        ("gray.png", images(1)[0][..., 0], None),
        ("palette.gif", images(1)[0], "P"),
        ("palette.png", images(1)[0], "P"),
        ("bit.png", images(1)[0], "1"),
        ("clear.png", images(1)[0], "P"),
        ("alpha.png", np.concatenate([images(1)[0], images(1)[0][..., :1]], 2), None),
        ("cmyk.jpg", images(1)[0], "CMYK"),
        ("one.bmp", images(1)[0][:1, :1], None),
        ("LOUD.JPEG", images(1)[0], None),
        ("modern.webp", images(1)[0], None),
    ],
)
def test_any_format_is_embedded_as_it_is(folder: Path, name: str, pixels: np.ndarray, mode: str | None) -> None:
    path = folder / "train/ant" / name
    image = PIL.Image.fromarray(pixels)
    transparency = {"transparency": bytes(range(256))} if name == "clear.png" else {}
    (image.convert(mode) if mode else image).save(path, **transparency)
    train = load(folder)["train"]
    row = train["id"][:].index(f"train/ant/{name}")
    assert train.with_format("arrow")[:]["image"][row]["bytes"].as_py() == path.read_bytes()
    decoded = ImageTable(train)[row]["image"]
    assert tuple(decoded.shape) == (3, *pixels.shape[:2])
    if pixels.dtype == np.uint16:
        assert np.array_equal(decoded[1], pixels >> (4 if "twelve" in name else 8))


def test_refuses_one_unreadable_image_among_many(folder: Path) -> None:
    truncate(folder / "val/cat/8.png")
    refused(folder, r"val/cat/8\.png: not a readable image .*repair or remove")


def test_refuses_what_is_an_image_by_its_name_only(folder: Path) -> None:
    (folder / "val/cat/page.jpg").write_text("<html>404</html>")
    refused(folder, r"page\.jpg: not a readable image")


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares this size, with no pixels in it."""
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


# PIL refuses the first by itself, warns about the second, and ignores the fault in the third.
@pytest.mark.parametrize("size", [(30_000, 30_000), (10_001, 10_000), (9_000, 9_000)])
def test_refuses_giants_before_decoding(folder: Path, size: tuple[int, int], recwarn: pytest.WarningsRecorder) -> None:
    (folder / "train/ant/giant.png").write_bytes(png_header(*size))
    too_large = size[0] * size[1] > 100_000_000
    refused(folder, r"giant\.png: .*pixels.* expected at most 100,000,000" if too_large else r"giant\.png: not a read")
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]


def test_refuses_a_class_that_train_lacks(folder: Path) -> None:
    write(folder / "test/bee/1.png", images(1)[0])
    refused(folder, r"test/bee: a class that .*train lacks, expected one of ant, cat")


@pytest.mark.parametrize("name", ["train/bee", "test/cat/empty", "train/ant/deep/er"])
def test_refuses_folders_without_images(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "notes.txt").touch()
    refused(folder, rf"{name}: no images in this folder")


def test_refuses_a_split_without_classes(folder: Path) -> None:
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    refused(folder, r"val: no folders, expected one for each class")


def test_refuses_an_image_beside_the_classes(folder: Path) -> None:
    write(folder / "train/stray.png", images(1)[0])
    refused(folder, r"train/stray\.png: beside the class folders, expected images")


def test_refuses_two_folders_for_one_split(folder: Path) -> None:
    shutil.copytree(folder / "train", folder / "Training")
    refused(folder, "Training and train both name the split train")


def test_leaves_out_clutter(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = load(folder)["train"]["id"][:]
    for name in ("train/ant/.DS_Store", "train/ant/._1.png", "train/ant/Thumbs.db", ".git/x.png", "__MACOSX/ant/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"clutter")
    assert load(folder)["train"]["id"][:] == before
    assert not caplog.records


def test_warns_of_what_else_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train/ant/readme.txt").touch()
    (folder / "masks").mkdir()
    assert len(load(folder)["train"]) == 6
    assert "left out 1 files that are not images, e.g. readme.txt" in caplog.text
    assert "left out the folders masks" in caplog.text


def test_refuses_links_that_lead_outside(folder: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside/1.png", images(1)[0])
    (folder / "train/ant/link.png").symlink_to(outside)
    refused(folder, r"train/ant/link\.png: a link to .*outside/1\.png")
    (folder / "train/ant/link.png").unlink()
    (folder / "train/link").symlink_to(outside.parent)
    refused(folder, r"train/link: a link to .*outside, expected")


def test_links_within_the_folder(folder: Path) -> None:
    (folder / "train/ant/link.png").symlink_to(folder / "train/ant/1.png")
    assert load(folder)["train"]["id"][3] == "train/ant/link.png"
    (folder / "train/ant/loop").symlink_to(folder / "train")
    refused(folder, r"train/ant/loop: a link to")


def test_a_link_of_a_split_that_leads_outside(folder: Path, tmp_path: Path) -> None:
    (folder / "val").rename(tmp_path / "val")
    (folder / "val").symlink_to(tmp_path / "val")
    refused(folder, r"val: a link to")


def test_a_renamed_class_is_converted_again(folder: Path) -> None:
    load(folder)
    for split in SPLITS:
        (folder / split / "ant").rename(folder / split / "dog")
    assert load(folder)["train"].features["label"].names == ["cat", "dog"]


def test_animations_give_their_first_frame(folder: Path) -> None:
    first, second = (PIL.Image.fromarray(image) for image in images(2))
    first.save(folder / "train/ant/moving.gif", save_all=True, append_images=[second])
    train = load(folder)["train"]
    buffer = io.BytesIO()
    first.save(buffer, "GIF")
    row = train["id"][:].index("train/ant/moving.gif")
    assert np.array_equal(ImageTable(train)[row]["image"], decode(buffer.getvalue()))


def test_a_link_to_itself(folder: Path) -> None:
    loop = folder / "train/ant/loop.png"
    loop.symlink_to(loop)
    refused(folder, r"train/ant/loop\.png: a link that leads back to itself")
    loop.unlink()
    (folder / "train/ant/a").symlink_to(folder / "train/ant/b")
    (folder / "train/ant/b").symlink_to(folder / "train/ant/a")
    assert len(load(folder)["train"]) == 6  # the links are not to folders, and are not named like images


def test_a_folder_named_like_an_image(folder: Path) -> None:
    (folder / "train/ant/7.png").mkdir()
    refused(folder, r"train/ant/7\.png: no images in this folder")


def spoil(folder: Path) -> None:
    """Make 3 of the 6 training images unreadable, one for each reason."""
    truncate(folder / "train/cat/0.png")
    (folder / "train/ant/1.png").write_bytes(b"")
    (folder / "train/cat/2.png").write_bytes(png_header(30_000, 30_000))


def test_unreadable_images_are_left_out_by_name(folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    spoil(folder)
    refused(folder, r"train/ant/1\.png: not a readable image \(0 bytes")
    options = DataOptions(data=str(folder), on_bad_image="skip")
    for run in range(2):
        caplog.clear()
        data = load(options)
        assert data["train"]["id"][:] == ["train/ant/3.png", "train/ant/5.png", "train/cat/4.png"]
        assert len(data["val"]) == 6
        assert "left out 3 images" in caplog.text
        for text in (caplog.text, data["train"].info.description):
            assert "train/ant/1.png: not a readable image (0 bytes" in text
            assert "train/cat/2.png: Image size (900000000 pixels) exceeds" in text
            assert text.count("train/cat/0.png") == 1 and str(folder / "train") not in text
        if run == 0:
            folder = folder.rename(tmp_path / "moved")
            options.data = str(folder)
    refused(folder, r"train/ant/1\.png: not a readable image")  # the cache of those that were read does not hide it


def test_leaving_out_is_other_data(folder: Path) -> None:
    assert fingerprint(load(folder)) != fingerprint(load(DataOptions(data=str(folder), on_bad_image="skip")))


def test_a_class_without_a_readable_image(folder: Path) -> None:
    for name in (1, 3, 5):
        truncate(folder / f"train/ant/{name}.png")
    for _ in range(2):
        with pytest.raises(HistoError, match="train has no readable image of ant; replace"):
            load(DataOptions(data=str(folder), on_bad_image="skip"))


def test_a_split_without_a_readable_image(folder: Path) -> None:
    for path in (folder / "test").rglob("*.png"):
        truncate(path)
    with pytest.raises(HistoError, match="test has no readable image; replace"):
        load(DataOptions(data=str(folder), on_bad_image="skip"))
