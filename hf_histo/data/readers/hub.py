"""Data sets that the `datasets` library loads by name, from the Hub or from a local folder of the same form."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.table import embed_table_storage
from filelock import FileLock
from huggingface_hub.constants import HF_HUB_CACHE
from numpy.typing import NDArray

from hf_histo.config import HUB
from hf_histo.data import cache, schema
from hf_histo.data.readers import shards
from hf_histo.data.readers.shards import FAULTS, readable
from hf_histo.data.reading import DEFAULT_READING, Reading
from hf_histo.errors import HistoError
from hf_histo.files import regular

if TYPE_CHECKING:
    from hf_histo.data.readers.streaming import Prepare, Stream  # imports torch

logger = logging.getLogger(__name__)

FORMATS = ("arrow", "csv", "imagefolder", "json", "parquet")  # the formats of `datasets` that are supported here
OPTIONS = ("gray_bits", "on_bad_image", "page")  # fields of `DataOptions` that have an effect here
BATCH = 1000  # rows of a stream that are read at a time
SPLITS = {"validation": "val", "valid": "val", "dev": "val"}  # a longer name before its beginning, see `_shards`
VERSION = "1"  # part of the cache key: raise it where other images or labels are stored


def load(
    name: str, *, cache_dir: str | Path, skip_bad_images: bool = False, reading: Reading = DEFAULT_READING
) -> datasets.DatasetDict:
    """Load a data set of the Hub into the schema; checksums of the converted data are verified each time.

    The data set must have one column of images and one of class labels. A split called validation, valid or dev
    becomes `val`. `id` is the row number in the source's split; center and group are unknown. (If patients are known,
    convert the data to another layout, which can hold them.)

    Args:
        name: "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION", or "hub:FOLDER" for a local folder that `datasets` can
            load, which needs no network.
        cache_dir: folder of the converted data.
        skip_bad_images: leave out images that can't be decoded, and log their rows.
        reading: how image files are read; without `gray_bits`, `schema.bits_for` determines it.

    Raises `HistoError` for a data set that can't be loaded, has no split `train` or other columns; a label without a
    class; two splits for validation; shards that declare other classes than the rest or expand too far (see `shards`);
    a local file that changes while it is read; and an image that `schema.decode` refuses, unless `skip_bad_images`.
    """
    root = Path(cache_dir) / "hf_histo_hub" / xxhash.xxh3_128_hexdigest(f"{VERSION} {name}".encode())
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{root}.lock"):
        cache.discard_damaged(root)
        builder = _find(name, cache_dir=str(root))
        folder, local = Path(builder.cache_dir), {path: Path(path) for path in _local_files(builder)}
        fresh = not folder.exists()
        state = cache.state_of(Path(), local)
        try:
            data = _read_all(name, _converted(name, builder, root), skip_bad_images, reading)
            if fresh:
                cache.check_unchanged(name, Path(), local, state)
        except HistoError:
            if fresh:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        cache.seal(folder)
    schema.check_texts(f"--data {name}", data)
    return named(data)


def _converted(name: str, builder: datasets.DatasetBuilder, root: Path) -> datasets.DatasetDict:
    """The splits as `datasets` converts them in the folder `root`; shards are checked before the conversion."""
    with _faults(name):
        manager = datasets.DownloadManager(
            download_config=datasets.DownloadConfig(cache_dir=str(root / "downloads"), token=builder.token)
        )
        files = {} if Path(builder.cache_dir).exists() else dict(_shards_of(name, builder, manager))
        schemas = {}
        for where, path in files.items():
            with regular(path).open("rb") as file:
                schemas[where] = shards.schema_of(file, _format(builder))
            shards.check_types(where, schemas[where])
        shards.check_content(files)
        builder.download_and_prepare(dl_manager=manager)
        found = builder.as_dataset()
        features = next(iter(found.values())).features
        for where, schema_ in schemas.items():
            _, label = columns(name, features)
            shards.check_classes(where, schema_, label, features[label].names)
        return found


def _shards_of(
    name: str, builder: datasets.DatasetBuilder, manager: datasets.DownloadManager
) -> Iterator[tuple[str, str]]:
    """Download the parquet or Arrow shards of a data set; yield the name for messages and the local path of each."""
    if _format(builder) in shards.FORMATS:
        for address, file in zip(_files(builder), manager.download(_files(builder)), strict=True):
            yield f"--data {name}: {address}", str(file)


def _read_all(name: str, found: datasets.DatasetDict, skip: bool, reading: Reading) -> datasets.DatasetDict:
    if "train" not in found:
        raise HistoError(f"--data {name}: has the splits {', '.join(found)}, expected train among them; choose another")
    _check_splits(name, found)
    peaks = (_brightest(name, rows, reading.page) for rows in found.values())
    reading = replace(reading, gray_bits=schema.bits_for(peaks, reading.gray_bits))
    return datasets.DatasetDict(
        {SPLITS.get(str(split), str(split)): _as_schema(name, rows, skip, reading) for split, rows in found.items()}
    )


def _check_splits(name: str, found: Iterable[str]) -> None:
    """Raise HistoError for two splits that would become one."""
    known: dict[str, str] = {}
    for split in map(str, found):
        ours = SPLITS.get(split, split)
        if (other := known.setdefault(ours, split)) != split:
            raise HistoError(
                f"--data {name}: has the splits {other} and {split}, expected one for {ours}; leave one out of a copy, "
                "or join them there"
            )


def load_streaming(name: str, *, reading: Reading = DEFAULT_READING) -> datasets.DatasetDict:
    """Load as `load` does, but only the labels of `train`: `train_stream` reads its images, and `image` is empty.

    The other splits, one of which must be for validation, are read completely. `name` may also be
    "hub:s3://BUCKET/FOLDER" (or any other URL that fsspec supports): a folder of parquet shards. 16-bit gray images
    need `reading.gray_bits`, since not all images are read beforehand; for the same reason, the expansion of shards is
    bounded only by the sizes that they declare.
    """
    builder = _find(name)
    with _faults(name):
        found = builder.as_streaming_dataset()
    if "train" not in found or not set(SPLITS) & set(found):
        raise HistoError(f"--data {name}: has the splits {', '.join(found)}, expected train and validation; add them")
    _check_splits(name, found)
    _check_declared(name, builder, found["train"].features)
    data = {}
    for split, rows in found.items():
        image, label = columns(name, rows.features)
        if split == "train":
            classes = rows.features[label].names
            labels = _labels(name, _whole(name, split, rows.select_columns([label]))[label], classes, first=0)
            data["train"] = datasets.Dataset.from_dict(
                {"id": [""] * len(labels), "image": [None] * len(labels), "label": labels}
                | {"center": [-1] * len(labels), "group": [""] * len(labels)},
                features=schema.features(classes),
            )
            schema.record(data["train"].info, reading)
        else:
            bare = rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
            kinds = datasets.Features({column: rows.features[column] for column in (image, label)})
            whole = datasets.Dataset(_whole(name, split, bare), info=datasets.DatasetInfo(features=kinds))
            data[SPLITS.get(split, split)] = _as_schema(name, whole, reading=reading)
    read = datasets.DatasetDict({split: rows for split, rows in data.items() if split != "train"})
    schema.check_texts(f"--data {name}", read)
    return named(datasets.DatasetDict(data))


def train_stream(
    name: str,
    total: int,
    seed: int,
    rank: int,
    processes: int,
    prepare: Prepare | None,
    reading: Reading = DEFAULT_READING,
) -> Stream:
    """A `Stream` of the training images of `load_streaming`, for process `rank` of `processes`."""
    from hf_histo.data.readers.streaming import Stream

    with _faults(name):
        rows = _find(name).as_streaming_dataset()["train"]
    image, label = columns(name, rows.features)
    return Stream(
        rows,
        image=image,
        label=label,
        total=total,
        seed=seed,
        rank=rank,
        processes=processes,
        prepare=prepare,
        reading=reading,
    )


def _find(name: str, **options: Any) -> datasets.DatasetBuilder:
    """The builder of a data set. Raises HistoError if it can't be found, or its files are in none of `FORMATS`."""
    source, _, revision = name.removeprefix(HUB).partition("@")
    if Path(source).is_dir():
        source = str(Path(source).absolute())  # a relative folder `parquet` would be taken for the format
    elif source in _PACKAGED_DATASETS_MODULES:  # `datasets` would read all such files of the current folder
        raise HistoError(f"--data {name}: names a format, expected OWNER/NAME or a folder; name one")
    with _faults(name):
        if "://" in source:
            return datasets.load_dataset_builder("parquet", data_files=_shards(source), **options)
        builder = datasets.load_dataset_builder(source, revision=revision or None, **options)
    if _format(builder) not in FORMATS:
        expected = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise HistoError(
            f"--data {name}: holds {_format(builder)} files, expected {expected}; write it as parquet by `push_to_hub`"
        )
    return builder


