"""Inventory of a data set: pixel statistics of each image, and families of copies and of near images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import xxhash
from numpy.typing import NDArray

from hf_histo.data.schema import ImageTable, center_names
from hf_histo.errors import HistoError

CHANNELS = ("red", "green", "blue")

BLANK = 2.0  # gray levels (of 255): a lower deviation in every channel is only noise or compression
SIMILARITY = 0.95
"""Correlation of details at which two images count as copies. Measured on 150 images of each of four data sets (brain
MRI, H&E, two of cervical cytology): all copies that were halved or doubled in size, or had their gamma changed to 0.7,
reach it, and 99% of those saved as JPEG of quality 30. Different images of the last three data sets stay below 0.85.
Neighboring slices of one MRI volume reach it if they look the same to a person; 0.8 finds more of them."""

NEAR = 0.7
"""Correlation of details at which two images, both upright, count as near images, such as neighboring slices of one
volume. Measured on all pairs of images: of 3,264 slices of brain MRI (Kaggle, patients unknown) 66% have a near image,
and the families (chains of near images) have up to 19 slices, 99% of them of one class; at 0.6, up to 119 slices. Of
2,617 H&E patches none has a near image, of 1,867 images of cervical cytology 4 have one."""

_SIDE = 64  # pixels of the thumbnails on which images are compared
_SIGMA = 2.0  # thumbnail pixels: width of the Gaussian blur that is subtracted to get the details
_DISTANCE = 10  # largest Hamming distance of 64-bit hashes; the copies above differ in up to 8 bits
_TURNS = 8  # quarter turns, mirrored or not
_BLOCK = 64  # images compared with all others at a time
_FEW = 2**16  # images up to which all pairs are compared, which takes about as long as the keys for them
_RECALL = 0.999  # for independent projections; tables share them
_PROJECTIONS = 256
_ROWS = 8192  # images projected at a time
_PAIRS = 2**20  # images whose pairs are listed at a time


def inventory(data: datasets.DatasetDict, *, similarity: float = SIMILARITY, near: float | None = None) -> pd.DataFrame:
    """Measure all images and find families of copies across splits; the result is deterministic.

    Returns a row for each image, in the order of splits and rows of `data`, with the columns:

    - `split`, `row` (index in the split), `id`, `label` (-1: hidden), `group`: as in the schema
    - `center`: its number, -1 if unknown; of named centers the name, "" if unknown
    - `height`, `width`: pixels
    - `red`, `green`, `blue`: mean of the channel, 0 to 255; `red_deviation` and so on: its standard deviation
    - `blank`: whether all three deviations are below 2
    - `identical`: number of the family of images with the same size and the same decoded pixels
    - `family`: number of the family of copies: images connected by pairs of copies, and so whole `identical` families
    - `near`, if a correlation `near` is given (see `NEAR`): number of the family of near images, connected likewise;
      it contains whole families of copies

    Two images are copies if they are the same picture except for compression, size, brightness, contrast, color,
    quarter turns and mirroring. Crops are not found (3% off two sides is too much already), nor are many copies that
    were brightened until parts are saturated.

    Candidates differ in at most 10 bits of their perceptual hashes: signs, about the median, of the 8x8 lowest
    frequencies of the cosine transform of the grayscale thumbnail (after pHash: C. Zauner, Implementation and
    Benchmarking of Perceptual Image Hash Functions, 2010). Candidates are copies if their details, 64x64 thumbnails
    minus their Gaussian blur, have a Pearson correlation of at least `similarity`, in (0, 1]. Blank images have no
    details; of them, only identical ones are copies.

    Up to 65,536 images, all pairs are compared. Of more, those whose details have equal signs in one of several sets
    of random projections: in a test, 99% of all pairs with correlations from `similarity` on. That takes about ten
    minutes of one core for a million images (extrapolated from 80,000), and 8 KB of memory per image. With `near`, the
    details of all pairs are compared, which takes a time that grows with the square of their number.

    Raises HistoError for a `similarity` or `near` out of range, an image that can't be decoded, and data without
    images.
    """
    for name, value, usual in (("similarity", similarity, SIMILARITY), ("near", near, NEAR)):
        if value is not None and not 0 < value <= 1:
            raise HistoError(f"{name} is {value}, expected a correlation above 0 and up to 1, e.g. {usual}")
    columns = ["id", "label", "center", "group"]
    total = sum(map(len, data.values()))
    if not total:
        raise HistoError("no images in any split, expected at least one; choose another data set")
    table: pd.DataFrame = pd.concat(
        [
            split.select_columns(columns).to_pandas().assign(split=name, row=range(len(split)))
            for name, split in data.items()
        ],
        ignore_index=True,
    )[["split", "row", *columns]]
    if names := center_names(next(iter(data.values()))):
        table["center"] = table["center"].map({-1: "", **dict(enumerate(names))})

    digests: list[bytes] = []
    measures = np.empty((total, 2 + 2 * len(CHANNELS)))
    hashes, details = np.empty((total, _TURNS), np.uint64), np.empty((total, _SIDE, _SIDE), np.float16)
    for i, image in enumerate(datasets.utils.tqdm(_images(data), total=total, desc="Measuring images", unit=" images")):
        digests.append(xxhash.xxh3_128_digest(np.array(image.shape).tobytes() + np.ascontiguousarray(image).tobytes()))
        measures[i] = *image.shape[:2], *image.mean((0, 1)), *image.std((0, 1))
        thumbnail = _thumbnail(image)
        hashes[i] = _hashes(thumbnail)
        details[i] = _details(thumbnail)

    deviations = [f"{channel}_deviation" for channel in CHANNELS]
    table[["height", "width"]] = measures[:, :2].astype(np.int64)
    table[[*CHANNELS, *deviations]] = measures[:, 2:]
    table["blank"] = (table[deviations] < BLANK).all(axis=1)
    table["identical"] = pd.factorize(np.array(digests, dtype=object))[0]
    distinct = np.flatnonzero(~table["identical"].duplicated() & ~table["blank"])
    pairs = distinct[_copies(hashes[distinct], details[distinct], similarity)]
    table["family"] = components(table["identical"].to_numpy(), pairs)
    if near is not None:
        table["near"] = components(table["family"].to_numpy(), distinct[_near(details[distinct], near)])
    return table


def components(labels: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Connected components of n rows, where rows with equal `labels` (n,) and the two rows of each of `pairs` (m, 2)
    are connected.

    Returns the number of each row's component (n,), counted by first appearance.
    """
    first = pd.Series(labels).drop_duplicates()
    leader = first.index.to_numpy()[pd.Index(first).get_indexer(labels)]
    one = np.concatenate([np.arange(len(labels)), pairs[:, 0]])
    other = np.concatenate([leader, pairs[:, 1]])
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(labels), len(labels)))
    numbers: NDArray[np.int64] = pd.factorize(connected_components(graph, directed=False)[1])[0].astype(np.int64)
    return numbers


