"""The code blocks of README.md and docs/, and how a test runs each: in miniature, in a folder that has what they name.

A comment directly above a block of bash, Python or YAML decides what a test does with it:

    <!-- test: run -->               run it in the fast suite
    <!-- test: slow -->              run it in the slow tests
    <!-- test: options; REASON -->   parse its options, and run nothing
    <!-- test: none; REASON -->      nothing

with `, DIR=KIND` for the data in the folder `DIR` (a key of `DATA`; else `centers`) and `, exit=N` for the exit code.

The blocks of a page run in order, in one folder. Commands stand as they are: `Workplace` puts miniature data, backbones
and adapters where they expect them, and what takes long is made small in one place, `small`.
"""

from __future__ import annotations

import dataclasses
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command_parser
from fixtures import write_pcam, write_wilds
from matplotlib.figure import Figure
from miniature import (
    SIZE,
    divide_training,
    write_adapter,
    write_backbone,
    write_data,
    write_digits,
    write_hf_vit,
    write_shards,
    write_slices,
)

from hf_histo import cli, config, launch
from hf_histo.config import Config, parser
from hf_histo.data import load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("bash", "python", "yaml")
MARKER = re.compile(r"<!-- test: (run|slow|options|none)((?:, \w+=\w+)*)(?:; (.+))? -->")
FENCE = re.compile(r"```(\w*)(?: title=\"(.+)\")?")
# Programs of others, which no block runs; `pip` must name extras that exist.
OTHERS = ("hf", "pip", "pytest", "tensorboard", "mkdocs")
CLASSES = ("no_tumor", "glioma", "pituitary")


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        where: page and line.
        language: one of `LANGUAGES`.
        title: name of the file that it is the content of, or None.
        text: the code.
        how: "run", "slow", "options" or "none".
        data: key of `DATA`, for the folder `DIR`.
        code: expected exit code of its commands.
    """

    where: str
    language: str
    title: str | None
    text: str
    how: str
    data: str
    code: int


def blocks(text: str, name: str) -> list[Block]:
    """The blocks of a page in `LANGUAGES`. Raises ValueError for one without a valid marker."""
    lines, found = text.splitlines(), []
    starts = [number for number, line in enumerate(lines) if line.startswith("```")]
    for start, end in zip(starts[::2], starts[1::2], strict=True):
        fence = FENCE.fullmatch(lines[start])
        if not fence or fence[1] not in LANGUAGES:
            continue
        where = f"{name}:{start + 1}"
        marker = MARKER.fullmatch(lines[start - 1])
        if not marker:
            raise ValueError(f"{where}: no marker, expected <!-- test: run --> or another above the block")
        how, more, reason = marker.groups()
        if (reason is None) is (how in ("options", "none")):
            raise ValueError(f"{where}: expected a reason for 'options' and 'none', and only for these")
        chosen = dict(pair.split("=") for pair in more.split(", ")[1:])
        if chosen.keys() - {"DIR", "exit"}:
            raise ValueError(f"{where}: {more[2:]}, expected DIR=KIND or exit=N")
        code = "\n".join(lines[start + 1 : end]) + "\n"
        data, status = chosen.get("DIR", "centers"), int(chosen.get("exit", 0))
        found.append(Block(where, fence[1], fence[2], code, how, data, status))
    return found


# Commands.


@dataclass(frozen=True)
class Command:
    """A command of this package: a recipe's file or a command of `hf_histo`, and its arguments."""

    program: str
    arguments: list[str]


def commands(text: str) -> Iterator[Command]:
    """The commands of this package in a block of bash; those of others are checked as far as they can be.

    Raises ValueError for a program that is not known here, and SystemExit for a launcher's option that does not exist.
    """
    text = re.sub(r"\$\([^)]*\)", "HOST", text.replace("\\\n", " "))
    for line in text.splitlines():
        words = shlex.shlex(re.sub(r"\$\w+", "1", line), posix=True, punctuation_chars="&|;")
        words.whitespace_split = True
        each: list[str] = []
        for word in [*words, "&&"]:
            if set(word) <= set("&|;"):
                yield from command(each)
                each = []
            else:
                each += sorted(map(str, Path().glob(word))) or [word] if "*" in word else [word]


