"""Training images of a data set of any size, streamed from shards on disk, on the Hub or in object storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import datasets
import torch
import xxhash
from datasets.distributed import split_dataset_by_node

from hf_histo.data.readers.shards import readable
from hf_histo.data.reading import DEFAULT_READING, Reading
from hf_histo.data.schema import Sample, decode, refuse_dicom
from hf_histo.errors import HistoError

Prepare = Callable[[torch.Tensor], torch.Tensor]
BUFFER = 1000  # size of the shuffle buffer, in images; the order of shards is shuffled as well
REMEMBERED = 10_000  # latest images whose ids are kept for messages


class Stream(torch.utils.data.IterableDataset[Sample]):
    """Iterable dataset of the training samples that one process of a launch sees in each epoch.

    The order depends only on the seed and the epoch, so a run that was interrupted within an epoch resumes with the
    next image; the images before it are read again, but not trained on. Shards are distributed over the processes if
    their number is a multiple of the number of processes, else single images are. In an epoch, every image is seen
    once, unless processes get shards with different numbers of images: then a process with fewer starts over, and
    another one leaves some out.

    `Sample.index` is a hash of the image's column `id`, or of its bytes, so that augmentation depends on the image and
    not on its position.

    Iterating raises `HistoError` for a shard or an image that can't be read, and if the shards hold no image.

    Args:
        rows: streamed rows with a column of images, whose bytes are in the shards, and one of labels.
        image, label: names of these columns.
        total: images per epoch, over all processes.
        seed: seed of the order.
        rank, processes: number of this process, from 0, and of all processes.
        prepare: applied to each image, uint8 (3, H, W), when it is read.
        reading: how the image files are read; 16-bit gray needs `gray_bits`.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        *,
        image: str,
        label: str,
        total: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        prepare: Prepare | None = None,
        reading: Reading = DEFAULT_READING,
    ) -> None:
        self._image, self._label, self._prepare, self._reading = image, label, prepare, reading
        columns = [image, label, *({"id"} & set(rows.features))]
        rows = rows.select_columns(columns).cast_column(image, datasets.Image(decode=False))
        self._rows = split_dataset_by_node(rows.shuffle(seed=seed, buffer_size=BUFFER), rank, processes)
        self._count = total // processes
        self._ids: dict[int, str] = {}

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch, from 0."""
        self._rows.set_epoch(epoch)

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Ids of samples by their `index`, if among the last `REMEMBERED` ones read by this process; else a text."""
        return [self._ids.get(row, f"index {row}") for row in rows]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        for row in islice(self._again_and_again(), self._count):
            stored = row[self._image] or {"bytes": None, "path": None}
            if (data := stored["bytes"]) is None:
                found = "missing" if stored["path"] is None else f"the path {stored['path']}"
                raise HistoError(
                    f"--streaming: an image is {found}, expected its bytes in the shard, as push_to_hub and to_parquet "
                    "of datasets write them"
                )
            name = row.get("id") or xxhash.xxh3_128_hexdigest(data)
            index = xxhash.xxh3_64_intdigest(name.encode()) >> 1
            if len(self._ids) >= REMEMBERED:
                self._ids.pop(next(iter(self._ids)))
            self._ids[index] = name
            refuse_dicom(data, name)
            image = decode(data, name, self._reading)
            image = image if self._prepare is None else self._prepare(image)
            yield {"image": image, "label": row[self._label], "center": -1, "index": index}

    def _again_and_again(self) -> Iterator[dict[str, Any]]:
        row = None
        while True:
            for row in readable(self._rows, "--streaming"):
                yield row
            if row is None:
                raise HistoError("--streaming: the shards of a process hold no image, expected some; add images")
