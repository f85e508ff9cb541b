"""The recipe as a user runs it: its files, and its one line of error."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from recipe_mains import RECIPES

from hf_histo.evaluation import calibration, thresholds
from hf_histo.evaluation import predictions as tables
from hf_histo.evaluation.ensembling import average
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions

RECIPE = RECIPES / "evaluate_predictions.py"


Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def evaluate(in_process: Call) -> Call:
    return partial(in_process, RECIPE.name)


def random_table(seed: int, sharpness: float = 1.0) -> pd.DataFrame:
    """Predictions of 60 images in two centers, whose labels don't depend on the seed."""
    labels, random = np.random.default_rng(0).integers(0, 2, 60), np.random.default_rng(seed)
    logits = sharpness * (random.normal(size=60) + 2 * labels - 1)
    return Predictions.make(range(60), np.arange(60) % 2, [f"p{i % 12}" for i in range(60)], labels, logits)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """One model's val and test, then another's."""
    paths = [tmp_path / model / f"{split}.parquet" for model in "ab" for split in ("val", "test")]
    for seed, path in enumerate(paths):
        random_table(seed, sharpness=6.0).with_label_names(["normal", "tumor"]).write(path)
    return paths


def test_end_to_end_and_no_overwriting(evaluate: Call, files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "report"
    done = evaluate("--predictions", *files[:2], "--output_dir", output, "--threshold", 0.6)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in output.iterdir()) == [
        "confusion_test.png",
        "confusion_val.png",
        "metrics.json",
        "predictions",
        "reliability_test.png",
        "reliability_val.png",
        "roc.png",
    ]
    written = json.loads((output / "metrics.json").read_text())
    assert list(written) == ["val", "test"]
    test = Predictions.read(files[1])
    assert written["test"].pop("predictions") == [str(files[1])]
    assert written["test"].pop("threshold_choice") is None
    measured = written["test"].pop("calibration")
    assert measured.pop("fitted_on") is None and measured.pop("temperature")["value"] == 1
    assert measured == calibration.report(test)
    assert written["test"] == classification.report(test, threshold=0.6)
    pd.testing.assert_frame_equal(Predictions.read(output / "predictions" / "test.parquet"), test)
    assert f"{measured['overall']['ece']:.3f}" in done.stdout
    assert f"{written['test']['overall']['auroc']['value']:.3f} (" in done.stdout
    assert done.stdout.count("| center 1 |") == 2

    before = (output / "metrics.json").read_bytes()
    again = evaluate("--predictions", files[0], "--output_dir", output)
    assert again.returncode == 1
    assert again.stderr.startswith("error: --output_dir") and "--overwrite" in again.stderr
    assert (output / "metrics.json").read_bytes() == before
    assert evaluate("--predictions", files[0], "--output_dir", output, "--overwrite").returncode == 0
    assert list(json.loads((output / "metrics.json").read_text())) == ["val"]


def test_ensemble_calibrated_and_balanced(evaluate: Call, files: list[Path], tmp_path: Path) -> None:
    output, submission = tmp_path / "report", tmp_path / "preds.csv"
    arguments = ["--predictions", files[1], files[3], "--ensemble", "--calibrate_on", files[0], files[2]]
    done = evaluate(*arguments, "--balanced", 0.4, "--submission", submission, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    validation, test = (average([Predictions.read(files[i]) for i in pair]) for pair in ((0, 2), (1, 3)))
    temperature = calibration.fit_temperature(validation)
    assert temperature.value > 1.2
    expected = test.with_temperature(temperature.value)
    pd.testing.assert_frame_equal(Predictions.read(output / "predictions" / "test.parquet"), expected)
    written = json.loads((output / "metrics.json").read_text())["test"]
    assert written["calibration"]["temperature"] == asdict(temperature)
    assert written["calibration"]["fitted_on"] == [str(files[0]), str(files[2])]
    assert written["calibration"]["overall"] == calibration.compute(expected)
    assert written["threshold"] == thresholds.for_share(expected, 0.4).value
    assert written["threshold_choice"]["achieved"] == 0.4
    assert written["threshold_choice"]["files"] == [str(files[1]), str(files[3])]
    assert written["transductive"] == ["threshold"]
    assert "Transductive: used the unlabeled images of test as a whole, for threshold." in done.stdout

    csv = pd.read_csv(submission, dtype={"ID": str})
    assert list(csv.columns) == ["ID", "Pred", "Prob"]
    assert csv["ID"].tolist() == expected["id"].tolist()
    assert csv["Pred"].sum() == 24
    np.testing.assert_allclose(csv["Prob"], expected["probability"])


def test_threshold_from_calibrated_validation(evaluate: Call, files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "report"
    done = evaluate(
        *("--predictions", files[1], "--output_dir", output, "--calibrate_on", files[0], "--threshold_on", files[0]),
        *("--criterion", "sensitivity", "--specificity", 0.8),
    )
    assert done.returncode == 0, done.stderr
    validation = Predictions.read(files[0])
    validation = validation.with_temperature(calibration.fit_temperature(validation).value)
    expected = thresholds.choose(validation, "sensitivity", specificity=0.8)
    written = json.loads((output / "metrics.json").read_text())["test"]
    assert written["threshold_choice"] == {**asdict(expected), "files": [str(files[0])]}
    assert not written["transductive"]
    assert f"test at threshold {expected.value:.3f} from {files[0]}, " in done.stdout
    assert written["threshold"] == expected.value


def test_what_predictions_owe_to_their_own_images_is_in_data_and_words(
    evaluate: Call, files: list[Path], tmp_path: Path
) -> None:
    table = random_table(1)
    for measured, words in ([], None), (["color statistics"], "Transductive: used the unlabeled images of test as a"):
        table.attrs["transductive"] = measured
        table.with_label_names(["normal", "tumor"]).write(files[1])
        done = evaluate("--predictions", files[1], "--output_dir", tmp_path / "report", "--overwrite")
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "report" / "metrics.json").read_text())["test"]["transductive"] == measured
        assert ("overall (transductive)" in done.stdout) == bool(measured)
        assert words in done.stdout if words else "ransductive" not in done.stdout
        assert Predictions.read(tmp_path / "report" / "predictions" / "test.parquet").attrs["transductive"] == measured


