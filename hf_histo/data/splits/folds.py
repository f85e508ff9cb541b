"""Other splits of the labeled images: every center, or every fold, held out of training once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import datasets
import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from hf_histo.data.splits.checks import named
from hf_histo.errors import HistoError, idle_option

POOLED = ("train", "val")
FOLDS = 5  # of images that come without splits: one is `test`
TEST = 2  # the number of that split in `drawn`; those of train and val are 0 and 1


def leave_one_center_out(
    data: datasets.DatasetDict, *, seed: int, validation_share: float = 0.15
) -> dict[int, datasets.DatasetDict]:
    """For every center, the splits `train` and `val` of the other centers, and `test`: that center.

    The images are the labeled ones of `train` and `val`; any other split stays out. `id` gets its split as a prefix
    ("train/0"), since both files may count from 0. A group is never on two sides: where the held-out center shares one
    with others, their images of it are in no split. `val` is that fold of a `StratifiedGroupKFold` over label and
    center that is nearest to `validation_share` of each; an image of unknown group is its own.

    Args:
        data: splits with known centers.
        seed: of the parts; the same gives the same.
        validation_share: of the images outside the held-out center that go to `val`, in (0, 0.5]; about, because
            groups stay whole.

    Returns:
        The splits by the center held out, in rising order. The fingerprints of any two that differ in an image differ.

    Raises:
        HistoError: the share is outside its range; there is no labeled image, an unknown center (-1), or fewer than
            two centers; without a center, there are fewer than two groups, or `train` would have fewer than two
            classes.
    """
    _check_share(validation_share)
    pool = _pool(data)
    centers = np.array(pool["center"])
    if unknown := int((centers < 0).sum()):
        raise HistoError(
            f"{unknown} of {len(pool)} labeled images have no known center (-1); leave them out of the data"
        )
    names = np.unique(centers).tolist()
    if len(names) < 2:
        raise HistoError(f"train and val: labeled images of centers {names}, expected at least two centers; add images")
    return {center: named(_fold(pool, center, seed, validation_share), data) for center in names}


def pool_centers(data: datasets.DatasetDict, *, seed: int, validation_share: float = 0.1) -> datasets.DatasetDict:
    """Train on every labeled center: `train` and `val` are made anew from both, other splits stay as they are.

    For the last run, when everything has been decided: `val` is then of the same centers as `train` (other groups), so
    it can choose a checkpoint but measures nothing of an unseen center. Ids, groups and strata are as in
    `leave_one_center_out`, and so are the errors; HistoError, too, where the images are of one center.
    """
    _check_share(validation_share)
    pool = _pool(data)
    if len(centers := pool.unique("center")) < 2:
        found = "no image has a known center" if centers == [-1] else f"all images are of center {centers[0]}"
        raise idle_option("pool_centers", True, found)
    parts = _parts(pool, np.arange(len(pool)), seed, validation_share, "all centers pooled")
    others = {name: split for name, split in data.items() if name not in POOLED}
    return named(datasets.DatasetDict({**{n: pool.select(rows) for n, rows in parts.items()}, **others}), data)


def k_folds(
    data: datasets.DatasetDict, *, folds: int = 5, seed: int = 0, validation_share: float = 0.1
) -> dict[int, datasets.DatasetDict]:
    """For every fold, counted from 0: it as `test`, and the splits `train` and `val` of the others.

    All labeled images of all splits are put together and divided by scikit-learn's `StratifiedGroupKFold` over label
    and group, so that each is in `test` once, folds have about the same shares of the classes, and no group is on two
    sides. `id` gets its split as a prefix; `val` is chosen as in `leave_one_center_out`.

    Args:
        data: splits whose groups are known (`splits.with_families`); an image of unknown group is its own.
        folds: at least 2.
        seed: of the assignment; the same gives the same.
        validation_share: of the images outside the fold that go to `val`, in (0, 0.5], about.

    Raises:
        HistoError: `folds` or the share is outside its range; there is no labeled image; a class has fewer groups than
            there are folds.
    """
    _check_share(validation_share)
    if folds < 2:
        raise HistoError(f"folds is {folds}, expected at least 2, e.g. 5")
    pool = _pool(data, list(data))
    labels, groups = np.array(pool["label"]), _groups(pool)
    for label, name in enumerate(pool.features["label"].names):
        count = len(set(groups[labels == label]))
        if 0 < count < folds:
            raise HistoError(f"class {name!r} has {count} groups, expected at least one for each of {folds} folds")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    divided = {}
    for fold, (rest, held_out) in enumerate(splitter.split(labels, labels, groups)):
        rows = _parts(pool, rest, seed, validation_share, f"fold {fold} held out") | {"test": held_out}
        divided[fold] = named(datasets.DatasetDict({name: pool.select(part) for name, part in rows.items()}), data)
    return divided


def with_validation(data: datasets.DatasetDict, *, share: float = 0.1) -> datasets.DatasetDict:
    """The same data; if `val` is missing, about `share` of each class of `train` becomes `val`, in whole groups.

    Where no group is known, it is a tenth of each class, see `hold_out`. The draw is always the same, so that runs of
    any seed are chosen on the same images. Raises HistoError where `train` is too small for it.
    """
    if "val" in data:
        return data
    train = data["train"]
    if not any(train.unique("group")):
        kept, held_out = hold_out(np.array(train["label"]))
        others = {name: rows for name, rows in data.items() if name != "train"}
        pieces = {"train": train.select(kept), "val": train.select(held_out), **others}
        return named(datasets.DatasetDict(pieces), data)
    rows = _parts(train, np.arange(len(train)), 0, share, "no val")
    parts = {name: train.select(part) for name, part in rows.items()}
    return named(datasets.DatasetDict({**data, **parts}), data)


def with_test(data: datasets.DatasetDict, name: str) -> datasets.DatasetDict:
    """The single split `name` as `train` and `test`: a fifth of each class, always the same one.

    Where groups are known they stay whole, and `val` is made as well: the first of five `k_folds`.
    """
    rows = data[name]
    if any(rows.unique("group")):
        return k_folds(data, folds=FOLDS)[0]
    labels = np.array(rows["label"])
    parts = [drawn(labels, label, TEST, 0) for label in np.unique(labels[labels >= 0])]
    test = np.sort(np.concatenate([part[: len(part) // FOLDS] for part in parts]))
    train = np.setdiff1d(np.arange(len(rows)), test)
    return named(datasets.DatasetDict({"train": rows.select(train), "test": rows.select(test)}), data)


def hold_out(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows (in order) to train on and those to validate on, for images without groups: a tenth of each class.

    The draw is always the same, so that runs of any seed are chosen on
    the same images. A class with a single image keeps it for training; `labels` (N,) are classes, -1 where hidden, and
    hidden ones stay where they are, too.
    """
    random = np.random.default_rng(0)
    held_out = [
        random.permutation(rows)[: (len(rows) + 8) // 10]  # a tenth, rounded up unless that leaves none
        for rows in (np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0]))
    ]
    validation = np.sort(np.concatenate([np.empty(0, np.int64), *held_out]))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def drawn(labels: NDArray[np.int64], label: int, split: int, seed: int) -> NDArray[np.int64]:
    """All rows of a class in an order that depends on the seed, the split's number and the class."""
    rows = np.flatnonzero(labels == label)
    return np.random.default_rng([seed, split, int(label)]).permutation(rows)


