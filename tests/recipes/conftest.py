"""Fixtures to run recipes: a backbone, and a function that returns their output."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from miniature import write_backbone
from recipe_mains import main_of

from hf_histo.launch import run


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "model")


@pytest.fixture
def in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a recipe's main here, as a process of its own would, without the seconds in which that imports everything."""

    def in_process(recipe: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        main = main_of(recipe)
        monkeypatch.setattr(sys, "argv", [recipe, *map(str, arguments)])
        monkeypatch.setattr("gc.freeze", lambda: None)  # garbage of earlier tests would stay for good
        capsys.readouterr()
        code = 0
        try:
            run(main)
        except SystemExit as end:
            code = int(end.code or 0)
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, code, shown.out, shown.err)

    return in_process


@pytest.fixture
def shown_by(in_process: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., str]:
    """Run a recipe's main in this process; return what it printed, on standard error where it fails."""

    def shown_by(recipe: str, *arguments: str) -> str:
        done = in_process(recipe, *arguments)
        return done.stderr if done.returncode else done.stdout

    return shown_by
