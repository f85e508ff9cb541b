"""Rows of a table of image files or slides: find the columns, and check every row before an image is read."""

from __future__ import annotations

import csv
import logging
import os
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from hf_histo.config import DataOptions
from hf_histo.data import schema
from hf_histo.data.readers import shards, slides
from hf_histo.data.readers.class_folders import SINGLE, SPLITS, split_files
from hf_histo.data.readers.pixel_tables import UNREADABLE, texts_of
from hf_histo.errors import HistoError, did_you_mean
from hf_histo.files import atomic_folder, regular

logger = logging.getLogger(__name__)

Named = Mapping[str, tuple[str, ...]]

SUFFIXES = (".csv", ".tsv", ".parquet", ".xlsx")
NAMED = {  # names of a column, in any capitalization, with spaces, hyphens or underscores; the first one is the usual
    "image": (
        *("image", "path", "file", "filename", "file_name", "filepath", "file_path"),
        *("image_path", "image_file", "image_name", "img", "img_path"),
    ),
    "label": ("label", "labels", "class", "class_name", "target", "diagnosis", "y"),
    "id": ("id", "image_id"),
    "split": ("split", "subset", "partition"),
    "center": ("center", "centre", "center_id", "hospital", "site", "institution", "scanner"),
    "group": ("group", "patient", "patient_id", "subject", "subject_id", "case", "case_id", "slide", "slide_id"),
}
NAMED_OF_SLIDES = {
    "slide": ("slide", "slide_path", "slide_file", "wsi", "wsi_path"),
    "annotations": ("annotations", "annotation", "annotation_file", "geojson"),
    **{role: NAMED[role] for role in ("label", "split", "center")},
    "group": tuple(name for name in NAMED["group"] if not name.startswith("slide")),
}
COLUMN_OPTIONS, SLIDE_COLUMN_OPTIONS = (tuple(f"{role}_column" for role in named) for named in (NAMED, NAMED_OF_SLIDES))
WITHOUT = "none"  # value of such an option: no column has this role
# By byte order mark, the longer ones first.
ENCODINGS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
DELIMITERS = ",;\t|"  # of CSV files; the most frequent one in the first line is taken
LARGEST_SHEET = 2**30  # bytes of an unpacked workbook
SHOWN = 5  # rows or names that an error lists


def read(directory: Path, options: DataOptions, named: Named = NAMED) -> pd.DataFrame:
    """Rows of a table, or of `train`, `val` and `test` tables in a folder, checked; no image is opened.

    Args:
        directory: the table or folder.
        options: names of columns, and the folder of the images.
        named: usual names of the columns, by role; the first role is the file's.

    Returns a row per image, with text columns: `where` (file and row, for errors), `name` (path below the root, with
    forward slashes), `path` (a `Path`), `present` (bool), `label` ("" where hidden), `id`, `split`, `center` and
    `group` ("" where unknown). Of slides, also `annotations`, as written; `name` and `id` are without the suffix.

    Raises HistoError as `image_table.TableOfImages` documents, except for images, and for labels of slides.
    """
    tables = {SINGLE: directory} if directory.is_file() else split_files(directory, SUFFIXES)
    root = root_of(directory, options)
    if not root.is_dir():
        raise HistoError(f"--image_root {root}: no such folder, expected the one that image paths are relative to")
    parts = [_read_table(path, split, options, named) for split, path in tables.items()]
    rows = pd.concat(parts, ignore_index=True)
    kind = next(iter(named))
    locate(rows, root, kind)
    rows["id"] = rows["id"].where(rows["id"] != "", rows["name"]) if "id" in rows else rows["name"]
    _check(rows, kind)
    if kind == "image":
        refuse_hidden(rows)
    _merge_centers(rows)
    return rows


def root_of(directory: Path, options: DataOptions) -> Path:
    """The folder that the paths in a table, or in tables of a folder, are relative to."""
    if options.image_root:
        return Path(options.image_root)
    return directory.parent if directory.is_file() else directory


