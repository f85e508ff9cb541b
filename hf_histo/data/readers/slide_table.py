"""A table of slides, or slides with annotations: each becomes patches at one resolution, read when they are needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import datasets
import multiprocess
import numpy as np
import pandas as pd
import xxhash
from numpy.typing import NDArray

from hf_histo import launch
from hf_histo.config import DataOptions
from hf_histo.data import schema
from hf_histo.data.readers import geojson, image_rows, slides
from hf_histo.data.readers.builder import FolderBuilder, split_generator
from hf_histo.data.readers.class_folders import SINGLE, SPLITS, split_files
from hf_histo.data.readers.pixel_tables import classes_of
from hf_histo.data.reading import Reading
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)

AMBIGUOUS, NONE = -2, -1  # of `classes_of_patches`: two classes, and none


class TableOfSlides(FolderBuilder):
    """`slides.csv`, or `train`, `val` and `test` as such tables, or a folder of slides with QuPath's GeoJSON beside.

    A table (as of images, see `image_table.TableOfImages`) is one of slides if it has a column `slide` and none of
    images. It may have columns for label, patient (or case), center, split and annotations. Annotations are the file
    that the table names, else the GeoJSON of the slide's name beside it; with `--annotations_column none` there are
    none. A table without splits, labels and annotations is `test`. A folder without a table is the slides beside its
    GeoJSON files.

    A slide becomes the patches of `slides.grid`. On a slide with annotations, a patch has the class of which they
    cover at least `--min_overlap`; it is left out where they do so for two classes or for none, but has the class
    `--unannotated` where none touches it. On other slides, all patches have the slide's label. Of each class of a
    slide, `--max_patches` are drawn, by its name alone.

    `id` is the slide's name, which is its path without the suffix, and the patch's corner: NAME_X_Y, see `place_of`;
    `group` is the patient, or the slide. Images are read when they are needed (see `slides.reference`), unless
    `--store_patches` copies them.

    Raises HistoError, naming file and row, as `TableOfImages` does; and for a slide as `slides.open_slide` and
    `slides.grid` do, without a label or annotations outside of `test`, without tissue, or without a patch that its
    annotations cover; and for annotations as `geojson.read` does (unless `--on_bad_image skip` leaves such slides
    out).
    """

    VERSION = datasets.Version(slides.VERSION)
    LAYOUT = "slide_table"
    OPTIONS: ClassVar[tuple[str, ...]] = (
        *("on_bad_image", "mpp", "patch_size", "stride", "min_tissue", "min_overlap", "unannotated", "max_patches"),
        *("assume_mpp", "store_patches", "image_root", *image_rows.SLIDE_COLUMN_OPTIONS),
    )
    EXPECTED = "a table of slides, with a column slide; or slides with annotations of QuPath (.geojson) beside"

    @classmethod
    def matches(cls, directory: Path) -> bool:
        return not split_files(directory, image_rows.SUFFIXES) and any(directory.glob("*.geojson"))

    @classmethod
    def listing(cls, directory: Path, options: DataOptions) -> pd.DataFrame:
        if directory.is_dir() and not split_files(directory, image_rows.SUFFIXES):
            return _annotated(directory)
        rows = image_rows.read(directory, options, image_rows.NAMED_OF_SLIDES)
        root = image_rows.root_of(directory, options)
        ignored = options.annotations_column == image_rows.WITHOUT
        found = [
            image_rows.located(row["where"], row["annotations"], root, "annotations")
            if row["annotations"]
            else None
            if ignored
            else geojson.beside(row["path"])
            for row in rows.to_dict("records")
        ]
        rows["annotations"] = np.array(found, object)
        hidden = rows["annotations"].isna() & (rows["label"] == "")
        if hidden.all():
            rows["split"] = rows["split"].replace(SINGLE, "test")
        image_rows.refuse_hidden(rows[hidden])
        rows["group"] = rows["group"].where(rows["group"] != "", rows["id"])
        image_rows.check_groups(rows)
        return rows

    @classmethod
    def files(cls, directory: Path, options: DataOptions, listing: pd.DataFrame) -> dict[str, Path]:
        if options.on_bad_image == "error":
            image_rows.check_present(listing, "slide")
        found = {}
        if directory.is_file() or split_files(directory, image_rows.SUFFIXES):
            tables = [directory] if directory.is_file() else split_files(directory, image_rows.SUFFIXES).values()
            found = {f"table {path.name}": path for path in tables}
        for row in listing.to_dict("records"):
            name, annotations = row["name"], row["annotations"]
            if row["present"]:
                found |= {f"slide {name} {path.name}": path for path in slides.files_of(row["path"])}
            if annotations is not None and (options.on_bad_image == "error" or annotations.is_file()):
                found[f"annotations {name}"] = annotations
        return found

    @classmethod
    def home(cls, cache_dir: Path, directory: Path, options: DataOptions) -> Path:
        """References of patches hold the place of the slides, so that those of a moved folder are made anew."""
        if options.store_patches:
            return cache_dir
        places = f"{directory.resolve()}\0{image_rows.root_of(directory, options).resolve()}"
        return cache_dir / "hf_histo_slides" / xxhash.xxh3_128_hexdigest(places.encode("utf-8", "surrogateescape"))

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()  # classes and centers are read from the files, once

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        options, rows = self.config.options, self.config.listing.copy()
        rows["number"], centers = image_rows.numbered(rows["center"])
        rows["classes"] = [self._classes(row) for row in rows.itertuples()]
        training = rows[rows["split"] == "train"] if "train" in set(rows["split"]) else rows
        names = classes_of(pd.Series([name for found in training["classes"] for name in found], dtype=object))
        if len(names) == 1:
            raise HistoError(
                f"{self.config.directory}: all slides and annotations are of the class {names[0]!r}, expected at least "
                "two classes; add slides, or give the class of what is not annotated by --unannotated"
            )
        for one, other in pairwise(sorted(names, key=str.casefold)):
            if one.casefold() == other.casefold():
                raise HistoError(
                    f"{self.config.directory}: a class is written in two ways, {one!r} and {other!r}, expected one; "
                    "correct the table, or the annotations"
                )
        for row in rows.itertuples():
            for name in row.classes:
                if name not in names:
                    raise HistoError(
                        f"{row.where}: class {name!r}, which train lacks, expected one of {', '.join(names)}; correct "
                        "it or add slides"
                    )
        if not names:
            logger.warning("%s: no labels and no annotations, so that all labels are hidden", self.config.directory)
        self.info.features = schema.features(names, centers)
        self._reading = Reading(mpp=options.mpp or slides.MPP, patch_size=options.patch_size or slides.PATCH_SIZE)
        splits = {split: rows[rows["split"] == split] for split in (*SPLITS, SINGLE)}
        splits = {split: of_split for split, of_split in splits.items() if len(of_split)}
        counts = {split: len(of_split) for split, of_split in splits.items()}
        self.info.description = f"patches of slides; group: patient or slide; slides: {counts}"
        schema.record(self.info, self._reading)
        logger.info("%s: %s", self.config.directory, self.info.description)
        return [
            split_generator(split, len(of_split), parts=_parts(of_split.to_dict("records")))
            for split, of_split in splits.items()
        ]

    def _classes(self, row: Any) -> list[str]:
        """The classes that patches of a slide may have; none for hidden labels, and for annotations with a fault."""
        if row.annotations is None:
            return [row.label] if row.label else []
        try:
            return [*geojson.classes(row.annotations), *filter(None, [self.config.options.unannotated])]
        except HistoError:
            if self.config.options.on_bad_image == "error":
                raise
            return []

    def _generate_examples(self, parts: list[list[dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in (row for part in parts for row in part):
            with self.skipping():
                yield from self._patches(row)

    def _patches(self, row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The patches of one slide, in the order of `slides.grid`."""
        options, names = self.config.options, self.info.features["label"].names
        if not row["present"]:
            image_rows.check_present(pd.DataFrame([row]), "slide")
        slide = slides.open_slide(row["path"])
        regions = None if row["annotations"] is None else geojson.read(row["annotations"], slide)
        grid = slides.grid(
            slide,
            mpp=self._reading.mpp or slides.MPP,
            patch_size=self._reading.patch_size or slides.PATCH_SIZE,
            stride=options.stride,
            min_tissue=options.min_tissue,
            assume_mpp=options.assume_mpp,
        )
        slides.require_patches(grid, row["path"], "patch")
        if regions is None:
            labels = np.full(len(grid.corners), names.index(row["label"]) if row["label"] else NONE)
            kept = np.arange(len(labels))
        else:
            found = [*regions, *filter(None, [options.unannotated])]
            shares = geojson.covered(regions, grid.corners, grid.size)
            chosen = classes_of_patches(shares, options.min_overlap, options.unannotated is not None)
            if ambiguous := int((chosen == AMBIGUOUS).sum()):
                logger.warning("%s: left out %d patches that two classes cover", row["annotations"], ambiguous)
            kept = np.flatnonzero(chosen >= 0)
            if not len(kept):
                raise HistoError(
                    f"{row['annotations']}: covers none of {len(chosen)} patches of tissue, expected regions at least "
                    "as large as a patch; lower --min_overlap, or draw larger ones"
                )
            labels = np.array([names.index(name) for name in found])[chosen]
        for place in drawn(row["name"], labels, kept, options.max_patches):
            x, y = map(int, grid.corners[place])
            name = f"{row['id']}_{x}_{y}"
            image: dict[str, Any] = {"bytes": None, "path": None}
            if options.store_patches:
                image["bytes"] = schema.encode_ppm(slides.read_patch(slide, x, y, grid.size, grid.pixels))
            else:
                image["path"] = slides.reference(row["path"].absolute(), x, y, grid.size, grid.pixels)
            yield (
                name,
                {
                    "id": name,
                    "image": image,
                    "label": int(labels[place]),
                    "center": row["number"],
                    "group": row["group"],
                },
            )


