"""Leakage by copies: families of copies as groups, and splits without the copies of training images."""

from __future__ import annotations

import logging

import datasets
import numpy as np

from hf_histo.data.audit.findings import audit
from hf_histo.data.audit.near_duplicates import NEAR, inventory
from hf_histo.data.splits.checks import clean, with_families

logger = logging.getLogger(__name__)

SEARCHED = "near copies were searched for"  # added to the description of data by `grouped`
CLEAN = "_clean"  # end of the name of a split without copies, see `without_copies`
LOGGED = ("overlap", "similar_overlap", "shared_groups", "label_conflict", "similar_label_conflict", "repeats")


def grouped(data: datasets.DatasetDict, family: str = "copies", *, only_one: bool = False) -> datasets.DatasetDict:
    """Set `group` to families of copies, or of near images (`family` "near"), and log copies as warnings.

    With `only_one`, keep one image of each family of copies (see `checks.clean`). Raises HistoError as `inventory` and
    `clean` do.
    """
    table = inventory(data, near=NEAR if family == "near" else None)
    for finding in audit(table, next(iter(data.values())).features["label"].names).findings:
        if finding.kind in LOGGED:
            logger.warning(finding.message)
    families = with_families(data, table, "near" if family == "near" else "family")
    found = clean(families, table) if only_one else families
    for part in found.values():
        part.info.description += f"; {SEARCHED}{', near images as well' if family == 'near' else ''}"
    return found


def were_searched(data: datasets.DatasetDict) -> bool:
    """Whether `grouped` searched for near copies among the images of `data`."""
    return any(SEARCHED in part.info.description for part in data.values())


def whole(data: datasets.DatasetDict) -> list[str]:
    """Names of the splits that are not a part of another, as those of `without_copies` are."""
    return [name for name in data if not name.endswith(CLEAN)]


def without_copies(data: datasets.DatasetDict) -> tuple[datasets.DatasetDict, list[str]]:
    """For each split that holds copies of images of `train` or `val`, add a split without them.

    Args:
        data: splits, including `train` and `val`, whose groups are families of copies (`grouped`).

    Returns:
        All splits, e.g. `test_clean` beside `test`, and a sentence about each added one.
    """
    seen = {*data["train"].unique("group"), *data["val"].unique("group")}
    others, notes = {}, []
    for name, rows in data.items():  # of train and val, all groups are in `seen`
        unseen = np.flatnonzero([group not in seen for group in rows["group"][:]])
        if 0 < len(unseen) < len(rows):
            others[name + CLEAN] = rows.select(unseen)
            copies = len(rows) - len(unseen)
            notes.append(f"{name}: {copies} of {len(rows)} have copies in train or val, {name}{CLEAN} is the rest")
    return datasets.DatasetDict({**data, **others}), notes
