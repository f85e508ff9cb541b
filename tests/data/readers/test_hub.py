"""Data sets that `datasets` loads by name, with local folders in place of the Hub."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forged_parquet import forge_page, load_measured

from hf_histo.config import DataOptions
from hf_histo.data.load import fingerprint, load
from hf_histo.data.protocol import arranged
from hf_histo.data.readers import hub
from hf_histo.data.reading import Reading
from hf_histo.data.schema import ImageTable, recorded
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
    source = DataOptions(f"hub:{tmp_path / 'data'}", cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in load(source).items()} == {"train": 20, "test": 20}
    data = arranged(source)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 18, "test": 20, "val": 2}
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


TWO_VALIDATION_SPLITS = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train-0.parquet}
  - {split: validation, path: validation-0.parquet}
  - {split: dev, path: dev-0.parquet}
---
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_two_splits_for_validation_are_refused(tmp_path: Path, streaming: bool) -> None:
    write_parquet(tmp_path / "data", splits=("train", "validation", "dev"))
    (tmp_path / "data/README.md").write_text(TWO_VALIDATION_SPLITS)
    with pytest.raises(HistoError, match="has the splits validation and dev, expected one for val; leave one out of"):
        load(DataOptions(f"hub:{tmp_path / 'data'}", streaming=streaming), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["validation", "valid", "dev"])
def test_each_shard_of_object_storage_is_of_one_split(tmp_path: Path, split: str, streaming: bool) -> None:
    write_parquet(tmp_path / "data", splits=("train", split))
    options = DataOptions(f"hub:file://{tmp_path / 'data'}", streaming=streaming)
    data = load(options, cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 20, "val": 20}


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
    assert "--data hub:nobody/nothing: can't be loaded" in refusal("hub:nobody/nothing", tmp_path)
    assert "--data hub:: can't be loaded" in refusal("hub:", tmp_path)
    write_parquet(tmp_path / "testing", splits=("test",))
    assert "has the splits test, expected train" in refusal(f"hub:{tmp_path / 'testing'}", tmp_path / "cache")
    (tmp_path / "text").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "text" / "train.parquet"))
    assert "has 0 columns of images" in refusal(f"hub:{tmp_path / 'text'}", tmp_path / "cache")


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "https://example.com/track.png"])
def test_a_table_that_names_files_of_this_machine(tmp_path: Path, path: str) -> None:
    """Images of a table may be paths; files outside the data set would be copied into the cache."""
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


def declare(path: Path, names: list[str], column: str = "digit") -> None:
    """Write into a shard that its classes have other names."""
    table = read_shard(path)
    declared = json.loads(table.schema.metadata[b"huggingface"])
    declared["info"]["features"][column]["names"] = names
    write_shard(path, table.replace_schema_metadata({b"huggingface": json.dumps(declared)}))


def read_shard(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    with pa.OSFile(str(path)) as file:
        return (pa.ipc.open_file if file.read(6) == b"ARROW1" else pa.ipc.open_stream)(str(path)).read_all()


def write_shard(path: Path, table: pa.Table, *, file: bool = False, compression: str | None = None) -> None:
    """Write a table as parquet or, by the suffix, in Arrow's streaming format, or its `file` format."""
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(str(path), table.schema, options=options) as writer:
        writer.write_table(table)


def as_arrow(folder: Path, *, file: bool = False) -> None:
    """Replace the parquet shards of a folder by Arrow files."""
    for path in folder.glob("*.parquet"):
        write_shard(path.with_suffix(".arrow"), pq.read_table(path), file=file)
        path.unlink()


@pytest.mark.parametrize(
    ("names", "shard", "format", "streaming"),
    [
        (["b", "a"], "train-1", "parquet", False),
        (["b", "a"], "validation-0", "arrow stream", True),
        (["a", "b", "c"], "validation-0", "parquet", True),
        (["a", "b", "c"], "train-1", "arrow file", False),
        (["a"], "train-1", "arrow stream", False),
        (["a"], "validation-0", "arrow file", True),
    ],
)
def test_shards_that_declare_other_classes(
    tmp_path: Path, streaming: bool, format: str, shard: str, names: list[str]
) -> None:
    """`datasets` uses the class names of one shard for all, which would mix up the labels of the others."""
    folder = tmp_path / "data"
    write_parquet(folder, splits=("train", "validation"))
    shutil.copy(folder / "train-0.parquet", folder / "train-1.parquet")
    if format != "parquet":
        as_arrow(folder, file=format == "arrow file")
    (path,) = folder.glob(f"{shard}.*")
    load(DataOptions(data=f"hub:{folder}", streaming=streaming), cache_dir=tmp_path / "cache")
    declare(path, names)
    for _ in range(2):  # nor are they taken from the cache
        with pytest.raises(HistoError, match=rf"{path.name}: declares the classes {', '.join(names)}, expected a, b"):
            load(DataOptions(data=f"hub:{folder}", streaming=streaming), cache_dir=tmp_path / "cache")


