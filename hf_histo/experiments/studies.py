"""The published tables that `hf_histo reproduce` fills: their rows, and what was reported of each.

A number that is not recorded in this repository is None, and shown as "not recorded".
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from hf_histo.config.experiments import REPORTED
from hf_histo.config.packaged import config_file
from hf_histo.experiments.compare import PublishedResult, read_published

# Dausort et al. 2024 (arXiv 2411.14975), github.com/mdausort/Cytology-fine-tuning, main.py
FOUNDATION_MODELS = ("clip-b16", "biomedclip", "quiltnet", "uni", "vit-b16")
CYTOLOGY_SETS = ("sipakmed", "mlcc", "bcfc", "hicervix")
SHOTS = (1, 2, 4, 8, 16)  # ours: those of `hf_histo few-shot`
ARTICLE, MRI_REPORT = "article on LoRA for MNIST, unpublished", "the brain MRI report, unpublished"


@dataclass(frozen=True)
class StudyRow:
    """A row of a table.

    Attributes:
        name: its folder, unique in the study.
        config: name of a packaged config.
        published: its title and the reported test accuracy.
        options: options of the run that differ from the config, by name.
        parameters: reported number of trainable parameters.
        data: folder of its data set inside `--data`; "" for `--data` itself.
    """

    name: str
    config: str
    published: PublishedResult
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # Any: values of options
    parameters: int | None = None
    data: str = ""


@dataclass(frozen=True)
class Study:
    """A published table: its title, its rows, and the seeds of each (their number, and the first one)."""

    title: str
    rows: tuple[StudyRow, ...]
    seeds: int
    seed: int = 0


def study(name: str) -> Study:
    """The study that `--study` names."""
    return {"dlmi": _dlmi, "brain-mri": _brain_mri, "cytology": _cytology, "mnist-cases": _mnist_cases}[name]()


def _dlmi() -> Study:
    """The five rows of the report, and two of ours: all of it together, and the config for centers never seen."""
    files = [path for path in sorted(config_file("report").glob("*.yaml")) if path.name != REPORTED]
    published = read_published(files)
    rows = [StudyRow(path.stem, f"report/{path.stem}", published[path.stem]) for path in files]
    extra = PublishedResult("LoRA for unseen centers (histo_ood)")
    ood = StudyRow("7_ood", "histo_ood", extra, {"backbone": "timm/resnet50.a1_in1k"})  # that of the other rows
    return Study("multi-center histology: the challenge's report", (*rows, ood), 2)


def _brain_mri() -> Study:
    """The eight cells of the report's grid; only the first, the config itself, has a recorded number."""
    ranges = yaml.safe_load(config_file("sweep/mri_report_grid").read_text(encoding="utf-8"))["grid"]
    reported = PublishedResult("", 0.2919, MRI_REPORT)
    rows = []
    for point in itertools.product(*ranges.values()):
        options = dict(zip(ranges, point, strict=True))
        first = all(value == values[0] for value, values in zip(point, ranges.values(), strict=True))
        title = ", ".join(f"{name} {value}" for name, value in options.items())
        published = PublishedResult(title, reported.reported, reported.source) if first else PublishedResult(title)
        name = "-".join(str(value) for value in point)
        rows.append(StudyRow(name, "mri_vgg16_lora", published, options, parameters=315_396))
    return Study("brain MRI: the report's grid, VGG16 with LoRA", tuple(rows), 1)


def _cytology() -> Study:
    """Experiments 1 to 3: linear with all labels, LoRA by shots, and CLIP with LoRA on 70% of HiCervix."""
    rows = []
    for data, model in itertools.product(CYTOLOGY_SETS, FOUNDATION_MODELS):
        of_all: dict[str, Any] = {"backbone": model} | ({"level": 3} if data == "hicervix" else {})
        title = PublishedResult(f"{data}, {model}, linear, all labels")
        rows.append(StudyRow(f"{data}-{model}-linear", "cytology_linear", title, of_all, data=data))
        for shots in SHOTS:
            title = PublishedResult(f"{data}, {model}, LoRA, {shots} per class")
            options = of_all | {"shots": shots}
            rows.append(StudyRow(f"{data}-{model}-lora-{shots:02}", "cytology_lora", title, options, data=data))
    last = PublishedResult("hicervix, clip-b16, LoRA, 70% of the labels")
    rows.append(StudyRow("hicervix-clip-b16-lora-70-percent", "cytology_hicervix", last, data="hicervix"))
    return Study("cytology: five foundation models, four data sets (arXiv 2411.14975)", tuple(rows), 3, 1)


def _mnist_cases() -> Study:
    """The four cases; accuracies and parameters are those in the comments of the configs."""
    reported = {
        1: ("frozen, a head of three layers on the 1000 outputs", 0.075, 646_410),
        2: ("LoRA, output layer retrained, the same head", 0.965, 2_733_810),
        3: ("LoRA, output layer retrained, one linear layer on it", 0.94, 2_097_410),
        4: ("a new output layer alone", 0.715, 20_490),
    }
    rows = [
        StudyRow(
            f"case{number}",
            f"digits_case{number}",
            PublishedResult(f"case {number}: {about}", accuracy, ARTICLE),
            parameters=parameters,
        )
        for number, (about, accuracy, parameters) in reported.items()
    ]
    return Study("digits: four cases on ResNet-50", tuple(rows), 1)
