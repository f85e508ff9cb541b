"""Several adapters in one table."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from miniature import write_adapter, write_data

from hf_histo.config.commands import CompareAdaptersOptions
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import classification
from hf_histo.experiments.compare_adapters import compare_adapters
from hf_histo.inference import Classifier


def test_the_table_holds_each_adapter_and_the_mean(
    in_process: Callable[..., subprocess.CompletedProcess[str]],
    backbone: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_data(tmp_path / "data")
    adapters = [str(write_adapter(tmp_path / name, backbone, seed=seed)) for seed, name in enumerate("ab")]
    done = in_process("compare_adapters.py", "--adapters", *adapters, "--data", data, "--average")
    assert done.returncode == 0, done.stderr
    assert f"--data {data}: other splits or images than those that {', '.join(adapters)} had" in caplog.text
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == ["", "images", "groups (of each class)", "accuracy", "balanced_accuracy", "auroc", "f1"]
    assert [row[0] for row in rows] == [*adapters, "mean of the 2"]
    for adapter, row in zip(adapters, rows, strict=False):
        report = classification.report(Classifier.from_pretrained(adapter).predict(load(data)["val"]))
        assert row[1] == "13"
        for name, cell in zip(header[3:], row[3:], strict=True):
            assert float(cell.split()[0]) == pytest.approx(report["overall"][name]["value"], abs=6e-4)


def test_the_mean_of_one_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HistoError, match="--average is for several adapters, found A alone"):
        compare_adapters(CompareAdaptersOptions(adapters=["A"], data=str(tmp_path), average=True))