def test_submission_of_several_classes_gives_the_predicted_one(tmp_path: Path) -> None:
    logits = np.array([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    Predictions.make("ab", [0, 0], ["", ""], [-1, -1], logits).write_submission(tmp_path / "preds.csv")
    csv = pd.read_csv(tmp_path / "preds.csv")
    assert csv["Pred"].tolist() == [2, 0]
    np.testing.assert_allclose(csv["Prob"], tables.probabilities(logits).max(axis=1))
    two = Predictions.make("ab", [0, 0], ["", ""], [-1, -1], logits[:, :2])
    two.write_submission(tmp_path / "preds.csv", threshold=0.9)
    csv = pd.read_csv(tmp_path / "preds.csv")
    assert csv["Pred"].tolist() == [0, 0]
    np.testing.assert_allclose(csv["Prob"], tables.probabilities(logits[:, :2])[:, 1])


def test_bad_input_is_one_line(evaluate: Call, files: list[Path], tmp_path: Path) -> None:
    output, other, swapped = tmp_path / "report", tmp_path / "other.parquet", tmp_path / "swapped.parquet"
    random_table(0).with_label_names(["benign", "malignant"]).write(other)
    random_table(0).with_label_names(["tumor", "normal"]).write(swapped)
    three = tmp_path / "three.parquet"
    Predictions.make("abc", [0] * 3, [""] * 3, [0, 1, 2], np.eye(3)).with_label_names(list("xyz")).write(three)
    files[0].write_text("not parquet")
    for arguments, message in [
        (["--predictions", files[0]], "can't be read as parquet"),
        (["--predictions", files[1], files[3]], "share a file name"),
        (["--predictions", files[1], files[2], "--submission", tmp_path / "preds.csv"], "--submission takes one split"),
        (["--predictions", files[1], "--calibrate_on", files[2], files[3]], "--calibrate_on has 2 files"),
        (["--predictions", files[1], "--calibrate_on", other], "has the classes ['benign', 'malignant']"),
        (["--predictions", files[1], other, "--ensemble"], f"{other} has the classes"),
        (
            ["--predictions", files[1], swapped],
            f"--predictions {swapped} has the classes ['tumor', 'normal'], expected",
        ),
        (["--predictions", files[1], "--threshold_on", swapped], "['normal', 'tumor'], in this order"),
        (["--predictions", files[1], "--threshold", 2], "threshold is 2"),
        (["--predictions", files[1], "--threshold", "nan"], "threshold is nan"),
        (["--predictions", files[1], "--balanced", -1], "share is -1.0"),
        (["--predictions", files[1], "--criterion", "f1"], "--criterion is 'f1', which acts only with --threshold_on"),
        (
            ["--predictions", files[1], "--threshold_on", files[2], "--specificity", 0.9],
            "--specificity is 0.9, which acts only with --criterion sensitivity",
        ),
        (["--predictions", files[1], "--threshold_on", files[1]], f"--threshold_on: {files[1]} is among --predictions"),
        (["--predictions", files[1], "--calibrate_on", files[1]], f"--calibrate_on: {files[1]} is among --predictions"),
        (["--predictions", three, "--threshold", 0.4], "--threshold is for two classes, found 3"),
    ]:
        done = evaluate(*arguments, "--output_dir", output)
        assert done.returncode == 1, arguments
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
        assert not output.exists()
