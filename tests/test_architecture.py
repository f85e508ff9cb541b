"""The layers of the package, checked: imports run from later stages to earlier ones, and never to a recipe."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_histo

# `stages` and `finetune` are one run from data to adapter, `experiments` are many: no earlier stage may import them.
STAGES = (
    "data",
    "transforms",
    "models",
    "training",
    "evaluation",
    "adapter",
    "hub",
    "export",
    "inference",
    "app",
    "result",
    "stages",
    "finetune",
    "api",
    "experiments",
    "doctor",
    "completion",
    "cli",
    "__main__",
)
BASE = ("config", "errors", "files", "launch", "library_warnings")

PACKAGE = Path(hf_histo.__file__).parent
RECIPES = PACKAGE.parent / "recipes"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def stage(module: str) -> str:
    """`data` for `hf_histo.data.readers.hdf5`."""
    return module.split(".")[1]


def name(path: Path) -> str:
    """`hf_histo.data.readers.hdf5` for its file."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imports(source: str, module: str) -> Iterator[str]:
    """The absolute names of the modules that `source`, the text of `module`, imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            # A name imported from the package itself is a stage or base module.
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "hf_histo" else [str(base)]


def faults(source: str, module: str) -> list[str]:
    """The imports of `module` that run against the order."""
    order = {name: rank for rank, name in enumerate(STAGES)}
    rank = order.get(stage(module), -1)
    found = [name for name in imports(source, module) if name.split(".")[0] in ("hf_histo", "recipes")]
    return [name for name in found if name.startswith("recipes") or ("." in name and order.get(stage(name), -1) > rank)]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_run_one_way(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), name(path)) == []


def test_every_module_belongs_to_a_stage_or_the_base() -> None:
    assert {stage(name(path)) for path in MODULES} <= {*STAGES, *BASE}


def test_the_walk_found_the_modules() -> None:
    names = {name(path) for path in MODULES}
    assert {"hf_histo.errors", "hf_histo.files", "hf_histo.data.schema", "hf_histo.data.load"} <= names
    found = {imported for path in MODULES for imported in imports(path.read_text(encoding="utf-8"), name(path))}
    assert "hf_histo.data.schema" in found


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("hf_histo.data.readers.hdf5", "from hf_histo.training.trainer import train", True),
        ("hf_histo.data.readers.hdf5", "from hf_histo import models", True),
        ("hf_histo.data.readers.hdf5", "def f():\n    import hf_histo.hub", True),
        ("hf_histo.data.schema", "from ..models.heads import head", True),
        ("hf_histo.data.readers.hdf5", "import recipes.sweep", True),
        ("hf_histo.files", "from hf_histo.data import schema", True),
        ("hf_histo.data.readers.hdf5", "from hf_histo.data.schema import decode", False),
        ("hf_histo.data.readers.hdf5", "from .schema import decode", False),
        ("hf_histo.inference", "from hf_histo.data import schema", False),
        ("hf_histo.data.readers.hdf5", "from hf_histo import __version__, errors", False),
    ],
)
def test_the_check_itself(module: str, source: str, fault: bool) -> None:
    assert bool(faults(source, module)) is fault


def test_recipes_are_not_importable() -> None:
    assert not list(RECIPES.rglob("__init__.py"))
    assert list(RECIPES.glob("*.py"))
    # Without an `__init__.py`, the folder is at most a namespace package in the current folder, and not installed.
    spec = importlib.util.find_spec("recipes")
    assert spec is None or spec.origin is None