def place_of(name: str) -> tuple[str, int, int]:
    """The slide's name, x and y of a patch's `id`."""
    slide, x, y = name.rsplit("_", 2)
    return slide, int(x), int(y)


def classes_of_patches(shares: NDArray[np.float64], min_overlap: float, unannotated: bool) -> NDArray[np.int64]:
    """Class (n,) of each patch by the share (n, classes) that annotations of each class cover.

    Returns the class that reaches `min_overlap`; `AMBIGUOUS` where several do, `NONE` where none does, and with
    `unannotated` the number after the last class where none touches the patch.
    """
    reached = shares >= min_overlap
    count = reached.sum(axis=1)
    first = reached.argmax(axis=1) if shares.shape[1] else NONE  # a file of annotations may have none with a class
    found = np.where(count == 1, first, np.where(count > 1, AMBIGUOUS, NONE))
    if unannotated:
        found[~(shares > 0).any(axis=1)] = shares.shape[1]
    return found


def drawn(name: str, labels: NDArray[np.int64], kept: NDArray[np.int64], most: int | None) -> NDArray[np.int64]:
    """`kept`, or at most `most` of each label, in order; the draw depends on `name` and the label alone."""
    if most is None:
        return kept
    chosen = []
    for label in np.unique(labels[kept]):
        of_label = kept[labels[kept] == label]
        rng = np.random.default_rng([xxhash.xxh3_64_intdigest(name.encode()), int(label) + 1])
        chosen.append(rng.permutation(of_label)[:most])
    return np.sort(np.concatenate(chosen))


