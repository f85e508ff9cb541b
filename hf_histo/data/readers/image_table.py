"""A table of image files: one row per image, with its path, its label and perhaps id, split, center and group."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pandas as pd

from hf_histo.config import DataOptions
from hf_histo.data import schema
from hf_histo.data.readers import image_rows
from hf_histo.data.readers.builder import IMAGE_OPTIONS, FolderBuilder, split_generator
from hf_histo.data.readers.class_folders import SINGLE, SPLITS, split_files
from hf_histo.data.readers.pixel_tables import classes_of
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)


class TableOfImages(FolderBuilder):
    """`images.csv`, or `train`, `val` and `test` as such tables (.csv, .tsv, .parquet, .xlsx); one row is one image.

    One column holds image paths, relative to the table's folder or to `--image_root`, or absolute within it; another
    one labels, as text or numbers. There may be columns for id (default: the path below that folder), split (spelled
    as class folders may be), center, and group (patient, slide). They are found by their usual names
    (`image_rows.NAMED`), or given by `--image_column` and so on ("none": not used). Spaces around a value are removed.

    The first row names the columns. CSV is UTF-8, or UTF-16 or UTF-32 with a byte order mark, separated by commas,
    semicolons, tabs or bars. Of a workbook the first sheet is read. Cells that pandas takes for missing ("", "NA",
    "None", ...) are blank.

    Without splits, all images are the split `full`; without a column of labels, too, they are `test`. A blank label,
    or -1, is hidden, in `test` only. Centers are numbers if all are whole numbers from 0; otherwise they are names,
    numbered in alphabetical order, and `center` is a `ClassLabel`. A blank center is unknown. Classes are those of
    `train` (of all images without it), sorted. Images are stored as by `ClassFolders`.

    Raises HistoError, naming file and row, for: a column that is missing, or of which there are several; a path outside
    the folder; an image that is missing or can't be decoded (unless such are left out: `--on_bad_image skip`); a blank
    path, id, split or group; two rows with one id or image; a group in several splits; a label that is written in
    two ways; a class that `train` lacks; and a file that can't be read.
    """

    LAYOUT = "image_table"
    OPTIONS: ClassVar[tuple[str, ...]] = (*IMAGE_OPTIONS, "image_root", *image_rows.COLUMN_OPTIONS)
    EXPECTED = (
        "a table (.csv, .tsv, .parquet, .xlsx), or train, val and test as tables, with one column of image paths and "
        "one of labels"
    )

    @classmethod
    def matches(cls, directory: Path) -> bool:
        return bool(split_files(directory, image_rows.SUFFIXES))

    @classmethod
    def listing(cls, directory: Path, options: DataOptions) -> pd.DataFrame:
        return image_rows.read(directory, options)

    @classmethod
    def files(cls, directory: Path, options: DataOptions, listing: pd.DataFrame) -> dict[str, Path]:
        tables = [directory] if directory.is_file() else split_files(directory, image_rows.SUFFIXES).values()
        rows = listing
        if options.on_bad_image == "error":
            image_rows.check_present(rows)
        present = rows[rows["present"]]
        images = {f"image {name}": path for name, path in zip(present["name"], present["path"], strict=True)}
        return {f"table {path.name}": path for path in tables} | images

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()  # classes and centers are read from the files, once

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        directory = self.config.directory
        rows = self.config.listing.copy()
        rows["number"], centers = image_rows.numbered(rows["center"])
        training = rows[rows["split"] == "train"]
        names = classes_of((training if len(training) else rows)["label"])
        if len(names) == 1:
            raise HistoError(f"{directory}: all labels are {names[0]!r}, expected at least two classes; add images")
        for row in rows[~rows["label"].isin(["", *names])].itertuples():
            found = f"class {row.label!r}, which train lacks"
            raise HistoError(f"{row.where}: {found}, expected one of {', '.join(names)}; correct it or add images")
        if not names:
            logger.warning("%s: no column of labels, so that all are hidden; name it by --label_column", directory)
        self.info.features = schema.features(names, centers)
        present = rows["present"]
        patients = self._survey(rows.loc[present, "path"].to_list())
        group = "as given" if (rows["group"] != "").all() else "unknown"
        if (rows["group"] == "").all() and self.config.options.group_column != image_rows.WITHOUT and any(patients):
            rows.loc[present, "group"] = patients
            image_rows.check_groups(rows)
            group = "patient of DICOM files"
        splits = {split: rows[rows["split"] == split] for split in (*SPLITS, SINGLE)}
        splits = {split: of_split for split, of_split in splits.items() if len(of_split)}
        counts = {split: len(of_split) for split, of_split in splits.items()}
        self._describe(f"image files in a table; group: {group}; {counts}")
        logger.info("%s: %s", directory, self.info.description)
        return [split_generator(split, len(of_split), rows=of_split) for split, of_split in splits.items()]

    def _generate_examples(self, rows: pd.DataFrame) -> Iterator[tuple[int, dict[str, Any]]]:
        label_of = self.info.features["label"].str2int
        for place, row in enumerate(rows.to_dict("records")):
            with self.skipping():
                if not row["present"]:
                    image_rows.check_present(rows.iloc[[place]])
                image = self._stored(row["path"], f"{row['where']} ({row['name']})")
                label = label_of(row["label"]) if row["label"] else -1
                yield (
                    place,
                    {
                        "id": row["id"],
                        "image": image,
                        "label": label,
                        "center": row["number"],
                        "group": row["group"],
                    },
                )
