from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from scipy.ndimage import zoom

from hf_histo.data import schema
from hf_histo.data.audit import near_duplicates
from hf_histo.data.audit.findings import Audit, Finding, audit
from hf_histo.data.audit.near_duplicates import _BLOCK, inventory
from hf_histo.data.load import load
from hf_histo.errors import HistoError

REAL = Path(__file__).parents[4] / "shared" / "data"
CLASSES = ["normal", "tumor"]


def picture(seed: int, size: int = 96) -> np.ndarray:
    """A smooth random image with structure of several scales, uint8 (size, size, 3)."""
    random = np.random.default_rng(seed)
    coarse = sum(zoom(random.normal(size=(n, n, 3)), (size / n, size / n, 1), order=1) for n in (6, 12, 24))
    return np.clip(128 + 40 * np.asarray(coarse), 0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(pixels: np.ndarray, quality: int = 50) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(pixels).resize((size, size), PIL.Image.Resampling.BICUBIC))


def brighter(pixels: np.ndarray) -> np.ndarray:
    return np.clip(0.8 * pixels.astype(float) + 40, 0, 255).astype(np.uint8)


def recolored(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels * [0.9, 0.7, 1.0] + [20, 0, -10], 0, 255).astype(np.uint8)


Row = tuple[str, bytes, int, int, str]


def split(rows: Iterable[Row]) -> datasets.Dataset:
    columns = ("id", "image", "label", "center", "group")
    made = [dict(zip(columns, (key, {"bytes": image, "path": None}, *rest), strict=True)) for key, image, *rest in rows]
    return datasets.Dataset.from_list(made, features=schema.features(CLASSES))


def plain(count: int, start: int) -> list[Row]:
    """Different images "0", "1", ... of two classes at one center, of unknown group."""
    return [(str(i), png(picture(start + i)), i % 2, 0, "") for i in range(count)]


def judged(data: dict[str, list[Row]]) -> tuple[Audit, pd.DataFrame]:
    table = inventory(datasets.DatasetDict({name: split(rows) for name, rows in data.items()}))
    return audit(table, CLASSES), table


def ids(finding: Finding) -> list[list[str]]:
    return [[f"{image.split}/{image.id}" for image in group] for group in finding.groups]


def test_nothing_is_found_in_sound_data() -> None:
    found, table = judged({"train": plain(_BLOCK + 10, 0), "val": plain(10, 500), "test": plain(10, 1000)})
    assert found.findings == []
    assert table["family"].nunique() == len(table) == _BLOCK + 30
    assert "findings: 0" in found.summary()


@pytest.mark.parametrize(
    "copy",
    [
        jpeg(picture(3)),
        jpeg(resized(picture(3), 64), 80),
        png(resized(picture(3), 48)),
        png(resized(picture(3), 250)),
        png(brighter(picture(3))),
        png(recolored(picture(3))),
        png(picture(3)[::-1]),
        png(np.rot90(picture(3))),
        png(np.rot90(picture(3)[::-1], 3)),
    ],
    ids=["jpeg", "smaller jpeg", "half", "larger", "brighter", "recolored", "mirrored", "turned", "both"],
)
def test_finds_a_copy_in_test(copy: bytes) -> None:
    late = jpeg(picture(_BLOCK + 5))  # of an image beyond the first block
    rows = [*plain(9, 500), ("copy", copy, 1, 0, ""), ("late", late, 1, 0, "")]
    found, table = judged({"train": plain(_BLOCK + 8, 0), "test": rows})
    (finding,) = found.findings
    assert (finding.kind, finding.split, finding.other) == ("similar_overlap", "test", "train")
    assert ids(finding) == [["train/3", "test/copy"], [f"train/{_BLOCK + 5}", "test/late"]]
    assert table["identical"].nunique() == len(table)
    assert table["family"].nunique() == len(table) - 2


def test_the_same_pixels_in_another_file_are_identical() -> None:
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture(2)).save(buffer, "BMP")
    found, _ = judged({"train": plain(6, 0), "test": [*plain(3, 100), ("copy", buffer.getvalue(), 0, 0, "")]})
    (finding,) = found.findings
    assert finding.kind == "overlap" and ids(finding) == [["train/2", "test/copy"]]
    assert finding.message == "test: 1 of 4 images are pixel-identical to images of train; 3 are not"


def test_the_same_bytes_in_another_shape_are_not_identical() -> None:
    even = np.arange(96 * 96 * 3, dtype=np.uint32).astype(np.uint8)
    rows: list[Row] = [("a", png(even.reshape(96, 96, 3)), 0, 0, ""), ("b", png(even.reshape(48, 192, 3)), 1, 0, "")]
    _, table = judged({"train": rows})
    assert table["identical"].tolist() == [0, 1]


def test_a_part_of_an_image_is_no_copy() -> None:
    found, _ = judged({"train": [*plain(6, 0), ("part", png(picture(0)[:64, :64]), 0, 0, "")]})
    assert found.findings == []