CARD = """---
dataset_info:
  features:
  - {name: IMAGE, dtype: image}
  - {name: digit, dtype: {class_label: {names: {'0': a, '1': b}}}}
---
"""


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".parquet", ".geoparquet", ".arrow"])
def test_shards_that_declare_other_classes_than_the_card(tmp_path: Path, suffix: str, streaming: bool) -> None:
    """For all suffixes that `datasets` recognizes as these formats."""
    folder = tmp_path / "data"
    write_parquet(folder, splits=("train", "validation"))
    if suffix == ".arrow":
        as_arrow(folder)
    for path in folder.iterdir():
        path.rename(path.with_suffix(suffix))
    (folder / "README.md").write_text(CARD.replace("IMAGE", "picture").replace("0': a, '1': b", "0': b, '1': a"))
    with pytest.raises(HistoError, match=r"declares the classes a, b, expected b, a in this order"):
        load(DataOptions(data=f"hub:{folder}", streaming=streaming), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_classes_of_text_are_matched_by_name(tmp_path: Path, format: str, streaming: bool) -> None:
    """The card declares the classes, and files name the class of each row, in any order of appearance."""
    folder = tmp_path / "data"
    folder.mkdir()
    PIL.Image.new("L", (5, 4)).save(folder / "one.png")
    (folder / "README.md").write_text(CARD.replace("IMAGE", "picture"))
    for split, names in (("train", "baab"), ("validation", "ba"), ("test", "ab")):
        rows = [{"picture": str(folder / "one.png"), "digit": name} for name in names]
        if format == "csv":
            lines = ["picture,digit", *(",".join(row.values()) for row in rows)]
        else:
            lines = list(map(json.dumps, rows))
        (folder / f"{split}.{format}").write_text("\n".join(lines))
    data = load(DataOptions(data=f"hub:{folder}", streaming=streaming), cache_dir=tmp_path / "cache")
    assert {split: rows["label"][:] for split, rows in data.items()} == {
        "train": [1, 0, 0, 1],
        "val": [1, 0],
        "test": [0, 1],
    }
    (folder / f"validation.{format}").write_text((folder / f"test.{format}").read_text().replace("b", "c"))
    with pytest.raises(HistoError, match="--data hub:"):
        load(DataOptions(data=f"hub:{folder}", streaming=streaming), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_formats_that_are_not_checked_are_refused(tmp_path: Path, streaming: bool) -> None:
    """`datasets` reads many more formats, such as HDF5 with links to other files, and archives of unbounded size."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "README.md").write_text(CARD.replace("IMAGE", "png"))
    picture = io.BytesIO()
    PIL.Image.new("L", (5, 4)).save(picture, "png")
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}.tar", "w") as archive:
            for name, content in (("1.png", picture.getvalue()), ("1.digit", b"a")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with pytest.raises(HistoError, match="holds webdataset files, expected arrow, csv, imagefolder, json or parquet"):
        load(DataOptions(data=f"hub:{folder}", streaming=streaming), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_of_a_format_is_no_data_set(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would read every file of the current folder; a folder of that name is one."""
    write_parquet(tmp_path / "parquet", splits=("train", "validation"))
    monkeypatch.chdir(tmp_path)
    options = DataOptions(data="hub:parquet", streaming=streaming)
    assert {len(rows) for rows in load(options, cache_dir=tmp_path / "cache").values()} == {20}
    (tmp_path / "parquet").rename(tmp_path / "moved")
    with pytest.raises(HistoError, match="--data hub:parquet: names a format, expected OWNER/NAME or a folder"):
        load(options, cache_dir=tmp_path / "cache")


def test_a_shard_that_declares_nothing_has_the_classes_of_the_rest(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data", splits=("train", "validation"))
    path = tmp_path / "data/validation-0.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    data = load(f"hub:{tmp_path / 'data'}", cache_dir=tmp_path / "cache")
    assert data["val"].features["label"].names == ["a", "b"] and data["val"]["label"][:4] == [0, 1, 0, 1]


@pytest.mark.parametrize("column", ["picture", "text"])
def test_a_small_shard_that_expands_is_refused(tmp_path: Path, column: str) -> None:
    write_parquet(tmp_path / "data", splits=("train", "validation"))
    path = tmp_path / "data/train-0.parquet"
    table = pq.read_table(path)
    large = b"P6 1000 300 255\n" + bytes(900_000)
    if column == "picture":
        pictures = pa.array([{"bytes": large, "path": None}] * 500, table.schema.field("picture").type)
        columns = {"picture": pictures, "digit": pa.array([0, 1] * 250)}
    else:
        columns = {"picture": table["picture"], "digit": table["digit"], "text": pa.array([large.decode()] * 20)}
    bomb = pa.table(columns)
    pq.write_table(bomb.replace_schema_metadata(table.schema.metadata), path, compression="zstd", version="2.6")
    assert path.stat().st_size < 300_000
    assert re.search(r"train-0\.parquet: expands to [\d,]+ bytes or more, from [\d,]+, expected at", refused(tmp_path))


def refused(folder: Path) -> str:
    """The error of loading FOLDER/data, which leaves nothing behind."""
    error = refusal(f"hub:{folder / 'data'}", folder / "cache")
    assert not list((folder / "cache").rglob("*.arrow"))
    return error


def with_text(path: Path, texts: pa.Array) -> pa.Table:
    """As many rows of a shard as there are `texts`, which are an additional column."""
    table = read_shard(path)
    features = datasets.Features(datasets.Features.from_arrow_schema(table.schema) | {"text": datasets.Value("string")})
    columns = {name: table[name].take(pa.array([0] * len(texts))) for name in table.column_names}
    return pa.table(columns | {"text": texts}).replace_schema_metadata(features.arrow_schema.metadata)


def test_a_shard_of_arrow_that_expands_is_refused(tmp_path: Path) -> None:
    """Its buffers may be compressed, and expand to any size."""
    write_parquet(tmp_path / "data", splits=("train", "validation"))
    as_arrow(tmp_path / "data")
    path = tmp_path / "data/train-0.arrow"
    write_shard(path, with_text(path, pa.array(["x" * 2**24] * 16)), compression="zstd")
    assert path.stat().st_size < 100_000
    assert "train-0.arrow: expands to " in refused(tmp_path)


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "list of null"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_whose_values_take_no_bytes_are_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    """Many rows may share one stored value, which `datasets` would write once per row."""
    write_parquet(tmp_path / "data", splits=("train", "validation"))
    if suffix == ".arrow":
        as_arrow(tmp_path / "data")
    path = tmp_path / f"data/train-0{suffix}"
    texts = {
        "dictionary": pa.DictionaryArray.from_arrays([0] * 40, ["x" * 1000]),
        "string_view": pa.array(["x" * 1000] * 40, pa.string_view()),
        "list of null": pa.array([[None] * 1000] * 40, pa.list_(pa.null())),
    }
    write_shard(path, with_text(path, texts[kind]))
    error = refused(tmp_path)
    assert f"train-0{suffix}: column text is " in error and "expected text, bytes, numbers, or lists of them" in error


def test_a_column_without_a_value_is_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data", splits=("train", "validation"))
    path = tmp_path / "data/train-0.parquet"
    write_shard(path, with_text(path, pa.nulls(40)))
    assert len(load(f"hub:{tmp_path / 'data'}", cache_dir=tmp_path / "cache")["train"]) == 40


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is bounded on Linux")
def test_a_page_that_unpacks_to_more_than_its_file_declares(tmp_path: Path) -> None:
    """Only the page header declares the real size; the footer and the values don't show it."""
    write_parquet(tmp_path / "data", splits=("train", "validation"))
    path = tmp_path / "data/train-0.parquet"
    table = with_text(path, pa.array(["x"]))
    noise = np.random.default_rng(0).bytes(150_000).hex()
    table = table.set_column(2, "text", pa.array([noise])).select(["text", "picture", "digit"])
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    forge_page(path, 2**31 - 2**20)
    assert path.stat().st_size < 200_000
    error, peak = load_measured(f"hub:{tmp_path / 'data'}", tmp_path / "cache")
    assert "train-0.parquet: expands to " in error
    assert peak < 1200


def test_a_damaged_conversion_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "data")
    name = f"hub:{tmp_path / 'data'}"
    first = load(name, cache_dir=tmp_path / "cache")
    files = sorted((tmp_path / "cache").rglob("*.arrow")) + sorted((tmp_path / "cache").rglob("dataset_info.json"))
    assert len(files) >= 5  # of the conversion, and of what was derived
    for place in range(len(files)):
        caplog.clear()
        content = bytearray(files[place].read_bytes())
        content[len(content) // 2] ^= 4
        files[place].write_bytes(content if place % 2 else b"")
        again = load(name, cache_dir=tmp_path / "cache")
        assert "damaged" in caplog.text and fingerprint(again) == fingerprint(first)
    caplog.clear()
    load(name, cache_dir=tmp_path / "cache")
    assert "damaged" not in caplog.text


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "data")
    write_parquet(tmp_path / "other", seed=1)
    read = hub._as_schema

    def interfere(*arguments: Any) -> datasets.Dataset:
        shutil.copy(tmp_path / "other/test-0.parquet", tmp_path / "data/test-0.parquet")
        return read(*arguments)

    monkeypatch.setattr(hub, "_as_schema", interfere)
    with pytest.raises(HistoError, match="a file changed while it was read, expected none to; run the command again"):
        load(f"hub:{tmp_path / 'data'}", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("streaming", [False, True])
def test_pipes_and_devices_are_not_opened(tmp_path: Path, streaming: bool) -> None:
    """`datasets` itself looks for regular files only."""
    write_parquet(tmp_path / "data", splits=("train", "validation"))
    os.mkfifo(tmp_path / "data/test-0.parquet")
    (tmp_path / "data/test-1.parquet").symlink_to("test-0.parquet")
    (tmp_path / "data/test-2.parquet").symlink_to("/dev/zero")
    options = DataOptions(data=f"hub:{tmp_path / 'data'}", streaming=streaming)
    assert set(load(options, cache_dir=tmp_path / "cache")) == {"train", "val"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stated", [None, 12, 14])
def test_sixteen_bits_are_scaled_alike_all_over_the_data_set(
    tmp_path: Path, streaming: bool, stated: int | None
) -> None:
    features = datasets.Features({"picture": datasets.Image(), "digit": datasets.ClassLabel(names=["a", "b"])})
    (tmp_path / "data").mkdir()
    for split, peak in (("train", 4095), ("validation", 300)):
        images = [PIL.Image.fromarray(np.array([[0, peak]], np.uint16))] * 10
        rows = {"picture": images, "digit": [0, 1] * 5}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"data/{split}-0.parquet"))
    options = DataOptions(data=f"hub:{tmp_path / 'data'}", streaming=streaming, gray_bits=stated)
    if streaming and stated is None:
        with pytest.raises(HistoError, match="16-bit gray of unknown range"):
            load(options, cache_dir=tmp_path / "cache")
        return
    data, bits = load(options, cache_dir=tmp_path / "cache"), stated or 12
    assert {recorded(rows).gray_bits for rows in data.values()} == {bits}
    assert ImageTable(data["val"])[0]["image"].tolist() == [[[0, 300 >> (bits - 8)]]] * 3
    if streaming:
        sample = next(iter(hub.train_stream(options.data, 10, 0, 0, 1, None, Reading(gray_bits=bits))))
        assert sample["image"].tolist() == [[[0, 4095 >> (bits - 8)]]] * 3


def test_texts_that_a_terminal_would_obey_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data", splits=("train", "validation"))
    for path in (tmp_path / "data").iterdir():
        declare(path, ["a", "\x1b[31mb"])
    for streaming in (False, True):
        with pytest.raises(HistoError, match=r"the class '\\x1b\[31mb', expected printable text"):
            load(DataOptions(data=f"hub:{tmp_path / 'data'}", streaming=streaming), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_no_class(streaming: bool, tmp_path: Path) -> None:
    """A missing label is hidden; `datasets` itself accepts any number."""

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
