"""Two processes of a launch share slides, and continue after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import counted_predict
import pandas as pd
import psutil
import pytest
import slide_files
from miniature import OF_SLIDES, write_adapter, write_backbone

from hf_histo.data.synthetic.slides import write_tiff
from hf_histo.inference import Classifier

COUNTED = Path(__file__).parents[1] / "support" / "counted_predict.py"
NAMES = [f"s{number}" for number in range(6)]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Predict the slides, as words of a command line."""
    for number, name in enumerate(NAMES):
        write_tiff(tmp_path / f"{name}.tif", slide_files.pixels(seed=number))
    backbone = write_backbone(tmp_path / "backbone")
    adapter = write_adapter(tmp_path / "adapter", backbone, changes=OF_SLIDES)
    slides = [str(tmp_path / f"{name}.tif") for name in NAMES]
    return [*slides, f"--adapter={adapter}", "--num_workers=0", f"--output_dir={tmp_path / 'out'}"]


def started(arguments: list[str], log: Path) -> subprocess.Popen[str]:
    # On CPUs, `accelerate launch` starts several processes over MPI alone.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(COUNTED)]
    environment = {**os.environ, "LOG": str(log), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, "predict", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_processes_predict_each_slide_once_and_a_killed_command_continues(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    process = started(arguments, tmp_path / "launch.log")
    while sum((output / name).is_dir() for name in NAMES) < 3 and process.poll() is None:
        time.sleep(0.05)
    launcher = psutil.Process(process.pid)
    for each in [*launcher.children(recursive=True), launcher]:
        each.kill()
    text, _ = process.communicate(timeout=60)
    kept = {name: (output / name / "tiles.csv").stat().st_mtime_ns for name in NAMES if (output / name).is_dir()}
    assert 3 <= len(kept) < len(NAMES), text
    assert not (output / "slides.csv").exists()
    by_process, predicted = zip(*map(str.split, (tmp_path / "launch.log").read_text().splitlines()), strict=True)
    assert len(set(by_process)) == 2
    assert len(set(predicted)) == len(predicted)

    monkeypatch.setenv("LOG", str(tmp_path / "again.log"))
    monkeypatch.setattr(counted_predict, "SECONDS", 0)
    monkeypatch.setattr(Classifier, "predict", counted_predict.counted)
    counted_predict.main(["predict", *arguments])
    again = [line.split()[1] for line in (tmp_path / "again.log").read_text().splitlines()]
    assert again == [name for name in NAMES if name not in kept]
    assert {name: (output / name / "tiles.csv").stat().st_mtime_ns for name in kept} == kept
    table = pd.read_csv(output / "slides.csv")
    assert list(table["slide"]) == NAMES
    assert (table["tiles"] == 48).all()
    assert table["mean_tumor"].nunique() == len(NAMES)  # no slide has the results of another
    assert {path.name for path in output.iterdir() if not path.name.endswith(".lock")} == {*NAMES, "slides.csv"}
