"""Where the recipes are, and the `main` function of each."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "recipes"


def main_of(recipe: str) -> Callable[[], Any]:
    """The `main` of a recipe, by the name of its file, to be run in this process."""
    return runpy.run_path(str(RECIPES / recipe), run_name="recipe")["main"]
