"""The tables written by predict.py, and the predictions in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from miniature import write_adapter, write_data

from hf_histo.inference import Classifier


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_table_for_a_challenge_and_one_with_all_that_is_known(
    backbone: Path, tmp_path: Path, shown_by: Callable[..., str], outputs: int
) -> None:
    file = write_data(tmp_path / "data") / "test.h5"
    adapter = write_adapter(tmp_path / "adapter", backbone, outputs=outputs, temperature=2.0, threshold=0.4)
    options = f"--adapter {adapter} --data {file} --cache_dir {tmp_path / 'cache'} --output {tmp_path}".split()
    plain, details = (tmp_path / name for name in ("plain.csv", "details.csv"))
    decision = " at threshold 0.4000 (the adapter's own)" if outputs == 1 else ""
    assert f"7 predictions{decision}: {plain}\n" in shown_by("predict.py", *options[:-1], str(plain))
    shown_by("predict.py", *options[:-1], str(details), "--details")
    found = pd.read_csv(details, dtype={"ID": str})
    assert list(found) == ["ID", "Pred", "Prob", "Label", "Calibrated"]
    pd.testing.assert_frame_equal(pd.read_csv(plain, dtype={"ID": str}), found[["ID", "Pred", "Prob"]])

    table = Classifier.from_pretrained(adapter)(file)
    assert list(found["ID"]) == list(table["id"])
    assert list(found["Label"]) == list(table["predicted"])
    assert [table.attrs["label_names"][index] for index in found["Pred"]] == list(table["predicted"])
    for column, known in (("Prob", "probability"), ("Calibrated", "calibrated")):
        rows = np.array(table[known].tolist()).reshape(len(table), -1)
        np.testing.assert_allclose(found[column], rows.max(axis=1) if outputs > 1 else rows[:, 0], rtol=0, atol=1e-6)
    assert not np.allclose(found["Prob"], found["Calibrated"])


def test_the_threshold_is_printed_with_its_origin(backbone: Path, tmp_path: Path, shown_by: Callable[..., str]) -> None:
    file = write_data(tmp_path / "data") / "test.h5"
    adapter = write_adapter(tmp_path / "adapter", backbone, thresholds={"validation": 0.3})
    common = f"--adapter {adapter} --data {file} --cache_dir {tmp_path / 'cache'} --output {tmp_path / 'preds.csv'}"
    shown = shown_by("predict.py", *common.split(), "--threshold", "validation")
    assert "at threshold 0.3000 (--threshold validation)" in shown and "transductive" not in shown
    shown = shown_by("predict.py", *common.split(), "--balanced", "0.43")
    assert "(transductive: class 1 for 43% of these images, not valid for others)" in shown
    assert shown.rstrip().endswith(f"transductive: used the images of {file} as a whole, for threshold")
    assert pd.read_csv(tmp_path / "preds.csv")["Pred"].sum() == 3


@pytest.mark.parametrize("outputs", [1, 3])
def test_what_bfloat16_changes_is_printed(
    backbone: Path, tmp_path: Path, shown_by: Callable[..., str], outputs: int
) -> None:
    file = write_data(tmp_path / "data") / "test.h5"
    adapter = write_adapter(tmp_path / "adapter", backbone, outputs=outputs)
    common = f"--adapter {adapter} --data {file} --cache_dir {tmp_path / 'cache'} --details --num_workers 1".split()
    exact, rounded = (tmp_path / name for name in ("exact.csv", "rounded.csv"))
    assert "bf16" not in shown_by("predict.py", *common, "--output", str(exact))
    shown = shown_by("predict.py", *common, "--output", str(rounded), "--mixed_precision", "bf16")
    tables = [pd.read_csv(path) for path in (exact, rounded)]
    difference = (tables[0]["Prob"] - tables[1]["Prob"]).abs().max()
    changed = (tables[0]["Pred"] != tables[1]["Pred"]).sum()
    assert 1e-6 < difference < 0.05
    assert f"--mixed_precision bf16 changed {changed} of 7 decisions ({changed / 7:.1%})" in shown
    if outputs == 1:
        assert f"probabilities differ by at most {difference:.4f}" in shown


@pytest.mark.parametrize(
    ("outputs", "options", "message"),
    [
        (1, "--batch_size 0", "--batch_size is 0, expected at least 1"),
        (1, "--test_time_views -1", "--test_time_views is -1"),
        (1, "--balanced nan", "--balanced is nan, expected a finite number"),
        (
            1,
            "--threshold balanced-test",
            "--threshold is 'balanced-test', a number from the images of an earlier split",
        ),
        (3, "--threshold 0.4", "--threshold is for two classes, found 3"),
        (3, "--balanced", "--balanced is for two classes, found 3"),
        (1, "--test_time_augmentation strong", "--test_time_augmentation is 'strong', which can't act on one view"),
    ],
)
def test_bad_options_are_one_line(
    backbone: Path, tmp_path: Path, shown_by: Callable[..., str], outputs: int, options: str, message: str
) -> None:
    file = write_data(tmp_path / "data") / "test.h5"
    adapter = write_adapter(tmp_path / "adapter", backbone, outputs=outputs, thresholds={"balanced-test": 0.3})
    common = f"--adapter {adapter} --data {file} --cache_dir {tmp_path / 'cache'} --output {tmp_path / 'preds.csv'}"
    shown = shown_by("predict.py", *common.split(), *options.split())
    assert shown.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "preds.csv").exists()
