"""Images flattened into the rows of a table, with a label and one column per pixel value, in CSV, parquet or npz."""

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
from hf_histo.data.readers.class_folders import SINGLE, split_files
from hf_histo.data.schema import MAX_TEXT
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".parquet", ".npz")
NAMED = {  # accepted names of a column, or of an array in an npz file, in any capitalization
    "label": ("label", "labels", "class", "target", "y"),
    "id": ("id", "image_id"),
    "group": ("group", "patient", "patient_id"),
}
PROBES = 16  # images from which range and order are detected
NUMBERED = re.compile(r"(.*?)(\d+)")  # a text and a number
BATCH = 1024  # rows of labels, ids and groups read at a time
BLOCK = 2**21  # values of a parquet file read at a time, in whole columns of a row group
DARKEST_PEAK = 16  # below this maximum, values above 1 could be dark images in [0, 255] or an unknown range
CLEARLY = 0.8  # ratio of the roughness of the two orders above which they can't be distinguished
UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, MemoryError, csv.Error, pa.ArrowException),
    *(zipfile.BadZipFile, zlib.error, RuntimeError),  # the last: an encrypted archive, or a newer compression
)


@dataclass(frozen=True)
class Layout:
    """How the rows of a table store square images of `side` x `side` pixels.

    `order` of the values is "hwc", "chw" or "gray"; they are in [0, `maximum`], which is 1 or 255.
    """

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
    """`train`, `val` and `test` (or the names in `class_folders.SPLITS`) as .csv, .parquet or .npz; a row is an image.

    The column `label` is the class, as a number or text; empty or -1 is hidden. The columns `id` and `group` (or
    `patient`) are optional. All other columns are pixel values: 3 x S x S of a color image (150,528 for S = 224), S x S
    of a gray one. If all their names are one text and a number (`pixel_0`), they are ordered by that number, else as in
    `train`; the other files must have the same columns, in any order. In an npz file, the values are an array
    (N, values) beside `y` (N,).

    Values are in [0, 1] or [0, 255] and in the order HWC or CHW: stated (`--pixel_range`, `--pixel_order`), or detected
    in the first 16 images and recorded in `info.description`. The range is detected by the maximum; the order is the
    one in which neighboring pixels differ less. The range is required of every image: in [0, 255], an image that is not
    black and has no value above 1 is refused.

    The table is never in memory: files are read row by row; parquet, which is stored by column, is first copied into a
    temporary file, 2 million values at a time.

    Raises HistoError, naming file and row, for a missing label column, a value that is not a number or out of range
    (unless `--on_bad_image skip` leaves the image out), a blank id or group, a number of columns that makes no square
    image, other columns than those of `train`, duplicate column names, a class that `train` lacks, a range or order
    that can't be detected, and a parquet file that expands to more than `EXPANSION` times its size.
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
        return datasets.DatasetInfo()  # `_split_generators` sets the classes, so that the files are read once

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        files = _files(self.config.directory)
        columns = _columns_of(list(files.values()))
        tables = {split: _described(path) for split, path in files.items()}
        names = classes_of(tables.get("train", pd.concat(tables.values()))["label"])
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
        """How the file stores its images: as options state, or as detected in the first ones."""
        options = self.config.options
        probes = np.stack(list(itertools.islice(_rows(path, columns, count), PROBES)))
        probes = probes[np.isfinite(probes).all(axis=1)]
        if not len(probes):
            raise HistoError(f"{path}: each of the first images has a value that is not a number; correct them")
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
    return {SINGLE: directory} if directory.is_file() else split_files(directory, SUFFIXES)


def _roughness(images: NDArray[Any]) -> float:
    """Mean absolute difference of neighboring pixels of images (B, H, W, C)."""
    return float(np.abs(np.diff(images, axis=1)).mean() + np.abs(np.diff(images, axis=2)).mean())


def classes_of(labels: pd.Series[str]) -> list[str]:
    """Class names, sorted: by value if all are numbers, else as text."""
    names = sorted(set(labels) - {""})
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def texts_of(values: pd.Series[Any]) -> pd.Series[str]:
    """Cells as texts without spaces around them, "" where blank; whole numbers without decimals."""
    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")
    texts = values.astype("string").fillna("").str.strip()
    if texts.str.fullmatch(r"(-?\d+\.0)?").all():  # integers beside blanks, as pandas writes them
        texts = texts.str.removesuffix(".0")
    return texts.astype(str)


def _described(path: Path) -> pd.DataFrame:
    """Label ("" where hidden), id (default: the row number) and group (default: "", unknown) of each row, as text."""
    try:
        columns = {"csv": _csv_columns, "parquet": _parquet_columns, "npz": _npz_columns}[_format(path)](path)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    if "label" not in columns:
        raise HistoError(f"{path}: no column label, expected the class of each image there; add or rename it")
    if len({len(values) for values in columns.values()}) > 1:
        found = ", ".join(f"{len(values):,} of {role}" for role, values in columns.items())
        raise HistoError(f"{path}: values of unequal number: {found}, expected as many; export it again")
    try:  # as objects, since pandas would round large integers beside nulls
        table = pd.DataFrame({role: texts_of(pd.Series(values, dtype=object)) for role, values in columns.items()})
    except UnicodeError as error:
        raise _unreadable(path, error) from None
    if table.empty:
        raise HistoError(f"{path}: no rows, expected one for each image; export it again")
    for role in table.columns.drop("label"):
        for row in np.flatnonzero(table[role] == "")[:1]:
            found = f"row {row}: the {role} is blank"
            raise HistoError(f"{path}: {found}, expected a value in each; fill it in, or remove the row")
    table["label"] = table["label"].str.removesuffix(".0").replace({"-1": "", "nan": "", "None": ""})
    return pd.DataFrame(
        {
            "label": table["label"],
            "id": table.get("id", pd.Series(range(len(table))).astype(str)),
            "group": table.get("group", pd.Series([""] * len(table))),
        }
    )


def _rows(path: Path, columns: list[str], count: int) -> Iterator[NDArray[np.float32]]:
    """Yield the values of each row, float32 (n,), in the order of `columns` (ignored for npz files).

    Raises HistoError, naming the file, if it can't be read or has more or fewer than `count` rows.
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
    """Column indices: of label, id and group by role, and of the pixel values by column name."""
    roles = {spelling: role for role, spellings in NAMED.items() for spelling in spellings}
    special = {roles[name.lower()]: place for place, name in enumerate(names) if name.lower() in roles}
    return special, {name: place for place, name in enumerate(names) if name.lower() not in roles and name != ""}


def _columns_of(paths: list[Path]) -> list[str]:
    """Names of the value columns, which all files share, in the order of the pixels; empty for npz files.

    Raises HistoError, naming the file, for other columns than in the first file, and two columns of one name or role.
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
    """Names of the value columns of a file, in the file's order."""
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
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others expand without bound
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
    # Repeated text is stored once; reading it as a dictionary keeps a small file from filling the memory.
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
