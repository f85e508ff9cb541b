"""No command overwrites what it reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from miniature import write_adapter, write_data

from hf_histo.evaluation.predictions import Predictions


@pytest.fixture(scope="module")
def inputs(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `adapter` and `test.parquet`, predictions of it."""
    folder = tmp_path_factory.mktemp("inputs")
    write_data(folder / "data")
    write_adapter(folder / "adapter", backbone)
    table = Predictions.make("abcdef", [0] * 6, [""] * 6, [0, 1] * 3, [0.5, -0.5, 1, 2, -1, 0])
    table.with_label_names(["normal", "tumor"]).write(folder / "out" / "predictions" / "test.parquet")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "predict.py --adapter adapter --data data/test.h5 --output data/test.h5",
        "predict.py --adapter adapter --data data --output data/train.h5",
        "predict.py --adapter adapter --data data --output adapter/metrics.json",
        "predict.py --adapter adapter --data data --output out.csv --explain data/val.h5",
        "evaluate_predictions.py --predictions out/predictions/test.parquet --output_dir out",
        "evaluate_predictions.py --predictions out/predictions/test.parquet --output_dir report --submission "
        "out/predictions/test.parquet",
        "audit.py --data data --output_dir data",
        "audit.py --data data --adapter adapter --output_dir adapter --overwrite",
        "export.py --adapter adapter --format merged --output_dir adapter/merged",
        "app.py --adapter adapter --space_dir adapter/space",
    ],
)
def test_an_output_that_is_an_input_is_refused(
    inputs: Path, tmp_path: Path, command: str, shown_by: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(inputs, tmp_path / "work")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.chdir(folder)
    assert "is the input" in shown_by(*command.split()).splitlines()[-1]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