def _format(builder: datasets.DatasetBuilder) -> str:
    """Name of the `datasets` module that reads the files, such as "parquet", independent of their suffix."""
    return type(builder).__module__.rpartition(".")[2]


@contextmanager
def _faults(name: str) -> Iterator[None]:
    try:
        yield
    except FAULTS as error:
        reason = " ".join(str(error).split())[:300]
        raise HistoError(
            f"--data {name}: can't be loaded ({reason}); expected a data set on the Hub and a network"
        ) from None


def _files(builder: datasets.DatasetBuilder) -> list[str]:
    """Addresses (local paths or URLs) of all files of a data set."""
    return [str(file) for files in (builder.config.data_files or {}).values() for file in files]


def _local_files(builder: datasets.DatasetBuilder) -> list[str]:
    """Paths of the files of a data set that are on this machine."""
    found = (fsspec.core.url_to_fs(file) for file in _files(builder))
    return [path for system, path in found if isinstance(system, fsspec.implementations.local.LocalFileSystem)]


def _check_declared(name: str, builder: datasets.DatasetBuilder, features: datasets.Features) -> None:
    """Raise `HistoError` for a streamed shard that declares other classes than `features`, or more than it can hold."""
    _, label = columns(name, features)
    if _format(builder) in shards.FORMATS:
        for address in _files(builder):
            with _faults(name), fsspec.open(address) as stored:
                where = f"--data {name}: {address}"
                if _format(builder) == "parquet":
                    shards.check_rows(where, pq.ParquetFile(stored), stored.size, width=0)
                    stored.seek(0)
                shards.check_classes(where, shards.schema_of(stored, _format(builder)), label, features[label].names)


