"""The splits that a run trains, validates and tests on: the one place where options arrange them."""

from __future__ import annotations

from collections.abc import Mapping

import datasets

from hf_histo.config import Config
from hf_histo.data.load import load
from hf_histo.data.splits.folds import pool_centers
from hf_histo.data.splits.leakage import arrange
from hf_histo.errors import HistoError


def prepare(config: Config) -> datasets.DatasetDict:
    """The data of `--data`, arranged as `--split` and then `--pool_centers` ask.

    See `leaks.arrange` and `folds.pool_centers`.

    Raises `HistoError` for data that can't be read, and splits that can't be made.
    """
    data = arrange(load(config.data), config.data.split, config.data.family)
    return pool_centers(data, seed=config.training.seed) if config.centers.pool_centers else data


def refuse(config: Config, reasons: Mapping[str, str]) -> None:
    """Raise `HistoError` for an option that was set to something else than its default and can't act in a recipe.

    `reasons` are sentences by the names of such options.
    """
    values, defaults = config.flat(), Config().flat()
    for name, reason in reasons.items():
        if values[name] != defaults[name]:
            raise HistoError(f"--{name} is {values[name]!r}, which can't act here: {reason}; leave it out")
