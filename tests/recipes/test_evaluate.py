"""The recipe as a user runs it: a process, its files, and its one line of error."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_histo.evaluation import metrics
from hf_histo.evaluation import predictions as tables

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate.py"


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, RECIPE, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    paths = [tmp_path / "predictions" / f"{split}.parquet" for split in ("val", "test")]
    for path in paths:
        labels = random.integers(0, 2, 60)
        groups = [f"p{i % 12}" for i in range(60)]
        table = tables.make(range(60), random.integers(0, 2, 60), groups, labels, random.normal(size=60) + labels)
        tables.write(path, table, ["normal", "tumor"])
    return paths


def test_end_to_end_and_no_overwriting(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "report"
    done = evaluate("--predictions", *files, "--output_dir", output, "--threshold", 0.6)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in output.iterdir()) == [
        "confusion_test.png",
        "confusion_val.png",
        "metrics.json",
        "roc.png",
    ]
    written = json.loads((output / "metrics.json").read_text())
    assert list(written) == ["val", "test"]
    assert written["test"].pop("predictions") == str(files[1])
    assert written["test"] == metrics.report(tables.read(files[1]), threshold=0.6)
    assert f"{written['test']['overall']['auroc']['value']:.3f} (" in done.stdout
    assert done.stdout.count("| center 1 |") == 2

    before = (output / "metrics.json").read_bytes()
    again = evaluate("--predictions", files[0], "--output_dir", output)
    assert again.returncode == 1
    assert again.stderr.startswith("error: --output_dir") and "--overwrite" in again.stderr
    assert (output / "metrics.json").read_bytes() == before
    assert evaluate("--predictions", files[0], "--output_dir", output, "--overwrite").returncode == 0
    assert list(json.loads((output / "metrics.json").read_text())) == ["val"]


def test_bad_input_is_one_line(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "report"
    files[0].write_text("not parquet")
    for arguments, message in [
        (["--predictions", files[0]], "can't be read as parquet"),
        (["--predictions", files[1], files[1]], "share a file name"),
        (["--predictions", files[1], "--threshold", 2], "threshold is 2"),
    ]:
        done = evaluate(*arguments, "--output_dir", output)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
        assert not output.exists()
