"""A training set of any size, read as it is needed from shards here, on the Hub or in object storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa
import torch
import xxhash
from datasets.distributed import split_dataset_by_node

from hf_histo.data.schema import Sample, decode
from hf_histo.errors import HistoError

Prepare = Callable[[torch.Tensor], torch.Tensor]
BUFFER = 1000  # images among which a pass is shuffled, beside the order of the shards
REMEMBERED = 10_000  # names of the last images, for messages
FAULTS = (  # what `datasets` and Arrow were seen to raise of damaged files
    *(OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, MemoryError),
    *(pa.ArrowException, datasets.exceptions.DatasetsError),
)


class Stream(torch.utils.data.IterableDataset[Sample]):
    """The part of one process of a launch in every pass over the training images.

    A pass is a function of the seed and its number, so that a run that was interrupted in the middle of one resumes
    with the image that is next (it reads, but does not train on, those before). In a pass the processes see every image
    once if their number divides that of the shards and these hold equally many, or if it does not; else a process
    whose shards hold fewer begins again, and the others leave some out.

    `Sample.index` is a hash of the image's column `id`, or of its bytes, so that augmentation depends on the image and
    not on where it stood.

    Iterating raises `HistoError` for a shard or an image that can't be read, and where no shard holds an image.

    Args:
        rows: a column of images, whose bytes are in the shards, and one of labels.
        image, label: these columns.
        total: images in a pass of all processes.
        seed: of the order.
        rank, processes: of the launch.
        prepare: applied to every image, uint8 (3, H, W), that is read.
        gray_bits: of 16-bit gray images, see `schema.rgb`; without it, they are refused.
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
        gray_bits: int | None = None,
    ) -> None:
        self._image, self._label, self._prepare, self._gray_bits = image, label, prepare, gray_bits
        columns = [image, label, *({"id"} & set(rows.features))]
        rows = rows.select_columns(columns).cast_column(image, datasets.Image(decode=False))
        self._rows = split_dataset_by_node(rows.shuffle(seed=seed, buffer_size=BUFFER), rank, processes)
        self._count = total // processes
        self._ids: dict[int, str] = {}

    def set_epoch(self, epoch: int) -> None:
        """The number of the next pass, from 0."""
        self._rows.set_epoch(epoch)

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Of samples by their `index`, among the last `REMEMBERED` that this process read."""
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
            image = decode(data, name, self._gray_bits)
            image = image if self._prepare is None else self._prepare(image)
            yield {"image": image, "label": row[self._label], "center": -1, "index": index}

    def _again_and_again(self) -> Iterator[dict[str, Any]]:
        row = None
        while True:
            for row in readable(self._rows, "--streaming"):
                yield row
            if row is None:
                raise HistoError("--streaming: the shards of a process hold no image, expected some; add images")


def readable(rows: Iterable[dict[str, Any]], option: str) -> Iterator[dict[str, Any]]:
    """The rows of streamed shards, with what `datasets` raises of a damaged one as `HistoError`."""
    try:
        yield from rows
    except FAULTS as error:
        reason = str(error)[:300]
        raise HistoError(f"{option}: a shard can't be read ({reason}), expected whole parquet; replace it") from None
