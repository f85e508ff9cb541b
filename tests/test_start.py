"""Before its options are checked, a command does not import torch, transformers' models or the data libraries.

The budget is a number of modules, since seconds depend on the machine.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each takes a good part of a second to import, torch several.
HEAVY = {"torch", "torchvision", "accelerate", "datasets", "peft", "timm", "kornia", "pandas", "sklearn", "matplotlib"}
BUDGET = 1000  # modules in all; the standard library, numpy and the parser of transformers take about 800

SHOW_HELP = """
import contextlib, io, runpy, sys
for recipe in sys.argv[1:]:
    sys.argv = [recipe, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        runpy.run_path(recipe, run_name="__main__")
    assert "usage:" in shown.getvalue(), recipe
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
