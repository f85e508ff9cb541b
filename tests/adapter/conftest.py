"""Adapter folders of finished runs; a test damages a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from adapter_folders import QUICK
from miniature import config, write_backbone, write_data

from hf_histo.data.load import load
from hf_histo.finetune import run_config
from hf_histo.result import Result


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A backbone and a data set in miniature."""
    folder = tmp_path_factory.mktemp("source")
    return write_backbone(folder / "backbone"), write_data(folder / "data")


@pytest.fixture(scope="session")
def results(source: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The results of finished runs, by `--batch_norm`."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        mode: run_config(config(folder / mode, *source, *QUICK, f"--batch_norm={mode}"), load(source[1]))
        for mode in ("frozen", "track")
    }


@pytest.fixture
def adapter(results: dict[str, Result], tmp_path: Path) -> Path:
    """A copy without checksums, as of an older version, so that changes are not found by them."""
    folder = shutil.copytree(results["frozen"].adapter, tmp_path / "adapter")
    (folder / "checksums.json").unlink()
    sidecar = json.loads((folder / "hf_histo.json").read_text(encoding="utf-8"))
    del sidecar["backbone"]["configuration"]
    (folder / "hf_histo.json").write_text(json.dumps(sidecar), encoding="utf-8")
    return folder


@pytest.fixture
def whole(results: dict[str, Result], tmp_path: Path) -> Path:
    """A copy with its checksums."""
    return shutil.copytree(results["frozen"].adapter, tmp_path / "whole")
