"""New splits of the labeled images: one center or fold held out at a time, and missing splits drawn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Set

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_histo.data.splits.checks import named
from hf_histo.errors import HistoError, idle_option

POOLED = ("train", "val")
FOLDS = 5  # of data without splits: one fold becomes `test`
TWENTIETHS = 20  # folds of images that come without splits, by label and center
SHARE = 3 / TWENTIETHS  # share of such images that go to `val`, and to `test`
TEST = 2  # number of the split `test` for `drawn`; `train` is 0 and `val` is 1


def leave_one_center_out(
    data: datasets.DatasetDict, *, seed: int, validation_share: float = 0.15
) -> dict[int, datasets.DatasetDict]:
    """For each center, three splits: `test` is that center, `train` and `val` are drawn from the other centers.

    The images are the labeled ones of `train` and `val`; other splits are ignored. `id` gets its split as a prefix
    ("train/0"), since ids need be unique only within a split. No group is in two splits: where a group is in the
    held-out center and in others, its images in the others are left out. `val` is the fold of a `StratifiedGroupKFold`
    (strata: label and center) whose share of each stratum is nearest to `validation_share`; an image of unknown group
    is its own group.

    Args:
        data: splits with known centers.
        seed: seed of the draw of `val`.
        validation_share: share of the images outside the held-out center that go to `val`, in (0, 0.5]; approximate,
            since groups stay whole.

    Returns:
        The splits by held-out center, in rising order. Splits that differ in an image have different fingerprints.

    Raises:
        HistoError: the share is outside its range; there is no labeled image, an unknown center (-1), or fewer than
            two centers; without the held-out center, there are fewer than two groups, or `train` would have fewer than
            two classes.
    """
    _check_share(validation_share)
    pool = _pool(data)
    centers = np.array(pool["center"][:])
    if unknown := int((centers < 0).sum()):
        raise HistoError(
            f"{unknown} of {len(pool)} labeled images have no known center (-1); leave them out of the data"
        )
    names = np.unique(centers).tolist()
    if len(names) < 2:
        raise HistoError(f"train and val: labeled images of centers {names}, expected at least two centers; add images")
    return {center: named(_fold(pool, center, seed, validation_share), data) for center in names}


def pool_centers(data: datasets.DatasetDict, *, validation_share: float = 0.1) -> datasets.DatasetDict:
    """Train on all labeled centers: split the images of `train` and `val` anew; other splits stay as they are.

    Meant for the final run: `val` then has the same centers as `train` (but other groups), so it can choose a
    checkpoint but measures nothing about an unseen center. It does not depend on a run's seed: none of several runs has
    trained on the `val` of another, so that they can make an ensemble. Ids, groups, strata, `validation_share` and
    errors are as in `leave_one_center_out`; HistoError is also raised if all images are of one center.
    """
    _check_share(validation_share)
    pool = _pool(data)
    if len(centers := pool.unique("center")) < 2:
        found = "no image has a known center" if centers == [-1] else f"all images are of center {centers[0]}"
        raise idle_option("pool_centers", True, found)
    parts = _parts(pool, np.arange(len(pool)), 0, validation_share, "all centers pooled")
    others = {name: split for name, split in data.items() if name not in POOLED}
    return named(datasets.DatasetDict({**{n: pool.select(rows) for n, rows in parts.items()}, **others}), data)


def k_folds(
    data: datasets.DatasetDict, *, folds: int = 5, seed: int = 0, validation_share: float = 0.1
) -> dict[int, datasets.DatasetDict]:
    """For each fold, counted from 0, three splits: `test` is the fold, `train` and `val` are drawn from the others.

    The labeled images of all splits are pooled and divided by scikit-learn's `StratifiedGroupKFold` over label and
    group: each image is in `test` once, folds have similar class shares, and no group is in two splits. `id` gets its
    split as a prefix; `val` is chosen as in `leave_one_center_out`.

    Args:
        data: splits whose groups are known (`checks.with_families`); an image of unknown group is its own group.
        folds: number of folds, at least 2.
        seed: seed of the assignment.
        validation_share: approximate share of the images outside the fold that go to `val`, in (0, 0.5].

    Raises:
        HistoError: `folds` or the share is outside its range; there is no labeled image; a class has fewer groups than
            there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second to import

    _check_share(validation_share)
    if folds < 2:
        raise HistoError(f"folds is {folds}, expected at least 2, e.g. 5")
    pool = _pool(data, list(data))
    labels, groups = np.array(pool["label"][:]), _groups(pool)
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
    """Add a missing split `val`: about `share` of each class of `train`, in whole groups.

    If no group is known, it is a tenth of each class, see `hold_out`. The draw does not depend on a run's seed, so that
    all runs validate on the same images. Raises HistoError if `train` is too small.
    """
    if "val" in data:
        return data
    train = data["train"]
    if not any(train.unique("group")):
        kept, held_out = hold_out(np.array(train["label"][:]))
        others = {name: rows for name, rows in data.items() if name != "train"}
        pieces = {"train": train.select(kept), "val": train.select(held_out), **others}
        return named(datasets.DatasetDict(pieces), data)
    rows = _parts(train, np.arange(len(train)), 0, share, "no val")
    parts = {name: train.select(part) for name, part in rows.items()}
    return named(datasets.DatasetDict({**data, **parts}), data)