def command(words: Sequence[str]) -> Iterator[Command]:
    """The command of this package that some words start, if any."""
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    match words:
        case []:
            return
        case ["srun", *rest]:
            yield from command(rest)
        case ["accelerate", "launch", *rest]:
            launched = launch_command_parser().parse_args(rest)
            script = ["-m", launched.training_script] if launched.module else [launched.training_script]
            yield from command(["python", *script, *launched.training_script_args])
        case ["torchrun", *rest]:
            started = torch.distributed.run.get_args_parser().parse_args(rest)
            yield from command(["python", started.training_script, *started.training_script_args])
        case ["hf_histo", *arguments] | ["python", "-m", "hf_histo", *arguments]:
            yield Command("hf_histo", arguments)
        case ["python", script, *arguments] if (ROOT / script).is_file():
            yield Command(script, arguments)
        case ["pip", *rest]:
            check_extras(rest)
        case [program, *_] if program in OTHERS:
            return
        case _:
            raise ValueError(f"{' '.join(words)}: expected a command of this package, or of {', '.join(OTHERS)}")


def check_extras(words: Sequence[str]) -> None:
    """Raise ValueError for an extra of this package that setup.cfg does not have."""
    declared = (ROOT / "setup.cfg").read_text(encoding="utf-8").partition("extras_require]")[2].partition("\n[")[0]
    for extra in re.findall(r"(?:hf_histo|\.)\[(\w+)\]", " ".join(words)):
        if f"\n{extra} =\n" not in declared:
            raise ValueError(f"pip {' '.join(words)}: setup.cfg has no extra {extra}")


class Parsed(BaseException):
    """Raised instead of running a command, when its options are parsed."""


def small(values: dict[str, Any]) -> dict[str, Any]:
    """Options that take seconds: of a run, or of an experiment."""
    most = {"image_size": SIZE, "resize_size": SIZE, "num_train_epochs": 1, "iterations_per_shot": 1}
    most |= {"seeds": 1, "folds": 2}
    found = {name: min(most[name], value or most[name]) for name, value in values.items() if name in most}
    if "iterations_per_shot" in values and values["iterations_per_shot"] is None:
        del found["iterations_per_shot"]
    return values | found


@contextmanager
def made_small(*, only_options: bool) -> Iterator[pytest.MonkeyPatch]:
    """Within it, options that are parsed become small ones, or raise `Parsed`."""
    parse, parse_command = parser._parse, config.parse_command

    def parsed(*arguments: Any, **more: Any) -> tuple[Config, list[Any]]:
        found, own = parse(*arguments, **more)
        if only_options:
            raise Parsed
        return Config.of(small(found.flat())), [dataclasses.replace(each, **small(vars(each))) for each in own]

    def command_parsed(*arguments: Any, **more: Any) -> Any:
        found = parse_command(*arguments, **more)
        if only_options:
            raise Parsed
        return found

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(parser, "_parse", parsed)
        patches.setattr(config, "parse_command", command_parsed)
        if only_options:  # an earlier command of the page may make the data
            patches.setattr(parser, "require_data", lambda data: None)
        for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):  # which a run may set
            patches.delenv(name, raising=False)
        yield patches


# What commands name.


def write_centers(folder: Path) -> None:
    write_data(folder, {"train": 36, "val": 16, "test": 16})
    divide_training(folder)


def write_volumes(folder: Path) -> None:
    """NIfTI volumes of two classes."""
    for split, count in (("train", 20), ("test", 4)):
        for number in range(count):
            path = folder / split / ("healthy", "tumor")[number % 2] / f"sub-{split}{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            voxels = np.random.default_rng(number).uniform(1, 255, (16, 18, 8))
            nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0])).to_filename(path)