def _annotated(directory: Path) -> pd.DataFrame:
    """A row for each GeoJSON file of a folder, as of a table; slides without one are left out, with a warning."""
    known = {path: geojson.beside(path) for path in sorted(directory.iterdir()) if _is_slide(path)}
    if without := [path.name for path, found in known.items() if found is None]:
        logger.warning(
            "%s: left out %d slides without annotations: %s; name them in a table",
            directory,
            len(without),
            ", ".join(without[:5]),
        )
    by_file = {found: path for path, found in known.items() if found is not None}
    files = sorted(directory.glob("*.geojson"))
    names = [by_file.get(file, file.with_suffix("")).name for file in files]
    rows = pd.DataFrame({"slide": names, "where": list(map(str, files)), "annotations": files})
    image_rows.locate(rows, directory, "slide")
    rows["id"] = rows["group"] = rows["name"]
    rows["label"] = rows["center"] = ""
    rows["split"] = SINGLE
    return rows


def _is_slide(path: Path) -> bool:
    return path.suffix.lower() in slides.SUFFIXES or (path.is_dir() and geojson.beside(path) is not None)


def _parts(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The slides of a split in consecutive parts, one for each process that looks for their patches."""
    number = min(len(rows), launch.thread_count()) if multiprocess.get_start_method() == "fork" else 1
    return [list(part) for part in np.array_split(np.array(rows, object), number)]
