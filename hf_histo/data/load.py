"""Load a folder in any supported layout as a `datasets.DatasetDict`: converted once, then memory-mapped."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pandas as pd
import xxhash
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock

from hf_histo.config import HUB, OPTIONS, SYNTHETIC, DataOptions, parse_options, require_data, with_role
from hf_histo.data import cache, schema
from hf_histo.data.readers import hub, image_rows, slides
from hf_histo.data.readers.builder import LEFT_OUT, FolderBuilder
from hf_histo.data.readers.class_folders import ClassFolders, split_files
from hf_histo.data.readers.cytology import HiCervix, NamedImages, SplitLists, check_known
from hf_histo.data.readers.idx import Idx
from hf_histo.data.readers.image_table import TableOfImages
from hf_histo.data.readers.multicenter_hdf5 import MulticenterHdf5, MulticenterHdf5File
from hf_histo.data.readers.nifti import VolumeFolders
from hf_histo.data.readers.patch_camelyon import PatchCamelyon
from hf_histo.data.readers.pixel_tables import SUFFIXES, PixelTables
from hf_histo.data.readers.slide_table import TableOfSlides
from hf_histo.data.readers.wilds_camelyon17 import WildsCamelyon17
from hf_histo.data.reading import DEFAULT_READING, Reading, window_text
from hf_histo.errors import HistoError, did_you_mean, idle_option

logger = logging.getLogger(__name__)

TABLES = tuple(dict.fromkeys((*image_rows.SUFFIXES, *SUFFIXES)))
LAYOUTS: tuple[type[FolderBuilder], ...] = (
    MulticenterHdf5,
    PatchCamelyon,
    WildsCamelyon17,
    Idx,
    HiCervix,
    NamedImages,
    SplitLists,
    TableOfSlides,
    TableOfImages,
    PixelTables,
    VolumeFolders,
    ClassFolders,
)


# Options that control how a source is read, each in some of the layouts.
READING = tuple(name for name in OPTIONS if any(name in layout.OPTIONS for layout in LAYOUTS))

Source: TypeAlias = (
    str | Path | DataOptions | pd.DataFrame | datasets.Dataset | datasets.DatasetDict | Sequence[str | Path]
)


def load(
    source: Source,
    labels: Sequence[Any] | None = None,
    *,
    cache_dir: str | Path | None = None,
    reading: Reading = DEFAULT_READING,
    **options: Any,
) -> datasets.DatasetDict:
    """Load a folder in any supported layout as splits `train`, `val` and, where present, `test` and others.

    Args:
        source: the folder, or options that name it (`data`) and how it is read. "synthetic" is the built-in data set,
            generated in `cache_dir` on first use; "hub:OWNER/NAME" is a data set on the Hub (see `hub.load`). A single
            HDF5 file in the multi-center layout is loaded as the split `test`, a single table as `full`. Or a table of
            images or slides in memory (see `image_table.TableOfImages`, `slide_table.TableOfSlides`): a
            `pandas.DataFrame`, a `datasets.Dataset` whose images may also be a column of `datasets.Image`, or paths of
            images; paths are relative to the current folder, or to `image_root`. Or a `datasets.DatasetDict`, whose
            splits are such tables: one of this schema is returned as it is, but for its fingerprint, which is that of
            its content.
        labels: a label for each path, if `source` is a list of paths; without it, all labels are hidden.
        cache_dir: folder of the converted data; default: the options' one, then `datasets.config.HF_DATASETS_CACHE`.
        reading: how an adapter's training images were read: other image files are read so where `options` allow it.
        **options: those of `READING`, by which the source is read, e.g. `label_column="diagnosis"`; checked as on the
            command line.

    Returns:
        Splits with the columns of `schema.features`. `val` may be missing, or all images may be in the single split
        `full`: `protocol.prepare` makes the missing splits. `info.description` records the format of the files, and
        one line for each image left out by `--on_bad_image skip`; those are also logged as a warning.

    The first time, the files are checked and converted, completely or not at all, by one process at a time. The cache
    is keyed by the contents of the files and the options: a folder that was moved is not converted again, one with a
    changed byte is. Each load verifies the checksums (xxh3) of the converted data; damaged data is converted again,
    with a warning.

    Raises:
        HistoError: an option is unknown, invalid, contradicts `reading`, or has no effect on this layout or these
            images; the folder is missing, incomplete or of no supported layout; a file has a fault, or changes while it
            is read; and as `schema.check_texts` does.
        OSError: the disk is full, or the cache can't be written.
    """
    for name in options:
        if name not in READING:
            remedy = did_you_mean(name, READING, f"expected some of {', '.join(READING)}")
            raise HistoError(f"unknown option {name!r} of how a source is read; {remedy}")
    checked = parse_options(options).data
    base = source if isinstance(source, DataOptions) else DataOptions()
    chosen = dataclasses.replace(base, **{name: getattr(checked, name) for name in options})
    cache_dir = Path(cache_dir or chosen.cache_dir or datasets.config.HF_DATASETS_CACHE)
    if isinstance(source, datasets.DatasetDict) and labels is None and schema.holds(source):
        _refuse_idle(chosen, "that is loaded already", ())
        return _with_content_fingerprint(source)
    if labels is not None or not isinstance(source, str | Path | DataOptions):
        chosen = image_rows.store(_table(source, labels), chosen, cache_dir)
    elif source is not base:
        chosen = dataclasses.replace(chosen, data=str(source))
    data = _load(chosen, cache_dir, reading)
    effective = schema.recorded(next(iter(data.values())))
    for name, what in (("page", "no image has several pages or frames"), ("window", "no image is DICOM")):
        if getattr(chosen, name) is not None and getattr(effective, name) is None:
            raise idle_option(name, getattr(chosen, name), what)
    return data


def _table(source: Source, labels: Sequence[Any] | None) -> pd.DataFrame | datasets.Dataset:
    """A source in memory as a table."""
    if isinstance(source, pd.DataFrame | datasets.Dataset) and labels is None:
        return source
    if isinstance(source, datasets.DatasetDict) and labels is None:
        return _joined(source)
    if isinstance(source, str | Path | DataOptions | pd.DataFrame | datasets.Dataset | datasets.DatasetDict):
        raise HistoError(f"labels are given beside a {type(source).__name__}, expected none; name a column of labels")
    try:
        paths = list(source)
    except TypeError:
        raise HistoError(f"data is a {type(source).__name__}, expected a path, a table or a list of paths") from None
    if labels is not None and len(paths) != len(labels):
        raise HistoError(f"{len(paths)} images, but {len(labels)} labels, expected one each")
    return pd.DataFrame({"image": paths} | ({} if labels is None else {"label": list(labels)}))


def _joined(splits: datasets.DatasetDict) -> datasets.Dataset:
    """The splits as one table, with their names in the column `split`."""
    named = []
    for name, rows in splits.items():
        if "split" in rows.column_names:
            raise HistoError(f"the split {name!r} has a column 'split' itself, expected none; remove or rename it")
        named.append(rows.add_column("split", [name] * len(rows)))
    try:
        return datasets.concatenate_datasets(named)
    except ValueError as error:
        raise HistoError(f"the splits have different columns ({error}), expected the same in each") from None


def _with_content_fingerprint(data: datasets.DatasetDict) -> datasets.DatasetDict:
    """The same data, with a `fingerprint` of the rows that it holds now: some may be left out or changed."""
    content = xxhash.xxh3_128()
    for split, rows in data.items():
        content.update(repr((split, rows.features)).encode())
        stored = rows.cast_column("image", datasets.Image(decode=False))
        for batch in stored.iter(batch_size=1000):
            content.update(repr([batch[name] for name in ("id", "label", "center", "group")]).encode())
            for image in batch["image"]:
                if image is None or (image["bytes"] is None and not slides.is_reference(image["path"])):
                    raise HistoError(f"{split}: images are not stored in the table; pass their paths as a table")
                content.update(image["bytes"] or f"{rows.info.config_name}{image['path']}".encode())
    found = datasets.DatasetDict({split: rows.select_columns(rows.column_names) for split, rows in data.items()})
    for rows in found.values():  # copies, info included
        rows.info.config_name = content.hexdigest()
    return found


def _load(options: DataOptions, cache_dir: Path, reading: Reading) -> datasets.DatasetDict:
    if options.data.startswith(HUB):
        _refuse_idle(options, "of the Hub", ("gray_bits", "page") if options.streaming else hub.OPTIONS)
        options = _as_adapter(options, reading, hub.OPTIONS)
        if options.streaming:
            return hub.load_streaming(options.data, reading=Reading.of(options))
        skip = options.on_bad_image == "skip"
        return hub.load(options.data, cache_dir=cache_dir, skip_bad_images=skip, reading=Reading.of(options))
    directory = _synthetic(cache_dir) if options.data == SYNTHETIC else Path(options.data)
    builder_class = _layout(directory, options)
    _refuse_idle(options, f"in the layout {builder_class.LAYOUT}", builder_class.OPTIONS)
    options = _as_adapter(options, reading, builder_class.OPTIONS)
    defaults = DataOptions()
    try:
        listing = builder_class.listing(directory, options)
        files = builder_class.files(directory, options, listing)
        state = cache.state_of(directory, files)
        name = cache.content_of(directory, files, state, cache_dir / "hf_histo_fingerprints")
        chosen = {key: getattr(options, key) for key in builder_class.OPTIONS if key not in with_role("place", "speed")}
        if changed := {key: value for key, value in chosen.items() if value != getattr(defaults, key)}:
            name = xxhash.xxh3_128(f"{name}{changed}".encode()).hexdigest()
    except FileNotFoundError as error:
        expected = builder_class.EXPECTED
        raise HistoError(f"{error.filename}: no such file, expected {expected}; complete the folder") from None
    home = builder_class.home(cache_dir, directory, options)
    folder = home / builder_class.LAYOUT / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        cache.discard_damaged(folder)
        builder = builder_class(
            cache_dir=str(home),
            dataset_name=builder_class.LAYOUT,
            config_name=name,
            config_id=name,  # set explicitly, so that `directory` is not part of the key
            directory=directory,
            options=options,
            state=state,
        )
        builder.config.listing = listing
        try:
            builder.download_and_prepare()
        except DatasetGenerationError as error:
            if isinstance(error.args[0], HistoError | OSError):
                raise error.args[0] from None
            raise
        cache.seal(Path(builder.cache_dir))
        return _reported(builder)


def _refuse_idle(options: DataOptions, kind: str, acting: Sequence[str]) -> None:
    """Raise HistoError for a reading option that was set but has no effect on this kind of data."""
    for name in sorted(set(READING) - set(acting)):
        if (value := getattr(options, name)) != getattr(DataOptions(), name):
            raise HistoError(f"--{name} is {value!r}, which changes nothing for data {kind}; leave it out")


def _as_adapter(options: DataOptions, reading: Reading, acting: Sequence[str]) -> DataOptions:
    """The options with those in `acting` as an adapter's images were read; raises HistoError if they contradict it."""
    if name := reading.difference(Reading.of(options)):
        raise HistoError(
            f"--{name} is {getattr(options, name)}, expected {reading.text(name)} as in training; leave it out"
        )
    found = {name: getattr(reading, name) for name in ("gray_bits", "page", "mpp", "patch_size") if name in acting}
    if "window" in acting and reading.window not in (None, "file"):
        found["window"] = window_text(reading.window)
    return dataclasses.replace(options, **{name: value for name, value in found.items() if value is not None})


