"""Accuracy of hierarchical classes at each level, for two decision rules.

The probability of a class of a higher level is the sum over the classes below it. The decision rules are:

- by level: the most probable class of each level independently. Levels may contradict each other.
- top-down: the most probable class of the first level, then the most probable one below it, and so on: a path. This is
  greedy descent over conditional probabilities, e.g. Silla & Freitas 2011, "A survey of hierarchical classification
  across different application domains", sec. 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_histo.data import hierarchy
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting.report import table


def are_in(predictions: Predictions) -> bool:
    """Whether the classes have several levels."""
    return hierarchy.depth(predictions.label_names) > 1


def top_down(predictions: Predictions) -> NDArray[np.int64]:
    """Class index at the end of the top-down path of each row, (n,).

    Raises `HistoError` if the classes have only one level.
    """
    probability, paths = predictions.class_probabilities, _paths(predictions)
    open_classes = np.ones_like(probability, dtype=bool)
    for level in range(1, hierarchy.depth(predictions.label_names) + 1):
        at = np.array([hierarchy.join(path[:level]) for path in paths])
        mass = np.stack([(probability * (open_classes & (at == name))).sum(axis=1) for name in np.unique(at)], axis=1)
        best = np.unique(at)[mass.argmax(axis=1)]
        open_classes &= at[None, :] == best[:, None]
    deepest: NDArray[np.int64] = np.where(open_classes, probability, -1).argmax(axis=1)
    return deepest


def scores(predictions: Predictions) -> dict[str, Any]:
    """Accuracy at each level, and the mean over levels, for both decision rules on the labeled rows.

    Returns:
        {"levels": {"1": {"classes": ..., "by_level": accuracy, "top_down": accuracy}, ...}, "mean": {"by_level": ...,
        "top_down": ...}, "consistent": share of rows whose decisions by level form a path, "n": number of rows}; values
        are None without labeled rows. At a level below a class's path, the class itself is used.

    Raises `HistoError` if the classes have only one level.
    """
    names, paths, probability = predictions.label_names, _paths(predictions), predictions.class_probabilities
    followed, labels = top_down(predictions), predictions.labels
    labeled = labels >= 0
    levels: dict[str, dict[str, float | int | None]] = {}
    decisions: list[NDArray[Any]] = []
    for level in range(1, hierarchy.depth(names) + 1):
        at = np.array([hierarchy.join(path[:level]) for path in paths])
        classes = np.unique(at)
        mass = np.stack([probability[:, at == name].sum(axis=1) for name in classes], axis=1)
        decisions.append(classes[mass.argmax(axis=1)][labeled])
        truth = at[labels[labeled]]
        levels[str(level)] = {
            "classes": len(classes),
            "by_level": _share(decisions[-1] == truth),
            "top_down": _share(at[followed][labeled] == truth),
        }
    consistent = np.array(
        [
            all(hierarchy.at(deepest, level) == name for level, name in enumerate(others, start=1))
            for *others, deepest in zip(*decisions, strict=True)
        ]
    )
    return {
        "n": int(labeled.sum()),
        "levels": levels,
        "mean": {kind: _mean([of[kind] for of in levels.values()]) for kind in ("by_level", "top_down")},
        "consistent": _share(consistent),
    }


def summary(found: Mapping[str, Any]) -> str:
    """The result of `scores` as a table, in text."""
    rows: list[list[object]] = [["level", "classes", "accuracy by level", "along the path"]]
    for level, of in found["levels"].items():
        rows.append([level, of["classes"], of["by_level"], of["top_down"]])
    rows.append(["mean", "", found["mean"]["by_level"], found["mean"]["top_down"]])
    return table(rows)


def _paths(predictions: Predictions) -> list[tuple[str, ...]]:
    names = predictions.label_names
    if hierarchy.depth(names) == 1:
        raise HistoError(f"the classes {', '.join(names[:4])}, ... have one level, expected names such as 'a > b'")
    return [hierarchy.path_of(name) for name in names]


def _share(right: NDArray[Any]) -> float | None:
    return float(np.mean(right)) if len(right) else None


def _mean(values: list[Any]) -> float | None:
    return None if None in values else float(np.mean(values))