def _images(data: datasets.DatasetDict) -> Iterator[NDArray[np.uint8]]:
    """All images, uint8 (H, W, 3)."""
    for split in data.values():
        images = ImageTable(split)
        for index in range(len(images)):
            yield images[index]["image"].permute(1, 2, 0).numpy()


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Grayscale thumbnail, float32 (64, 64); the aspect ratio is not kept."""
    gray = PIL.Image.fromarray(image).convert("L")
    return np.asarray(gray.resize((_SIDE, _SIDE), PIL.Image.Resampling.BILINEAR), np.float32)


def _turned(images: np.ndarray, turn: int) -> np.ndarray:
    """Images (..., S, S) under one of the eight symmetries of the square; 0 leaves them as they are."""
    mirrored = images.swapaxes(-1, -2) if turn >= 4 else images
    return np.rot90(mirrored, turn % 4, axes=(-2, -1))


def _hashes(thumbnail: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Perceptual hash of the thumbnail under each of the eight symmetries, uint64 (8,)."""
    from scipy.fft import dctn

    turns = np.stack([_turned(thumbnail, turn) for turn in range(_TURNS)])
    lowest = dctn(turns, axes=(1, 2))[:, :8, :8].reshape(_TURNS, 64)
    return np.packbits(lowest > np.median(lowest, axis=1, keepdims=True), axis=1).view(np.uint64)[:, 0]


def _details(thumbnail: NDArray[np.float32]) -> NDArray[np.float32]:
    """The fine structure of the thumbnail, of zero mean and unit norm (zero where there is none), float32 (64, 64)."""
    from scipy.ndimage import gaussian_filter

    details: NDArray[np.float32] = thumbnail - gaussian_filter(thumbnail, _SIGMA)
    details -= details.mean()
    return details / max(float(np.linalg.norm(details)), 1e-6)


def _near(details: NDArray[np.float16], correlation: float) -> NDArray[np.int64]:
    """Pairs (m, 2) of rows whose details correlate by at least `correlation`, the smaller row first."""
    flat = details.reshape(len(details), -1)
    pairs = [np.empty((0, 2), np.int64)]
    for start in datasets.utils.tqdm(range(0, len(flat), 8 * _BLOCK), desc="Comparing details"):
        rows = flat[start : start + 8 * _BLOCK].astype(np.float32)
        for other in range(start, len(flat), 8 * _BLOCK):
            found = np.argwhere(rows @ flat[other : other + 8 * _BLOCK].astype(np.float32).T >= correlation)
            found += np.array([start, other])
            pairs.append(found[found[:, 0] < found[:, 1]])
    return np.concatenate(pairs)


