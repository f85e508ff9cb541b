"""Predictions of several models for the same images: averaged, or compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions


def average(
    tables: Sequence[Predictions] | Mapping[str, Predictions], weights: Sequence[float] | None = None
) -> Predictions:
    """Return a table with the mean logits of several tables of the same images.

    The mean of logits is the normalized geometric mean of the probabilities (the "logarithmic opinion pool", Genest &
    Zidek 1986, "Combining Probability Distributions", Statistical Science 1(1):114-135). With two classes, the result
    has one logit per image. Its `transductive` is the union over the tables.

    Args:
        tables: predictions tables, matched by `id`; the keys of a mapping name them in errors. Order, `center` and
            `group` are those of the first table.
        weights: weight of each table, at least 0 and not all 0; only ratios matter. Equal by default.

    Raises:
        HistoError: there is no table; their ids, labels, number or names of classes differ; `weights` are not as above.
    """
    named = tables if isinstance(tables, Mapping) else {f"table {i}": table for i, table in enumerate(tables)}
    aligned = _aligned(named)
    given = np.ones(len(tables)) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != (len(tables),) or not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise HistoError(f"weights are {weights}, expected {len(tables)} numbers, at least 0 and not all 0")
    first = aligned[0]
    result = first.with_logits(np.average([table.task_logits for table in aligned], 0, given))
    recorded = [table.transductive for table in aligned]
    measured = sorted({what for each in recorded for what in each or ()})
    result.attrs["transductive"] = measured if measured or None not in recorded else None
    return result


def compare(tables: Mapping[str, Predictions], *, threshold: float = 0.5) -> pd.DataFrame:
    """Return the metrics of several tables of the same images, one row each.

    Args:
        tables: predictions tables by the name of their model, matched by `id`.
        threshold: for two classes, the smallest probability in [0, 1] at which class 1 is predicted.

    Returns:
        The values of `classification.compute` and `calibration.compute` as float64 columns, NaN where undefined; names
        are the index.

    Raises:
        HistoError: the tables' ids, labels, number or names of classes differ, or `threshold` is outside [0, 1].
    """
    aligned = dict(zip(tables, _aligned(tables), strict=True))
    rows = {
        name: classification.compute(table, threshold=threshold) | calibration.compute(table)
        for name, table in aligned.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index", dtype=np.float64)


def _aligned(tables: Mapping[str, Predictions]) -> list[Predictions]:
    """Return the tables with their rows in the order of the first one."""
    if not tables:
        raise HistoError("tables are empty, expected at least one predictions table")
    (reference, first), *others = tables.items()
    names, labels = first.label_names, first.labels
    aligned = [first]
    for name, table in others:
        found = table.label_names
        both_named = table.is_named and first.is_named
        if len(found) != len(names) or (both_named and found != names):
            raise HistoError(
                f"{name} has the classes {found}, expected those of {reference}, {names}: pass predictions of one task"
            )
        if differing := sorted(set(first["id"]) ^ set(table["id"])):
            raise HistoError(
                f"{name} and {reference} differ in {len(differing)} ids, e.g. {differing[0]}, expected none: "
                "predict the same split with every model"
            )
        table = table.set_index("id", drop=False).loc[first["id"]].reset_index(drop=True)
        for key, label, expected in zip(table["id"], table["label"], labels, strict=True):
            if label != expected:
                raise HistoError(
                    f"{name} has label {label} for id {key}, expected that of {reference}, {expected}: predict the "
                    "same split with every model"
                )
        aligned.append(table)
    return aligned
