"""Bags of images that have one label and get one prediction: the patches of a slide, or the images of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_histo.data.readers.slide_table import place_of
from hf_histo.data.schema import recorded
from hf_histo.errors import HistoError


@dataclass(frozen=True)
class Bags:
    """The B bags of a schema table with n rows, in the order of their first rows.

    Attributes:
        names: B names, of slides or groups.
        groups: B groups: of a slide its patient, where the table names it.
        labels: int64 (B,), class index, -1 where hidden.
        centers: int64 (B,), -1 where unknown, or where images of a bag are of several centers.
        of_row: int64 (n,), the bag of each row.
    """

    names: list[str]
    groups: list[str]
    labels: NDArray[np.int64]
    centers: NDArray[np.int64]
    of_row: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def rows(self) -> list[NDArray[np.int64]]:
        """The rows of each bag, in rising order."""
        order = np.argsort(self.of_row, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.of_row, minlength=len(self)))[:-1])


def find(dataset: datasets.Dataset, labels: Sequence[int] | None = None) -> Bags:
    """The bags of a schema table: a slide each where its images are patches of slides, else a `group`.

    Args:
        dataset: of the one schema.
        labels: class index (n,) of each row in place of the column `label`.

    Raises HistoError for images without a group, and for a bag whose images differ in label.
    """
    columns = dataset.select_columns(["id", "label", "center", "group"])[:]
    is_of_slides = recorded(dataset).mpp is not None
    keys = [place_of(key)[0] for key in columns["id"]] if is_of_slides else columns["group"]
    if without := keys.count(""):
        raise HistoError(
            f"--aggregation: {without} of {len(keys)} images are of no group, expected the bag of each; name the "
            "column of patients or slides by --group_column"
        )
    numbers = {name: number for number, name in enumerate(dict.fromkeys(keys))}
    of_row = np.array([numbers[key] for key in keys], np.int64)
    _, first = np.unique(of_row, return_index=True)
    of_image = np.array(columns["label"] if labels is None else labels, np.int64)
    if len(mixed := np.flatnonzero(of_image != of_image[first][of_row])):
        row, known = mixed[0], dataset.features["label"].names
        found = [
            known[label] if label >= 0 else "hidden"
            for label in (columns["label"][first[of_row[row]]], columns["label"][row])
        ]
        remedy = (
            "leave its annotations out by --annotations_column none" if is_of_slides else "correct labels or groups"
        )
        raise HistoError(
            f"--aggregation: {'slide' if is_of_slides else 'group'} {keys[row]!r} has images of {found[0]!r} and of "
            f"{found[1]!r}, expected one label for all; {remedy}"
        )
    centers = np.array(columns["center"], np.int64)
    several = np.bincount(of_row, centers != centers[first][of_row]) > 0
    return Bags(
        names=list(numbers),
        groups=[columns["group"][row] for row in first],
        labels=of_image[first],
        centers=np.where(several, -1, centers[first]),
        of_row=of_row,
    )