def _copies(hashes: NDArray[np.uint64], details: NDArray[np.float16], similarity: float) -> NDArray[np.int64]:
    """Pairs (m, 2) of rows that are copies, the smaller row first."""
    pairs = [np.empty((0, 2), np.int64)]
    tables = _tables(len(hashes), similarity)
    for turn, one, other in _of_all_pairs(hashes) if tables is None else _of_one_key(hashes, details, *tables):
        for part in range(0, len(one), 1024):
            rows, others = one[part : part + 1024], other[part : part + 1024]
            correlation = np.einsum("nyx,nyx->n", _turned(details[rows], turn), details[others], dtype=np.float32)
            alike = correlation >= similarity
            pairs.append(np.stack([rows[alike], others[alike]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


# A symmetry of the square, and pairs of rows, the smaller one first, with near hashes if that one is turned so.
_Candidates: TypeAlias = Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]


def _of_all_pairs(hashes: NDArray[np.uint64]) -> _Candidates:
    """Counting differing bits takes a few nanoseconds per pair and symmetry, without a copy of the hashes."""
    for start in datasets.utils.tqdm(range(0, len(hashes), _BLOCK), desc="Searching for copies"):
        for turn in range(_TURNS):
            turned = hashes[start : start + _BLOCK, turn]
            distances = np.bitwise_count(turned[:, None] ^ hashes[None, start:, 0])
            one, other = (rows + start for rows in np.nonzero(distances <= _DISTANCE))
            yield turn, one[one < other], other[one < other]


def _tables(count: int, similarity: float) -> tuple[int, int] | None:
    """Bits of a key and number of tables for `_of_one_key`; None if comparing all pairs of so many images is faster.

    Two images with a correlation of `similarity` of their details have equal signs in a random projection with
    probability 1 - arccos(similarity) / pi (M. Charikar, Similarity Estimation Techniques from Rounding Algorithms,
    2002), and so have an equal key in one of the tables with a probability of about `_RECALL`.
    """
    if count <= _FEW:
        return None
    bits = int(math.log2(count))  # so that a key has one or two images, whatever their number
    equal = (1 - math.acos(similarity) / math.pi) ** bits
    tables = math.ceil(math.log(1 - _RECALL) / math.log1p(-equal)) if equal < 1 else 1
    return (bits, tables) if tables <= 2**bits / _TURNS else None


def _of_one_key(hashes: NDArray[np.uint64], details: NDArray[np.float16], bits: int, tables: int) -> _Candidates:
    """Those with an equal key in one of the tables: the time does not grow with the square of the number of images."""
    chance = np.random.default_rng(0)
    projections = chance.normal(size=(_PROJECTIONS, _SIDE, _SIDE)).astype(np.float32)
    chosen = np.stack([chance.choice(_PROJECTIONS, bits, replace=False) for _ in range(tables)])
    upright = _keys(details, projections, chosen)
    orders = [np.argsort(keys, kind="stable") for keys in upright]
    for turn in datasets.utils.tqdm(range(_TURNS), desc="Searching for copies", unit=" turns"):
        turned = upright if turn == 0 else _keys(details, _turned_back(projections, turn), chosen)
        for keys, order, wanted in zip(upright, orders, turned, strict=True):
            ordered = keys[order]
            first, last = (np.searchsorted(ordered, wanted, side) for side in ("left", "right"))
            for start in range(0, len(wanted), _PAIRS):
                begin, counts = first[start : start + _PAIRS], (last - first)[start : start + _PAIRS]
                one = np.repeat(np.arange(start, start + len(counts)), counts)
                within = np.arange(len(one)) - np.repeat(np.cumsum(counts) - counts, counts)
                other = order[np.repeat(begin, counts) + within]
                one, other = one[one < other], other[one < other]
                near = np.bitwise_count(hashes[one, turn] ^ hashes[other, 0]) <= _DISTANCE
                yield turn, one[near], other[near]


def _keys(
    details: NDArray[np.float16], projections: NDArray[np.float32], chosen: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Key of each image in each table, (tables, n): the signs of the table's `chosen` (tables, bits) projections."""
    flat, weights = projections.reshape(len(projections), -1).T, (1 << np.arange(chosen.shape[1])).astype(np.float32)
    keys = np.empty((len(chosen), len(details)), np.uint32)
    for start in range(0, len(details), _ROWS):
        rows = details[start : start + _ROWS].reshape(-1, flat.shape[0]).astype(np.float32)
        signs = (rows @ flat > 0).astype(np.float32)
        for table, columns in enumerate(chosen):
            keys[table, start : start + len(rows)] = signs[:, columns] @ weights  # below 2^24, so exact
    return keys


def _turned_back(images: NDArray[np.float32], turn: int) -> NDArray[np.float32]:
    """The inverse of `_turned`, so that a product with its result is one with turned images."""
    back = np.rot90(images, -(turn % 4), axes=(-2, -1))
    return np.ascontiguousarray(back.swapaxes(-1, -2) if turn >= 4 else back)
