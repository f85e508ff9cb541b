"""Image files in one folder per class."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import PIL.Image

from hf_histo.data import schema
from hf_histo.data.readers import dicom
from hf_histo.data.readers.builder import IMAGE_OPTIONS, FolderBuilder, split_generator
from hf_histo.errors import HistoError, printable

logger = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SINGLE = "full"  # name of the only split of data without split folders; `datasets` reserves "all"
CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")  # written by operating systems; hidden files are ignored as well


class ClassFolders(FolderBuilder):
    """`train/`, `val/` and `test/` with one folder per class, or class folders alone.

    Splits may also be called training, valid, validation or testing, in any capitalization, and any may be missing;
    without split folders, the only split is `full`. Classes are the sorted names of the folders in `train`, or in all
    splits if there is no `train`. A class folder holds images of any size in the formats of `schema.FORMATS` or DICOM,
    directly or in subfolders, read in the text order of their paths. Files are stored as `schema.checked` does; 16-bit
    gray images are scaled to 8 bits, all by the same bit depth (`--gray_bits`). `id` is the path relative to the data
    set's folder, with forward slashes; `group` is the patient of DICOM files (see `FolderBuilder`), else unknown.

    Files with another suffix are left out with a warning, hidden ones silently. Links are followed within the data
    set's folder.

    Raises HistoError, naming the file or folder, for an image that can't be decoded or has over 100 megapixels (unless
    `--on_bad_image skip` leaves it out), a folder without images, an image beside the class folders, a class that
    `train` lacks, two folders for one split, and a link to outside the folder, to one of its parents, or to nothing.
    """

    LAYOUT = "class_folders"
    OPTIONS: ClassVar[tuple[str, ...]] = IMAGE_OPTIONS
    EXPECTED = "train/, val/ and test/ (any of them) with one folder of images per class, or such class folders alone"
    FILES = "images"  # what the files are called in messages
    GROUP = "unknown"

    @classmethod
    def matches(cls, directory: Path) -> bool:
        folders = _folders(directory)
        return any(split_of(folder) for folder in folders) or any(cls.holds(p) for f in folders for p in f.iterdir())

    @classmethod
    def holds(cls, path: Path) -> bool:
        """Whether a file is one to read, by its name."""
        return is_image(path)

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        splits = cls._scan(directory)
        return [name_of(path, directory) for classes in splits.values() for paths in classes.values() for path in paths]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=schema.features(_labels(self._scan(self.config.directory))))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        splits = self._scan(self.config.directory)
        counts = {split: sum(map(len, classes.values())) for split, classes in splits.items()}
        paths = [path for classes in splits.values() for paths in classes.values() for path in paths]
        self._groups = dict(zip(paths, self._survey(paths), strict=True))
        group = "patient" if any(self._groups.values()) else self.GROUP
        self._describe(f"{self.FILES}; group: {group}; {counts}")
        logger.info("%s: %s", self.config.directory, self.info.description)
        return [split_generator(split, counts[split], classes=classes) for split, classes in splits.items()]

    def _generate_examples(self, classes: dict[str, list[Path]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for label, paths in classes.items():
            for path in paths:
                name = name_of(path, self.config.directory)
                with self.skipping():
                    image = self._stored(path)
                    yield name, {"id": name, "image": image, "label": label, "center": -1, "group": self._groups[path]}

    @classmethod
    def _scan(cls, directory: Path) -> dict[str, dict[str, list[Path]]]:
        """The files by split (train, val, test), then by class, in text order."""
        folders: dict[str, Path] = {}
        for folder in _folders(directory):
            if split := split_of(folder):
                if split in folders:
                    raise HistoError(
                        f"{directory}: {folders[split].name} and {folder.name} both name the split {split}, "
                        "expected one; merge them"
                    )
                folders[split] = folder
        others = [f.name for f in _folders(directory) if f not in folders.values()]
        if folders and others:
            names = printable(", ".join(others))
            logger.warning("%s: left out the folders %s, which are not splits", directory, names)
        folders = {split: folders[split] for split in SPLITS if split in folders} or {SINGLE: directory}
        root = directory.resolve()
        splits = {split: cls._classes(folder, root) for split, folder in folders.items()}
        labels = _labels(splits)
        for split, classes in splits.items():
            for name in classes.keys() - set(labels):
                raise HistoError(
                    f"{folders[split] / name}: a class that {folders['train']} lacks, expected one of "
                    f"{', '.join(labels)}; add training images or remove the folder"
                )
        return splits

    @classmethod
    def _classes(cls, folder: Path, root: Path) -> dict[str, list[Path]]:
        """The files of each class folder in `folder`."""
        _check_link(folder, root)
        for path in sorted(folder.iterdir()):
            if cls.holds(path):
                raise HistoError(
                    f"{path}: beside the class folders, expected {cls.FILES} in them alone; move or remove it"
                )
        classes = {path.name: cls._files(path, root) for path in _folders(folder)}
        if not classes:
            raise HistoError(f"{folder}: no folders, expected one for each class; add them or remove this one")
        return classes

    @classmethod
    def _files(cls, folder: Path, root: Path) -> list[Path]:
        """The files in and below `folder`, in text order."""
        _check_link(folder, root)
        files, ignored = [], []
        for path in sorted(folder.iterdir()):
            if is_clutter(path):
                continue
            if path.is_dir():
                files += cls._files(path, root)
            elif cls.holds(path):
                _check_link(path, root)
                files.append(path)
            else:
                ignored.append(path.name)
        if not files:
            raise HistoError(
                f"{folder}: no {cls.FILES} in this folder, expected at least one; add some or remove the folder"
            )
        if ignored:
            example = printable(ignored[0])
            logger.warning("%s: left out %d files that are not %s, e.g. %s", folder, len(ignored), cls.FILES, example)
        return files


def _labels(splits: dict[str, dict[str, list[Path]]]) -> list[str]:
    return sorted(splits["train"]) if "train" in splits else sorted({name for c in splits.values() for name in c})


def _check_link(path: Path, root: Path) -> None:
    """Raise HistoError for a symbolic link to outside `root`, to nothing, or to a parent of itself."""
    if not path.is_symlink():
        return
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # Python 3.11 raises the latter
        raise HistoError(f"{path}: a link that leads back to itself, expected one to a file; remove it") from None
    if not target.is_relative_to(root) or not target.exists() or target in (p.resolve() for p in path.parents):
        raise HistoError(
            f"{path}: a link to {target}, expected one to a file or another folder within {root}; "
            "put the images themselves there"
        )


def check_inside(path: Path, root: Path) -> None:
    """Raise HistoError for an image outside `root`, whether through a link or through `..` in its path."""
    target = path.resolve()
    if not target.is_relative_to(root.resolve()):
        raise HistoError(f"{path}: leads to {target}, expected a file within {root}; put the images themselves there")


def _folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir() and not is_clutter(path))


def split_of(path: Path) -> str | None:
    """The split that a folder holds, by its name; None for other folders."""
    return next((split for split, names in SPLITS.items() if path.name.lower() in names), None)


def split_files(directory: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files of a folder that are named as splits may be and have one of `suffixes`; as train, val, test.

    Raises HistoError for two files of one split.
    """
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        split = split_of(path.with_suffix(""))
        if split and path.suffix.lower() in suffixes and path.is_file():
            if split in found:
                raise HistoError(f"{path}: {found[split].name} is there as well, expected one file; remove one")
            found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def is_image(path: Path) -> bool:
    """Whether a path has the suffix of a format that `schema.decode` reads, or is DICOM of another name."""
    if path.is_dir() or is_clutter(path):
        return False
    suffix = path.suffix.lower()
    format = PIL.Image.registered_extensions().get(suffix)
    return format in schema.FORMATS or suffix in dicom.SUFFIXES or (format is None and dicom.is_dicom_file(path))


def is_clutter(path: Path) -> bool:
    """Whether a path is hidden, or written by an operating system."""
    return path.name.startswith(".") or path.name.lower() in CLUTTER


def name_of(path: Path, directory: Path) -> str:
    """Id of an image: its path relative to `directory`, with forward slashes."""
    name = path.relative_to(directory).as_posix()
    if not name.isprintable():  # such as bytes that are not UTF-8, which a table can't hold
        raise HistoError(f"{directory}: a file is named {name!r}, expected printable text; rename it")
    return name
