"""The splits that a run trains, validates and tests on: the one place where they are made and arranged.

A reader returns the splits of the files. Missing ones are made here:

| `--split` | data without `val` | data without any splits |
|---|---|---|
| files | `val`: a tenth of each class of `train`, in whole groups if known | also `test`: a fifth of each class |
| published | `val`: a tenth of `train`, in whole families of copies | refused |
| clean | all images are split anew in whole families: a fifth is `test`, a tenth of the rest `val` | the same |

A table of images or slides without splits is divided 70/15/15 by label and center, in whole groups. With
`--test_centers`, `test` is all images of these centers, and `val`, where it is missing, 15 percent of the rest.

Then `--pool_centers` splits the images of `train` and `val` anew. None of this depends on a run's seed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import datasets

from hf_histo.config import HUB, OPTIONS, Config, DataOptions
from hf_histo.data.load import load
from hf_histo.data.readers import hub
from hf_histo.data.readers.class_folders import SINGLE
from hf_histo.data.readers.idx import Idx
from hf_histo.data.readers.image_table import TableOfImages
from hf_histo.data.readers.slide_table import TableOfSlides
from hf_histo.data.schema import center_name, center_names
from hf_histo.data.splits import folds
from hf_histo.data.splits.checks import named
from hf_histo.data.splits.folds import k_folds, pool_centers, with_test, with_validation
from hf_histo.data.splits.leakage import grouped, without_copies
from hf_histo.errors import HistoError, did_you_mean, idle_option

logger = logging.getLogger(__name__)

# Besides `DataOptions`, the options that decide which images and classes the splits of a run have.
SELECTING = ("pool_centers", "shots", "percentage", "level")


def prepare(config: Config, files: datasets.DatasetDict | None = None) -> datasets.DatasetDict:
    """Load `--data`, or take `files`, loaded splits, as `train`, `val` and, where the data has them, `test` and others.

    Raises `HistoError` for data that can't be read or split as the options ask.
    """
    return pooled(config, arranged(config.data, files))


def pooled(config: Config, data: datasets.DatasetDict) -> datasets.DatasetDict:
    """The arranged splits of a run: with `--pool_centers`, those of `folds.pool_centers`."""
    return pool_centers(data) if config.centers.pool_centers else data


def arranged(options: DataOptions, files: datasets.DatasetDict | None = None) -> datasets.DatasetDict:
    """Load `--data`, or take `files`, split by `--split` and `--family` as `arrange` does."""
    files = load(options) if files is None else files
    if options.test_centers is not None:
        return hold_out(files, options.test_centers)
    if options.split == "files" and options.data.startswith(HUB) and "val" not in files:
        whole = complete(files)
        # Order and fingerprint as in earlier versions: a run that is resumed compares them.
        return hub.named(datasets.DatasetDict({name: whole[name] for name in [*files, "val"]}))
    return arrange(files, options.split, options.family)


def arrange(files: datasets.DatasetDict, split: str = "files", family: str | None = None) -> datasets.DatasetDict:
    """Arrange loaded splits by `--split` and `--family`, and record what was done in `info.description`.

    - "files": the splits of the files, completed by `complete`; copies are not searched for.
    - "published": the splits of the files, with `group` naming families of copies. A split that holds copies of images
      of `train` or `val` gets a second split without them: `test_clean` beside `test`.
    - "clean": the first of five `k_folds`, with one image of each family of copies, and none of a family with several
      labels.

    With `family` "near", groups are families of near images instead; "clean" still drops only copies.

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


def hold_out(files: datasets.DatasetDict, test_centers: str) -> datasets.DatasetDict:
    """The images of some centers, in any split, as `test`, and those of the others as `train` and `val`.

    See `folds.held_out_centers`; the images that it leaves out are logged, and recorded in `info.description`.

    Args:
        files: splits with known centers.
        test_centers: their names or numbers, separated by commas.

    Raises HistoError for a name that no center has, and data without known centers.
    """
    names = center_names(next(iter(files.values())))
    every = sorted({center for rows in files.values() for center in rows.unique("center")} - {-1})
    known = {center_name(center, names): center for center in every}
    if not known:
        raise idle_option("test_centers", test_centers, "no image has a known center")
    wanted = [test_centers] if test_centers in known else [name.strip() for name in test_centers.split(",")]
    for name in wanted:
        if name not in known:
            remedy = did_you_mean(name, known, "correct the names")
            raise HistoError(f"--test_centers is {test_centers!r}, expected some of {', '.join(known)}; {remedy}")
    data, left_out = folds.held_out_centers(files, {known[name] for name in wanted})
    notes = [f"test: center {', '.join(wanted)}", *left_out]
    if left_out:
        logger.warning("--test_centers %s: %s", test_centers, "; ".join(left_out))
    for rows in data.values():
        rows.info.description += f"; {'; '.join(notes)}"
    return data


def complete(files: datasets.DatasetDict) -> datasets.DatasetDict:
    """Add the missing ones of `train`, `val` and `test`, drawn from `train` or the single split `full`.

    Data that has them all, or neither `train` nor `full`, is returned unchanged.
    """
    if SINGLE in files and files[SINGLE].info.dataset_name in (TableOfImages.LAYOUT, TableOfSlides.LAYOUT):
        return folds.split_in_three(files, SINGLE)
    data = with_test(files, SINGLE) if SINGLE in files else files
    if "val" in data or "train" not in data:
        return data
    completed = with_validation(data)
    if files["train" if "train" in files else SINGLE].info.dataset_name == Idx.LAYOUT:
        for rows in completed.values():  # fingerprint as in earlier versions, see `arranged`
            rows.info.config_name = files["train"].info.config_name
            rows.info.description += "; val: a tenth of each class of train"
    return completed


def refuse(config: Config, reasons: Mapping[str, str]) -> None:
    """Raise `HistoError` for an option that differs from its default although it has no effect in a recipe.

    `reasons` maps the names of such options to a sentence that explains why.
    """
    values = config.flat()
    for name, reason in reasons.items():
        if values[name] != OPTIONS[name].default:
            raise idle_option(name, values[name], reason)
