"""Fixtures to run recipes: a backbone, and a function that returns their output."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from miniature import write_backbone

from hf_histo.launch import run

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "model")


@pytest.fixture
def shown_by(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a recipe's main in this process; return what it printed, on standard error where it fails."""

    def shown_by(recipe: str, *arguments: str) -> str:
        main = runpy.run_path(str(RECIPES / recipe), run_name="recipe")["main"]
        monkeypatch.setattr(sys, "argv", [recipe, *arguments])
        capsys.readouterr()
        try:
            run(main)
        except SystemExit:
            return capsys.readouterr().err
        return capsys.readouterr().out

    return shown_by
