"""Few-shot subsets: a number of images per class, or a percentage of each class.

The protocol of Dausort et al. 2024 (arXiv 2411.14975, its datasets/): `shots` images per class of `train`,
min(shots, 4) per class of `val`, all of `test`; or a percentage of each class of `train` and `val`. Two differences:
the draw depends only on (seed, split, class), so that larger subsets contain smaller ones of the same seed; and a class
with too few images is an error, where the study repeats images.
"""

from __future__ import annotations

import datasets
import numpy as np

from hf_histo.data import hierarchy
from hf_histo.data.splits.checks import named
from hf_histo.data.splits.folds import drawn
from hf_histo.errors import HistoError

VALIDATION_SHOTS = 4  # most images per class of `val`
SPLITS = {"train": 0, "val": 1}


def select(
    data: datasets.DatasetDict,
    *,
    seed: int,
    shots: int | None = None,
    percentage: float | None = None,
    level: int | None = None,
) -> datasets.DatasetDict:
    """Select few images per class from `train` and `val`; other splits are returned whole.

    Args:
        data: splits with `train` and `val`, see `protocol.prepare`.
        seed: seed of the draw.
        shots: training images per class; None for all.
        percentage: share of each class of `train` and `val`, in (0, 100], rounded down to at least one image; None for
            all. Can't be combined with `shots`.
        level: reduce the classes to one level of their hierarchy first, see `hierarchy.at_level`.

    Raises `HistoError` for a class with fewer than `shots` images in `train`, or without images in `train` or `val`.
    """
    if shots is not None and percentage is not None:
        raise HistoError(f"--shots is {shots} and --percentage {percentage}, expected one of them; leave the other out")
    if level is not None:
        data = hierarchy.at_level(data, level)
    if shots is None and percentage is None:
        return data
    chosen = dict(data)
    for split, number in SPLITS.items():
        if split not in data:
            raise HistoError(f"{split}: no such split, only {', '.join(data)}; few-shot training needs it")
        labels, names = np.array(data[split]["label"][:]), data[split].features["label"].names
        rows = []
        for label, name in enumerate(names):
            order = drawn(labels, label, number, seed)
            if shots is not None:
                count = shots if split == "train" else min(shots, VALIDATION_SHOTS)
            else:
                assert percentage is not None
                count = max(1, int(len(order) * percentage / 100))
            if len(order) < count:
                raise HistoError(
                    f"{split}: {name} has {len(order)} images, expected at least {count} for --shots {shots}; ask for "
                    "fewer shots, or add images"
                    if shots is not None
                    else f"{split}: {name} has no image, expected at least 1; add some, or remove the class"
                )
            rows.append(order[:count])
        chosen[split] = data[split].select(np.sort(np.concatenate(rows)))
    return named(datasets.DatasetDict(chosen), data)
