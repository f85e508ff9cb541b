"""Checks of splits for shared images and groups, and functions that remove them.

Functions that return other splits than they were given also give these a new fingerprint.
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
from hf_histo.data.schema import center_name, center_names
from hf_histo.errors import HistoError
from hf_histo.files import STRICT

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Composition:
    """Counts of the images and groups of a split, and of those that `train` has as well.

    Attributes:
        images: number of images.
        hidden: number of images with a hidden label.
        groups: number of known groups.
        classes: number of images by class name.
        centers: number of images by center name (or number), without unknown centers.
        copies_of_train: number of images whose stored bytes equal those of an image of `train`. None for `train`
            itself, without a split `train`, and if `train` is streamed.
        groups_of_train: number of groups that are also in `train`; None as above.
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
    """The `Composition` of each split.

    Reads all stored bytes once, without decoding. Copies with other bytes (the same pixels in another file format, or
    near copies) are not found: use `inventory` and `audit` for those.
    """
    shared = {other: len(groups) for (one, other), groups in shared_groups(data).items() if one == "train"}
    known = set(_digests(data["train"])) if "train" in data else set()
    result = {}
    for split, rows in data.items():
        labels, centers = np.array(rows["label"][:]), np.array(rows["center"][:])
        result[split] = Composition(
            images=len(rows),
            hidden=int((labels < 0).sum()),
            groups=len(set(rows.unique("group")) - {""}),
            classes={name: int((labels == place).sum()) for place, name in enumerate(rows.features["label"].names)},
            centers={
                center_name(center, center_names(rows)): int((centers == center).sum())
                for center in np.unique(centers)
                if center >= 0
            },
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
    """The same images, with `group` set so that it joins known groups that share a family of copies.

    Args:
        data: any splits.
        table: their `inventory`.
        column: the column of `table` with the families: "family" (copies) or "near" (near images).

    A group that shares no family with another one keeps its name. Joined groups get the name of the first one, images
    of unknown group that of a group in their family or `family_N`. Raises HistoError if `table` is of other data.
    """
    _check_same(data, table)
    group = table["group"].to_numpy()
    # Each row of unknown group starts as a group of its own, before copies are joined.
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
    """Keep one image of each family of copies, in the first split that has one: `test` has no copy from `train`.

    Args:
        data: any splits.
        table: their `inventory`.
        first: the splits that come first, in this order; the others follow in the order of `data`.

    A family with conflicting labels is removed from all splits, since it is unknown which label is right. Raises
    HistoError if `table` is of other data, and if a split would lose all its images.
    """
    _check_same(data, table)
    rank = {name: i for i, name in enumerate(dict.fromkeys([*first, *data]))}
    labels = table["label"].where(table["label"] >= 0)  # NaN where hidden: no conflict
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
    """`derived`, other splits of the images of `source`, with a new fingerprint of that source and these splits."""
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
        key for split in data.values() for key in split["id"][:]
    ]:
        raise HistoError(f"table: lists {listed}, expected the inventory of this data, {counts}; take it again")
