"""A handful of labels: so many images of each class, or a share of them, the same ones whatever is trained on them.

The protocol of Dausort et al. 2024 (arXiv 2411.14975, its datasets/): shots per class from `train`, min(shots, 4) per
class from `val`, all of `test`; or a percentage of each class of `train` and `val`. Ours: an image is drawn by (seed,
split, class) alone, so that 2 shots hold the 1 shot of the same seed, and 10 percent the 1 percent; and a class with
too few images is an error, where the study repeats images.
"""

from __future__ import annotations

import datasets
import numpy as np

from hf_histo.data import hierarchy
from hf_histo.data.splits.checks import named
from hf_histo.data.splits.folds import drawn
from hf_histo.errors import HistoError

VALIDATION_SHOTS = 4  # at most
SPLITS = {"train": 0, "val": 1}


def select(
    data: datasets.DatasetDict,
    *,
    seed: int,
    shots: int | None = None,
    percentage: float | None = None,
    level: int | None = None,
) -> datasets.DatasetDict:
    """The training and validation images of a protocol; other splits whole.

    Args:
        data: splits with `train` and `val` among them, see `protocol.prepare`.
        seed: of the draw.
        shots: images of each class to train on; None for all.
        percentage: of each class's images to train and to validate on, above 0 and up to 100, rounded down but at least
            one; None for all. Not beside `shots`.
        level: of a hierarchy of classes, see `hierarchy.at_level`.

    Raises `HistoError` for a class that has fewer images than are asked for, or none in `val`.
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
        labels, names = np.array(data[split]["label"]), data[split].features["label"].names
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