def _reported(builder: FolderBuilder) -> datasets.DatasetDict:
    """The converted data, after logging the images left out. Raises HistoError for a split or class without images."""
    directory, info = builder.config.directory, builder.info
    lines = [line.removeprefix(LEFT_OUT) for line in info.description.splitlines() if line.startswith(LEFT_OUT)]
    remedy = "replace some of the images that were left out"
    for split, rows in info.splits.items():
        if not rows.num_examples:
            raise HistoError(f"{directory}: {split} has no readable image; {remedy}, e.g. {lines[-1]}")
    data = builder.as_dataset()
    schema.check_texts(str(directory), data)
    check_known(directory, next(iter(data.values())).features["label"].names)
    if lines:
        logger.warning("%s: left out %d images that can't be read:\n%s", directory, len(lines), "\n".join(lines))
        for split in data.keys() & {"train"}:
            present = set(data[split]["label"][:])
            lost = [name for label, name in enumerate(info.features["label"].names) if label not in present]
            if lost:
                raise HistoError(f"{directory}: {split} has no readable image of {', '.join(lost)}; {remedy}")
    return data


def fingerprint(dataset: datasets.Dataset | datasets.DatasetDict) -> str:
    """Content hash (32 hexadecimal digits) of the files that `dataset` was loaded from."""
    if isinstance(dataset, datasets.DatasetDict):
        dataset = next(iter(dataset.values()))
    return str(dataset.info.config_name)


