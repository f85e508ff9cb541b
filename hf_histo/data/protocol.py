"""The splits that a run trains, validates and tests on: the one place where they are made and arranged.

A reader gives what the files hold. What is missing is made here, by one rule for each case:

| `--split` | without `val` | without any splits |
|---|---|---|
| files | a tenth of each class of `train`; whole groups where groups are known | also a fifth of each class as `test` |
| published | a tenth of `train`, whole families of copies | refused |
| clean | everything is split anew: a fifth is `test`, a tenth of the rest `val`, whole families | the same |

Then `--pool_centers` makes `train` and `val` anew from both. No rule but that depends on a run's seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import datasets

from hf_histo.config import OPTIONS, Config, DataOptions
from hf_histo.data.load import load
from hf_histo.data.readers import hub
from hf_histo.data.readers.class_folders import SINGLE
from hf_histo.data.readers.idx import Idx
from hf_histo.data.splits.checks import named
from hf_histo.data.splits.folds import k_folds, pool_centers, with_test, with_validation
from hf_histo.data.splits.leakage import grouped, without_copies
from hf_histo.errors import HistoError, idle_option


def prepare(config: Config) -> datasets.DatasetDict:
    """The data of `--data` as `train`, `val` and, where there are any, `test` and others.

    Raises `HistoError` for data that can't be read, and splits that can't be made.
    """
    data = arranged(config.data)
    return pool_centers(data, seed=config.training.seed) if config.centers.pool_centers else data


def arranged(options: DataOptions) -> datasets.DatasetDict:
    """The data of `--data`, arranged as `--split` and `--family` ask; see `arrange`."""
    files = load(options)
    if options.split == "files" and options.data.startswith(hub.PREFIX) and "val" not in files:
        whole = complete(files)
        # The order and the fingerprint by which runs on such data are known.
        return hub.named(datasets.DatasetDict({name: whole[name] for name in [*files, "val"]}))
    return arrange(files, options.split, options.family)


def arrange(files: datasets.DatasetDict, split: str = "files", family: str | None = None) -> datasets.DatasetDict:
    """The splits that `--split` and `--family` ask for; what was done is added to `info.description`.

    - "files": nothing is looked at, and what is missing is made (`complete`).
    - "published": the splits of the files, `group` naming families of copies; where other splits hold copies of images
      of `train` or `val`, their images that are none are a further split: `test_clean` for `test`.
    - "clean": one image of each family of copies, none of a family with several labels, in the first of five `k_folds`.

    With the family "near", families of near images take the place of those of copies, save that "clean" keeps one image
    of each family of copies.

    Raises HistoError for a split that can't be made, and as `inventory` does.
    """
    if split == "files":
        return complete(files)
    families = grouped(files, family or "copies", only_one=split == "clean")
    if split == "clean":
        data, notes = k_folds(families, folds=5)[0], ["one image of each family of copies, split anew"]
    elif "train" not in files:
        raise HistoError(f"--split published: there is no train, only {', '.join(files)}; expected clean")
    else:
        whole = with_validation(families)
        made = [] if "val" in files else [f"val: {len(whole['val'])} images of train, whole families"]
        data, found = without_copies(whole)
        data, notes = named(data, families), [*made, *found] or ["no copies across splits"]
    for part in data.values():
        part.info.description += f"; {'; '.join(notes)}; { ({name: len(part) for name, part in data.items()}) }"
    return data


def complete(files: datasets.DatasetDict) -> datasets.DatasetDict:
    """The same images as `train`, `val` and `test`, where some are missing; data with all splits is as it was.

    Data with neither `train` nor the single split `full` is as it was, too.
    """
    data = with_test(files, SINGLE) if SINGLE in files else files
    if "val" in data or "train" not in data:
        return data
    completed = with_validation(data)
    if files["train" if "train" in files else SINGLE].info.dataset_name == Idx.LAYOUT:
        for rows in completed.values():  # the fingerprint by which runs on such data are known
            rows.info.config_name = files["train"].info.config_name
            rows.info.description += "; val: a tenth of each class of train"
    return completed


def refuse(config: Config, reasons: Mapping[str, str]) -> None:
    """Raise `HistoError` for an option that was set to something else than its default and can't act in a recipe.

    `reasons` are sentences by the names of such options.
    """
    values = config.flat()
    for name, reason in reasons.items():
        if values[name] != OPTIONS[name].default:
            raise idle_option(name, values[name], reason)
