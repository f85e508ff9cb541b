"""Audit of a data set before training: the composition of its splits, and a list of problems (findings)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from hf_histo.data.audit.near_duplicates import CHANNELS

TINY = 32  # pixels: a shorter side leaves less than one cell of a ResNet's or ViT-32's last grid
IMBALANCE = 10.0  # images of the largest class for one of the smallest
UNKNOWN = (-1, "")  # centers
HIDDEN = "(hidden)"  # stands for the label -1


@dataclass(frozen=True)
class Image:
    """Reference to an image: `id` and `center` as in an `inventory`, `label` its class name or "(hidden)"."""

    split: str
    id: str
    label: str
    center: int | str


@dataclass(frozen=True)
class Finding:
    """One problem in a data set.

    `kind` is one of the list in `audit`, `split` the split that has the problem, `other` a second split that is
    involved or None, `message` a sentence, and `groups` the images, each group holding those that belong together.
    """

    kind: str
    split: str
    other: str | None
    message: str
    groups: list[list[Image]]


@dataclass(frozen=True)
class Stratum:
    """The images of one center in one split.

    `classes` counts images by class name, hidden labels as "(hidden)"; `groups` counts known patients or slides; `mean`
    and `deviation` are those of all pixels of R, G, B in gray levels from 0 to 255, with equal weight for each image.
    """

    center: int | str
    images: int
    classes: dict[str, int]
    groups: int
    mean: list[float]
    deviation: list[float]


@dataclass(frozen=True)
class Split:
    """One split.

    `distinct` counts images with different pixels, `families` families of copies and `near_families` families of near
    images (see `inventory`; None if these were not searched for), and `sizes` the different pairs of height and width;
    `smallest` and `largest` are the extremes of [height, width] in pixels.
    """

    name: str
    images: int
    distinct: int
    families: int
    near_families: int | None
    classes: dict[str, int]
    groups: int
    sizes: int
    smallest: list[int]
    largest: list[int]
    centers: list[Stratum]


@dataclass(frozen=True)
class Audit:
    """Composition of a data set's splits, and its findings, the most serious first."""

    classes: list[str]
    splits: list[Split]
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        """The audit as JSON values: lists, dicts, strings and numbers."""
        return dataclasses.asdict(self)

    def summary(self, examples: int = 3) -> str:
        """A plain-text report: a paragraph for each split, then the findings, each with a few `examples`."""
        lines = [line for split in self.splits for line in _described(split)]
        lines += ["", f"findings: {len(self.findings)}"]
        for number, finding in enumerate(self.findings, start=1):
            lines += ["", f"{number}. {finding.message}"]
            for group in finding.groups[:examples]:
                named = [
                    f"{i.split}: {i.id}" + ("" if i.label == HIDDEN else f" ({i.label})") for i in group[:examples]
                ]
                lines.append("   " + "  =  ".join(named) + _more(len(group) - examples))
            if len(finding.groups) > examples:
                lines.append("  " + _more(len(finding.groups) - examples))
        return "\n".join(lines)


def audit(table: pd.DataFrame, classes: Sequence[str]) -> Audit:
    """Audit a data set from its `inventory` and the names of its classes.

    Kinds of findings, in this order:

    - `overlap`: images of a later split with the same pixels as an image of an earlier one
    - `similar_overlap`: further images that are copies of an image of an earlier split
    - `shared_groups`: known groups (patients, slides) on both sides of two splits
    - `label_conflict`: images of identical pixels with different labels; `similar_label_conflict`: further families of
      copies with different labels. (Groups may have several labels: a slide has normal and tumor tissue.)
    - `repeats`: images of identical pixels within a split; `similar_repeats`: further copies within a split
    - `blank`: images without any structure; `tiny`: images with a side below 32 pixels
    - `size_shift`: two splits that have no image size in common
    - `missing_class`: a class that other splits have; `imbalance`: a class 10 times as frequent as another
    - `one_class_center`: a center of which a labeled split has one class only: its appearance predicts the label

    Hidden labels cause no conflict.
    """
    names = np.array([*classes, HIDDEN], dtype=object)
    table = table.assign(name=names[table["label"]])  # -1 is the last
    splits = list(dict.fromkeys(table["split"]))
    findings = [
        *_overlaps(table, splits),
        *_shared_groups(table, splits),
        *_conflicts(table),
        *_repeats(table, splits),
        *_bad_images(table, splits),
        *_size_shifts(table, splits),
        *_bad_balance(table, splits, classes),
    ]
    return Audit(list(classes), [_split(name, table[table["split"] == name], classes) for name in splits], findings)