def check_trainable(dataset: datasets.Dataset) -> None:
    """Raise HistoError unless every image of a training set has a label and there are at least two classes."""
    labels = set(dataset.unique("label"))
    names = dataset.features["label"].names
    if -1 in labels:
        raise HistoError("train: some labels are hidden (-1), expected one for each image; remove those images")
    if len(labels) < 2:
        found = ", ".join(names[label] for label in labels) or "none"
        raise HistoError(f"train: classes present: {found}, expected at least two of {', '.join(names)}; add images")


def _synthetic(cache_dir: Path) -> Path:
    """Folder of the built-in data set; the first process generates it, others wait."""
    code = Path(__file__).parent / "synthetic" / "tissue.py"
    generator = xxhash.xxh3_64(code.read_bytes()).hexdigest()  # changed code may draw other images
    folder = cache_dir / "hf_histo_synthetic" / generator
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        cache.discard_damaged(folder)
        if not folder.is_dir():
            from hf_histo.data.synthetic import tissue

            tissue.generate(folder)
        cache.seal(folder)
    return folder


def _layout(directory: Path, options: DataOptions) -> type[FolderBuilder]:
    if directory.is_file():
        return _layout_of_table(directory, options) if directory.suffix.lower() in TABLES else MulticenterHdf5File
    require_data(str(directory))
    for layout in LAYOUTS:
        if layout.matches(directory):
            tables = split_files(directory, TABLES) if layout in (TableOfImages, PixelTables) else {}
            return _layout_of_table(next(iter(tables.values())), options) if tables else layout
    names = sorted(path.name for path in directory.iterdir())
    found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
    expected = "; or ".join(layout.EXPECTED for layout in LAYOUTS)
    raise HistoError(f"{directory}: no known layout: found {found}; expected {expected}")


def _layout_of_table(path: Path, options: DataOptions) -> type[FolderBuilder]:
    if image_rows.lists_slides(path, options):
        return TableOfSlides
    return TableOfImages if image_rows.fits(path, options) else PixelTables