def _shards(address: str) -> dict[str, list[str]]:
    """The parquet files in a folder that fsspec can open, by the split that their names start with."""
    storage, folder = fsspec.core.url_to_fs(address)
    found: dict[str, list[str]] = {split: [] for split in ("train", *SPLITS, "test")}
    for file in storage.glob(f"{folder}/*.parquet"):
        split = next((split for split in found if file.rpartition("/")[2].startswith(split)), None)
        if split is not None:
            found[split].append(storage.unstrip_protocol(file))
    return {split: files for split, files in found.items() if files}


def named(data: datasets.DatasetDict) -> datasets.DatasetDict:
    """Set the fingerprint of `data`, in place, to a hash of its images and labels; return `data`."""
    content = xxhash.xxh3_128()
    for split, rows in data.items():
        content.update(split.encode())
        for batch in rows.with_format("arrow").iter(1000):
            for image, label in zip(batch["image"], batch["label"], strict=True):
                content.update(image["bytes"].as_buffer() if image.is_valid else b"")
                content.update(str(label).encode())
    for rows in data.values():
        rows.info.config_name = content.hexdigest()
    return data


def columns(name: str, features: datasets.Features) -> tuple[str, str]:
    """Names of the image column and the label column. Raises `HistoError` unless there is exactly one of each."""
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise HistoError(
            f"--data {name}: has {len(images)} columns of images and {len(labels)} of class labels, expected one of "
            "each; keep those in a copy"
        )
    return images[0], labels[0]


def _brightest(name: str, rows: datasets.Dataset, page: int | None) -> int | None:
    """The largest value in the 16-bit gray images of a split; None if it has no such images."""
    image, _ = columns(name, rows.features)
    _check_paths(name, rows, image)
    bare = rows.select_columns([image]).with_format("arrow")
    peaks = bare.map(partial(_peaks, column=image, page=page), batched=True, remove_columns=[image])
    brightest: int | None = pc.max(peaks["peak"][:]).as_py()
    return brightest


