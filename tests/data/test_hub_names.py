"""Data sets that `datasets` finds by name; a local folder stands for one on the Hub."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_histo.config import DataOptions
from hf_histo.data.load import fingerprint, load
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError


def write_parquet(folder: Path, *, splits: tuple[str, ...] = ("train", "test"), seed: int = 0) -> np.ndarray:
    """Save 20 gray images per split as the Hub stores them, columns named as MNIST's; return those of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"picture": datasets.Image(), "digit": datasets.ClassLabel(names=["a", "b"])})
    for number, split in enumerate(splits):
        images = np.random.default_rng([seed, number]).integers(0, 256, (20, 6, 8), dtype=np.uint8)
        rows = {"picture": [PIL.Image.fromarray(image) for image in images], "digit": [i % 2 for i in range(20)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-0.parquet"))
    return images


def test_a_name_gives_the_schema(tmp_path: Path) -> None:
    test = write_parquet(tmp_path / "data")
    data = load(f"hub:{tmp_path / 'data'}", cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 18, "val": 2, "test": 20}
    assert data["test"].column_names == ["id", "image", "label", "center", "group"]
    assert data["val"].features["label"].names == ["a", "b"]
    assert sorted(data["val"]["label"]) == [0, 1]
    assert not set(data["train"]["id"]) & set(data["val"]["id"])
    for place, image in enumerate(test):
        assert (ImageTable(data["test"])[place]["image"].numpy() == image).all()


def test_files_of_a_folder_and_an_official_validation_split(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for label in ("no", "yes"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            image = PIL.Image.new("RGB", (5, 4), (10, 20, len(label)))
            image.save(tmp_path / "data" / split / label / "one.png")
    data = load(f"hub:{tmp_path / 'data'}", cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 2, "val": 2}
    assert ImageTable(data["val"])[0]["image"][:, 0, 0].tolist() == [10, 20, 2]


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("moved", 0), ("other", 1)):
        write_parquet(tmp_path / name, seed=seed)
    a, moved, other = (
        fingerprint(load(f"hub:{tmp_path / name}", cache_dir=tmp_path / "cache")) for name in ("a", "moved", "other")
    )
    assert a == moved
    assert a != other


def refusal(name: str, cache_dir: Path) -> str:
    with pytest.raises(HistoError) as caught:
        load(name, cache_dir=cache_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_names_and_other_columns(tmp_path: Path) -> None:
    assert "--data hub:nobody/nothing: can't be had" in refusal("hub:nobody/nothing", tmp_path)
    assert "--data hub:: can't be had" in refusal("hub:", tmp_path)
    write_parquet(tmp_path / "testing", splits=("test",))
    assert "has the splits test, expected train" in refusal(f"hub:{tmp_path / 'testing'}", tmp_path / "cache")
    (tmp_path / "text").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "text" / "train.parquet"))
    assert "has 0 columns of images" in refusal(f"hub:{tmp_path / 'text'}", tmp_path / "cache")


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "https://example.com/track.png"])
def test_a_table_that_names_files_of_this_machine(tmp_path: Path, path: str) -> None:
    """Images of a table may be paths; those of files outside would be copied into the cache and sent along."""
    PIL.Image.new("RGB", (5, 4)).save(tmp_path / "secret.png")
    folder = tmp_path / "data"
    write_parquet(folder, splits=("train",))
    table = pq.read_table(folder / "train-0.parquet")
    images = [{"bytes": None, "path": path}] * len(table)
    table = table.set_column(0, table.schema.field(0), pa.array(images, table.schema.field(0).type))
    pq.write_table(table, folder / "train-0.parquet")
    with pytest.raises(HistoError, match=r"an image is .*, expected its bytes or a file of this data set"):
        load(f"hub:{folder}", cache_dir=tmp_path / "cache")


def test_images_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "data", splits=("train", "validation"))
    path = tmp_path / "data" / "train-0.parquet"
    table = pq.read_table(path)
    pictures = table["picture"].to_pylist()
    pictures[3]["bytes"], pictures[11]["bytes"] = pictures[3]["bytes"][:40], b"<html>404</html>"
    column = pa.array(pictures, table.schema.field("picture").type)
    pq.write_table(table.set_column(table.column_names.index("picture"), table.schema.field("picture"), column), path)
    with pytest.raises(HistoError, match="row 3: not a readable image"):
        load(f"hub:{tmp_path / 'data'}", cache_dir=tmp_path / "cache")
    options = DataOptions(data=f"hub:{tmp_path / 'data'}", cache_dir=str(tmp_path / "cache"), on_bad_image="skip")
    for _ in range(2):
        caplog.clear()
        data = load(options)
        assert data["train"]["id"][:] == [str(row) for row in range(20) if row not in (3, 11)]
        assert data["train"]["label"][:3] == [0, 1, 0] and data["train"]["label"][3] == 0
        assert "left out 2 images that can't be read: rows [3, 11]" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_no_class(streaming: bool, tmp_path: Path) -> None:
    """A missing one is hidden; `datasets` itself takes any number."""

    def load_with(split: str, label: int | None) -> datasets.DatasetDict:
        folder = tmp_path / f"{split} {label}"
        write_parquet(folder, splits=("train", "validation"))
        table = pq.read_table(folder / f"{split}-0.parquet")
        digits = pa.array([0, 1, label, *[1] * 17], pa.int64())
        table = table.set_column(1, table.schema.field(1), digits)
        pq.write_table(table, folder / f"{split}-0.parquet")
        return load(DataOptions(data=f"hub:{folder}", streaming=streaming), cache_dir=tmp_path / "cache")

    for split in ("train", "validation"):
        for label in (2, -2):
            with pytest.raises(HistoError, match=f"row 2 has the label {label}, expected 0 to 1, or -1"):
                load_with(split, label)
        assert load_with(split, None)["val" if split == "validation" else split]["label"][:3] == [0, 1, -1]
