"""Metrics against scikit-learn, and intervals against what the bootstrap is for."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
from transformers import EvalPrediction

from hf_histo.errors import HistoError
from hf_histo.evaluation import metrics
from hf_histo.evaluation.predictions import array, make, predicted

SCREENING = {"sensitivity_at_0.9": 0.9, "sensitivity_at_0.95": 0.95}


def random_table(n: int = 400, classes: int = 1, groups: int = 0, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    labels = random.integers(0, max(2, classes), n)
    noise = random.normal(size=(n, classes))
    if classes < 3:
        noise = (8 * noise).round() / 8  # eighths are exact in floating point: scores tie
    logits = noise + (labels[:, None] if classes == 1 else np.eye(classes)[labels])
    names = [f"g{i}" for i in random.integers(0, groups, n)] if groups else [""] * n
    return make(range(n), random.integers(0, 3, n), names, labels, logits)


def by_sklearn(table: pd.DataFrame, weights: Any = None, threshold: float = 0.5) -> dict[str, float]:
    y, p, answer = table["label"].to_numpy(), array(table, "probability"), predicted(table, threshold)
    binary = p.ndim == 1 or p.shape[1] == 2
    p = p[:, 1] if binary and p.ndim == 2 else p
    kinds = dict(average="binary" if binary else "macro", sample_weight=weights)
    truth = y if binary else np.eye(p.shape[1])[y]
    return {
        "accuracy": sk.accuracy_score(y, answer, sample_weight=weights),
        "balanced_accuracy": sk.balanced_accuracy_score(y, answer, sample_weight=weights),
        "auroc": sk.roc_auc_score(truth, p, average="macro", sample_weight=weights),
        "average_precision": sk.average_precision_score(truth, p, average="macro", sample_weight=weights),
        "precision": sk.precision_score(y, answer, **kinds),
        "recall": sk.recall_score(y, answer, **kinds),
        "f1": sk.f1_score(y, answer, **kinds),
        "loss": sk.log_loss(y, p, sample_weight=weights),
    }


@pytest.mark.parametrize("classes", [1, 2, 3, 7])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_values_are_those_of_scikit_learn(classes: int, threshold: float) -> None:
    table = random_table(classes=classes)
    values = metrics.compute(table, threshold=threshold)
    assert values.pop("n") == 400
    expected = by_sklearn(table, threshold=threshold)
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    if classes > 2:
        parts = sk.precision_recall_fscore_support(table["label"], predicted(table))
        for c in range(classes):
            assert values[f"precision_{c}"] == pytest.approx(parts[0][c])
            assert values[f"recall_{c}"] == pytest.approx(parts[1][c])
            one = array(table, "probability")[:, c]
            assert values[f"auroc_{c}"] == pytest.approx(sk.roc_auc_score(table["label"] == c, one))
        assert not any(name.startswith("sensitivity") for name in values)
    else:
        assert set(values) == {*expected, "sensitivity_at_0.9", "sensitivity_at_0.95"}


@pytest.mark.parametrize(("classes", "negative"), [(1, None), (1, 0), (2, 1), (4, 2)])
def test_screening_is_a_point_of_the_roc_curve(classes: int, negative: int | None) -> None:
    table = random_table(classes=classes, groups=30)
    probability, healthy = array(table, "probability"), negative or 0
    score = probability if classes == 1 else 1 - probability[:, healthy]
    counts = np.random.default_rng(1).multinomial(30, np.full(30, 1 / 30), size=4).T.astype(float)
    rows = metrics._Rows(table, 0.5, negative)
    values = {
        name: [metrics.compute(table, negative=negative)[name], *rows.metrics(counts)[name]] for name in SCREENING
    }
    for b, weights in enumerate([None, *(counts[rows.groups].T)]):
        false_rate, true_rate, _ = sk.roc_curve(
            table["label"] != healthy, score.round(12), sample_weight=weights, drop_intermediate=False
        )
        for name, specificity in SCREENING.items():
            assert values[name][b] == pytest.approx(true_rate[1 - false_rate >= specificity - 1e-9].max())


def test_screening_where_the_best_score_is_a_negative_or_a_class_lacks() -> None:
    wrong = metrics.compute(make("abcd", [0] * 4, [""] * 4, [1, 1, 0, 0], [50.0, 60.0, 70.0, 80.0]))
    assert wrong["sensitivity_at_0.9"] == 0
    right = metrics.compute(make("abcd", [0] * 4, [""] * 4, [0, 0, 1, 1], [50.0, 60.0, 70.0, 80.0]))
    assert right["sensitivity_at_0.95"] == 1  # although every probability is 1
    for label in (0, 1, -1):
        assert metrics.compute(make("ab", [0] * 2, [""] * 2, [label] * 2, [1.0, 2.0]))["sensitivity_at_0.9"] is None


@pytest.mark.parametrize("classes", [1, 3])
def test_resampled_values_are_those_of_weighted_scikit_learn(classes: int) -> None:
    table = random_table(classes=classes, groups=30)
    rows = metrics._Rows(table, 0.5)
    counts = np.random.default_rng(1).multinomial(30, np.full(30, 1 / 30), size=4).T.astype(float)
    values = rows.metrics(counts)
    for b in range(4):
        expected = by_sklearn(table, counts[rows.groups, b])
        assert {name: values[name][b] for name in expected} == pytest.approx(expected)


def test_interval_is_the_percentile_interval_of_resampled_groups() -> None:
    table = random_table(n=60, groups=8)
    interval = metrics.report(table, resamples=200, seed=3)["overall"]["accuracy"]
    random, names = np.random.default_rng(3), table["group"].unique()
    sample = []
    for _ in range(200):
        drawn = pd.concat([table[table["group"] == names[i]] for i in random.integers(8, size=8)])
        sample.append((predicted(drawn) == drawn["label"]).mean())
    assert [interval["low"], interval["high"]] == pytest.approx(np.quantile(sample, [0.025, 0.975]).tolist())


def test_blocks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table(n=100)
    whole = metrics.report(table, resamples=50)
    monkeypatch.setattr(metrics, "BLOCK", 700)
    blocks = metrics.report(table, resamples=50)
    for name in ("auroc", "f1", "loss"):
        assert blocks["overall"][name] == pytest.approx(whole["overall"][name], rel=1e-12)


def test_groups_widen_the_interval_of_clustered_images() -> None:
    random = np.random.default_rng(0)
    patient = np.repeat(np.arange(20), 30)
    labels = patient % 2
    # All images of a patient share most of the error: 600 images know little more than 20 patients.
    logits = 2.0 * labels - 1 + random.normal(size=20)[patient] + 0.2 * random.normal(size=600)
    grouped = make(range(600), np.zeros(600, int), [f"p{i}" for i in patient], labels, logits)
    width = {}
    for name, table in {"groups": grouped, "images": grouped.assign(group="")}.items():
        result = metrics.report(table)["overall"]
        assert result["groups"] == (20 if name == "groups" else 600)
        width[name] = {m: result[m]["high"] - result[m]["low"] for m in ("auroc", "accuracy", "loss")}
    assert all(width["groups"][m] > 2 * width["images"][m] for m in width["images"])


def test_report_by_center() -> None:
    table = random_table(n=300, groups=40)
    table.loc[:9, "center"] = -1
    result = metrics.report(table, resamples=50)
    assert list(result["centers"]) == ["0", "1", "2"]
    assert result["overall"]["n"] == 300
    assert sum(center["n"] for center in result["centers"].values()) == 290
    for center, values in result["centers"].items():
        expected = metrics.compute(table[table["center"] == int(center)])
        assert {name: values[name]["value"] for name in expected if name != "n"} == {
            name: value for name, value in expected.items() if name != "n"
        }
        assert values["auroc"]["low"] < values["auroc"]["value"] < values["auroc"]["high"]
    assert metrics.report(table, resamples=50) == result
    assert metrics.report(table, resamples=50, seed=1)["overall"]["auroc"] != result["overall"]["auroc"]
    json.dumps(result, allow_nan=False)


def test_undefined_is_none() -> None:
    values = metrics.compute(make("abc", [0] * 3, [""] * 3, [0, 0, 0], [-1.0, -2.0, -3.0]))
    undefined = {name for name, value in values.items() if value is None}
    assert undefined == {"auroc", "average_precision", "balanced_accuracy", "precision", "recall", "f1", *SCREENING}
    assert values["accuracy"] == 1

    values = metrics.compute(make("abc", [0] * 3, [""] * 3, [0, 1, 1], [-1.0, -2.0, -3.0]))
    assert (values["precision"], values["recall"], values["f1"], values["auroc"]) == (None, 0, 0, 0)

    only_positive = metrics.compute(make("ab", [0] * 2, [""] * 2, [1, 1], [1.0, 2.0]))
    assert only_positive["average_precision"] is None
    assert only_positive["recall"] == 1

    # A class that doesn't occur is left out of the averages.
    three = metrics.compute(make("abcd", [0] * 4, [""] * 4, [0, 1, 0, 1], np.eye(3)[[0, 1, 1, 1]]))
    assert three["recall_2"] is None and three["precision_2"] is None
    assert three["recall"] == three["balanced_accuracy"] == 0.75


def test_undefined_intervals_are_none() -> None:
    one_group = metrics.report(random_table(n=20).assign(group="p"), resamples=20)["overall"]
    assert one_group["groups"] == 1
    assert one_group["accuracy"]["value"] is not None
    assert one_group["accuracy"]["low"] is one_group["accuracy"]["high"] is None

    # The only positive group of three is missing from (2/3)^3 = 30% of the resamples: enough are left.
    few = make("abc", [0] * 3, [""] * 3, [1, 0, 0], [1.0, 2.0, 0.0])
    assert metrics.report(few)["overall"]["recall"]["low"] == 1
    # Both of two groups are in half of the resamples: more than half with one seed, less with another.
    two = make("ab", [0] * 2, [""] * 2, [1, 0], [1.0, 0.0])
    for seed, enough in ((0, True), (1, False)):
        draws = np.random.default_rng(seed).integers(2, size=(1000, 2))
        assert (np.mean(draws[:, 0] != draws[:, 1]) >= 0.5) == enough
        bound = 1.0 if enough else None
        assert metrics.report(two, seed=seed)["overall"]["auroc"] == {"value": 1.0, "low": bound, "high": bound}


@pytest.mark.parametrize("classes", [1, 3])
def test_hidden_labels_are_left_out(classes: int) -> None:
    table = random_table(n=100, classes=classes)
    hidden = table.copy()
    hidden.loc[60:, "label"] = -1
    assert metrics.compute(hidden) == metrics.compute(table[:60])
    assert metrics.report(hidden, resamples=20) == metrics.report(table[:60], resamples=20)
    nothing = metrics.report(hidden.assign(label=-1), resamples=20)["overall"]
    assert nothing.pop("n") == nothing.pop("groups") == 0
    assert len(nothing) >= 8
    assert all(value == {"value": None, "low": None, "high": None} for value in nothing.values())


def test_empty_table() -> None:
    values = metrics.compute(make([], [], [], [], []))
    assert values.pop("n") == 0
    assert set(values.values()) == {None}


def test_saturated_probabilities_still_rank() -> None:
    values = metrics.compute(make("abc", [0] * 3, [""] * 3, [0, 1, 1], [50.0, 60.0, 70.0]))
    assert values["auroc"] == 1
    assert values["loss"] == pytest.approx(50 / 3)


def test_bad_arguments() -> None:
    with pytest.raises(HistoError, match="threshold is -1"):
        metrics.compute(random_table(), threshold=-1)
    with pytest.raises(HistoError, match="resamples is 0"):
        metrics.report(random_table(), resamples=0)


def test_for_trainer() -> None:
    table = random_table(n=50)
    logits, labels = array(table, "logit"), table["label"].to_numpy()
    values = metrics.for_trainer()(EvalPrediction(predictions=logits[:, None], label_ids=labels))
    expected = metrics.compute(table)
    assert values == {name: value for name, value in expected.items() if name != "loss"}
    assert all(type(value) is float for value in values.values())
    with_index = EvalPrediction(predictions=logits, label_ids=(labels, np.arange(50)))
    assert metrics.for_trainer()(with_index) == values
    assert "auroc" not in metrics.for_trainer()(EvalPrediction(predictions=logits, label_ids=np.zeros(50, int)))
    with pytest.raises(HistoError, match="the first ids: 0"):
        metrics.for_trainer()(EvalPrediction(predictions=logits * np.nan, label_ids=labels))


def test_evaluate_metric_needs_no_network() -> None:
    program = """
import json, numpy as np
from hf_histo.evaluation.hugging_face import ClassificationMetrics
metric = ClassificationMetrics()
logits, labels = np.array([[2.0, 0, 0], [0, 1, 0], [0, 3, 0], [0, 0, 1]]), np.array([0, 1, 2, 2])
out = [metric.compute(predictions=logits, references=labels)]
out.append(metric.compute(predictions=logits[:, 1], references=labels % 2, threshold=0.9))
for i in (0, 2):
    metric.add_batch(predictions=logits[i:i + 2], references=labels[i:i + 2])
out.append(metric.compute())
print(json.dumps(out))
"""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=True)
    many, binary, batched = json.loads(done.stdout)
    logits = np.array([[2.0, 0, 0], [0, 1, 0], [0, 3, 0], [0, 0, 1]])
    assert many == batched == metrics.of_logits(logits, [0, 1, 2, 2])
    assert binary == metrics.of_logits(logits[:, 1], [0, 1, 0, 0], threshold=0.9)


def test_bootstrap_is_fast() -> None:
    table = random_table(n=600, groups=40)
    start = time.process_time()
    metrics.report(table)
    assert time.process_time() - start < 5
