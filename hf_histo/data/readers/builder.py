"""Base class of the readers: a folder of one layout, converted once into the schema."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

import datasets
import multiprocess
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError

from hf_histo import launch
from hf_histo.config import DataOptions
from hf_histo.data import cache, schema
from hf_histo.data.reading import Reading
from hf_histo.errors import HistoError

logger = logging.getLogger(__name__)

IMAGE_OPTIONS = ("on_bad_image", "gray_bits", "page", "window")  # fields of `DataOptions` that act on image files
LEFT_OUT = "left out "  # starts the line of `info.description` about an image that can't be read
# Largest expansion factor of deflate (https://www.zlib.net/zlib_tech.html); a size in bytes that is always allowed.
EXPANSION, SMALL = 1032, 2**20
BATCH = datasets.config.ARROW_RECORD_BATCH_SIZE_FOR_IMAGE_DATASETS  # rows that are written together
PER_PROCESS = 2500  # fewest images for which another process is started


@dataclasses.dataclass
class FolderConfig(datasets.BuilderConfig):
    """Config of a `FolderBuilder`. Its `name`, the fingerprint of the file contents and `options`, is the cache key.

    `directory` is the current location of the files, `state` the result of `cache.state_of` for them, `listing` that of
    `FolderBuilder.listing`.
    """

    directory: Path = dataclasses.field(default_factory=Path)
    state: str = ""
    options: DataOptions = dataclasses.field(default_factory=DataOptions)
    listing: Any = None


class FolderBuilder(datasets.ArrowBasedBuilder):
    """A `datasets` builder for a folder in one of the supported layouts.

    A subclass recognizes its layout, lists the files that it reads, and generates the rows. Its module must not call
    `Path(...)`, since `datasets` replaces that name in builder modules; derive paths from `self.config.directory`.
    """

    VERSION = datasets.Version("1.3.0")  # part of the cache key: raise it where a conversion's output changes
    BUILDER_CONFIG_CLASS = FolderConfig

    LAYOUT: ClassVar[str]  # name of the layout, and of its folder in the cache
    EXPECTED: ClassVar[str]  # what the folder must hold, for errors
    LABELS: ClassVar[tuple[str, ...]]
    OPTIONS: ClassVar[tuple[str, ...]] = ()  # fields of `DataOptions` that have an effect on this layout

    @classmethod
    def matches(cls, directory: Path) -> bool:
        """Whether `directory` looks like this layout, complete or not."""
        raise NotImplementedError

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        """Files that the conversion reads: all required ones, even if missing, and the optional ones that exist.

        Paths relative to `directory`, with forward slashes, in an order that depends only on these paths.
        """
        raise NotImplementedError

    @classmethod
    def listing(cls, directory: Path, options: DataOptions) -> Any:
        """What is read of the source once, to list its files and to convert them; None for most layouts."""
        return None

    @classmethod
    def files(cls, directory: Path, options: DataOptions, listing: Any) -> dict[str, Path]:
        """Path of each file that the conversion reads, by a name that doesn't depend on where the data lies.

        `sources`, unless the files depend on `options` and `listing`.
        """
        return {name: directory / name for name in cls.sources(directory)}

    @classmethod
    def home(cls, cache_dir: Path, directory: Path, options: DataOptions) -> Path:
        """Folder of the converted data; it is `cache_dir`, unless that data depends on where the source lies."""
        return cache_dir

    def _generate_examples(self, *arguments: Any, **options: Any) -> Iterator[tuple[str | int, dict[str, Any]]]:
        """Key and row of each image; a row has the columns of `schema.features`."""
        raise NotImplementedError

    def _generate_tables(self, **arguments: Any) -> Iterator[tuple[int, pa.Table]]:
        """The rows in tables of `BATCH`: `GeneratorBasedBuilder`, which encodes each value on its own, is slower."""
        features = self.info.features
        labels = {name: kind for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
        rows = (row for _, row in self._generate_examples(**arguments))
        for number in count():
            if not (batch := list(islice(rows, BATCH))):
                break
            for row in batch:
                row.update({name: kind.encode_example(row[name]) for name, kind in labels.items()})
            yield number, pa.Table.from_pylist(batch, features.arrow_schema)

    def _prepare_split(self, split_generator: datasets.SplitGenerator, **options: Any) -> None:
        """Convert a split as `datasets` does, in as many processes as there are `parts` (see the function) of it."""
        parts = len(split_generator.gen_kwargs.get("parts", ()))
        self._main_process = os.getpid()
        try:
            super()._prepare_split(split_generator, **(options | {"num_proc": parts or None}))
        except multiprocess.TimeoutError as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # `datasets` raises the one while it handles the other
                raise error.__context__ from None
            raise
        except RuntimeError as error:
            if "abruptly died" not in str(error):
                raise
            raise HistoError(
                f"{self.config.directory}: one of {parts} processes that convert it was killed, as the system does "
                "when memory is short; set OMP_NUM_THREADS=1 to convert in one process"
            ) from None
        self.info.description += cache.take_notes(self._output_dir)

    def _prepare_split_single(self, *, fpath: str, job_id: int, **options: Any) -> Iterator[Any]:
        """Convert a part of a split, perhaps in a process of its own.

        Raises DatasetGenerationError with its cause as an argument: other processes don't receive `__cause__`.
        """
        if os.getpid() != self._main_process:  # which ends this process, and reports
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._left_out = ""
        try:
            yield from super()._prepare_split_single(fpath=fpath, job_id=job_id, **options)
        except DatasetGenerationError as error:
            raise DatasetGenerationError(error.__cause__) from error.__cause__
        if self._left_out:
            cache.write_note(self._output_dir, job_id, self._left_out)

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Context in which one image is read and yielded; with `--on_bad_image skip`, an unreadable one is left out.

        `info.description` then gets a line with the error, which names the file relative to the folder.
        """
        try:
            yield
        except HistoError as error:
            if self.config.options.on_bad_image == "error":
                raise
            directory = self.config.directory
            folder = directory.parent if directory.is_file() else directory
            reason = str(error).removeprefix(str(folder)).lstrip("/\\")  # relative, since the folder may be moved
            self._left_out += f"\n{LEFT_OUT}{reason}"

    def _download_and_prepare(self, *arguments: Any, **options: Any) -> None:
        """Convert as `datasets` does. Raises HistoError, and keeps nothing, if a file changed in the meantime."""
        super()._download_and_prepare(*arguments, **options)
        directory = self.config.directory
        files = self.files(directory, self.config.options, self.config.listing)
        cache.check_unchanged(directory, directory, files, self.config.state)

    def _survey(self, paths: Sequence[Path]) -> list[str]:
        """Find how the images at `paths` are read, for `_stored` and `_describe`; for layouts with `IMAGE_OPTIONS`.

        Returns the group of each: "patient 1" and so on for DICOM files, numbered in the order of `paths`, so that
        nothing of the patients' ids is in it; else "".
        """
        chosen = Reading.of(self.config.options)
        found = [schema.facts(path, chosen.page) for path in paths]
        self._reading = Reading(
            schema.bits_for((each.peak for each in found), chosen.gray_bits), chosen.page, chosen.window
        )
        self._effective = Reading(
            self._reading.gray_bits,
            chosen.page if any(each.pages > 1 for each in found) else None,
            (chosen.window or "file") if any(each.patient is not None for each in found) else None,
        )
        patients = [each.patient or "" for each in found]
        numbers = {patient: number for number, patient in enumerate(dict.fromkeys(filter(None, patients)), 1)}
        if len(numbers) == 1 and sum(map(bool, patients)) > 1:
            logger.warning(
                "%s: all DICOM files have one patient id, which is taken for a placeholder: patients are unknown, and "
                "the images of one may be on both sides of a split",
                self.config.directory,
            )
            numbers = {}
        return [f"patient {numbers[patient]}" if patient in numbers else "" for patient in patients]

    def _describe(self, text: str) -> None:
        """Set the description to `text` and how the images are read."""
        self.info.description = text
        schema.record(self.info, self._effective)

    def _stored(self, path: Path, where: str | None = None) -> dict[str, Any]:
        """Value of the column `image` for an image file.

        Raises HistoError, starting with `where` (default: the path), as `schema.decode` does.
        """
        return {"bytes": schema.checked(path.read_bytes(), where or str(path), self._reading), "path": None}

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=schema.features(self.LABELS))


def parts(rows: int) -> list[range]:
    """Consecutive ranges of `rows`, one for each process that converts them: at most one for each core.

    There is a single one for small data, and where processes can't be forked: those that are started anew would run a
    script without `if __name__ == "__main__"` again.
    """
    forks = multiprocess.get_start_method() == "fork"
    number = max(1, min(rows // PER_PROCESS, launch.thread_count())) if forks else 1
    bounds = [rows * part // number for part in range(number + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


def split_generator(name: str, count: int, **arguments: Any) -> datasets.SplitGenerator:
    """A `SplitGenerator` with a row `count`, which is the total of the progress bar."""
    generator = datasets.SplitGenerator(name=name, gen_kwargs=arguments)
    generator.split_info.num_examples = count
    return generator
