"""Layouts of cytology data sets: files named after their class, lists of files, and HiCervix's three class levels."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from hf_histo.data import hierarchy, schema
from hf_histo.data.readers.builder import IMAGE_OPTIONS, FolderBuilder, split_generator
from hf_histo.data.readers.class_folders import check_inside, is_image, name_of, split_of
from hf_histo.errors import HistoError
from hf_histo.files import regular

logger = logging.getLogger(__name__)

# Number of classes of each data set that a folder may be named after.
CLASSES = {
    "sipakmed": 5,  # Plissiti et al. 2018, "SIPaKMeD: a new dataset for feature and image based classification"
    "mlcc": 4,  # Hussain et al. 2020, Mendeley liquid-based cytology, doi 10.17632/zddtpgzv63.4 (CC BY 4.0)
    "bcfc": 2,  # body cavity fluid cytology, kaggle.com/datasets/cmacus/body-cavity-fluid-cytology-images
    "herlev": 7,  # Jantzen et al. 2005, "Pap-smear benchmark data for pattern classification"
}

Listed = dict[str, list[tuple[Path, str]]]  # images and their classes, by split


def check_known(directory: Path, names: list[str]) -> None:
    """Raise HistoError for a folder named after a data set of `CLASSES` that has another number of classes."""
    key = directory.resolve().name.lower().replace("_", "-").split("-")[0]
    if key in CLASSES and len(names) != CLASSES[key]:
        raise HistoError(
            f"{directory}: has {len(names)} classes ({', '.join(names)}), expected the {CLASSES[key]} of {key}; "
            "complete the folder, or give it another name"
        )


class ListedImages(FolderBuilder):
    """Base class of the layouts in this module: a subclass lists the images of each split with their classes.

    Images are stored as by `ClassFolders`, in the text order of their paths. `group` is unknown. Raises HistoError for
    an image outside the folder, whether through its path in a list or through a link.
    """

    OPTIONS = IMAGE_OPTIONS

    @classmethod
    def listed(cls, directory: Path) -> Listed:
        """The images of each split with their classes; each file exists."""
        raise NotImplementedError

    @classmethod
    def labels(cls, directory: Path, listed: Listed) -> list[str]:
        """Class names: those of the training images, sorted."""
        return sorted({name for _, name in listed["train"]})

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        paths = [path for images in cls.listed(directory).values() for path, _ in images]
        for path in paths:
            check_inside(path, directory)
        return [name_of(path, directory) for path in paths]

    def _info(self) -> datasets.DatasetInfo:
        directory = self.config.directory
        return datasets.DatasetInfo(features=schema.features(self.labels(directory, self.listed(directory))))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        listed = self.listed(self.config.directory)
        counts = {split: len(images) for split, images in listed.items()}
        paths = [path for images in listed.values() for path, _ in images]
        self._groups = dict(zip(paths, self._survey(paths), strict=True))
        self._describe(f"image files; group: {'patient' if any(self._groups.values()) else 'unknown'}; {counts}")
        logger.info("%s: %s", self.config.directory, self.info.description)
        return [split_generator(split, len(images), images=images) for split, images in listed.items()]

    def _generate_examples(self, images: list[tuple[Path, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, label in images:
            name = name_of(path, self.config.directory)
            with self.skipping():
                image = self._stored(path)
                yield name, {"id": name, "image": image, "label": label, "center": -1, "group": self._groups[path]}


class NamedImages(ListedImages):
    """`images/train/`, `images/val/` and `images/test/` with files called CLASS_NUMBER.EXT.

    The layout of Dausort et al. 2024 (arXiv 2411.14975) for SIPaKMeD, MLCC and BCFC. (These are published as class
    folders, which `ClassFolders` reads.) The last underscore separates class and number, so class names may contain
    underscores: `normal_columnar_012.bmp` is of class `normal_columnar`.

    Raises HistoError, naming the file, for a name without an underscore, a split without images, a class that `train`
    lacks, and an image that can't be decoded.
    """

    LAYOUT = "named_images"
    EXPECTED = "images/train/CLASS_NUMBER.EXT and the same in images/val and images/test"

    @classmethod
    def matches(cls, directory: Path) -> bool:
        folder = directory / "images" / "train"
        return folder.is_dir() and any(is_image(path) for path in folder.iterdir())

    @classmethod
    def listed(cls, directory: Path) -> Listed:
        splits: Listed = {}
        for split in ("train", "val", "test"):
            folder = directory / "images" / split
            if not folder.is_dir():
                continue
            paths = sorted(path for path in folder.iterdir() if is_image(path))
            if not paths:
                raise HistoError(f"{folder}: no images, expected CLASS_NUMBER.EXT; add some or remove the folder")
            splits[split] = [(path, cls._class_of(path)) for path in paths]
        known = {name for _, name in splits["train"]}
        for images in splits.values():
            for path, name in images:
                if name not in known:
                    raise HistoError(
                        f"{path}: is of class {name!r} (the text before the last underscore), expected one of "
                        f"train: {', '.join(sorted(known))}; rename it or add training images"
                    )
        return splits

    @staticmethod
    def _class_of(path: Path) -> str:
        name, _, number = path.stem.rpartition("_")
        if not name or not number:
            raise HistoError(
                f"{path}: its name has no class, expected CLASS_NUMBER{path.suffix}, divided at the last underscore"
            )
        return name


class SplitLists(ListedImages):
    """`images/CLASS/` with `splits/train.txt`, `val.txt` and `test.txt`, and perhaps `classnames.txt`.

    A line of a list is a path relative to the folder or to `images/`, optionally followed by the number of its class. A
    line of `classnames.txt` is the name of a class folder, optionally followed by a display name; the order of lines
    gives the class numbers. Without that file, classes are the sorted folders of the training images.

    Raises HistoError, naming file and line, for a missing image, a class that is not in `classnames.txt`, a number that
    belongs to another class, and an image in two splits.
    """

    LAYOUT = "split_lists"
    EXPECTED = "images/CLASS/, splits/train.txt, val.txt and test.txt, and perhaps classnames.txt"

    @classmethod
    def matches(cls, directory: Path) -> bool:
        return (directory / "images").is_dir() and any((directory / "splits").glob("*.txt"))

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        texts = [path for path in cls._lists(directory).values()]
        if (directory / "classnames.txt").is_file():
            texts.append(directory / "classnames.txt")
        return [*(name_of(path, directory) for path in texts), *super().sources(directory)]

    @classmethod
    def labels(cls, directory: Path, listed: Listed) -> list[str]:
        return list(cls._shown(directory).values()) or super().labels(directory, listed)

    @classmethod
    def listed(cls, directory: Path) -> Listed:
        shown = cls._shown(directory)
        order, seen = list(shown), dict[Path, str]()
        splits: Listed = {}
        for split, file in cls._lists(directory).items():
            images = []
            for place, line in _lines(file):
                path, number = cls._found(directory, line)
                if path is None:
                    raise HistoError(
                        f"{place}: {line!r} is not an image in {directory / 'images'}; add it or remove the line"
                    )
                folder = path.parent.name
                if shown and folder not in shown:
                    raise HistoError(f"{place}: class {folder!r} is not in classnames.txt: {', '.join(shown)}; add it")
                if number is not None and (not shown or order.index(folder) != number):
                    expected = (
                        f"{order.index(folder)} as in classnames.txt" if shown else "no number without classnames.txt"
                    )
                    raise HistoError(
                        f"{place}: class {folder!r} has the number {number}, expected {expected}; correct it"
                    )
                if path in seen:
                    raise HistoError(f"{place}: {line!r} is in {seen[path]} as well, expected once; remove one of them")
                seen[path] = place
                images.append((path, shown.get(folder, folder)))
            if not images:
                raise HistoError(f"{file}: lists no images, expected a path in each line; add some or remove the file")
            splits[split] = sorted(images)
        if "train" not in splits:
            raise HistoError(f"{directory / 'splits' / 'train.txt'}: no such file, expected {cls.EXPECTED}; add it")
        return splits

    @classmethod
    def _lists(cls, directory: Path) -> dict[str, Path]:
        found = {split_of(path.with_suffix("")): path for path in sorted((directory / "splits").glob("*.txt"))}
        return {split: found[split] for split in ("train", "val", "test") if split in found}

    @classmethod
    def _shown(cls, directory: Path) -> dict[str, str]:
        """Display name of each class folder, in the order of `classnames.txt`; empty without the file."""
        file, shown = directory / "classnames.txt", dict[str, str]()
        for place, line in _lines(file) if file.is_file() else ():
            folder, _, name = line.partition(" ")
            if _is_there(directory / "images" / line, folder=True):
                folder, name = line, line
            if not _is_there(directory / "images" / folder, folder=True) or folder in shown:
                raise HistoError(f"{place}: {folder!r} is not a folder in images/, or is listed twice; correct it")
            shown[folder] = name.strip() or folder
        return shown

    @staticmethod
    def _found(directory: Path, line: str) -> tuple[Path | None, int | None]:
        """The image that a line names, and the class number behind it; None for each one that is missing."""
        name, _, last = line.rpartition(" ")
        candidates = [(line, None), (name.strip(), int(last))] if name and last.isdigit() else [(line, None)]
        for text, number in candidates:
            for path in (directory / text, directory / "images" / text):
                if _is_there(path):
                    return path, number
        return None, None


class HiCervix(ListedImages):
    """HiCervix (Cai et al. 2024; zenodo.org/records/11087263): `train/`, `val/`, `test/` and a CSV table of each.

    The tables have the columns `image_name` and `level_1`, `level_2`, `level_3`, of which the deeper ones may be empty.
    A class is the path to the deepest level given, such as `ASC > ASC-US`; `hierarchy.at_level` reduces the classes to
    one level. Classes are those of the training images; `val` and `test` images of other classes, which no model could
    predict, are left out with a warning.

    Raises HistoError, naming file and row, for a missing image, an empty `level_1`, a level with two parents, and a
    table without these columns.
    """

    LAYOUT = "hicervix"
    EXPECTED = "train.csv, val.csv and test.csv with image_name, level_1, level_2, level_3, beside train/, val/, test/"
    LEVELS = ("level_1", "level_2", "level_3")

    @classmethod
    def matches(cls, directory: Path) -> bool:
        try:
            with regular(directory / "train.csv").open(encoding="utf-8") as file:
                return "level_1" in file.readline()
        except (OSError, UnicodeDecodeError):
            return False

    @classmethod
    def sources(cls, directory: Path) -> list[str]:
        tables = [f"{split}.csv" for split in ("train", "val", "test") if (directory / f"{split}.csv").is_file()]
        return [*tables, *super().sources(directory)]

    @classmethod
    def listed(cls, directory: Path) -> Listed:
        splits: Listed = {}
        for split in ("train", "val", "test"):
            file = directory / f"{split}.csv"
            if file.is_file():
                splits[split] = cls._rows(file, directory / split)
        known = {name for _, name in splits["train"]}
        hierarchy.check(sorted(known), directory / "train.csv")
        for split, images in splits.items():
            kept = [(path, name) for path, name in images if name in known]
            if len(kept) < len(images):
                unknown = sorted({name for _, name in images} - known)
                logger.warning(
                    "%s: left out %d images of %s, which train lacks", split, len(images) - len(kept), unknown
                )
            if not kept:
                raise HistoError(f"{directory / split}.csv: no image of a class of train.csv, expected some; add them")
            splits[split] = sorted(kept)
        return splits

    @classmethod
    def _rows(cls, file: Path, folder: Path) -> list[tuple[Path, str]]:
        try:
            table = pd.read_csv(file, usecols=["image_name", *cls.LEVELS], dtype="str", keep_default_na=False)
        except (ValueError, OSError) as error:
            raise HistoError(f"{file}: {error}, expected the columns image_name, {', '.join(cls.LEVELS)}") from None
        images = []
        for row, (name, *levels) in enumerate(table[["image_name", *cls.LEVELS]].itertuples(index=False), start=2):
            path = folder / name
            if not _is_there(path):
                raise HistoError(f"{file}, row {row}: {name!r} is not in {folder}; add it or remove the row")
            given = [level.strip() for level in levels]
            depth = next((place for place, level in enumerate(given) if not level), len(given))
            if depth == 0:
                raise HistoError(f"{file}, row {row}: level_1 is empty, expected a class; correct it")
            images.append((path, hierarchy.join(given[:depth])))
        return images


def _is_there(path: Path, folder: bool = False) -> bool:
    """Whether a path from a list is a file, or a folder; False for a name too long for the file system."""
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:
        return False


def _lines(file: Path) -> list[tuple[str, str]]:
    """The lines that are not empty, each with its place (file and line number) for messages."""
    try:
        lines = regular(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HistoError(f"{file}: can't be read as text ({error}); save it as UTF-8") from None
    return [(f"{file}, line {number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
