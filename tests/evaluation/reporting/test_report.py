"""Figures are written and not empty; tables are aligned."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score

from hf_histo.evaluation import calibration
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import report


def random_table(classes: int = 1, n: int = 80) -> pd.DataFrame:
    random = np.random.default_rng(0)
    labels = random.integers(0, max(2, classes), n)
    logits = random.normal(size=(n, classes)) + (labels[:, None] if classes == 1 else np.eye(classes)[labels])
    return Predictions.make([f"$slide_{i}" for i in range(n)], random.integers(0, 3, n), [""] * n, labels, logits)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts in the figures that are written."""
    found: list[str] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        if kwargs["format"] == "png":
            found.extend(text.get_text() for text in figure.findobj(matplotlib.text.Text))  # type: ignore[attr-defined]

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def shows_something(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and min(image.size) > 200 and np.asarray(image.convert("L")).std() > 1


def test_training_curve(tmp_path: Path, texts: list[str]) -> None:
    log = [
        {"loss": 0.7, "learning_rate": 1e-3, "epoch": 0.5, "step": 1},
        {"loss": 0.5, "learning_rate": 5e-4, "epoch": 1.0, "step": 2},
        {"eval_loss": 0.6, "eval_accuracy": 0.8, "epoch": 1.0, "step": 2},
        {"train_runtime": 3.0, "train_loss": 0.6, "epoch": 1.0, "step": 2},
    ]
    report.training_curve(log, tmp_path / "curve.png")
    assert shows_something(tmp_path / "curve.png")
    assert {"loss (nats)", "validation metric", "accuracy", "learning rate", "epoch"} <= set(texts)
    assert "AUROC" not in texts
    report.training_curve([], tmp_path / "empty.png")
    assert texts[-1] == "Nothing was logged."


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_roc_curve(tmp_path: Path, texts: list[str], classes: int) -> None:
    table = random_table(classes)
    splits = {"val": table, "test": table.assign(label=1), "hidden": table.assign(label=-1)}
    report.roc_curve(splits, tmp_path / "roc.png")
    assert shows_something(tmp_path / "roc.png")
    if classes < 3:
        assert f"val  {classification.compute(table)['auroc']:.3f}" in texts
        assert {"test  undefined (one class only)", "hidden  undefined (one class only)"} <= set(texts)
    else:
        auroc = roc_auc_score(table["label"] == 1, np.stack(table["probability"])[:, 1])
        assert {"val", "test", "0  undefined (one class only)", f"1  {auroc:.3f}"} <= set(texts)


@pytest.mark.parametrize("classes", [1, 4])
def test_confusion_matrix(tmp_path: Path, texts: list[str], classes: int) -> None:
    table = random_table(classes)
    table.loc[0, "label"] = -1
    report.confusion_matrix(table, tmp_path / "confusion.png", threshold=0.7)
    assert shows_something(tmp_path / "confusion.png")
    counts = [int(text.split("\n")[0]) for text in texts if "%" in text]
    assert sum(counts) == 79
    answer = table.predicted_classes(0.7)
    assert counts[1] == ((table["label"] == 0) & (answer == 1)).sum()
    report.confusion_matrix(table.assign(label=-1), tmp_path / "hidden.png")
    assert texts[-1] == "No label is known."


@pytest.mark.parametrize("classes", [1, 3])
def test_worst_errors(tmp_path: Path, texts: list[str], classes: int) -> None:
    table = random_table(classes)
    table.loc[0, "label"] = -1
    asked: list[str] = []

    def image_of(name: str) -> np.ndarray:
        asked.append(name)
        return np.full((8, 8, 3) if len(asked) % 2 else (8, 8), 200, np.uint8)

    report.worst_errors(table, image_of, tmp_path / "worst.png", n=7)
    assert shows_something(tmp_path / "worst.png")
    assert len(asked) == 7
    labels, of_truth = table["label"].to_numpy(), []
    for label, p in zip(labels, table["probability"], strict=True):
        of_truth.append((p if label == 1 else 1 - p) if classes == 1 else p[label])
    wrong = (labels >= 0) & (table.predicted_classes() != labels)
    assert asked == table["id"][wrong].iloc[np.argsort(np.array(of_truth)[wrong])][:7].tolist()
    assert any(text.startswith(f"{asked[0]}\ncenter ") for text in texts)

    report.worst_errors(table[~wrong], image_of, tmp_path / "none.png")
    assert texts[-1] == f"No error among {(~wrong).sum() - 1} labeled images."
    assert len(asked) == 7


def test_figures_leave_no_global_state(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    report.confusion_matrix(random_table(), tmp_path / "confusion.png")
    assert dict(matplotlib.rcParams) == before


def test_table() -> None:
    assert report.table([["", "n", "auroc"], ["center 0", 12, 0.98765], ["all", 1234, None]]) == (
        "|          |    n | auroc |\n"
        "| -------- | ---: | ----: |\n"
        "| center 0 |   12 | 0.988 |\n"
        "| all      | 1234 |     – |"
    )


def test_names_in_tables_do_not_steer_the_terminal() -> None:
    assert report.table([["", "n"], ["tumor\x1b[2J", 1]]).splitlines()[-1] == "| tumor\\x1b[2J |   1 |"


def test_center_table() -> None:
    table = random_table()
    table.loc[table["center"] == 2, "label"] = 0
    result = classification.report(table)
    lines = report.center_table(result, ["auroc"]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["center 0", "center 1", "center 2", "overall"]
    auroc = result["overall"]["auroc"]
    assert lines[-1].endswith(f" {auroc['value']:.3f} ({auroc['low']:.3f}–{auroc['high']:.3f}) |")
    assert lines[4].endswith(" – |")
    assert len({len(line) for line in lines}) == 1


def test_a_missing_interval_is_explained_below_the_table() -> None:
    labels = np.repeat([0, 1], [60, 40])
    groups = [f"p{i // 10}" for i in range(100)]
    table = Predictions.make(range(100), [3] * 100, groups, labels, np.random.default_rng(0).normal(size=100))
    table.attrs["label_names"] = ["normal", "tumor"]
    result = classification.report(table)
    reason = "no interval, 4 groups with tumor, expected at least 5."
    assert report.withheld(result) == [
        f"center 3, balanced_accuracy, auroc: {reason}",
        f"overall, balanced_accuracy, auroc: {reason}",
    ]
    *rows, blank, first, second = report.center_table(result).splitlines()
    assert blank == "" and [first, second] == report.withheld(result)
    assert "10 (6, 4)" in rows[2] and "10 (6, 4)" in rows[3]
    assert report.overall_table({"mine": result}).splitlines()[-1] == f"mine, balanced_accuracy, auroc: {reason}"
    assert report.withheld(classification.report(table.assign(group=""))) == []


def test_tables_of_classes_and_of_screening() -> None:
    names, logits = ["glioma", "none", "pituitary"], np.eye(3)[[0, 0, 1, 1, 2, 0]] * 3
    logits = np.tile(logits, (5, 1))
    table = Predictions.make(range(30), [-1] * 30, [""] * 30, [0, 0, 1, 1, 2, 2] * 5, logits)
    lines = report.table(report.class_rows(classification.report(table, negative=1), names)).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == names
    assert "0.667 (" in lines[2] and "0.500 (" in lines[4]
    sentence = report.screening(classification.report(table, negative=1), names)
    assert sentence.startswith("Sensitivity for any class but none: 1.000 at specificity 0.9, ")
    assert report.screening(classification.report(table), names) == ""
    no_negative = report.screening(classification.report(table[table["label"] == 0], negative=1), names)
    assert no_negative == "Sensitivity for any class but none: – at specificity 0.9, – at specificity 0.95."


def test_errors_of_each_center_and_class() -> None:
    logits = [-2.0, 2.0, 2.0, -0.5, 1.0, 0.0]
    table = Predictions.make(range(6), [0, 0, 0, 1, 1, 1], [""] * 6, [0, 0, 1, 1, 1, -1], logits)
    assert report.error_rows(table) == [
        ["", *table.label_names],
        ["center 0", "1 of 2 (50%)", "0 of 1 (0%)"],
        ["center 1", None, "1 of 2 (50%)"],
        ["overall", "1 of 2 (50%)", "1 of 3 (33%)"],
    ]
    assert report.error_rows(table, threshold=0.1)[2] == ["center 1", None, "0 of 2 (0%)"]


def test_calibration_rows_have_the_errors_of_each_center_before_and_after_scaling() -> None:
    table = random_table()
    assert report.calibration_rows(table, 1.0)[0] == ["", "images", "ECE", "Brier score"]
    header, *rows = report.calibration_rows(table, 2.0)
    assert [row[0] for row in rows] == ["center 0", "center 1", "center 2", "overall"]
    assert header[-1] == "calibrated Brier score"
    for scale, place in ((1.0, 2), (2.0, 4)):
        found = calibration.report(table.with_temperature(scale))
        assert rows[1][place] == found["centers"]["1"]["ece"]
        assert rows[-1][place + 1] == found["overall"]["brier"]
