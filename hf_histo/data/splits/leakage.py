"""Data sets whose images have copies: what is said about it, and splits on which a result means something."""

from __future__ import annotations

import logging

import datasets
import numpy as np

from hf_histo.data.audit.findings import audit
from hf_histo.data.audit.near_duplicates import NEAR, inventory
from hf_histo.data.splits.checks import clean, named, with_families
from hf_histo.data.splits.folds import k_folds, with_validation
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)

SEARCHED = "near copies were searched for"  # in the description of data on which `grouped` did so
LOGGED = ("overlap", "similar_overlap", "shared_groups", "label_conflict", "similar_label_conflict", "repeats")


def arrange(data: datasets.DatasetDict, split: str, family: str | None = None) -> datasets.DatasetDict:
    """The splits that `--split` and `--family` ask for; what was done is added to `info.description`.

    - "files": `data` itself, nothing is looked at.
    - "published": the splits of the files, `group` naming families of copies; a tenth of `train`, whole families,
      becomes `val` where there is none; where other splits hold copies of images of `train` or `val`, their images
      that are none are a further split: `test_clean` for `test`.
    - "clean": one image of each family of copies, none of a family with several labels, in the first of five
      `k_folds`: a fifth is `test`, a tenth of the rest `val`.

    With the family "near", families of near images take the place of those of copies, save that "clean" keeps one image
    of each family of copies.

    Neither depends on a run's seed. Raises HistoError for a split that can't be made, and as `inventory` does.
    """
    if split == "files":
        if family:
            raise HistoError(f"--family is {family} with --split files, which searches for none; leave it out")
        return data
    families = grouped(data, family or "copies", only_one=split == "clean")
    if split == "clean":
        arranged = k_folds(families, folds=5)[0]
        said = "one image of each family of copies, split anew"
    else:
        arranged, said = _published(families)
    for part in arranged.values():
        part.info.description += f"; {said}; { ({name: len(part) for name, part in arranged.items()}) }"
    return arranged


def grouped(data: datasets.DatasetDict, family: str = "copies", *, only_one: bool = False) -> datasets.DatasetDict:
    """`data` with families of copies, or of near images, for groups; warns of what it finds.

    With `only_one`, it keeps one image of each family of copies.
    """
    table = inventory(data, near=NEAR if family == "near" else None)
    for finding in audit(table, next(iter(data.values())).features["label"].names).findings:
        if finding.kind in LOGGED:
            logger.warning(finding.message)
    families = with_families(data, table, "near" if family == "near" else "family")
    found = clean(families, table) if only_one else families
    for part in found.values():
        part.info.description += f"; {SEARCHED}{', near images as well' if family == 'near' else ''}"
    return found


def were_searched(data: datasets.DatasetDict) -> bool:
    """Whether near copies among the images of `data` were searched for, whatever was done with them."""
    return any(SEARCHED in part.info.description for part in data.values())


def _published(data: datasets.DatasetDict) -> tuple[datasets.DatasetDict, str]:
    if "train" not in data:
        raise HistoError(f"--split published: there is no train, only {', '.join(data)}; expected clean")
    splits = with_validation(data)
    said = [] if "val" in data else [f"val: {len(splits['val'])} images of train, whole families"]
    seen = {*splits["train"]["group"], *splits["val"]["group"]}
    others = {}
    for name in [name for name in data if name not in ("train", "val")]:
        unseen = np.flatnonzero([group not in seen for group in data[name]["group"]])
        if 0 < len(unseen) < len(data[name]):
            others[f"{name}_clean"] = data[name].select(unseen)
            copies = len(data[name]) - len(unseen)
            said.append(f"{name}: {copies} of {len(data[name])} have copies in train or val, {name}_clean is the rest")
    return named(datasets.DatasetDict({**splits, **others}), data), "; ".join(said) or "no copies across splits"
