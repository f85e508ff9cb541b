"""Tables of slides: how they are recognized, the classes of patches, and what is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from slide_files import feature, pixels, square, write_geojson, write_slides

from hf_histo import launch
from hf_histo.config import Config, DataOptions
from hf_histo.data import protocol, schema
from hf_histo.data.load import fingerprint, load
from hf_histo.data.readers.slide_table import classes_of_patches, drawn, place_of
from hf_histo.data.schema import ImageTable
from hf_histo.data.synthetic.slides import write_dicom, write_tiff
from hf_histo.errors import HistoError


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slides(tmp_path_factory.mktemp("slides") / "data")


@pytest.fixture(scope="module")
def full(table: Path) -> datasets.Dataset:
    return load(table, patch_size=64)["full"]


@pytest.fixture
def copy(table: Path, tmp_path: Path) -> Path:
    """A table that a test may change."""
    shutil.copytree(table.parent, tmp_path / "copy")
    return tmp_path / "copy" / "slides.csv"


def test_patches_have_the_class_of_the_annotations_else_of_the_slide(full: datasets.Dataset) -> None:
    assert full.features == schema.features(["normal", "tumor"], ["A", "B"])
    counts = Counter((place_of(row["id"])[0], row["label"]) for row in full.remove_columns("image"))
    # 8 x 6 squares of tissue, the left half of them normal.
    assert counts == {(f"s{n}", label): 24 for n in (0, 1, 3, 4) for label in (0, 1)} | {("s2", 0): 48, ("s5", 0): 48}
    for row in full.remove_columns("image"):
        name, x, _ = place_of(row["id"])
        number = int(name[1:])
        assert (row["group"], row["center"]) == (f"p{number}", number % 2)
        if number % 3 < 2:
            assert row["label"] == (x >= 320)


def test_a_table_in_memory_is_read_as_its_file(full: datasets.Dataset, table: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(table)
    for column, places in (("slide", frame["slide"]), ("WSI path", [table.parent / name for name in frame["slide"]])):
        given = frame.drop(columns="slide").assign(**{column: places})
        found = load(given, patch_size=64, image_root=table.parent)["full"]
        assert found.remove_columns("image").to_dict() == full.remove_columns("image").to_dict()
        assert torch.equal(ImageTable(found)[7]["image"], ImageTable(full)[7]["image"])
    (shutil.copytree(table.parent, tmp_path / "copy") / "s0.geojson").rename(tmp_path / "copy" / "other.geojson")
    moved = frame.assign(annotations=["other.geojson"] + [None] * 5)
    assert len(load(moved, patch_size=64, image_root=tmp_path / "copy")["full"]) == len(full)
    with pytest.raises(HistoError, match=r"row 2: slide 'no' is missing"):
        load(frame.replace(frame["slide"][2], "no.tiff"), patch_size=64, image_root=table.parent)


def test_patches_are_those_of_the_slide_lazy_or_stored(full: datasets.Dataset, table: Path) -> None:
    images = ImageTable(full)
    assert images.is_of_one_size()
    samples = images.__getitems__(range(len(full)))
    drawn_pixels = [pixels(seed=number) for number in range(6)]
    for sample, name in zip(samples, full["id"], strict=True):
        slide, x, y = place_of(name)
        expected = drawn_pixels[int(slide[1:])][y : y + 64, x : x + 64]
        assert (sample["image"].permute(1, 2, 0).numpy() == expected).all()
    copied = load(table, patch_size=64, store_patches=True)["full"]
    assert fingerprint(copied) == fingerprint(full)
    assert copied.remove_columns("image").to_dict() == full.remove_columns("image").to_dict()
    assert all(
        torch.equal(one["image"], other["image"])
        for one, other in zip(samples, ImageTable(copied).__getitems__(range(len(full))), strict=True)
    )
    assert ImageTable(full).fingerprint() != ImageTable(full.select(range(5))).fingerprint()


def test_workers_read_slides(full: datasets.Dataset) -> None:
    images = ImageTable(full)
    images[0]  # opens a slide before the fork
    loaded = torch.utils.data.DataLoader(images, batch_size=32, num_workers=2, collate_fn=list)
    found = [sample["image"] for batch in loaded for sample in batch]
    assert all(
        torch.equal(image, sample["image"])
        for image, sample in zip(found, images.__getitems__(range(len(full))), strict=True)
    )


def test_splits_are_by_patient(table: Path) -> None:
    config = Config.of(Config().flat() | {"data": str(table), "patch_size": 64, "max_patches": 5})
    splits = protocol.prepare(config)
    assert set(splits) == {"train", "val", "test"}
    groups = [set(rows["group"]) for rows in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 6


def test_a_moved_folder_keeps_its_fingerprint_and_its_patches_are_found(copy: Path) -> None:
    before = load(copy, patch_size=64)["full"]
    moved = copy.parent.rename(copy.parent.with_name("moved"))
    after = load(moved / "slides.csv", patch_size=64)["full"]
    assert fingerprint(after) == fingerprint(before)
    assert ImageTable(after)[0]["image"].shape == (3, 64, 64)
    # A loaded data set is one, too.
    assert len(load(datasets.DatasetDict(train=after))["train"]) == len(after)


def test_a_folder_of_annotated_slides_needs_no_table(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy.unlink()
    full = load(copy.parent, patch_size=64)["full"]
    assert {place_of(name)[0] for name in full["id"]} == {"s0", "s1", "s3", "s4"}
    assert set(full["group"]) == {"s0", "s1", "s3", "s4"}
    assert "left out 2 slides without annotations: s2.tif, s5.tif" in caplog.text


def test_a_column_slide_beside_images_names_groups(tmp_path: Path) -> None:
    import PIL.Image

    for number in range(4):
        PIL.Image.fromarray(pixels(200, 200, number)).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,{number % 2},s{number // 2}" for number in range(4)]
    (tmp_path / "table.csv").write_text("\n".join(["image,label,slide", *rows]), encoding="utf-8")
    assert load(tmp_path / "table.csv")["full"]["group"][:] == ["s0", "s0", "s1", "s1"]
    with pytest.raises(HistoError, match=r"--mpp is 0\.5, which changes nothing for data in the layout image_table"):
        load(tmp_path / "table.csv", mpp=0.5)


def test_columns_by_option_dicom_and_mixed_magnifications(tmp_path: Path) -> None:
    write_dicom(tmp_path / "fine", pixels(1024, 1280), mpp=0.25)
    write_tiff(tmp_path / "coarse.tif", pixels(512, 640), mpp=0.5)
    write_geojson(tmp_path / "other.geojson", [feature("b", square(64, 64, 576, 448))])
    (tmp_path / "t.tsv").write_text("file\twho\twhat\tmarks\nfine\tx\ta\t\ncoarse.tif\ty\t\tother.geojson\n")
    names = {"slide_column": "file", "label_column": "what", "group_column": "who", "annotations_column": "marks"}
    full = load(tmp_path / "t.tsv", patch_size=64, **names)["full"]
    by_slide = {
        name: [row for row in full.remove_columns("image") if row["id"].startswith(name)] for name in ("f", "c")
    }
    assert {row["label"] for row in by_slide["f"]} == {0}
    assert {row["label"] for row in by_slide["c"]} == {1}
    assert len(by_slide["c"]) == 48
    assert len(by_slide["f"]) > 48  # the edge of glass is as wide in pixels
    recorded = schema.recorded(full)
    assert (recorded.mpp, recorded.patch_size) == (0.5, 64)


def test_an_adapters_resolution_is_taken_and_another_one_refused(table: Path) -> None:
    reading = schema.Reading(mpp=1.0, patch_size=32)
    full = load(table, reading=reading)["full"]
    assert ImageTable(full)[0]["image"].shape == (3, 32, 32)
    assert schema.recorded(full) == reading
    with pytest.raises(HistoError, match=r"--mpp is 0\.5, expected --mpp=1\.0 as in training"):
        load(table, reading=reading, mpp=0.5)


def test_the_options_act(table: Path) -> None:
    few = load(table, patch_size=64, max_patches=5)["full"]
    counts = Counter((place_of(row["id"])[0], row["label"]) for row in few.remove_columns("image"))
    assert set(counts.values()) == {5}
    assert len(load(table, patch_size=64, stride=128)["full"]) < 100
    wide = load(table, patch_size=64, min_tissue=0)["full"]
    assert len(wide) > len(load(table, patch_size=64)["full"])  # of the slides without annotations
    rest = load(table, patch_size=64, min_tissue=0, unannotated="glass")["full"]
    assert rest.features["label"].names == ["glass", "normal", "tumor"]
    assert Counter(rest["label"])[0] == 4 * (80 - 48)


def test_classes_of_patches() -> None:
    shares = np.array([[0.6, 0.0], [0.5, 0.5], [0.4, 0.4], [0.0, 1.0], [0.0, 0.0]])
    assert classes_of_patches(shares, 0.5, unannotated=False).tolist() == [0, -2, -1, 1, -1]
    assert classes_of_patches(shares, 0.5, unannotated=True).tolist() == [0, -2, -1, 1, 2]
    none = np.zeros((2, 0))
    assert classes_of_patches(none, 0.5, unannotated=False).tolist() == [-1, -1]
    assert classes_of_patches(none, 0.5, unannotated=True).tolist() == [0, 0]


def test_a_slide_whose_annotations_have_no_object_with_a_class(copy: Path) -> None:
    write_geojson(copy.parent / "s0.geojson", [feature(None, square(64, 64, 320, 448))])
    with pytest.raises(HistoError, match=r"s0.geojson: covers none of 48 patches of tissue"):
        load(copy, patch_size=64)
    full = load(copy, patch_size=64, unannotated="glass")["full"]
    of_slide = [row["label"] for row in full.remove_columns("image") if place_of(row["id"])[0] == "s0"]
    assert of_slide == 48 * [full.features["label"].str2int("glass")]


def test_the_draw_is_always_the_same_and_by_class() -> None:
    labels, kept = np.arange(100) % 2, np.arange(50)
    one = drawn("a", labels, kept, 7)
    assert one.tolist() == drawn("a", labels, kept, 7).tolist() == sorted(one.tolist())
    assert Counter(labels[one]) == {0: 7, 1: 7}
    assert one.tolist() != drawn("b", labels, kept, 7).tolist()
    assert drawn("a", labels, kept, 30).tolist() == kept.tolist()


def _edit(table: Path, old: str, new: str) -> None:
    text = table.read_text(encoding="utf-8")
    assert old in text
    table.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("s2.tif,normal", "s2.tif,", r"slides\.csv, row 4: the label is blank"),
        ("s2.tif", "s9.tif", r"slides\.csv, row 4: slide 's9' is missing"),
        ("s2.tif", "s1.tif", r"rows 3, 4 have the id 's1', expected one row per slide"),
        ("s2.tif", "../s2.tif", r"slide '../s2.tif' lies outside"),
        ("normal", "Normal", r"a class is written in two ways, 'Normal' and 'normal'"),
    ],
)
def test_faults_of_the_table(copy: Path, old: str, new: str, message: str) -> None:
    _edit(copy, old, new)
    with pytest.raises(HistoError, match=message):
        load(copy, patch_size=64)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda folder: (folder / "s0.tif").write_bytes(b"no"), r"s0\.tif: not a readable slide"),
        (lambda folder: write_tiff(folder / "s0.tif", np.full((512, 640, 3), 240, np.uint8)), "no patch with tissue"),
        (lambda folder: (folder / "s0.geojson").write_text("{"), r"s0\.geojson: not readable GeoJSON"),
        (
            lambda folder: write_geojson(folder / "s0.geojson", [feature("tumor", square(0, 0, 9, 9))]),
            r"s0\.geojson: covers none of 48 patches of tissue",
        ),
        (lambda folder: (folder / "s0.tif").unlink(), r"slide 's0' is missing"),
    ],
)
def test_a_bad_slide_is_named_or_left_out(copy: Path, fault: object, message: str) -> None:
    fault(copy.parent)  # type: ignore[operator]
    with pytest.raises(HistoError, match=message):
        load(copy, patch_size=64)
    full = load(copy, patch_size=64, on_bad_image="skip")["full"]
    assert {place_of(name)[0] for name in full["id"]} == {"s1", "s2", "s3", "s4", "s5"}
    assert full.info.description.count("left out") == 1


def test_patches_of_two_classes_are_left_out(
    copy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "thread_count", lambda: 1)  # `caplog` hears this process alone
    both = [feature("normal", square(64, 64, 384, 448)), feature("tumor", square(320, 64, 576, 448))]
    write_geojson(copy.parent / "s0.geojson", both)
    full = load(copy, patch_size=64)["full"]
    assert sum(name.startswith("s0_") for name in full["id"]) == 42
    assert "s0.geojson: left out 6 patches that two classes cover" in caplog.text


@pytest.mark.parametrize("named", [True, False], ids=["in a column", "beside"])
def test_slides_with_annotations_need_no_column_of_labels(copy: Path, named: bool) -> None:
    rows = pd.read_csv(copy).drop(columns="label").iloc[[0, 1, 3, 4]]
    if named:
        for name in rows["slide"]:
            (copy.parent / name).with_suffix(".geojson").rename(copy.parent / f"{name}.marks.geojson")
        rows["annotations"] = rows["slide"] + ".marks.geojson"
    rows.to_csv(copy, index=False)
    data = load(copy, patch_size=64)
    assert list(data) == ["full"] and Counter(data["full"]["label"]) == {0: 96, 1: 96}
    pd.concat([rows, pd.DataFrame({"slide": ["s2.tif"], "patient": "p2"})]).to_csv(copy, index=False)
    with pytest.raises(HistoError, match=r"slides\.csv, row 6: the label is blank"):
        load(copy, patch_size=64)


def test_slides_without_labels_and_annotations_are_test(copy: Path) -> None:
    pd.read_csv(copy)[["slide"]].to_csv(copy, index=False)
    data = load(copy, patch_size=64, annotations_column="none")
    assert list(data) == ["test"] and set(data["test"]["label"]) == {-1}


def test_one_class_is_refused(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", pixels())
    (tmp_path / "slides.csv").write_text("slide,label\na.tif,x\n", encoding="utf-8")
    with pytest.raises(HistoError, match="all slides and annotations are of the class 'x', expected at least two"):
        load(DataOptions(data=str(tmp_path / "slides.csv")))
