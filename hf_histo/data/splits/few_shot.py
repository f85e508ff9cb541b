"""A handful of labels: so many images of each class, or a share of them, the same ones whatever is trained on them.

The protocol of Dausort et al. 2024 (arXiv 2411.14975, its datasets/): shots per class from `train`, min(shots, 4) per
class from `val`, all of `test`; or a percentage of each class of `train` and `val`. Ours: an image is drawn by (seed,
split, class) alone, so that 2 shots hold the 1 shot of the same seed, and 10 percent the 1 percent; and a class with
too few images is an error, where the study repeats images.
"""

from __future__ import annotations

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_histo.data import hierarchy
from hf_histo.data.readers.builder import hold_out
from hf_histo.data.readers.class_folders import SINGLE
from hf_histo.data.splits.checks import named
from hf_histo.errors import HistoError

VALIDATION_SHOTS = 4  # at most
SPLITS = {"train": 0, "val": 1}
FOLDS = 5  # of images that come without splits: one is `test`


def complete(data: datasets.DatasetDict) -> datasets.DatasetDict:
    """The same images as `train`, `val` and `test`, where some are missing; the draw is always the same one.

    Images without splits give a fifth of each class to `test`. Without `val`, a tenth of each class of `train` goes
    there (`builder.hold_out`). Groups are unknown in such layouts and not looked at. Data with all splits is as it was.
    """
    if SINGLE in data:
        rows = data[SINGLE]
        labels = np.array(rows["label"])
        parts = [drawn(labels, label, len(SPLITS), 0) for label in np.unique(labels[labels >= 0])]
        test = np.sort(np.concatenate([part[: len(part) // FOLDS] for part in parts]))
        train = np.setdiff1d(np.arange(len(rows)), test)
        pieces = {"train": rows.select(train), "test": rows.select(test)}
        data = named(datasets.DatasetDict(pieces), data)
    if "val" in data or "train" not in data:
        return data
    kept, held_out = hold_out(np.array(data["train"]["label"]))
    pieces = {"train": data["train"].select(kept), "val": data["train"].select(held_out)}
    return named(datasets.DatasetDict({**pieces, **{k: v for k, v in data.items() if k != "train"}}), data)


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
        data: any; splits that are missing are made (`complete`).
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
    data = complete(data)
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


def drawn(labels: NDArray[np.int64], label: int, split: int, seed: int) -> NDArray[np.int64]:
    """All rows of a class in an order that depends on the seed, the split and the class."""
    rows = np.flatnonzero(labels == label)
    return np.random.default_rng([seed, split, int(label)]).permutation(rows)