def write_cells(folder: Path) -> None:
    """HiCervix: images whose color is that of the class, with its levels."""
    colors = {"ASC,ASC-H": (200, 40, 40), "ASC,ASC-US": (200, 120, 40), "Normal,Basal": (40, 80, 200)}
    for split in ("train", "val", "test"):
        rows = ["image_name,level_1,level_2,level_3"]
        (folder / split).mkdir(parents=True)
        for name, color in colors.items():
            for number in range(18 if split == "train" else 6):
                file = f"{name.split(',')[1]}-{number}.png"
                noise = np.random.default_rng(number).normal(0, 15, (SIZE, SIZE, 3))
                pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(folder / split / file)
                rows.append(f"{file},{name},")
        (folder / f"{split}.csv").write_text("\n".join(rows))


def write_pixels(folder: Path) -> None:
    """Tables of RGB images of 12 x 12 pixels, bright to the left."""
    folder.mkdir()
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        noise = np.random.default_rng(count).integers(0, 40, (count, 12, 12, 3))
        images = noise + np.linspace(200, 0, 12, dtype=int)[None, None, :, None]
        images[np.arange(count) % 2 == 1] //= 3
        images[:, 0, 0], images[:, 0, 1] = 0, 255
        names = [f"pixel_{i}" for i in range(12 * 12 * 3)]
        table = pd.DataFrame(images.reshape(count, -1), columns=names)
        table.assign(label=np.arange(count) % 2).to_csv(folder / f"{split}.csv", index=False)


DATA: dict[str, Callable[[Path], Any]] = {
    "cells": write_cells,
    "centers": write_centers,
    "digits": write_digits,
    "mri": partial(write_slices, classes=CLASSES),
    "pcam": write_pcam,
    "pixels": write_pixels,
    "shards": write_shards,
    "volumes": write_volumes,
    "wilds": write_wilds,
}
RESNET, MOBILENET, VIT, HF_VIT = "test_resnet.r160_in1k", "test_efficientnet.r160_in1k", "test_vit.r160_in1k", "hf-vit"
# Backbones by the names that commands and configs have for them, and what stands in for each.
BACKBONES = {
    "NAME_OR_FOLDER": RESNET,
    "resnet50.a1_in1k": RESNET,
    "timm/resnet18.a1_in1k": RESNET,
    "timm/mobilenetv2_100.ra_in1k": MOBILENET,
    "timm/mobilenetv2_100.tf_in1k": MOBILENET,
    "timm/resnet50.a1_in1k": RESNET,
    "facebook/dinov2-small": HF_VIT,
    "facebook/dinov2-base": HF_VIT,
    "clip-b16": VIT,
    "uni": VIT,
    "biomedclip": VIT,
}