def fits(path: Path, options: DataOptions) -> bool:
    """Whether a table lists image files, rather than pixel values as `pixel_tables` reads them.

    It does if a column is named for paths (`NAMED`, or `--image_column`). Raises HistoError for a table that has
    neither such a column nor one of numbers.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return False
    if options.image_column is not None or suffix not in (".csv", ".parquet"):
        return True
    try:
        names, are_numbers = _head(path)
    except UnicodeError as error:
        raise HistoError(f"{path}: {error}, expected text in UTF-8, or UTF-16 with its mark; save it so") from None
    except UNREADABLE:
        return False  # the reader of pixel tables names the fault
    roles = _roles(NAMED)
    if any(roles.get(_plain(name)) == "image" for name in names):
        return True
    values = [number for name, number in zip(names, are_numbers, strict=False) if _plain(name) not in roles]
    if are_numbers and not any(values):
        raise HistoError(
            f"{path}: the columns are {_few(names)}, expected one of image paths ({', '.join(NAMED['image'][:3])}, or "
            "as --image_column names it), or numbers, one column for each pixel value; rename or name a column"
        )
    return False


def lists_slides(path: Path, options: DataOptions) -> bool:
    """Whether a table lists slides: it has a column of them (`NAMED_OF_SLIDES`, or `--slide_column`), none of images.

    In a table of images, a column `slide` names their groups.
    """
    return _is_of_slides(options, lambda: _names(path))


def _names(path: Path) -> Sequence[Any]:
    """Names of the columns of a table; none of one that has no names or can't be read: its reader names the fault."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return []
    try:
        return list(_cells(path).columns) if suffix == ".xlsx" else _head(path)[0]
    except UNREADABLE:
        return []


def _is_of_slides(options: DataOptions, names: Callable[[], Sequence[Any]]) -> bool:
    """`lists_slides` of a table whose columns have these `names`, which are read only if no option decides."""
    if options.slide_column is not None or options.image_column is not None:
        return options.slide_column is not None
    plain = {_plain(str(name)) for name in names()}
    return bool(plain & {*NAMED_OF_SLIDES["slide"]}) and not plain & {*NAMED["image"]}