def with_test(data: datasets.DatasetDict, name: str) -> datasets.DatasetDict:
    """Divide the single split `name` into `train` and `test`, a fifth of each class; the draw is always the same.

    If groups are known, the result is the first of five `k_folds`, which keeps groups whole and includes `val`.
    """
    rows = data[name]
    if any(rows.unique("group")):
        return k_folds(data, folds=FOLDS)[0]
    labels = np.array(rows["label"][:])
    parts = [drawn(labels, label, TEST, 0) for label in np.unique(labels[labels >= 0])]
    test = np.sort(np.concatenate([part[: len(part) // FOLDS] for part in parts]))
    train = np.setdiff1d(np.arange(len(rows)), test)
    return named(datasets.DatasetDict({"train": rows.select(train), "test": rows.select(test)}), data)


def split_in_three(data: datasets.DatasetDict, name: str) -> datasets.DatasetDict:
    """The single split `name` as `train`, `val` and `test`: 70, 15 and 15 percent, always the same ones.

    Of twenty folds that are stratified by label and center, in whole groups, three are `test` and three `val`. Where
    groups are fewer than 20, or images of every label and center, there are as many folds, and shares are rounded to
    whole ones, at least one each. Images without a label go to none of them.

    Raises HistoError for fewer than three groups, and a `train` with fewer than two classes.
    """
    rows = data[name]
    labels = np.array(rows["label"][:])
    pool = rows.select(np.flatnonzero(labels >= 0))
    folds = _folds(pool, TWENTIETHS)
    if len(folds) < 3:
        raise HistoError(
            f"{len(pool)} labeled images of {len(set(_groups(pool)))} groups can't make train, val and test, "
            "expected at least three groups with images of one label and center; add images, or a column split"
        )
    chosen = 2 * max(1, round(SHARE * len(folds)))
    parts = {"train": folds[chosen:], "val": folds[1:chosen:2], "test": folds[:chosen:2]}
    rows_of = {split: np.sort(np.concatenate(of_split)) for split, of_split in parts.items()}
    _check_classes(pool, rows_of["train"], "no splits")
    divided = {split: pool.select(chosen_rows) for split, chosen_rows in rows_of.items()}
    return named(datasets.DatasetDict(divided), data)


def held_out_centers(data: datasets.DatasetDict, centers: Set[int]) -> tuple[datasets.DatasetDict, list[str]]:
    """All images of some centers as `test`, those of the others as they were in `train` and `val`.

    Without `val`, or where nothing of it is left, it is made of `train` as in `leave_one_center_out`. Left out are
    other images of groups that a held-out center shares, those of unknown center, which may be a held-out one, and
    those of other splits than these two. Where images of several splits have one id, ids of `test` get the split as a
    prefix.

    Returns:
        The splits, and a sentence about each kind of images left out.

    Raises:
        HistoError: the other centers have no image in `train` or the single split.
    """
    chosen = np.array(sorted(centers))
    masks = {split: np.isin(np.array(rows["center"][:]), chosen) for split, rows in data.items()}
    tests = {split: data[split].select(np.flatnonzero(mask)) for split, mask in masks.items() if mask.any()}
    test = datasets.concatenate_datasets(list(tests.values()))
    if len(test.unique("id")) < len(test):
        test = datasets.concatenate_datasets([_prefixed(rows, split) for split, rows in tests.items()])
    shared = set(test.unique("group")) - {""}
    parts, notes = {}, []
    for split, rows in data.items():
        linked = ~masks[split] & np.isin(np.array(rows["group"][:]), sorted(shared))
        if linked.any():
            notes.append(f"{linked.sum():,} images of {split} are left out, whose groups the held-out centers share")
        unknown = ~linked & (np.array(rows["center"][:]) < 0)
        if unknown.any():
            notes.append(f"{unknown.sum():,} images of {split} are left out, whose center is unknown")
        rest = np.flatnonzero(~masks[split] & ~linked & ~unknown)
        if split in POOLED or len(data) == 1:
            parts["train" if len(data) == 1 else split] = rows.select(rest)
        elif len(rest):
            notes.append(f"{len(rest):,} images of other centers in {split} are left out")
    train = parts.get("train")
    if train is None or not len(train):
        raise HistoError("train: all images are of the centers held out, expected some of others; hold out fewer")
    if not len(parts.get("val", ())):
        made = _parts(train, np.flatnonzero(np.array(train["label"][:]) >= 0), 0, SHARE, "held-out centers")
        parts = {name: train.select(rows) for name, rows in made.items()}
    return named(datasets.DatasetDict({"train": parts["train"], "val": parts["val"], "test": test}), data), notes


def hold_out(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide rows without groups into training rows and validation rows, a tenth of each class; both are sorted.

    The draw is always the same, so that all runs validate on the same images. `labels` (N,) are class indices, -1 where
    hidden. The image of a class that has only one, and images with a hidden label, stay in training.
    """
    random = np.random.default_rng(0)
    held_out = [
        random.permutation(rows)[: (len(rows) + 8) // 10]  # a tenth, rounded up unless that leaves none
        for rows in (np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0]))
    ]
    validation = np.sort(np.concatenate([np.empty(0, np.int64), *held_out]))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def drawn(labels: NDArray[np.int64], label: int, split: int, seed: int) -> NDArray[np.int64]:
    """Rows of the class `label` in a random order that depends only on `seed`, the split's number and the class."""
    rows = np.flatnonzero(labels == label)
    return np.random.default_rng([seed, split, int(label)]).permutation(rows)


def _check_share(share: float) -> None:
    if not 0 < share <= 0.5:
        raise HistoError(f"validation_share is {share}, expected more than 0 and at most 0.5, e.g. 0.15")


def _pool(data: datasets.DatasetDict, names: Sequence[str] = POOLED) -> datasets.Dataset:
    """The labeled images of the splits `names`, with the split's name as a prefix of `id`."""
    parts = []
    for name in names:
        if name in data:
            parts.append(_prefixed(data[name], name))
    if not parts:
        raise HistoError(f"the data has the splits {', '.join(data)}, expected train or val; rename one")
    pool = datasets.concatenate_datasets(parts)
    labeled = np.flatnonzero(np.array(pool["label"][:]) >= 0)
    if not len(labeled):
        raise HistoError(f"{' and '.join(names)}: all labels are hidden (-1), expected labeled images; add labels")
    return pool.select(labeled)


def _prefixed(rows: datasets.Dataset, split: str) -> datasets.Dataset:
    """The same images with the split in their ids."""
    ids = [f"{split}/{key}" for key in rows["id"][:]]
    named_rows = rows.remove_columns("id").add_column("id", ids, feature=datasets.Value("string"))
    return named_rows.select_columns(rows.column_names)


def _folds(pool: datasets.Dataset, most: int) -> list[NDArray[np.int64]]:
    """Rows of each of `most` folds or fewer, of whole groups; first those with the most even share of every stratum.

    Strata are the combinations of label and center.
    """
    strata = _strata(pool)
    folds = _equal_folds(strata, _groups(pool), most, 0, is_grouped=any(pool.unique("group")))
    return sorted(folds, key=lambda part: _unevenness(strata, part, 1 / len(folds)))


def _equal_folds(
    strata: NDArray[np.int64], groups: NDArray[np.str_], most: int, seed: int, *, is_grouped: bool = True
) -> list[NDArray[np.int64]]:
    """Rows of each of `most` equal folds or fewer, of whole groups, stratified; none if two can't be made.

    Without `is_grouped`, each row is a group: the same, and much faster.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    # The splitters refuse more folds than the most frequent stratum has images.
    count = min(most, len(np.unique(groups)), int(np.bincount(strata).max(initial=0)))
    if count < 2:
        return []
    splitter = (StratifiedGroupKFold if is_grouped else StratifiedKFold)(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # scikit-learn warns of a stratum with fewer images than folds, which is fine here.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        return [part for _, part in splitter.split(strata, strata, groups if is_grouped else None)]


def _strata(pool: datasets.Dataset) -> NDArray[np.int64]:
    """Number of the combination of label and center, (n,)."""
    numbers: NDArray[np.int64] = np.unique([pool["label"][:], pool["center"][:]], axis=1, return_inverse=True)[1]
    return numbers


def _fold(pool: datasets.Dataset, center: int, seed: int, share: float) -> datasets.DatasetDict:
    held_out, groups = np.array(pool["center"][:]) == center, _groups(pool)
    rest = np.flatnonzero(~held_out & ~np.isin(groups, groups[held_out]))
    rows = _parts(pool, rest, seed, share, f"center {center} held out") | {"test": np.flatnonzero(held_out)}
    return datasets.DatasetDict({name: pool.select(part) for name, part in rows.items()})


def _groups(pool: datasets.Dataset) -> NDArray[np.str_]:
    """Group of each row; an image of unknown group gets a unique name that no group can have."""
    return np.array([group or f"\0{key}" for group, key in zip(pool["group"][:], pool["id"][:], strict=True)])


def _parts(
    pool: datasets.Dataset, rest: NDArray[np.int64], seed: int, share: float, what: str
) -> dict[str, NDArray[np.int64]]:
    """Divide the rows `rest` of `pool` into `train` and `val`; errors start with `what`."""
    of_rest = np.unique(_strata(pool)[rest], return_inverse=True)[1]  # numbered without gaps
    validation = _nearest_fold(of_rest, _groups(pool)[rest], seed, share, what)
    rows = {"train": rest[~validation], "val": rest[validation]}
    _check_classes(pool, rows["train"], what)
    return rows


def _check_classes(pool: datasets.Dataset, train: NDArray[np.int64], what: str) -> None:
    """Raise HistoError, starting with `what`, for training rows of fewer than two classes."""
    classes = pool.features["label"].names
    present = np.unique(np.array(pool["label"][:])[train])
    if len(present) < 2:
        found = ", ".join(classes[label] for label in present) or "none"
        raise HistoError(
            f"{what}: classes present in train: {found}, expected at least two of "
            f"{', '.join(classes)}; add images of other centers, or leave fewer of them to validation"
        )


def _nearest_fold(
    strata: NDArray[np.int64], groups: NDArray[np.str_], seed: int, share: float, what: str
) -> NDArray[np.bool_]:
    """Mask (n,) of the fold, among equal folds of whole groups, nearest to `share` of each stratum."""
    parts = _equal_folds(strata, groups, round(1 / share), seed)
    if not parts:
        raise HistoError(
            f"{what}: {len(strata)} images in {len(np.unique(groups))} groups are left for train and "
            "val, expected at least two groups, and two images of a class and center; add images of other centers"
        )
    distances = [_unevenness(strata, part, share) for part in parts]
    mask = np.zeros(len(strata), dtype=bool)
    mask[parts[int(np.argmin(distances))]] = True
    return mask


def _unevenness(strata: NDArray[np.int64], part: NDArray[np.int64], share: float) -> float:
    """How far some rows are from a `share` of every stratum, in images."""
    counts = np.bincount(strata)
    return float(np.abs(np.bincount(strata[part], minlength=len(counts)) - share * counts).sum())