def _peaks(table: pa.Table, *, column: str, page: int | None) -> pa.Table:
    files = (
        (io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"] or "")) if image else Path()
        for image in table[column].to_pylist()
    )
    return pa.table({"peak": pa.array([schema.brightest(file, page) for file in files], pa.int64())})


def _as_schema(
    name: str, rows: datasets.Dataset, skip: bool = False, reading: Reading = DEFAULT_READING
) -> datasets.Dataset:
    image, label = columns(name, rows.features)
    _check_paths(name, rows, image)
    classes = rows.features[label].names
    table = rows.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    read = partial(_read, name=name, classes=classes, skip=skip, reading=reading)
    table = table.with_format("arrow").map(read, batched=True, with_indices=True).with_format(None)
    if left_out := sorted(set(range(len(rows))) - set(map(int, table["id"]))):
        logger.warning("--data %s: left out %d images that can't be read: rows %s", name, len(left_out), left_out)
    count = len(table)
    if not count:
        raise HistoError(f"--data {name}: a split has no readable image, expected some; choose another data set")
    table = table.add_column("center", [-1] * count).add_column("group", [""] * count)
    features = schema.features(classes)
    table = table.select_columns(list(features)).cast(features)
    schema.record(table.info, reading)
    return table


def _read(
    table: pa.Table, rows: list[int], *, name: str, classes: Sequence[str], skip: bool, reading: Reading
) -> pa.Table:
    """The rows with `id` and with the bytes of each image, also of one stored as a local file; unreadable ones are
    left out if `skip`."""
    labels = pa.array(_labels(name, table["label"], classes, first=rows[0]))
    table, kept, stored = embed_table_storage(table.drop_columns("label")).append_column("label", labels), [], []
    for place, (row, image) in enumerate(zip(rows, table["image"], strict=True)):
        try:
            data = image["bytes"] if image.is_valid else pa.scalar(None)
            content = data.as_py() if data.is_valid else b""
            where = f"--data {name}: row {row}"
            schema.refuse_dicom(content, where)
            stored.append({"bytes": schema.checked(content, where, reading), "path": None})
            kept.append(place)
        except HistoError:
            if not skip:
                raise
    ids = pa.array([str(rows[place]) for place in kept], pa.string())
    images = pa.array(stored, datasets.Image().pa_type)
    table = table.drop_columns("image").take(pa.array(kept, pa.int64()))
    return table.append_column("image", images).append_column("id", ids)


def _whole(name: str, split: str, rows: datasets.IterableDataset) -> pa.Table:
    """All rows of a streamed split. Raises HistoError if a shard can't be read, or there is no row."""
    tables = list(readable(rows.with_format("arrow").iter(BATCH), f"--data {name}"))
    if not tables:
        raise HistoError(f"--data {name}: {split} has no image, expected some; add images")
    return pa.concat_tables(tables)


def _labels(name: str, found: pa.ChunkedArray, classes: Sequence[str], first: int) -> NDArray[np.int64]:
    """Labels of a batch, -1 where hidden. Raises HistoError for an invalid one, its row counted from `first`."""
    labels: NDArray[np.int64] = found.fill_null(-1).to_numpy()
    for place in np.flatnonzero((labels < -1) | (labels >= len(classes)))[:1]:
        expected = f"0 to {len(classes) - 1}, or -1 where it is hidden"
        raise HistoError(
            f"--data {name}: row {first + place} has the label {labels[place]}, expected {expected}; correct a copy"
        )
    return labels


def _check_paths(name: str, rows: datasets.Dataset, column: str) -> None:
    """Raise HistoError for an image given as a path outside the data set: it could name any file on this machine."""
    source = Path(name.removeprefix(HUB).partition("@")[0])
    roots = [root.resolve() for root in (source, Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE))]
    for batch in rows.select_columns([column]).with_format("arrow").iter(1000):
        images = batch[column].combine_chunks()
        for path in images.field("path").filter(images.field("bytes").is_null()).drop_null().to_pylist():
            if not any(Path(path).resolve().is_relative_to(root) for root in roots):
                found = f"an image is {path}, expected its bytes or a file of this data set"
                raise HistoError(f"--data {name}: {found}; put it there")