def numbered(centers: pd.Series[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Numbers of centers, (n,) with -1 for blank ones, and their names by number; none if all are whole numbers."""
    known = sorted(set(centers) - {""})
    if all(center.isdecimal() for center in known):
        return np.array([int(center or -1) for center in centers], np.int64), []
    numbers = {"": -1} | {name: number for number, name in enumerate(known)}
    return np.array([numbers[center] for center in centers], np.int64), known


def check_present(rows: pd.DataFrame, kind: str = "image") -> None:
    """Raise HistoError for images, or what `kind` is, that are no files."""
    missing = rows[~rows["present"]]
    if len(missing):
        more = f" ({len(missing)} {kind}s are missing in all)" if len(missing) > 1 else ""
        raise HistoError(
            f"{missing['where'].iloc[0]}: {kind} {missing['name'].iloc[0]!r} is missing{more}, expected a file below "
            f"the folder of the {kind}s; add it, or remove the row"
        )


def store(source: pd.DataFrame | datasets.Dataset, options: DataOptions, cache_dir: Path) -> DataOptions:
    """Write a table in memory to a file below `cache_dir`, named by its content; returns the options to load it.

    It is one of images or of slides, as `lists_slides` tells. Paths, also those of annotations, are relative to
    `image_root`, or absolute within it. Its default is the current folder; if all paths are absolute, and some lie
    elsewhere, the folder that holds them all. Images that a `datasets.Dataset` holds as bytes are written beside the
    table.
    """
    images: list[bytes] = []
    if isinstance(source, datasets.Dataset):
        source, images = _frame(source)
    frame = source.rename(columns=str)
    names = list(frame.columns)
    named = NAMED_OF_SLIDES if _is_of_slides(options, lambda: names) else NAMED
    kind = next(iter(named))
    column = _column(names, kind, options, "the table", named)
    if column is None:
        raise _lacks(kind, "the table", names)
    root = Path(options.image_root) if options.image_root else _root_of(frame[column])
    for row, data in enumerate(images):
        schema.refuse_dicom(data, f"row {row} of the data set")
    annotations = _column(names, "annotations", options, "the table", named) if "annotations" in named else None
    for paths in () if images else filter(None, (column, annotations)):  # without where they lie on this machine
        frame[paths] = [_below(os.fspath(path), root) if _is_given(path) else "" for path in frame[paths]]
    table = pa.table({str(name): pa.array(texts_of(values)) for name, values in frame.items()})
    content = xxhash.xxh3_128(repr(table.to_pydict()).encode())
    for data in images:
        content.update(data)
    folder = cache_dir / "hf_histo_tables" / content.hexdigest()
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            pq.write_table(table, temporary / "table.parquet")
            for row, data in enumerate(images):
                (temporary / str(row)).write_bytes(data)
    return replace(options, data=str(folder / "table.parquet"), image_root=None if images else str(root))


def _root_of(paths: pd.Series[Any]) -> Path:
    """The folder that paths are relative to where no option names it."""
    current = Path.cwd()
    given = [Path(path) for path in paths if _is_given(path)]
    if not given or not all(path.is_absolute() for path in given):
        return current
    within = all(path.is_relative_to(current) for path in given)
    return current if within else Path(os.path.commonpath([path.parent for path in given]))


def _read_table(path: Path, split: str, options: DataOptions, named: Named) -> pd.DataFrame:
    """Rows of one file, as texts; without its split column, they are all of `split`."""
    try:
        cells = _cells(regular(path))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise HistoError(
            f"{path}: unreadable ({reason}), expected a whole {path.suffix[1:]} file, and CSV as UTF-8 or UTF-16; "
            "export it again"
        ) from None
    names, kind = list(cells.columns), next(iter(named))
    columns = {role: _column(names, role, options, str(path), named) for role in named}
    if columns[kind] is None:
        raise _lacks(kind, str(path), names)
    if cells.empty:
        raise HistoError(f"{path}: no rows, expected one for each {kind}; add them")
    rows = pd.DataFrame(
        {role: "" if name is None else texts_of(cells[name]) for role, name in columns.items()}, index=cells.index
    )
    rows.insert(0, "where", [f"{path}, row {row}" for row in rows.index])
    for role in (kind, "split", "group", "id"):
        if columns.get(role) is not None:
            _refuse_rows(rows[rows[role] == ""], f"the {role} is blank", "fill it in, or remove the row")
    if columns["split"] is None:
        rows["split"] = "test" if split == SINGLE and kind == "image" and columns["label"] is None else split
        return rows
    known = {spelling: split for split, spellings in SPLITS.items() for spelling in spellings}
    given = rows["split"].str.lower().map(known)
    for row in rows[given.isna()].itertuples():
        raise HistoError(
            f"{row.where}: split {row.split!r}, expected {', '.join(SPLITS)}; correct it, or give --split_column "
            f"{WITHOUT} for new splits"
        )
    if split != SINGLE:
        _refuse_rows(rows[given != split], f"the split is not {split}, as the file's name", "move it, or correct it")
    rows["split"] = given
    return rows


def locate(rows: pd.DataFrame, root: Path, kind: str) -> None:
    """Add `name`, `path` and `present` of each file in the column `kind`; a slide may be a folder.

    Raises HistoError for a path outside `root`.
    """
    paths = [located(where, text, root, kind) for where, text in zip(rows["where"], rows[kind], strict=True)]
    rows["name"] = [_below(str(path.absolute()), root) for path in paths]
    rows["path"] = np.array(paths, object)
    rows["present"] = [_is_file(path) or (kind == "slide" and path.is_dir()) for path in paths]
    if kind == "slide":
        rows["name"] = rows["name"].map(slides.name_of)


def located(where: str, text: str, root: Path, kind: str) -> Path:
    """The path that a cell gives relative to `root`. Raises HistoError, starting with `where`, for one outside."""
    path = root / text
    if "\\" in text and not _is_file(path):  # of Windows
        path = root / text.replace("\\", "/")
    if not path.resolve().is_relative_to(root.resolve()):
        raise HistoError(
            f"{where}: {kind} {text!r} lies outside {root}, expected a path within it; correct it, or state the "
            "folder of the images by --image_root"
        )
    return path


def refuse_hidden(rows: pd.DataFrame) -> None:
    """Raise HistoError for rows without a label that are not of test."""
    hidden = rows[(rows["label"] == "") & (rows["split"] != "test")]
    _refuse_rows(hidden, "the label is blank (or -1, hidden)", "fill it in, or remove the row; test images may lack it")


def _check(rows: pd.DataFrame, kind: str) -> None:
    """Raise HistoError for rows that contradict each other."""
    for column, what in (("id", "have the id"), ("name", f"name the {kind}")):
        for value, same in rows[rows[column].duplicated(keep=False)].groupby(column, sort=False):
            raise HistoError(f"{_listed(same)} {what} {value!r}, expected one row per {kind}; remove or correct one")
    rows["label"] = rows["label"].replace("-1", "")
    for where, spellings in _respelled(rows, "label"):
        raise HistoError(f"{where}: the label is written in {_ways(spellings)}, expected one; correct the table")
    check_groups(rows)


def check_groups(rows: pd.DataFrame) -> None:
    """Raise HistoError for groups that are in several splits."""
    known = rows[rows["group"] != ""]
    splits = known.groupby("group")["split"].nunique()
    if len(mixed := splits.index[splits > 1]):
        one = known[known["group"] == mixed[0]].drop_duplicates("split")
        found = " and ".join(f"{split} ({where})" for split, where in zip(one["split"], one["where"], strict=True))
        raise HistoError(
            f"{len(mixed)} groups (patients, slides) are in several splits: {_few(list(mixed))}, expected each in one; "
            f"{mixed[0]} is in {found}; correct the splits, or give --split_column {WITHOUT} for new ones"
        )


def _merge_centers(rows: pd.DataFrame) -> None:
    """Merge the spellings of a center, with a warning: apart, it would be on both sides of a held-out test."""
    for where, spellings in _respelled(rows, "center"):
        kept = max(spellings, key=spellings.__getitem__)
        logger.warning("%s: the center is written in %s, taken as one: %s", where, _ways(spellings), kept)
        rows.loc[rows["center"].isin(spellings), "center"] = kept


def _respelled(rows: pd.DataFrame, column: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Values that differ in capitals, inner spaces or the encoding of a character alone.

    Yields a row with the second one, and the number of rows with each.
    """
    found = dict[str, dict[str, int]]()
    for value, count in rows[column].value_counts(sort=False).items():
        plain = " ".join(unicodedata.normalize("NFKC", str(value)).casefold().split())
        found.setdefault(plain, {})[str(value)] = count
    for spellings in found.values():
        if len(spellings) > 1:
            yield rows.loc[rows[column] == list(spellings)[1], "where"].iloc[0], spellings


def _ways(spellings: Mapping[str, int]) -> str:
    """Spellings in a message, with the number of rows of each."""
    return f"{len(spellings)} ways, " + " and ".join(f"{text!r} ({count} rows)" for text, count in spellings.items())


def _refuse_rows(rows: pd.DataFrame, fault: str, remedy: str) -> None:
    """Raise HistoError, naming the rows, unless there are none."""
    if len(rows):
        raise HistoError(f"{_listed(rows)}: {fault}, expected a value in each; {remedy}")


def _listed(rows: pd.DataFrame) -> str:
    """File and rows, e.g. "images.csv, rows 3, 7 and 2 more"."""
    first, *others = rows["where"]
    start, _, number = first.rpartition(", row ")
    if not others or any(not other.startswith(f"{start}, row ") for other in others):  # or of several files
        return " and ".join(rows["where"][:SHOWN]) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
    return f"{start}, rows {_few([number, *(other.rpartition(' ')[2] for other in others)])}"


def _few(names: Sequence[Any]) -> str:
    shown, rest = ", ".join(map(str, names[:SHOWN])), len(names) - SHOWN
    return shown + (f" and {rest} more" if rest > 0 else "")


def _roles(named: Named) -> dict[str, str]:
    """The role of each usual name of a column."""
    return {spelling: role for role, spellings in named.items() for spelling in spellings}


def _column(names: Sequence[str], role: str, options: DataOptions, where: str, named: Named) -> str | None:
    """The column of a role, by its option or its name; None if there is none."""
    roles, given = _roles(named), {f"{role}_column": getattr(options, f"{role}_column") for role in named}
    option = f"{role}_column"
    if given[option] is None:
        found = [name for name in names if roles.get(_plain(name)) == role and name not in given.values()]
    elif given[option] in names:
        found = [name for name in names if name == given[option]]
    elif given[option] == WITHOUT:
        return None
    else:
        remedy = did_you_mean(given[option], names, "correct the name")
        raise HistoError(f"{where}: no column {given[option]!r} (--{option}), expected one of {_few(names)}; {remedy}")
    if len(found) > 1:
        raise HistoError(
            f"{where}: {len(found)} columns could be the {role}: {', '.join(found)}, expected one; name it by "
            f"--{option}, or rename the other"
        )
    return found[0] if found else None


def _lacks(kind: str, where: str, names: Sequence[str]) -> HistoError:
    return HistoError(
        f"{where}: no column of {kind} paths among {_few(names)}, expected one; name it by --{kind}_column"
    )


def _cells(path: Path) -> pd.DataFrame:
    """All cells, by column name and row: the number in a spreadsheet, or, of parquet, counted from 0."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        file = pq.ParquetFile(path)
        shards.check_rows(str(path), file, path.stat().st_size, 64 * len(file.schema_arrow))
        shards.check_content({str(path): path})
        plain = [field.name for field in file.schema_arrow if not pa.types.is_nested(field.type)]
        table: pd.DataFrame = file.read(columns=plain).to_pandas()
        return table
    cells = _sheet(path) if suffix == ".xlsx" else _csv(path)
    cells = cells.dropna(how="all")
    if cells.empty:
        raise HistoError(f"{path}: empty, expected the names of columns in the first row; export it again")
    body = cells.iloc[1:]
    body.columns = pd.Index(cells.iloc[0].fillna("").str.strip())
    body.index += 1
    return body


def _csv(path: Path) -> pd.DataFrame:
    encoding, delimiter = _format_of(path)
    return pd.read_csv(
        path, header=None, dtype=str, sep=delimiter, encoding=encoding, skip_blank_lines=False, index_col=False
    )


def _format_of(path: Path) -> tuple[str, str]:
    """Encoding and delimiter of a CSV file."""
    with path.open("rb") as file:
        start = file.read(4)
    if b"\0" in start and not start.startswith(tuple(ENCODINGS)):
        raise UnicodeError("UTF-16 or UTF-32 without a byte order mark")
    encoding = next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), "utf-8-sig")
    with path.open(encoding=encoding, newline="") as text:
        first = text.readline()
    return encoding, max(DELIMITERS, key=first.count)


def _sheet(path: Path) -> pd.DataFrame:
    """First sheet of a workbook."""
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        raise HistoError(f"{path}: needs openpyxl: pip install 'hf_histo[excel]', or save it as CSV") from None
    with zipfile.ZipFile(path) as archive:
        if (size := sum(member.file_size for member in archive.infolist())) > LARGEST_SHEET:
            raise HistoError(f"{path}: unpacks to {size:,} bytes, expected at most {LARGEST_SHEET:,}; save it as CSV")
    with pd.ExcelFile(path, engine="openpyxl") as book:
        if len(book.sheet_names) > 1:
            logger.warning("%s: read the first of its sheets, %s", path, _few(book.sheet_names))
        return pd.read_excel(book, header=None, dtype=str)


def _head(path: Path) -> tuple[list[str], list[bool]]:
    """Names of the columns, and whether each one is of numbers: in a CSV, in its first row."""
    if path.suffix.lower() == ".parquet":
        columns = pq.read_schema(path)
        return columns.names, [pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in columns.types]
    encoding, delimiter = _format_of(path)
    with path.open(encoding=encoding, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        names, first = next(rows, []), next(rows, [])
    return names, pd.to_numeric(pd.Series(first, dtype=object), errors="coerce").notna().to_list()


def _frame(data: datasets.Dataset) -> tuple[pd.DataFrame, list[bytes]]:
    """A `datasets.Dataset` as a table of texts and numbers, and the images that it holds as bytes, in its order."""
    columns: dict[str, Any] = {}
    images: list[bytes] = []
    for name, kind in data.features.items():
        if isinstance(kind, datasets.Image):
            if images:
                raise HistoError(f"the data set has several columns of images, expected one; leave out {name!r}")
            found = data.cast_column(name, datasets.Image(decode=False))[name]
            if all(image and image["bytes"] is None for image in found):
                columns[name] = [image["path"] for image in found]
                continue
            images = [_bytes_of(image, row) for row, image in enumerate(found)]
            columns[name] = [str(row) for row in range(len(images))]
        elif isinstance(kind, datasets.ClassLabel):
            columns[name] = [None if label in (None, -1) else kind.int2str(label) for label in data[name]]
        elif isinstance(kind, datasets.Value):
            columns[name] = data[name][:]
    return pd.DataFrame(columns), images


def _bytes_of(image: dict[str, Any] | None, row: int) -> bytes:
    if image is None:
        raise HistoError(f"row {row} of the data set has no image, expected one; leave it out")
    data: bytes = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
    return data


def _plain(name: str) -> str:
    return "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split())


def _is_given(path: Any) -> bool:
    return isinstance(path, str | os.PathLike)


def _below(path: str, root: Path) -> str:
    """A path relative to `root`, with forward slashes; where links lead there, by their targets."""
    relative = Path(os.path.relpath(root.absolute() / path, root.absolute()))
    if relative.parts[:1] == ("..",):
        relative = Path(os.path.relpath((root / path).resolve(), root.resolve()))
    return relative.as_posix()


def _is_file(path: Path) -> bool:
    """Whether a path that somebody wrote is a file; one that is too long for a name is not."""
    try:
        return path.is_file()
    except OSError:
        return False