def test_alike_from_afar_is_no_copy() -> None:
    def built(seed: int) -> bytes:
        """Six by six large spots, the same ones, under a fine structure of its own."""
        large = zoom(np.random.default_rng(0).normal(size=(6, 6)), 16, order=1)
        fine = zoom(np.random.default_rng(seed).normal(size=(32, 32)), 3, order=1)
        gray = np.clip(128 + 60 * large + 8 * fine, 0, 255).astype(np.uint8)
        return png(np.repeat(gray[..., None], 3, axis=2))

    data = datasets.DatasetDict({"train": split([("a", built(1), 0, 0, ""), ("b", built(2), 0, 0, "")])})
    assert inventory(data)["family"].tolist() == [0, 1]
    # Their hashes alone would relate them, and so does a low similarity.
    assert inventory(data, similarity=0.05)["family"].tolist() == [0, 0]


def test_most_copies_are_found_without_comparing_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    details = chance.normal(size=(240, 64, 64))
    turns, similarities = chance.integers(0, 8, 120), chance.uniform(0.95, 0.99, 120)
    for row, (turn, similarity) in enumerate(zip(turns, similarities, strict=True)):
        copy = similarity * near_duplicates._turned(details[row], turn)
        details[120 + row] = copy + np.sqrt(1 - similarity**2) * details[120 + row]
    details = (details / np.linalg.norm(details, axis=(1, 2), keepdims=True)).astype(np.float16)
    hashes = np.zeros((240, 8), np.uint64)
    compared: list[int] = []

    def count(bits: np.ndarray) -> np.ndarray:
        compared.append(bits.size)
        return np.zeros(bits.shape, np.uint8)

    monkeypatch.setattr(np, "bitwise_count", count)
    every = {tuple(pair) for pair in near_duplicates._copies(hashes, details, 0.94)}
    assert every == {(row, 120 + row) for row in range(120)}
    of_all, compared[:] = sum(compared), []
    monkeypatch.setattr(near_duplicates, "_FEW", 0)
    found = {tuple(pair) for pair in near_duplicates._copies(hashes, details, 0.94)}
    assert found <= every
    assert len(found) >= 0.98 * len(every)
    assert sum(compared) < of_all / 5
    assert near_duplicates._tables(240, 0.05) is None  # so low that nearly all pairs would have an equal key


def test_families_are_chains() -> None:
    rows = [("a", png(picture(0)), 0, 0, ""), ("b", jpeg(picture(0)), 0, 0, ""), ("c", jpeg(picture(0)), 0, 0, "")]
    _, table = judged({"train": [*plain(2, 100), *rows[:2]], "val": [rows[2], *plain(2, 200)]})
    assert table["identical"].tolist() == [0, 1, 2, 3, 3, 4, 5]
    assert table["family"].tolist() == [0, 1, 2, 2, 2, 3, 4]


def test_label_conflicts() -> None:
    train = [
        *plain(6, 0),  # 0 has label 0, 1 has label 1
        ("same", png(picture(0)), 1, 0, ""),
        ("near", jpeg(picture(1)), 0, 0, ""),
        ("agrees", jpeg(picture(3)), 1, 0, ""),
        ("unknown", png(picture(2)), -1, 0, ""),
    ]
    found, _ = judged({"train": train})
    by_kind = {finding.kind: finding for finding in found.findings}
    assert list(by_kind) == ["label_conflict", "similar_label_conflict", "repeats", "similar_repeats"]
    assert ids(by_kind["label_conflict"]) == [["train/0", "train/same"]]
    assert ids(by_kind["similar_label_conflict"]) == [["train/1", "train/near"]]
    assert ids(by_kind["repeats"]) == [["train/0", "train/same"], ["train/2", "train/unknown"]]
    assert ids(by_kind["similar_repeats"]) == [["train/1", "train/near"], ["train/3", "train/agrees"]]
    assert [image.label for image in by_kind["repeats"].groups[1]] == ["normal", "(hidden)"]


def test_blank_and_tiny_images() -> None:
    faint = (200 + picture(8) / picture(8).std()).round().astype(np.uint8)
    train = [
        *plain(4, 0),
        ("white", png(np.full((96, 96, 3), 255, np.uint8)), 0, 0, ""),
        ("gray", png(faint), 1, 0, ""),
        ("mirrored", png(faint[::-1]), 1, 0, ""),
        ("dot", png(picture(9)[:1, :1]), 0, 0, ""),
        ("strip", png(picture(9)[:31]), 0, 0, ""),
        ("enough", png(picture(9)[:32]), 0, 0, ""),
    ]
    found, table = judged({"train": train})
    assert [(f.kind, [g for (g,) in ids(f)]) for f in found.findings if f.kind in ("blank", "tiny")] == [
        ("blank", ["train/white", "train/gray", "train/mirrored", "train/dot"]),
        ("tiny", ["train/dot", "train/strip"]),
    ]
    # Blank images differ, however alike they are, unless their pixels are the same.
    assert table["family"].nunique() == len(table) - 1  # the strips
    assert (table.loc[table["id"] == "strip", ["height", "width"]].to_numpy() == (31, 96)).all()


