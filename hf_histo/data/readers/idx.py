"""Gray images and labels in idx files: MNIST, and data sets in the same format."""

from __future__ import annotations

import gzip
import logging
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_histo.data.readers.builder import EXPANSION, FolderBuilder, split_generator
from hf_histo.data.reading import MAX_PIXELS
from hf_histo.data.schema import encode_ppm
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)

NAME = re.compile(r"(train|t10k|test)\w*-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
ROLES = ("train-images", "train-labels", "test-images", "test-labels")
# Two zero bytes, the type (8: unsigned byte), the number of dimensions: "The IDX file format",
# http://yann.lecun.com/exdb/mnist/
MAGIC = {"images": 0x0803, "labels": 0x0801}


class Idx(FolderBuilder):
    """MNIST, Fashion-MNIST, KMNIST: idx files of gray images and of labels 0 to 9, gzipped or not.

    The files are `train-images-idx3-ubyte.gz` and `train-labels-idx1-ubyte.gz`, and optionally the same with t10k or
    test for the split `test`. Letters and digits may follow the name of the split (`train10k-...`), and `.gz` may be
    missing. There is no official `val`. `id` is the row in the file; gray becomes RGB; center and group are unknown.

    Raises HistoError, naming the file, for one that is missing, truncated, longer than its header states, or of another
    type than its name states; for different numbers of images and labels; and for a label above 9.
    """

    LAYOUT = "idx"
    EXPECTED = "train-images-idx3-ubyte, train-labels-idx1-ubyte, perhaps t10k-... likewise, gzipped (.gz) or not"
    LABELS = tuple("0123456789")

    @classmethod
    def matches(cls, directory: Path) -> bool:
        return any(NAME.fullmatch(path.name) for path in directory.iterdir())

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        return list(_files(directory).values())

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        directory = self.config.directory
        files = {role: directory / name for role, name in _files(directory).items()}
        labels = {role.split("-")[0]: _labels(files[role]) for role in files if role.endswith("labels")}
        counts = {split: len(found) for split, found in labels.items()}
        self.info.description = f"idx files; group: unknown; {counts}"
        logger.info("%s: %s", directory, self.info.description)
        return [
            split_generator(split, len(found), path=files[f"{split}-images"], labels=found)
            for split, found in labels.items()
        ]

    def _generate_examples(self, path: Path, labels: NDArray[np.uint8]) -> Iterator[tuple[int, dict[str, Any]]]:
        images = _read(path, "images")
        if len(images) != len(labels):
            raise HistoError(
                f"{path}: {len(images)} images, but {len(labels)} labels in the file of labels, expected as many; "
                "the two are from different data sets, download them again"
            )
        for row in range(len(labels)):
            image = encode_ppm(np.stack([images[row]] * 3, axis=-1))
            yield (
                row,
                {
                    "id": str(row),
                    "image": {"bytes": image, "path": None},
                    "label": int(labels[row]),
                    "center": -1,
                    "group": "",
                },
            )


def _files(directory: Path) -> dict[str, str]:
    """Names of the files by role: those of train, even if missing, and those of test if at least one exists."""
    found: dict[str, str] = {}
    for path in sorted(directory.iterdir()):
        if match := NAME.fullmatch(path.name):
            role = f"{'train' if match[1] == 'train' else 'test'}-{match[2]}"
            if role in found:
                raise HistoError(f"{path}: {found[role]} is there as well, expected one file of {role}; remove one")
            found[role] = path.name
    wanted = ROLES if any(role.startswith("test") for role in found) else ROLES[:2]
    kinds = {"images": "idx3", "labels": "idx1"}
    return {
        role: found.get(role, f"{role.replace('test', 't10k')}-{kinds[role.split('-')[1]]}-ubyte.gz") for role in wanted
    }


def _labels(path: Path) -> NDArray[np.uint8]:
    labels = _read(path, "labels")
    for row in np.flatnonzero(labels >= len(Idx.LABELS))[:1]:
        raise HistoError(f"{path}: label {labels[row]} in row {row}, expected 0 to {len(Idx.LABELS) - 1}; correct it")
    return labels


def _read(path: Path, kind: str) -> NDArray[np.uint8]:
    """The array in an idx file: `images` (N, H, W) or `labels` (N,), uint8."""
    remedy = "download it again"
    try:
        with path.open("rb") as plain:
            # By content: some browsers decompress a download but keep the suffix.
            is_packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            with gzip.open(plain) if is_packed else plain as file:
                magic = int.from_bytes(file.read(4), "big")
                if magic != MAGIC[kind]:
                    other = next((f", that of {name}" for name, number in MAGIC.items() if number == magic), "")
                    raise HistoError(
                        f"{path}: starts with {magic:#010x}{other}, expected {MAGIC[kind]:#010x} for {kind}; "
                        f"{'the two files may be swapped' if other else remedy}"
                    )
                header = file.read(4 * (magic & 0xFF))
                shape = np.frombuffer(header[: len(header) // 4 * 4], ">u4").tolist()
                if len(shape) < (magic & 0xFF) or 0 in shape or math.prod(shape[1:]) > MAX_PIXELS:
                    raise HistoError(f"{path}: a header with the shape {shape}, expected {kind} in it; {remedy}")
                most = path.stat().st_size * (EXPANSION if is_packed else 1)  # a forged header may declare more
                data = file.read(min(math.prod(shape) + 1, most))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise HistoError(f"{path}: can't be decompressed ({error}), expected a complete gzip file; {remedy}") from None
    if len(data) != math.prod(shape):
        found = "more" if len(data) > math.prod(shape) else f"{len(data):,}"
        raise HistoError(f"{path}: {found} bytes after the header, expected {math.prod(shape):,} of {shape}; {remedy}")
    return np.frombuffer(data, np.uint8).reshape(shape)
