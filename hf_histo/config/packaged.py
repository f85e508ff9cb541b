"""The recipes and their configs, of an installed package or of a checkout, and their names as commands."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from hf_histo.errors import HistoError, did_you_mean

PACKAGE = Path(__file__).parents[1]
PROGRAM = "hf_histo"
# Command: its recipe, and what it does.
COMMANDS = {
    "fine-tune": ("histo_lora", "fine-tune a backbone: an adapter folder"),
    "predict": ("predict", "an adapter and images: a CSV of predictions"),
    "predict-slides": ("predict_slides", "an adapter and slides: tiles and regions for QuPath, heat maps, scores"),
    "evaluate": ("evaluate_predictions", "prediction files: metrics, calibration, thresholds, figures"),
    "audit": ("audit", "what is wrong with a data set, before anything is trained"),
    "accept": ("accept", "an adapter and images of a new site: accept, recalibrate or refuse, and why"),
    "compare": ("compare", "configs × seeds (× centers) in one table"),
    "compare-adapters": ("compare_adapters", "several adapters on one backbone, and their mean, in one table"),
    "ensemble": ("ensemble", "finished runs of one data set: a folder that predicts their mean logits"),
    "soup": ("soup", "adapters of one backbone: their greedy mean as one adapter, chosen on val"),
    "few-shot": ("few_shot", "methods × shots × seeds: curves and tables"),
    "cross-validate": ("cross_validate", "k folds by class and family of copies"),
    "leave-one-center-out": ("leave_one_center_out", "every center held out once: mean and worst"),
    "acceptance-study": ("acceptance_study", "power and false alarms of accept at held-out centers"),
    "coverage": ("coverage", "prediction sets at held-out centers, before and after calibration there"),
    "sweep": ("sweep", "a grid or a search over the options of a run"),
    "pareto": ("pareto", "rank × adapted layers: accuracy against trainable parameters"),
    "reproduce": ("reproduce", 'a published table in one command, "reported" beside "obtained"'),
    "make-slides": ("make_slides", "synthetic pyramidal slides with annotations, to try it all"),
    "push": ("push", "an adapter folder: to the Hub"),
    "export": ("export", "an adapter: one checkpoint, ONNX, or WSInfer"),
    "app": ("app", "an adapter: a page in the browser"),
    "benchmark": ("benchmark", "how fast this package is on this machine, beside stock practice"),
    "doctor": ("doctor", "what this machine has for a run, and what it lacks"),
    "backbones": ("import_backbone", "registered foundation models: list them, fetch one"),
}
COMPLETION, ABOUT, SHELLS = (
    "completion",
    "a script by which a shell completes commands and options",
    ("bash", "zsh", "fish"),
)
STUDIES = ("histo_lora", "mri_lora", "cytology_lora", "digits_lora")  # each fine-tunes


def recipes() -> Path:
    """The folder of the recipes: in the installed package, or beside it in a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def config_file(name: str) -> Path:
    """A YAML file or folder by its path, or a packaged one by its name: histo_ood, ablation/lora, ablation.

    Raises HistoError for a name without suffix that is neither, with the nearest one.
    """
    path = Path(name)
    if path.exists() or path.suffix:
        return path
    names = config_names()
    if name not in names:
        hint = did_you_mean(name, names, f"they are {', '.join(sorted(n for n in names if '/' not in n))}")
        raise HistoError(f"config {name}: no such file, and no packaged config of that name; {hint}")
    return names[name]


def config_names() -> dict[str, Path]:
    """The packaged configs, and the folders of them, by name."""
    configs = recipes() / "configs"
    names = {file.relative_to(configs).with_suffix("").as_posix(): file for file in configs.rglob("*.yaml")}
    return names | {folder.name: folder for folder in configs.iterdir() if folder.is_dir()}


def config_files(names: Iterable[str]) -> list[Path]:
    """As `config_file`; a folder stands for the YAML files in it, in order of their names."""
    found = map(config_file, names)
    return [file for path in found for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]


def as_commands(text: str) -> str:
    """A recipe's docstring with the commands of `PROGRAM` in place of the scripts and files of a checkout."""
    by_recipe = {recipe: name for name, (recipe, _) in COMMANDS.items()} | dict.fromkeys(STUDIES, "fine-tune")

    def command(script: re.Match[str]) -> str:
        launcher, recipe = script.groups()
        return f"accelerate launch -m {PROGRAM} {by_recipe[recipe]}" if launcher else f"{PROGRAM} {by_recipe[recipe]}"

    known = "|".join(by_recipe)
    text = re.sub(rf"(?:(accelerate launch )|python )?recipes/({known})\.py", command, text)
    return re.sub(r"recipes/configs/([\w/]+)(\.yaml)?", r"\1", text)
