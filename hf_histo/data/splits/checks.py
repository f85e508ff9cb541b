"""Checks on splits, and splits that pass them: no copy and no group on both sides.

What is returned is other data than its source, and has a fingerprint of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Annotated, Literal

import datasets
import numpy as np
import pandas as pd
import xxhash
from pydantic import Field

from hf_histo.data.audit.near_duplicates import components
from hf_histo.data.load import fingerprint
from hf_histo.errors import HistoError
from hf_histo.files import STRICT

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Composition:
    """What a split holds, and what of `train` is in it.

    Attributes:
        images: all of them.
        hidden: images whose label is hidden.
        groups: known ones.
        classes: images by the class's name.
        centers: images by the center's number; unknown ones are left out.
        copies_of_train: images that are byte for byte one of train's. None of train itself, of a data set without
            that split, and where it is streamed.
        groups_of_train: groups that train has, too; None as above.
    """

    __pydantic_config__ = STRICT

    images: Count
    hidden: Count
    groups: Count
    classes: dict[str, Count]
    centers: dict[str, Count]
    copies_of_train: Count | None = None
    groups_of_train: Count | None = None


def shared_groups(splits: Mapping[str, datasets.Dataset]) -> dict[tuple[str, str], list[str]]:
    """The groups on both sides of each pair of splits, sorted; empty where the splits are disjoint.

    Unknown groups ("") count as disjoint.
    """
    groups = {name: set(dataset.unique("group")) - {""} for name, dataset in splits.items()}
    shared = {pair: sorted(groups[pair[0]] & groups[pair[1]]) for pair in combinations(groups, 2)}
    return {pair: names for pair, names in shared.items() if names}


def composition(data: Mapping[str, datasets.Dataset]) -> dict[str, Composition]:
    """What each split holds, and what of `train` is in it.

    One pass over the stored bytes, at the speed of the disk; nothing is decoded. Files that hold the same pixels in
    other bytes and near copies are not found: that is what `inventory` and `audit` are for.
    """
    shared = {other: len(groups) for (one, other), groups in shared_groups(data).items() if one == "train"}
    known = set(_digests(data["train"])) if "train" in data else set()
    result = {}
    for split, rows in data.items():
        labels, centers = np.array(rows["label"]), np.array(rows["center"])
        result[split] = Composition(
            images=len(rows),
            hidden=int((labels < 0).sum()),
            groups=len(set(rows.unique("group")) - {""}),
            classes={name: int((labels == place).sum()) for place, name in enumerate(rows.features["label"].names)},
            centers={str(center): int((centers == center).sum()) for center in np.unique(centers) if center >= 0},
        )
        if known and split != "train":
            copies = sum(digest in known for digest in _digests(rows))
            result[split] = replace(result[split], copies_of_train=copies, groups_of_train=shared.get(split, 0))
    return result


def _digests(rows: datasets.Dataset) -> Iterator[bytes]:
    for batch in rows.select_columns("image").with_format("arrow").iter(1000):
        for image in batch["image"]:
            if image["bytes"].is_valid:  # a streamed image is not in the table
                yield xxhash.xxh3_128_digest(image["bytes"].as_buffer())


def with_families(
    data: datasets.DatasetDict, table: pd.DataFrame, column: Literal["family", "near"] = "family"
) -> datasets.DatasetDict:
    """The same images, with `group` naming those that must not be on both sides of a split: families and known groups.

    Args:
        data: any splits.
        table: their `inventory`.
        column: of the table that numbers the families, of copies or of near images.

    A group that shares no family with another keeps its name. Others, and images of unknown group, get the name of
    their first group or `family_N`. Raises HistoError if `table` is of other data.
    """
    _check_same(data, table)
    group = table["group"].to_numpy()
    # Rows of unknown group are alone, whatever copies add.
    labels = np.where(group == "", -1 - np.arange(len(table)), pd.factorize(group)[0])
    first = table[column].drop_duplicates()
    leader = first.index.to_numpy()[pd.Index(first).get_indexer(table[column])]
    joined = pd.Series(components(labels, np.stack([leader, np.arange(len(table))], axis=1)))
    known = pd.Series(group).where(group != "")
    names = known.groupby(joined).transform("first").fillna("family_" + joined.astype(str))
    # `group` is the last column of the schema, so the order stays.
    grouped = {
        name: split.remove_columns("group").add_column("group", names[table["split"] == name].to_list())
        for name, split in data.items()
    }
    return named(datasets.DatasetDict(grouped), data)


def clean(
    data: datasets.DatasetDict, table: pd.DataFrame, *, first: Sequence[str] = ("train", "val")
) -> datasets.DatasetDict:
    """One image of every family of copies, in the first split that has it: nothing of `train` and `val` in `test`.

    Args:
        data: any splits.
        table: their `inventory`.
        first: the splits that keep what later ones lose, in this order; the others follow as they are in `data`.

    A family in which labels conflict is left out of every split, for nobody knows which label is true. Raises
    HistoError if `table` is of other data, and if a split would lose all its images.
    """
    _check_same(data, table)
    rank = {name: i for i, name in enumerate(dict.fromkeys([*first, *data]))}
    labels = table["label"].where(table["label"] >= 0)  # missing where hidden, which conflicts with nothing
    clear = labels.groupby(table["family"]).transform("nunique") <= 1
    order = table["split"].map(rank).sort_values(kind="stable").index
    kept = (~table["family"].reindex(order).duplicated()).reindex(table.index) & clear
    cleaned = {}
    for name, split in data.items():
        rows = table.loc[kept & (table["split"] == name), "row"].to_list()
        if not rows:
            raise HistoError(f"{name}: all {len(split)} images are copies of others, expected some that are not")
        cleaned[name] = split.select(rows)
    return named(datasets.DatasetDict(cleaned), data)


def named(derived: datasets.DatasetDict, source: datasets.DatasetDict) -> datasets.DatasetDict:
    """`derived`, other splits of the images of `source`, with a fingerprint of its own: it is other data."""
    content = xxhash.xxh3_128(fingerprint(source).encode())
    for name, split in derived.items():
        content.update("\0".join(["", name, *split["id"], *split["group"]]).encode())
    copies = {name: split.select(range(len(split))) for name, split in derived.items()}  # `info` is a copy, too
    for split in copies.values():
        split.info.config_name = content.hexdigest()  # what `fingerprint` reads
    return datasets.DatasetDict(copies)


def _check_same(data: datasets.DatasetDict, table: pd.DataFrame) -> None:
    counts = {name: len(split) for name, split in data.items()}
    listed = table["split"].value_counts().to_dict()
    if listed != {name: count for name, count in counts.items() if count} or list(table["id"]) != [
        key for split in data.values() for key in split["id"]
    ]:
        raise HistoError(f"table: lists {listed}, expected the inventory of this data, {counts}; take it again")
