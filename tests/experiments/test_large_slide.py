"""Memory of a prediction at the largest slides."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from miniature import OF_SLIDES, write_adapter, write_backbone
from slide_files import write_sparse

SIDE, SHARE = 100_000, 0.1  # pixels of the slide, and how much of it is tissue: 20,000 tiles of 224 pixels


def memory(processes: list[psutil.Process]) -> int:
    """Resident bytes of all; pages that several share count once."""
    found = 0
    for process in processes:
        try:
            found += process.memory_full_info().pss
        except psutil.Error:  # it has ended
            continue
    return found


@pytest.mark.slow
def test_a_slide_of_100_000_pixels_is_predicted_within_2_gib(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "backbone")
    adapter = write_adapter(tmp_path / "adapter", backbone, changes=OF_SLIDES | {"patch_size": 224})
    slide = write_sparse(tmp_path / "large.tif", SIDE, SHARE)
    assert slide.stat().st_size < 10e6
    command = [
        sys.executable,
        "-m",
        "hf_histo",
        "predict",
        slide,
        "--adapter",
        adapter,
        "--output_dir",
        tmp_path / "out",
        "--num_workers",
        2,
    ]
    started, largest = time.monotonic(), 0
    process = psutil.Process(subprocess.Popen([*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}).pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        largest = max(largest, memory([process, *process.children(recursive=True)]))
        time.sleep(0.2)
    assert process.wait() == 0
    scores = pd.read_csv(tmp_path / "out" / "slides.csv")
    assert scores["tiles"][0] == pytest.approx(SHARE * SIDE**2 / 224**2, rel=0.02)
    print(f"{scores['tiles'][0]} tiles, {time.monotonic() - started:.0f} s, {largest / 2**30:.2f} GiB")
    assert largest < 2 * 2**30
