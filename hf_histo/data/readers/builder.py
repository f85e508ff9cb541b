"""What the loaders share: a folder of one layout that is converted once into the schema."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import datasets

from hf_histo.config import DataOptions
from hf_histo.data import cache, schema
from hf_histo.errors import HistoError

LEFT_OUT = "left out "  # starts the line of `info.description` about an image that can't be read
# How many times its size deflate can expand at most (https://www.zlib.net/zlib_tech.html), and what is never a bomb.
EXPANSION, SMALL = 1032, 2**20


@dataclasses.dataclass
class FolderConfig(datasets.BuilderConfig):
    """`name` is the fingerprint of contents and `options`, all that the cache is keyed by.

    `directory` is where they lie now, and `state` what `cache.state_of` gave of them.
    """

    directory: Path = dataclasses.field(default_factory=Path)
    state: str = ""
    options: DataOptions = dataclasses.field(default_factory=DataOptions)


class FolderBuilder(datasets.GeneratorBasedBuilder):
    """A folder in one of the known layouts.

    A subclass defines how to recognize its layout and which files it reads, and generates the rows. Its module must not
    construct a `Path`, since `datasets` replaces that name in the modules of builders: derive from the one given.
    """

    VERSION = datasets.Version("1.1.0")  # part of the cache key: raise it where a conversion's output changes
    BUILDER_CONFIG_CLASS = FolderConfig

    LAYOUT: ClassVar[str]  # names the folder in the cache
    EXPECTED: ClassVar[str]  # what the folder must hold, for errors
    LABELS: ClassVar[tuple[str, ...]]
    OPTIONS: ClassVar[tuple[str, ...]] = ()  # those of `DataOptions` that change what is read from the same files

    @classmethod
    def matches(cls, directory: Path) -> bool:
        """Whether `directory` looks like this layout, complete or not."""
        raise NotImplementedError

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        """The files that the conversion reads: the required ones, present or not, and the optional ones present.

        Names below `directory`, with forward slashes, in an order that depends on nothing else.
        """
        raise NotImplementedError

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Around reading and yielding one image: one that can't be read is left out where options ask for it.

        `info.description` then gets a line with the error, which names the file below the folder.
        """
        try:
            yield
        except HistoError as error:
            if self.config.options.on_bad_image == "error":
                raise
            directory = self.config.directory
            folder = directory.parent if directory.is_file() else directory
            reason = str(error).removeprefix(str(folder)).lstrip("/\\")  # without the folder, which may move
            self.info.description += f"\n{LEFT_OUT}{reason}"

    def _download_and_prepare(self, *arguments: Any, **options: Any) -> None:
        """As `datasets` does. Raises HistoError, which leaves nothing behind, for files that changed meanwhile."""
        super()._download_and_prepare(*arguments, **options)
        directory = self.config.directory
        cache.check_unchanged(directory, directory, self.sources(directory), self.config.state)

    def _find_bits(self, paths: Iterable[Path]) -> None:
        """Decide how the 16-bit gray images among all of the data set are read, for `_stored`; part of the description.

        For layouts of image files with `gray_bits` among their `OPTIONS`.
        """
        self._gray_bits = schema.bits_for(map(schema.brightest, paths), self.config.options.gray_bits)
        schema.record_bits(self.info, self._gray_bits)

    def _stored(self, path: Path) -> dict[str, Any]:
        """The column `image` of an image file. Raises HistoError as `schema.decode` does."""
        return {"bytes": schema.checked(path.read_bytes(), str(path), self._gray_bits), "path": None}

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=schema.features(self.LABELS))


def split_generator(name: str, count: int, **arguments: Any) -> datasets.SplitGenerator:
    """A split of `count` rows; the count is what gives the progress bar its total."""
    generator = datasets.SplitGenerator(name=name, gen_kwargs=arguments)
    generator.split_info.num_examples = count
    return generator
