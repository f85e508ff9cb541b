"""Images flattened into the rows of a table: a label and one column per value, in CSV, parquet or npz."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import re
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hf_histo.data import schema
from hf_histo.data.readers import shards
from hf_histo.data.readers.builder import FolderBuilder, split_generator
from hf_histo.data.readers.class_folders import SINGLE, SPLITS
from hf_histo.data.schema import MAX_TEXT
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".parquet", ".npz")
NAMED = {  # what a column, or an array of an npz file, may be called, in any capitalization
    "label": ("label", "labels", "class", "target", "y"),
    "id": ("id", "image_id"),
    "group": ("group", "patient", "patient_id"),
}
PROBES = 16  # images from which range and order are detected
NUMBERED = re.compile(r"(.*?)(\d+)")  # a text and a number
BATCH = 1024  # rows of labels and the like that are read at a time
BLOCK = 2**21  # values of a parquet file that are read at a time, in whole columns of a row group
DARKEST_PEAK = 16  # below, an image that exceeds 1 may be a dark one in [0, 255] as well as one in an unknown range
CLEARLY = 0.8  # of the other order's roughness: above, the two can't be distinguished
UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, MemoryError, csv.Error, pa.ArrowException),
    *(zipfile.BadZipFile, zlib.error, RuntimeError),  # the last where an archive is encrypted, or packed in a newer way
)


@dataclass(frozen=True)
class Layout:
    """Square images of `side` pixels, in the order "hwc", "chw" or "gray", with values in [0, `maximum`], 1 or 255."""

    side: int
    order: str
    maximum: int

    def __str__(self) -> str:
        return f"{self.order.upper()} {self.side}x{self.side} in [0, {self.maximum}]"

    def arrange(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values (..., n) as images (..., side, side, channels)."""
        if self.order == "chw":
            return np.moveaxis(values.reshape(*values.shape[:-1], 3, self.side, self.side), -3, -1)
        return values.reshape(*values.shape[:-1], self.side, self.side, -1)

    def read(self, values: NDArray[np.float32], where: str) -> NDArray[np.uint8]:
        """One image, uint8 (side, side, 3). Raises HistoError, starting with `where`, for a value out of range."""
        bad = np.flatnonzero(~((values >= 0) & (values <= self.maximum)))  # also NaN
        if len(bad):
            found = "no number" if np.isnan(values[bad[0]]) else f"{values[bad[0]]:g}"
            found += f" in value {bad[0]}, counted from 0"
            raise HistoError(f"{where}: {found}, expected a number in [0, {self.maximum}]; correct it")
        if self.maximum == 255 and 0 < values.max() <= 1:
            found = f"values reach only {values.max():.7g}, as of [0, 1]"
            raise HistoError(f"{where}: {found}, expected [0, 255] as in the rest; scale or remove it")
        image = np.rint(self.arrange(values) * (255 // self.maximum)).astype(np.uint8)
        return np.broadcast_to(image, (self.side, self.side, 3))


class PixelTables(FolderBuilder):
    """`train`, `val` and `test` (spelled as class folders may be) as .csv, .parquet or .npz; one row is one image.

    A column `label` names the class, as a number or text; empty or -1 is hidden. There may be `id` and `group` (or
    `patient`). All other columns are the image's values: 3 x S x S of them, or S x S of a gray one, so that 224 pixels
    make 150,528. Their order is that of the numbers in their names, where all are one text and a number (`pixel_0`), or
    else that of the columns of `train`; the other files must have the same columns, in any order. In an npz file they
    are an array (N, values) beside `y` (N,).

    Values are in [0, 1] or [0, 255] and in the order HWC or CHW: stated (`--pixel_range`, `--pixel_order`), or detected
    in the first 16 images and recorded in `info.description`. The range is that of their maximum; the order is the one
    in which neighbors differ less, since images are smooth. The range is demanded of every image: in [0, 255], one that
    is not black and does not exceed 1 is refused.

    A row is read at a time, and of parquet files, which are stored by column, as many columns of a row group as hold 2
    million values, into a temporary file: the table is never in memory.

    Raises HistoError, naming file and row, for a missing column of labels, a value that is no number or out of range
    (unless such images are left out: `--on_bad_image skip`), a number of columns that makes no square image, other
    columns than those of `train`, a name that two columns have, a class that `train` lacks, a range or order that can't
    be detected, and a parquet file that expands to more than `EXPANSION` times its size.
    """

    LAYOUT = "pixel_tables"
    EXPECTED = "train, val and test as .csv, .parquet or .npz, with a column label and one column for each pixel value"
    OPTIONS = ("on_bad_image", "pixel_order", "pixel_range")

    @classmethod
    def matches(cls, directory: Path) -> bool:
        return bool(_files(directory))

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        return ["" if path == directory else path.name for path in _files(directory).values()]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()  # the classes are read from the files, once

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        files = _files(self.config.directory)
        columns = _columns_of(list(files.values()))
        tables = {split: _described(path) for split, path in files.items()}
        names = _classes(tables.get("train", pd.concat(tables.values()))["label"])
        if len(names) < 2:
            raise HistoError(f"{self.config.directory}: classes {names}, expected at least two; add labeled images")
        self.info.features = schema.features(names)
        self.info.description = ""
        generators = []
        for split, path in files.items():
            unknown = sorted(set(tables[split]["label"]) - {"", *names})
            if unknown:
                found = f"class {unknown[0]!r}, which {files['train'].name} lacks"
                raise HistoError(f"{path}: {found}, expected one of {', '.join(names)}; correct it or add images")
            layout = self._layout(path, columns, len(tables[split]))
            self.info.description += f"{path.name}: {layout}, {len(tables[split])} images; "
            arguments = {"path": path, "columns": columns, "table": tables[split], "layout": layout}
            generators.append(split_generator(split, len(tables[split]), **arguments))
        known = all((table["group"] != "").all() for table in tables.values())
        self.info.description += f"group: {'as given' if known else 'unknown'}"
        logger.info("%s: %s", self.config.directory, self.info.description)
        return generators

    def _layout(self, path: Path, columns: list[str], count: int) -> Layout:
        """How the file stores its images: stated, or detected in the first ones."""
        options = self.config.options
        probes = np.stack(list(itertools.islice(_rows(path, columns, count), PROBES)))
        probes = probes[np.isfinite(probes).all(axis=1)]
        if not len(probes):
            raise HistoError(f"{path}: each of the first images has a value that is no number; correct them")
        maximum, order = 255, options.pixel_order
        if options.pixel_range != "detect":
            maximum = int(options.pixel_range)
        elif probes.max() <= 1:
            maximum = 1
        elif not probes.max() >= DARKEST_PEAK:
            found = f"values of the first images reach only {probes.max():.7g}"
            raise HistoError(f"{path}: {found}, expected [0, 1] or [0, 255]; state it by --pixel_range")
        values = probes.shape[1]
        side = math.isqrt(values)
        if side * side == values:
            return Layout(side, "gray", maximum)
        side = math.isqrt(values // 3)
        if 3 * side * side != values:
            found = f"{values:,} columns of values"
            raise HistoError(f"{path}: {found}, expected 3 x S x S or S x S; remove other columns, or pad to squares")
        if order == "detect":
            rough = {name: _roughness(Layout(side, name, maximum).arrange(probes)) for name in ("hwc", "chw")}
            order = min(rough, key=rough.__getitem__)
            if not rough[order] < CLEARLY * max(rough.values()):
                found = f"neighbors differ by {rough['hwc']:.3g} as HWC and by {rough['chw']:.3g} as CHW"
                raise HistoError(f"{path}: {found}, expected clearly less in one; state it by --pixel_order")
        return Layout(side, order, maximum)

    def _generate_examples(
        self, path: Path, columns: list[str], table: pd.DataFrame, layout: Layout
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, (row, values) in enumerate(zip(table.itertuples(), _rows(path, columns, len(table)), strict=True)):
            with self.skipping():
                image = {"bytes": schema.encode_ppm(layout.read(values, f"{path}: row {number}")), "path": None}
                label = -1 if row.label == "" else self.info.features["label"].str2int(row.label)
                yield number, {"id": row.id, "image": image, "label": label, "center": -1, "group": row.group}


def _files(directory: Path) -> dict[str, Path]:
    """The file of each split; a single file is the split `full`."""
    if directory.is_file():
        return {SINGLE: directory}
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        split = next((split for split, names in SPLITS.items() if path.stem.lower() in names), None)
        if split and path.suffix.lower() in SUFFIXES and path.is_file():
            if split in found:
                raise HistoError(f"{path}: {found[split].name} is there as well, expected one file; remove one")
            found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def _roughness(images: NDArray[Any]) -> float:
    """The mean difference of neighbors in (B, H, W, C)."""
    return float(np.abs(np.diff(images, axis=1)).mean() + np.abs(np.diff(images, axis=2)).mean())


def _classes(labels: pd.Series[str]) -> list[str]:
    """The classes, numbers by their value and text by the alphabet."""
    names = sorted(set(labels) - {""})
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _described(path: Path) -> pd.DataFrame:
    """Label ("" where hidden), id (default: the row) and group ("" where unknown) of every row, as text."""
    try:
        columns = {"csv": _csv_columns, "parquet": _parquet_columns, "npz": _npz_columns}[_format(path)](path)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    if "label" not in columns:
        raise HistoError(f"{path}: no column label, expected the class of each image there; add or rename it")
    if len({len(values) for values in columns.values()}) > 1:
        found = ", ".join(f"{len(values):,} of {role}" for role, values in columns.items())
        raise HistoError(f"{path}: values of unequal number: {found}, expected as many; export it again")
    table = pd.DataFrame(columns).astype(str)
    if table.empty:
        raise HistoError(f"{path}: no rows, expected one for each image; export it again")
    table["label"] = table["label"].str.strip().str.removesuffix(".0").replace({"-1": "", "nan": "", "None": ""})
    return pd.DataFrame(
        {
            "label": table["label"],
            "id": table.get("id", pd.Series(range(len(table))).astype(str)),
            "group": table.get("group", pd.Series([""] * len(table))),
        }
    )


def _rows(path: Path, columns: list[str], count: int) -> Iterator[NDArray[np.float32]]:
    """The values of each row, float32 (n,), in the order of `columns`, which an npz file has not.

    Raises HistoError, naming the file, where it can't be read, and for more or fewer than `count` rows.
    """
    number = 0
    try:
        rows = {"csv": _csv_rows, "parquet": _parquet_rows, "npz": _npz_rows}[_format(path)](path, columns)
        for number, values in enumerate(rows, start=1):
            if number <= count:
                yield values
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    if number != count:
        raise HistoError(f"{path}: {number:,} images, but {count:,} labels, expected as many; export it again")


def _format(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _unreadable(path: Path, error: Exception) -> HistoError:
    reason = " ".join(str(error).split())[:300]
    return HistoError(f"{path}: unreadable ({reason}), expected a whole {_format(path)} file; export it again")


def _split_names(names: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """The places of label, id and group, and those of the values by their names."""
    roles = {spelling: role for role, spellings in NAMED.items() for spelling in spellings}
    special = {roles[name.lower()]: place for place, name in enumerate(names) if name.lower() in roles}
    return special, {name: place for place, name in enumerate(names) if name.lower() not in roles and name != ""}


def _columns_of(paths: list[Path]) -> list[str]:
    """The names of the columns of values in the order of an image, which all files have; none for npz files.

    Raises HistoError, naming the file, for other columns than those of the first one, and a name or role of two.
    """
    first, *others = (_names(path) for path in paths)
    for path, names in zip(paths[1:], others, strict=True):
        if set(names) != set(first):
            some = sorted(set(names) ^ set(first), key=lambda name: (len(name), name))[0]
            has, lacks = (path, paths[0]) if some in names else (paths[0], path)
            found = f"a column {some!r} that {lacks.name} lacks" if has == path else f"no column {some!r}"
            raise HistoError(f"{path}: {found}, expected the columns of {paths[0].name}; convert one like the other")
    numbered = [NUMBERED.fullmatch(name) for name in first]
    if all(numbered) and len({match[1] for match in numbered if match}) == 1:
        return sorted(first, key=lambda name: int(name[len(numbered[0][1]) :]))  # type: ignore[index]
    return first


def _names(path: Path) -> list[str]:
    """The names of the columns of values in a file, in its order."""
    try:
        names = {"csv": _csv_names, "parquet": _parquet_names, "npz": _npz_names}[_format(path)](path)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    special, values = _split_names(names)
    known = [name.lower() for name in names if name != ""]
    for name, times in Counter(names).items():
        if times > 1 and name != "":
            raise HistoError(f"{path}: two columns are named {name!r}, expected one; rename or remove one")
    if len(special) + len(values) < len(known):
        doubled = next(role for role, spellings in NAMED.items() if sum(name in spellings for name in known) > 1)
        raise HistoError(f"{path}: several columns for {doubled}, expected one; rename or remove the others")
    return [] if _format(path) == "npz" else list(values)


def _csv_names(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return next(csv.reader(file), [])


def _parquet_names(path: Path) -> list[str]:
    names: list[str] = pq.ParquetFile(path).schema_arrow.names
    return names


def _npz_names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others expand without bounds
                raise HistoError(
                    f"{path}: {member.filename} is packed as NumPy never does, expected deflate; save it anew"
                )
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _csv_columns(path: Path) -> dict[str, list[str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        special, _ = _split_names(names)
        columns: dict[str, list[str]] = {role: [] for role in special}
        for number, row in enumerate(rows):
            if len(row) != len(names):
                raise HistoError(f"{path}: row {number} has {len(row):,} cells, expected {len(names):,}; correct it")
            for role, place in special.items():
                columns[role].append(row[place])
    return columns


def _csv_rows(path: Path, columns: list[str]) -> Iterator[NDArray[np.float32]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        _, found = _split_names(next(rows))
        places = [found[name] for name in columns]
        for row in rows:
            cells = [row[place] for place in places]
            try:
                yield np.array(cells, np.float32)
            except ValueError:  # NaN, which the layout refuses
                yield pd.to_numeric(pd.Series(cells), errors="coerce").to_numpy(np.float32)


def _parquet_columns(path: Path) -> dict[str, list[Any]]:
    names = _parquet_names(path)
    special, values = _split_names(names)
    wanted = {role: names[place] for role, place in special.items()}
    # A text that is repeated is stored once, and read so, lest a small file fill the memory.
    file = pq.ParquetFile(path, read_dictionary=list(wanted.values()))
    shards.check_rows(str(path), file, path.stat().st_size, len(values) + 64 * len(wanted))
    shards.check_content({str(path): path})
    columns: dict[str, list[Any]] = {role: [] for role in wanted}
    for batch in file.iter_batches(batch_size=BATCH, columns=list(wanted.values())):
        for role, name in wanted.items():
            texts = getattr(batch[name], "dictionary", batch[name]).to_pylist()
            if (longest := max((len(str(text)) for text in texts), default=0)) > MAX_TEXT:
                found = f"a {role} of {longest:,} characters"
                raise HistoError(f"{path}: {found}, expected at most {MAX_TEXT:,}; shorten or remove it")
            columns[role] += batch[name].to_pylist()
    return columns


def _parquet_rows(path: Path, names: list[str]) -> Iterator[NDArray[np.float32]]:
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        with tempfile.TemporaryFile() as transposed:
            step = max(1, BLOCK // max(1, count))
            for start in range(0, len(names), step):
                block = file.read_row_group(group, columns=names[start : start + step])
                values = np.empty((count, block.num_columns), np.float32)
                for place, (name, kind) in enumerate(zip(block.schema.names, block.schema.types, strict=True)):
                    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                        raise HistoError(f"{path}: column {name} is {kind}, expected numbers; convert or remove it")
                    values[:, place] = block[place].to_numpy()
                for row in range(count):
                    transposed.seek(4 * (row * len(names) + start))
                    transposed.write(values[row].tobytes())
            transposed.seek(0)
            for _ in range(count):
                yield np.frombuffer(transposed.read(4 * len(names)), np.float32)


def _npz_columns(path: Path) -> dict[str, list[Any]]:
    with np.load(path, allow_pickle=False) as file:
        special, _ = _split_names(list(file))
        columns = {}
        for role, place in special.items():
            array = file[list(file)[place]]
            if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
                found, remedy = f"{list(file)[place]} has the shape {array.shape}", "of one-hot labels, take the argmax"
                raise HistoError(f"{path}: {found}, expected (N,), one {role} for each image; {remedy}")
            columns[role] = array.reshape(-1).tolist()
        return columns


def _npz_rows(path: Path, columns: list[str]) -> Iterator[NDArray[np.float32]]:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        found = list(_split_names(names)[1])
        if len(found) != 1:
            raise HistoError(
                f"{path}: arrays {', '.join(names)}, expected one of values (N, n) beside the labels y; remove others"
            )
        with archive.open(f"{found[0]}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read(file)
            if len(shape) != 2 or (by_column and 1 not in shape) or dtype.kind not in "uif":
                kind = f"{dtype} {shape}{' in Fortran order' if by_column else ''}"
                raise HistoError(f"{path}: {found[0]} is {kind}, expected numbers (N, n) in C order; convert it")
            for _ in range(shape[0]):
                data = file.read(shape[1] * dtype.itemsize)
                yield np.frombuffer(data, dtype, shape[1]).astype(np.float32)
