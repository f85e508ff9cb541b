"""The tables written by predict.py, and the predictions in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fixtures import write_challenge
from miniature import SIZE, config, write_adapter, write_centers, write_data

from hf_histo.data.protocol import prepare
from hf_histo.evaluation.prediction_sets import REFER
from hf_histo.finetune import run_config
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The adapter of a short run, whose `val` has 7 slides with images of each class, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    backbone, data = write_centers(folder)
    options = config(folder / "run", backbone, data, "--method=linear", f"--cache_dir={folder / 'cache'}")
    return run_config(options, prepare(options)).adapter, data


def test_a_set_of_classes_or_a_referral(
    trained: tuple[Path, Path], tmp_path: Path, shown_by: Callable[..., str]
) -> None:
    adapter, data = trained
    common = f"--adapter {adapter} --data {data / 'test.h5'} --cache_dir {tmp_path / 'cache'}".split()
    sets, withheld, calibrated = (tmp_path / f"{name}.csv" for name in ("sets", "withheld", "calibrated"))
    shown = shown_by("predict.py", *common, "--output", str(sets), "--coverage", "0.8")
    found = pd.read_csv(sets, keep_default_na=False)
    assert list(found) == ["ID", "Pred", "Prob", "Set", "Decision"]
    one = found["Set"].isin(["normal", "tumor"])
    assert list(found["Decision"]) == list(found["Set"].where(one, REFER))
    assert f"prediction sets at 0.8 coverage of each class: {one.sum()} of 7 images have one class" in shown
    assert "7 images are of no center that val has enough groups of" in shown
    classifier = Classifier.from_pretrained(adapter)
    table = classifier.prediction_sets(0.8).apply(classifier(data / "test.h5"))
    assert [" | ".join(names) for names in table["set"]] == list(found["Set"])

    shown = shown_by("predict.py", *common, "--output", str(withheld), "--coverage")
    assert "no prediction set is claimed, every image has all classes: a coverage of 0.9 needs 9 groups" in shown
    found = pd.read_csv(withheld)
    assert set(found["Set"]) == {"normal | tumor"} and set(found["Decision"]) == {REFER}

    more = ["--coverage", "--calibration", str(data / "train.h5"), "--test_time_views", "8"]
    shown = shown_by("predict.py", *common, "--output", str(calibrated), *more)
    assert (
        f"calibrated on {data / 'train.h5'} (groups: 12 of normal, 12 of tumor)" in shown
        and "of no center" not in shown
    )
    assert set(pd.read_csv(calibrated, keep_default_na=False)["Set"]) <= {"", "normal", "tumor", "normal | tumor"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--coverage 1", "--coverage is 1.0, expected more than 0 and below 1"),
        ("--calibration test.h5", "--calibration is 'test.h5', which acts only with --coverage"),
        (
            "--coverage --test_time_views 8",
            "--test_time_views is 8, but --coverage is calibrated on predictions of val",
        ),
        ("--coverage --calibration DATA", "--calibration DATA: has the splits train, val, test, expected one"),
        ("--coverage --calibration HIDDEN", "--calibration HIDDEN: no label is known"),
    ],
)
def test_sets_that_can_not_be_calibrated(
    trained: tuple[Path, Path], tmp_path: Path, shown_by: Callable[..., str], options: str, message: str
) -> None:
    adapter, data = trained
    write_challenge(tmp_path / "hidden", counts={"test": 4}, size=SIZE)
    places = {"DATA": str(data), "HIDDEN": str(tmp_path / "hidden" / "test.h5")}
    for name, place in places.items():
        options, message = options.replace(name, place), message.replace(name, place)
    common = f"--adapter {adapter} --data {data / 'test.h5'} --cache_dir {tmp_path} --output {tmp_path / 'p.csv'}"
    shown = shown_by("predict.py", *common.split(), *options.split())
    assert shown.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "p.csv").exists()


def test_an_adapter_without_predictions_of_val(backbone: Path, tmp_path: Path, shown_by: Callable[..., str]) -> None:
    file = write_data(tmp_path / "data") / "test.h5"
    adapter = write_adapter(tmp_path / "adapter", backbone)
    common = f"--adapter {adapter} --data {file} --cache_dir {tmp_path / 'cache'} --output {tmp_path / 'p.csv'}"
    shown = shown_by("predict.py", *common.split(), "--coverage")
    assert shown.splitlines()[-1].startswith(f"error: {adapter} holds no predictions/val.parquet")