def write_table(
    path: Path, columns: dict[str, str], separator: str = ",", classes: tuple[str, str] = ("no_tumor", "tumor")
) -> None:
    """A table of 48 images, whose `columns` are named by what they are: path, label, center, split, group."""
    folder, rows = path.with_suffix(""), []
    folder.mkdir(exist_ok=True)
    for number in range(48):
        image = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        PIL.Image.fromarray(image // (1 + 2 * (number % 2))).save(folder / f"{number}.png")
        row = {
            "path": f"{folder.name}/{number}.png",
            "label": classes[number % 2],
            "center": ("Leipzig", "Halle", "Jena")[number // 2 % 3],
            "split": ("train", "train", "val", "test")[number // 6 % 4],
            "group": f"P{number // 2}",
        }
        rows.append({name: row[what] for what, name in columns.items()})
    pd.DataFrame(rows).to_csv(path, index=False, sep=separator)


def write_picture(path: Path) -> None:
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)


def saved(figure: Figure, file: Any, **options: Any) -> None:
    """In place of drawing a figure, which is most of the time of an audit in miniature."""
    PIL.Image.new("RGB", (1, 1)).save(file, "png")


FILES: dict[str, Callable[[Path], None]] = {
    "patch.png": write_picture,
    "a.png": write_picture,
    "b.png": write_picture,
    "new.csv": lambda path: write_table(path, {"path": "path"}),
    "patches.csv": lambda path: write_table(
        path, {"path": "path", "label": "diagnosis", "center": "hospital", "group": "slide"}
    ),
    "few.csv": lambda path: write_table(
        path, {"path": "path", "label": "label", "group": "slide"}, classes=("normal", "tumor")
    ),
    "slices.csv": lambda path: write_table(
        path, {"path": "path", "label": "class", "split": "split", "group": "patient"}, ";"
    ),
}


class Workplace:
    """A folder in which the blocks of a page run.

    Args:
        folder: it, which is made.
        sources: folder of miniature data and backbones, which all workplaces share.
        patches: undone after the page.
    """

    def __init__(self, folder: Path, sources: Path, patches: pytest.MonkeyPatch) -> None:
        self.folder, self.sources, self.patches = folder, sources, patches
        self.names: dict[str, Any] = {}  # of the page's Python blocks
        folder.mkdir()
        for part in ("recipes", "accelerate_configs"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        for name, stand_in in BACKBONES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(self.backbone(stand_in))
        for name, write in FILES.items():
            write(folder / name)
        shutil.copy(self.data("centers") / "test.h5", folder)
        adapter = self.source("adapter", lambda path: write_adapter(path, self.backbone(RESNET)))
        shutil.copytree(adapter, folder / "runs" / "NAME" / "adapter")
        patches.chdir(folder)
        patches.setattr("hf_histo.evaluation.figures.run.draw", lambda *arguments, **options: {})
        patches.setattr(Figure, "savefig", saved)
        patches.setattr(load, "_synthetic", lambda cache_dir: self.data("centers"))

    def source(self, name: str, write: Callable[[Path], Any]) -> Path:
        """A shared folder, made when it is first asked for."""
        folder = self.sources / name
        if not folder.exists():
            write(folder)
        return folder

    def backbone(self, stand_in: str) -> Path:
        write = write_hf_vit if stand_in == HF_VIT else lambda folder: write_backbone(folder, stand_in)
        return self.source(stand_in, write)

    def data(self, kind: str) -> Path:
        return self.source(kind, DATA[kind])

    def run(self, block: Block, *, only_options: bool = False) -> None:
        """Run a block, or parse its options; raises AssertionError for a command that fails."""
        for name in ("DIR", "DIR2"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            shutil.copytree(self.data(block.data), self.folder / name)
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        if block.language == "python" and not only_options:
            with made_small(only_options=False):
                exec(compile(block.text, block.where, "exec"), self.names)
        elif block.language == "yaml" and block.title and not {"grid", "space"} & yaml.safe_load(block.text).keys():
            config.parse(None, ["--config", block.title])  # no study
        elif block.language == "bash":
            for each in commands(block.text):
                status = self.call(each, only_options=only_options)
                assert status == (0 if only_options else block.code), (
                    f"{block.where}: {shlex.join(each.arguments)} ends with {status}"
                )

    def call(self, command: Command, *, only_options: bool) -> int:
        """Run a command in this process; return its exit code."""
        with made_small(only_options=only_options) as patches:
            patches.setattr(sys, "argv", [command.program, *command.arguments])
            try:
                if command.program == "hf_histo":
                    cli.main(command.arguments)
                else:
                    launch.run(runpy.run_path(str(ROOT / command.program), run_name="recipe")["main"])
            except Parsed:
                missing = [word for word in command.arguments if word.endswith(".yaml") and not Path(word).is_file()]
                assert not missing, f"{missing}: no such file"
            except SystemExit as end:
                return int(end.code or 0)
        return 0
