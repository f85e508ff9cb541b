"""Patches listed in a table: WILDS Camelyon17."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from hf_histo.data.readers.builder import FolderBuilder, split_generator
from hf_histo.data.readers.class_folders import check_inside
from hf_histo.data.schema import decode
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)


class WildsCamelyon17(FolderBuilder):
    """Camelyon17 as WILDS publishes it (https://wilds.stanford.edu, `wilds/datasets/camelyon17_dataset.py`), CC0.

    `metadata.csv` lists the patches, `patches/` holds them as PNG. Splits follow WILDS: center 1 is `val` and center 2
    is `test`, whatever the column `split` holds; in the other centers, `split` 0 is `train` and 1 is `id_val`. Patches
    of `id_val` come from the slides of `train`: it measures the fit, and must not be used to select a model.

    `group` is the patient rather than the slide: lymph nodes of a patient were cut, stained and scanned together and
    share the disease, so their patches are not independent. `id` is the stem of the file name.

    Raises HistoError, naming the file, for a table that lacks a column of `COLUMNS` or rows of a split, and for a patch
    that is missing, can't be decoded or has another size than the first.
    """

    LAYOUT = "wilds_camelyon17"
    OPTIONS = ("on_bad_image",)
    EXPECTED = "metadata.csv and patches/patient_004_node_4/patch_patient_004_node_4_x_3328_y_21792.png and so on"
    LABELS = ("normal", "tumor")

    COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
    VAL_CENTER, TEST_CENTER = 1, 2

    @classmethod
    def matches(cls, directory: Path) -> bool:
        return (directory / "metadata.csv").is_file() and (directory / "patches").is_dir()

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        paths = _table(directory)["path"]
        for path in paths:
            check_inside(directory / path, directory)
        return ["metadata.csv", *paths]

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        directory = self.config.directory
        table = _table(directory)
        splits = {name: table[table["split"] == name] for name in ("train", "id_val", "val", "test")}
        counts = {name: len(rows) for name, rows in splits.items()}
        for name in ("train", "val"):
            if not counts[name]:
                raise HistoError(
                    f"{directory / 'metadata.csv'}: no rows for {name}, expected split 0 outside the centers "
                    f"{self.VAL_CENTER} and {self.TEST_CENTER} for train and center {self.VAL_CENTER} for val; "
                    "download it again"
                )
        self.info.description = f"image files; group: patient; {counts}"
        logger.info("%s: %s", directory, self.info.description)
        return [split_generator(name, len(rows), rows=rows) for name, rows in splits.items() if len(rows)]

    def _generate_examples(self, rows: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
        first = None
        for row in rows.itertuples():
            path = self.config.directory / str(row.path)
            with self.skipping():
                data = path.read_bytes()
                size = decode(data, str(path)).shape
                first = first or size
                if size != first:
                    raise HistoError(
                        f"{path}: shape {tuple(size)}, expected {tuple(first)} as the first; download it again"
                    )
                yield (
                    path.stem,
                    {
                        "id": path.stem,
                        "image": {"bytes": data, "path": None},
                        "label": row.tumor,
                        "center": row.center,
                        "group": f"patient_{row.patient:03}",
                    },
                )


def _table(directory: Path) -> pd.DataFrame:
    """Rows of `metadata.csv`, with `path` of the patch relative to `directory` and the name of its official `split`."""
    path = directory / "metadata.csv"
    try:
        with np.errstate(invalid="ignore"):  # from a cell that is not a number, which is refused
            table = pd.read_csv(path, usecols=list(WildsCamelyon17.COLUMNS), dtype="int64")
    except (ValueError, OverflowError, TypeError) as error:
        expected = f"a CSV table with whole numbers in {', '.join(WildsCamelyon17.COLUMNS)}"
        raise HistoError(f"{path}: {error}, expected {expected}; download it again") from error
    for column in ("tumor", "split"):
        for row in np.flatnonzero(~table[column].isin((0, 1)))[:1]:
            found = f"{column} is {table[column].iloc[row]} in row {row}"
            raise HistoError(f"{path}: {found}, expected 0 or 1; download it again")
    table["path"] = [
        f"patches/patient_{patient:03}_node_{node}/patch_patient_{patient:03}_node_{node}_x_{x}_y_{y}.png"
        for patient, node, x, y in zip(table["patient"], table["node"], table["x_coord"], table["y_coord"], strict=True)
    ]
    by_center = {WildsCamelyon17.VAL_CENTER: "val", WildsCamelyon17.TEST_CENTER: "test"}
    table["split"] = table["center"].map(by_center).fillna(table["split"].map({0: "train", 1: "id_val"}))
    return table
