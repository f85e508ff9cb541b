"""Checks on splits."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import datasets


def shared_groups(splits: Mapping[str, datasets.Dataset]) -> dict[tuple[str, str], list[str]]:
    """The groups on both sides of each pair of splits, sorted; empty where the splits are disjoint.

    Unknown groups ("") count as disjoint.
    """
    groups = {name: set(dataset.unique("group")) - {""} for name, dataset in splits.items()}
    shared = {pair: sorted(groups[pair[0]] & groups[pair[1]]) for pair in combinations(groups, 2)}
    return {pair: names for pair, names in shared.items() if names}