def _check_share(share: float) -> None:
    if not 0 < share <= 0.5:
        raise HistoError(f"validation_share is {share}, expected more than 0 and at most 0.5, e.g. 0.15")


def _pool(data: datasets.DatasetDict, names: Sequence[str] = POOLED) -> datasets.Dataset:
    """The labeled images of the splits `names`, with ids that name the split."""
    parts = []
    for name in names:
        if name in data:
            ids = [f"{name}/{key}" for key in data[name]["id"]]
            split = data[name].remove_columns("id").add_column("id", ids, feature=datasets.Value("string"))
            parts.append(split.select_columns(data[name].column_names))
    if not parts:
        raise HistoError(f"the data has the splits {', '.join(data)}, expected train or val; rename one")
    pool = datasets.concatenate_datasets(parts)
    labeled = np.flatnonzero(np.array(pool["label"]) >= 0)
    if not len(labeled):
        raise HistoError(f"{' and '.join(names)}: all labels are hidden (-1), expected labeled images; add labels")
    return pool.select(labeled)


def _fold(pool: datasets.Dataset, center: int, seed: int, share: float) -> datasets.DatasetDict:
    held_out, groups = np.array(pool["center"]) == center, _groups(pool)
    rest = np.flatnonzero(~held_out & ~np.isin(groups, groups[held_out]))
    rows = _parts(pool, rest, seed, share, f"center {center} held out") | {"test": np.flatnonzero(held_out)}
    return datasets.DatasetDict({name: pool.select(part) for name, part in rows.items()})


def _groups(pool: datasets.Dataset) -> NDArray[np.str_]:
    """With a name that no group has for an image of unknown group: it is alone."""
    return np.array([group or f"\0{key}" for group, key in zip(pool["group"], pool["id"], strict=True)])


def _parts(
    pool: datasets.Dataset, rest: NDArray[np.int64], seed: int, share: float, what: str
) -> dict[str, NDArray[np.int64]]:
    """The rows `rest` of `pool` as `train` and `val`."""
    labels, centers, groups = np.array(pool["label"]), np.array(pool["center"]), _groups(pool)
    strata = np.unique(np.stack([labels[rest], centers[rest]]), axis=1, return_inverse=True)[1]
    validation = _nearest_fold(strata, groups[rest], seed, share, what)
    rows = {"train": rest[~validation], "val": rest[validation]}
    classes = pool.features["label"].names
    present = np.unique(labels[rows["train"]])
    if len(present) < 2:
        found = ", ".join(classes[label] for label in present) or "none"
        raise HistoError(
            f"{what}: classes present in train: {found}, expected at least two of "
            f"{', '.join(classes)}; add images of other centers, or leave fewer of them to validation"
        )
    return rows


def _nearest_fold(
    strata: NDArray[np.int64], groups: NDArray[np.str_], seed: int, share: float, what: str
) -> NDArray[np.bool_]:
    """Of equal folds of whole groups, that with about `share` of every stratum, as a mask of shape (n,)."""
    counts = np.bincount(strata)
    # The splitter refuses more folds than the most frequent stratum has images.
    folds = min(round(1 / share), len(np.unique(groups)), int(counts.max(initial=0)))
    if folds < 2:
        raise HistoError(
            f"{what}: {len(strata)} images in {len(np.unique(groups))} groups are left for train and "
            "val, expected at least two groups, and two images of a class and center; add images of other centers"
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A stratum with fewer images than there are folds is in some of them only.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        parts = [part for _, part in splitter.split(strata, strata, groups)]
    distances = [np.abs(np.bincount(strata[part], minlength=len(counts)) - share * counts).sum() for part in parts]
    mask = np.zeros(len(strata), dtype=bool)
    mask[parts[int(np.argmin(distances))]] = True
    return mask