def test_groups_on_two_sides() -> None:
    rows = [
        (key, image, label, center, f"slide {i // 2}") for i, (key, image, label, center, _) in enumerate(plain(8, 0))
    ]
    found, _ = judged({"train": rows[:5], "val": rows[5:]})
    (finding,) = found.findings
    assert finding.kind == "shared_groups" and ids(finding) == [["train/4", "val/5"]]
    assert found.splits[0].groups == 3


def test_sizes_without_overlap() -> None:
    small: list[Row] = [(key, png(picture(100 + int(key), 80)), label, 0, "") for key, _, label, *_ in plain(4, 0)]
    found, _ = judged({"train": plain(4, 0), "val": plain(4, 50), "test": small})
    assert [(f.kind, f.split, f.other) for f in found.findings] == [
        ("size_shift", "test", "train"),
        ("size_shift", "test", "val"),
    ]
    assert "80 x 80" in found.findings[0].message


def test_balance() -> None:
    def rows(start: int, labels: list[int], centers: list[int]) -> list[Row]:
        pictures = [png(picture(start + i, 40)) for i in range(len(labels))]
        return [(str(i), *rest, "") for i, rest in enumerate(zip(pictures, labels, centers, strict=True))]

    found, _ = judged(
        {
            "train": rows(0, [0] * 10 + [1], [0] * 8 + [3] * 3),
            "val": rows(100, [1, 1], [1, 1]),
            "test": rows(200, [-1, -1], [2, 2]),
        }
    )
    assert [(f.kind, f.message) for f in found.findings] == [
        ("imbalance", "train: normal has 10 images, tumor only 1"),
        ("one_class_center", "train: all 8 images of center 0 are normal"),
        ("missing_class", "val: no image of normal"),
    ]
    train, _, test = found.splits
    assert [(s.center, s.classes) for s in train.centers] == [
        (0, {"normal": 8, "tumor": 0}),
        (3, {"normal": 2, "tumor": 1}),
    ]
    assert test.classes == {"normal": 0, "tumor": 0, "(hidden)": 2}


def test_color_statistics_are_those_of_all_pixels() -> None:
    found, table = judged({"train": plain(6, 0)})
    pixels = np.stack([picture(i) for i in range(6)]).reshape(-1, 3)
    (stratum,) = found.splits[0].centers
    assert stratum.mean == pytest.approx(pixels.mean(axis=0))
    assert stratum.deviation == pytest.approx(pixels.std(axis=0))
    assert table.loc[4, ["red", "green", "blue"]].tolist() == pytest.approx(picture(4).mean((0, 1)))
    assert table.loc[4, "blue_deviation"] == pytest.approx(picture(4)[..., 2].std())


def test_json_names_every_image_and_the_summary_a_few() -> None:
    train = plain(6, 0)
    found, _ = judged({"train": train, "test": [(f"copy {key}", *rest) for key, *rest in train]})
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    (finding,) = content["findings"]
    assert [group[1]["id"] for group in finding["groups"]] == [f"copy {i}" for i in range(6)]
    assert content["splits"][1]["distinct"] == 6
    summary = found.summary(examples=2)
    assert "train: 1 (tumor)  =  test: copy 1 (tumor)\n   and 4 more" in summary
    assert "copy 2" not in summary


def test_deterministic() -> None:
    data = {"train": [*plain(5, 0), *plain(5, 3)]}
    (first, one), (second, other) = judged(data), judged(data)
    assert first == second
    pd.testing.assert_frame_equal(one, other)


def test_refusals() -> None:
    data = datasets.DatasetDict({"train": split(plain(2, 0))})
    for similarity in (0, 1.1, float("nan")):
        with pytest.raises(HistoError, match="similarity is"):
            inventory(data, similarity=similarity)
    with pytest.raises(HistoError, match="no images"):
        inventory(datasets.DatasetDict({"train": data["train"].select([])}))


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "brain-tumor-mri").is_dir(), reason="needs the brain tumor MRI data set")
def test_finds_the_leak_of_the_brain_tumor_data() -> None:
    # The counts of pixel-identical images are those that its README gives and that md5sum confirms.
    data = load(REAL / "brain-tumor-mri")
    found = audit(inventory(data), data["train"].features["label"].names)
    messages = {(finding.kind, finding.split): finding.message for finding in found.findings}
    expected = "test: 250 of 394 images are pixel-identical to images of train; 144 are not"
    assert messages["overlap", "test"] == expected
    assert (found.splits[0].distinct, found.splits[1].distinct) == (2771, 314)
    (near,) = [f for f in found.findings if f.kind == "similar_overlap"]
    assert {image.id for group in near.groups for image in group if image.split == "test"} >= {
        "Testing/glioma_tumor/image(2).jpg",
        "Testing/glioma_tumor/image(48).jpg",
    }