def _overlaps(table: pd.DataFrame, splits: Sequence[str]) -> Iterator[Finding]:
    """Findings of images that are also in an earlier split, each grouped with its first copy there."""
    for similar in (False, True):
        for earlier, later in combinations(splits, 2):
            one, other = table[table["split"] == earlier], table[table["split"] == later]
            identical = other["identical"].isin(one["identical"])
            found = other[other["family"].isin(one["family"]) & ~identical] if similar else other[identical]
            if found.empty:
                continue
            key, what = ("family", "near-identical") if similar else ("identical", "pixel-identical")
            first = one.drop_duplicates(key).set_index(key, drop=False)
            groups = [[*_listed(first.loc[[row[key]]]), *_listed(found.loc[[i]])] for i, row in found.iterrows()]
            rest = len(other) - int(identical.sum()) - (len(found) if similar else 0)
            message = (
                f"{later}: {len(found):,} of {len(other):,} images are {what} to images of {earlier}; {rest:,} are "
                + ("neither that nor identical" if similar else "not")
            )
            yield Finding("similar_overlap" if similar else "overlap", later, earlier, message, groups)


def _shared_groups(table: pd.DataFrame, splits: Sequence[str]) -> Iterator[Finding]:
    known = table[table["group"] != ""]
    for earlier, later in combinations(splits, 2):
        one, other = known[known["split"] == earlier], known[known["split"] == later]
        shared = sorted(set(one["group"]) & set(other["group"]))
        if shared:
            both = pd.concat([one, other])
            groups = [_listed(both[both["group"] == group]) for group in shared]
            message = f"{later}: {len(shared):,} groups (patients, slides) are in {earlier}, too, e.g. {shared[0]}"
            yield Finding("shared_groups", later, earlier, message, groups)


def _conflicts(table: pd.DataFrame) -> Iterator[Finding]:
    labeled = table[table["label"] >= 0]
    seen: set[int] = set()
    for key, kind, what in (
        ("identical", "label_conflict", "images of identical pixels"),
        ("family", "similar_label_conflict", "families of near-identical images"),
    ):
        counts = labeled.groupby(key)["label"].nunique()
        groups = [rows for _, rows in labeled[labeled[key].isin(counts[counts > 1].index)].groupby(key)]
        groups = [rows for rows in groups if not seen & set(rows["family"])]
        seen |= {family for rows in groups for family in rows["family"]}
        if groups:
            number = sum(map(len, groups))
            message = f"{len(groups):,} {what} have different labels ({number:,} files)"
            yield Finding(kind, "any", None, message, [_listed(rows) for rows in groups])


def _repeats(table: pd.DataFrame, splits: Sequence[str]) -> Iterator[Finding]:
    for split in splits:
        rows = table[table["split"] == split]
        repeated = rows[rows["identical"].duplicated(keep=False)]
        if len(repeated):
            groups = [_listed(same) for _, same in repeated.groupby("identical")]
            distinct = rows["identical"].nunique()
            message = (
                f"{split}: {len(rows):,} files hold {distinct:,} distinct images; {len(groups):,} of them are there "
                f"more than once, in {len(repeated):,} files"
            )
            yield Finding("repeats", split, None, message, groups)
        distinct_rows = rows.drop_duplicates("identical")
        similar = distinct_rows[distinct_rows["family"].duplicated(keep=False)]
        if len(similar):
            groups = [_listed(same) for _, same in similar.groupby("family")]
            message = f"{split}: {len(similar):,} distinct images form {len(groups):,} families of near-identical ones"
            yield Finding("similar_repeats", split, None, message, groups)


def _bad_images(table: pd.DataFrame, splits: Sequence[str]) -> Iterator[Finding]:
    kinds = {
        "blank": (table["blank"], "blank (one even color)"),
        "tiny": (table[["height", "width"]].min(axis=1) < TINY, f"less than {TINY} pixels high or wide"),
    }
    for kind, (bad, what) in kinds.items():
        for split in splits:
            rows = table[bad & (table["split"] == split)]
            if len(rows):
                groups = [[image] for image in _listed(rows)]
                yield Finding(kind, split, None, f"{split}: {len(rows):,} images are {what}", groups)


def _size_shifts(table: pd.DataFrame, splits: Sequence[str]) -> Iterator[Finding]:
    sizes = table["width"].astype(str) + " x " + table["height"].astype(str)
    for earlier, later in combinations(splits, 2):
        one, other = sizes[table["split"] == earlier], sizes[table["split"] == later]
        if not set(one) & set(other):
            found = f"{other.mode()[0]} and the like, {earlier} {one.mode()[0]}"
            message = f"{later}: no image has the size of one in {earlier}; {later} has {found} pixels"
            yield Finding("size_shift", later, earlier, message, [])


