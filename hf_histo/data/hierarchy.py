"""Hierarchical classes: a class is named by its path from the top level, such as `ASC > ASC-US`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets

from hf_histo.errors import HistoError, idle_option

SEPARATOR = " > "


def join(levels: Sequence[str]) -> str:
    """Name of the class that the names of its levels, from the coarsest on, lead to."""
    return SEPARATOR.join(levels)


def path_of(name: str) -> tuple[str, ...]:
    """Level names from the top down to the class `name`; for a flat class, a single one."""
    return tuple(name.split(SEPARATOR))


def depth(names: Sequence[str]) -> int:
    """Number of levels of the classes; 1 without a hierarchy."""
    return max(len(path_of(name)) for name in names)


def at(name: str, level: int) -> str:
    """Ancestor of the class `name` at `level`, counted from 1; `name` itself if its path is shorter."""
    return join(path_of(name)[:level])


def check(names: Sequence[str], source: Path) -> None:
    """Raise HistoError, starting with `source`, unless each level name has a single parent."""
    above: dict[str, tuple[str, ...]] = {}
    for name in names:
        path = path_of(name)
        for place, level in enumerate(path):
            if above.setdefault(level, path[:place]) != path[:place]:
                found = f"below {join(above[level]) or 'nothing'!r} and below {join(path[:place]) or 'nothing'!r}"
                raise HistoError(
                    f"{source}: {level!r} is {found}, expected one place for each class; correct the table"
                )


def at_level(data: datasets.DatasetDict, level: int) -> datasets.DatasetDict:
    """The same images labeled with the classes of one level, 1 being the coarsest.

    As in Dausort et al. 2024 (their datasets/hicervix.py): at level 3, a class without level 3 keeps its level 2, and
    images without a level 2 are left out at levels 2 and 3. Hidden labels stay hidden.

    Raises HistoError for a level that the classes do not have, and for classes without a hierarchy.
    """
    names = next(iter(data.values())).features["label"].names
    if depth(names) == 1:
        raise idle_option("level", level, "the classes have no levels")
    if not 1 <= level <= depth(names):
        raise HistoError(f"--level is {level}, expected 1 to {depth(names)}, the levels of the classes")
    new = sorted({at(name, level) for name in names if level == 1 or len(path_of(name)) > 1})
    number = {old: new.index(at(name, level)) for old, name in enumerate(names) if at(name, level) in new}
    number[-1] = -1
    changed = {}
    for split, rows in data.items():
        labels = rows["label"][:]
        kept = rows.select([row for row, label in enumerate(labels) if label in number])
        column = [number[label] for label in labels if label in number]
        relabeled = kept.remove_columns("label").add_column("label", column, feature=datasets.ClassLabel(names=new))
        changed[split] = relabeled.select_columns(rows.column_names)
    return datasets.DatasetDict(changed)
