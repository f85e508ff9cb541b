"""Before its options are checked, a command does not import torch, transformers' models or the data libraries.

A command whose run is finished imports the data libraries, to see whether the data is still the same, and no torch. A
training imports what it trains with, and nothing that only some trainings need, or that comes after it. The budget is a
number of modules, since seconds depend on the machine.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from miniature import config, write_backbone, write_data

from hf_histo.data.protocol import prepare
from hf_histo.errors import HistoError
from hf_histo.finetune import run_config

ROOT = Path(__file__).parents[1]
# Each takes a good part of a second to import, torch several.
HEAVY = {"torch", "torchvision", "accelerate", "datasets", "peft", "timm", "kornia", "pandas", "sklearn", "matplotlib"}
BUDGET = 750  # modules in all; the standard library and the parser of transformers take about 620
FINISHED_BUDGET = 2100  # `datasets`, which imports pandas and pyarrow, and the readers take about 1,000 more

TRAINING_BUDGET = 5000  # torch 1,200; sympy, scipy, pandas, peft, timm, transformers 200 to 400 each
# Of some trainings, of the evaluation, or of extras.
LATER = {
    "matplotlib",
    "sklearn",
    "kornia",
    "torchmetrics",
    "captum",
    "optuna",
    "evaluate",
    "onnxruntime",
    "tensorboard",
}

SHOW_HELP = """
import contextlib, io, runpy, sys
for recipe in sys.argv[1:]:
    sys.argv = [recipe, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        runpy.run_path(recipe, run_name="__main__")
    assert "usage:" in shown.getvalue(), recipe
print(*sys.modules)
"""

RUN_AGAIN = """
import contextlib, io, runpy, sys
sys.argv = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()) as shown:
    runpy.run_path(sys.argv[0], run_name="__main__")
assert "finished before, nothing was trained" in shown.getvalue() and "| val " in shown.getvalue()
print(*sys.modules)
"""


IMPORT_TRAINING = """
import sys
from hf_histo.launch import importing
with importing():
    import hf_histo.finetune, hf_histo.stages
print(*sys.modules)
"""


def modules(*arguments: str) -> set[str]:
    """The modules that Python has imported at the end of a program that prints them."""
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_of_every_recipe_imports_nothing_heavy() -> None:
    found = modules(SHOW_HELP, *map(str, sorted((ROOT / "recipes").glob("*.py"))))
    assert "hf_histo.config.parser" in found
    assert sorted(found & HEAVY) == []
    assert len(found) < BUDGET


def test_the_package_itself_imports_nothing() -> None:
    bare = modules("import sys; print(*sys.modules)")
    assert modules("import hf_histo, sys; print(*sys.modules)") - bare == {"hf_histo"} | (
        modules("import importlib, typing, sys; print(*sys.modules)") - bare
    )


def test_a_training_imports_nothing_that_comes_later_or_seldom() -> None:
    found = modules(IMPORT_TRAINING)
    assert sorted(found & LATER) == []
    assert len(found) < TRAINING_BUDGET


def test_a_finished_run_shows_its_table_without_torch_while_its_data_is_the_same(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    options = config(tmp_path / "run", write_backbone(tmp_path / "backbone"), data, "--num_train_epochs=1")
    run_config(options, prepare(options))
    found = modules(RUN_AGAIN, str(ROOT / "recipes" / "histo_lora.py"), "--config", str(tmp_path / "run" / "run.yaml"))
    assert sorted(found & HEAVY) == ["datasets", "pandas"]
    assert len(found) < FINISHED_BUDGET
    with h5py.File(data / "test.h5", "r+") as file:
        label = next(iter(file.values()))["label"]
        label[()] = 1 - label[()]
    with pytest.raises(HistoError, match="its run was on other data"):
        run_config(options, prepare(options))