def _bad_balance(table: pd.DataFrame, splits: Sequence[str], classes: Sequence[str]) -> Iterator[Finding]:
    for split in splits:
        labeled = table[(table["split"] == split) & (table["label"] >= 0)]
        if labeled.empty:
            continue
        counts = labeled["name"].value_counts().reindex(list(classes), fill_value=0)
        missing = list(counts.index[counts == 0])
        if missing:
            message = f"{split}: no image of {', '.join(missing)}"
            yield Finding("missing_class", split, None, message, [])
        present = counts[counts > 0]
        if present.max() >= IMBALANCE * present.min():
            most, least = present.idxmax(), present.idxmin()
            message = f"{split}: {most} has {present.max():,} images, {least} only {present.min():,}"
            yield Finding("imbalance", split, None, message, [])
        for center, rows in labeled.groupby("center"):
            if rows["label"].nunique() == 1 and len(present) > 1:
                message = f"{split}: all {len(rows):,} images of center {center} are {rows['name'].iloc[0]}"
                yield Finding("one_class_center", split, None, message, [])


def _split(name: str, rows: pd.DataFrame, classes: Sequence[str]) -> Split:
    sizes = rows[["height", "width"]]
    return Split(
        name=name,
        images=len(rows),
        distinct=int(rows["identical"].nunique()),
        families=int(rows["family"].nunique()),
        near_families=int(rows["near"].nunique()) if "near" in rows else None,
        classes=_counts(rows, classes),
        groups=_groups(rows),
        sizes=len(sizes.drop_duplicates()),
        smallest=[int(x) for x in sizes.min()],
        largest=[int(x) for x in sizes.max()],
        centers=[_stratum(_plain(center), part, classes) for center, part in rows.groupby("center")],
    )


def _stratum(center: int | str, rows: pd.DataFrame, classes: Sequence[str]) -> Stratum:
    means = rows[list(CHANNELS)].to_numpy()
    variances = rows[[f"{channel}_deviation" for channel in CHANNELS]].to_numpy() ** 2
    return Stratum(
        center=center,
        images=len(rows),
        classes=_counts(rows, classes),
        groups=_groups(rows),
        mean=[float(x) for x in means.mean(axis=0)],
        # Law of total variance: the variance within images plus that between their means.
        deviation=[float(x) for x in np.sqrt(variances.mean(axis=0) + means.var(axis=0))],
    )


def _counts(rows: pd.DataFrame, classes: Sequence[str]) -> dict[str, int]:
    counts = rows["name"].value_counts()
    shown = [*classes, HIDDEN] if HIDDEN in counts else classes
    return {name: int(counts.get(name, 0)) for name in shown}


def _groups(rows: pd.DataFrame) -> int:
    return int(rows.loc[rows["group"] != "", "group"].nunique())


def _listed(rows: pd.DataFrame) -> list[Image]:
    columns = (rows[name] for name in ("split", "id", "name", "center"))
    return [Image(split, key, name, _plain(center)) for split, key, name, center in zip(*columns, strict=True)]


def _plain(center: object) -> int | str:
    """A value of the column `center` as JSON takes it."""
    return center if isinstance(center, str) else int(str(center))


def _described(split: Split) -> Iterator[str]:
    height, width = split.smallest
    sizes = f"{width} x {height}"
    if split.sizes > 1:
        sizes = f"{split.sizes:,} sizes from {sizes} to {split.largest[1]} x {split.largest[0]}"
    yield ""
    yield f"{split.name}: {split.images:,} images ({split.distinct:,} distinct), {sizes} pixels" + (
        f", {split.groups:,} groups" if split.groups else ", groups (patients, slides) unknown"
    )
    if split.near_families is not None:
        yield f"  {split.families:,} families of copies, {split.near_families:,} families of near images"
    width = max(map(len, split.classes))
    for name, count in split.classes.items():
        if count or name != HIDDEN:
            yield f"  {name:{width}}  {count:>9,}  {count / split.images:6.1%}"
    for stratum in split.centers:
        where = f"center {stratum.center}" if stratum.center not in UNKNOWN else "all centers (unknown)"
        counts = ", ".join(f"{name} {count:,}" for name, count in stratum.classes.items())
        color = " ".join(f"{m:.0f}±{d:.0f}" for m, d in zip(stratum.mean, stratum.deviation, strict=True))
        yield f"  {where}: {counts}; RGB {color}"


def _more(count: int) -> str:
    return f" and {count:,} more" if count > 0 else ""
