"""Metrics against scikit-learn, and which have intervals (see also test_intervals.py, test_coverage.py)."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
from transformers import EvalPrediction

from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import classification, intervals
from hf_histo.evaluation.metrics.hugging_face import ClassificationMetrics
from hf_histo.evaluation.predictions import Predictions

make = Predictions.make

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
    y, p, answer = table["label"].to_numpy(), table.probabilities, table.predicted_classes(threshold)
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
    values = classification.compute(table, threshold=threshold)
    assert values.pop("n") == 400
    expected = by_sklearn(table, threshold=threshold)
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    if classes > 2:
        parts = sk.precision_recall_fscore_support(table["label"], table.predicted_classes())
        for c in range(classes):
            assert values[f"precision_{c}"] == pytest.approx(parts[0][c])
            assert values[f"recall_{c}"] == pytest.approx(parts[1][c])
            one = table.probabilities[:, c]
            assert values[f"auroc_{c}"] == pytest.approx(sk.roc_auc_score(table["label"] == c, one))
        assert not any(name.startswith("sensitivity") for name in values)
    else:
        assert set(values) == {*expected, "sensitivity_at_0.9", "sensitivity_at_0.95"}


@pytest.mark.parametrize(("classes", "negative"), [(1, None), (1, 0), (2, 1), (4, 2)])
def test_screening_is_a_point_of_the_roc_curve(classes: int, negative: int | None) -> None:
    table = random_table(classes=classes, groups=30)
    probability, healthy = table.probabilities, negative or 0
    score = probability if classes == 1 else 1 - probability[:, healthy]
    counts = np.random.default_rng(1).multinomial(30, np.full(30, 1 / 30), size=4).T.astype(float)
    rows = classification._Rows(table, 0.5, negative)
    values = {
        name: [classification.compute(table, negative=negative)[name], *rows.metrics(counts)[name]]
        for name in SCREENING
    }
    for b, weights in enumerate([None, *(counts[rows.groups].T)]):
        false_rate, true_rate, _ = sk.roc_curve(
            table["label"] != healthy, score.round(12), sample_weight=weights, drop_intermediate=False
        )
        for name, specificity in SCREENING.items():
            assert values[name][b] == pytest.approx(true_rate[1 - false_rate >= specificity - 1e-9].max())


def test_screening_where_the_best_score_is_a_negative_or_a_class_lacks() -> None:
    wrong = classification.compute(make("abcd", [0] * 4, [""] * 4, [1, 1, 0, 0], [50.0, 60.0, 70.0, 80.0]))
    assert wrong["sensitivity_at_0.9"] == 0
    right = classification.compute(make("abcd", [0] * 4, [""] * 4, [0, 0, 1, 1], [50.0, 60.0, 70.0, 80.0]))
    assert right["sensitivity_at_0.95"] == 1  # although every probability is 1
    for label in (0, 1, -1):
        assert (
            classification.compute(make("ab", [0] * 2, [""] * 2, [label] * 2, [1.0, 2.0]))["sensitivity_at_0.9"] is None
        )


@pytest.mark.parametrize("classes", [1, 3])
def test_resampled_values_are_those_of_weighted_scikit_learn(classes: int) -> None:
    table = random_table(classes=classes, groups=30)
    rows = classification._Rows(table, 0.5)
    counts = np.random.default_rng(1).multinomial(30, np.full(30, 1 / 30), size=4).T.astype(float)
    values = rows.metrics(counts)
    for b in range(4):
        expected = by_sklearn(table, counts[rows.groups, b])
        assert {name: values[name][b] for name in expected} == pytest.approx(expected)


def test_replicates_leave_out_one_group_each() -> None:
    table = random_table(n=60, groups=8)
    replicates = classification._Rows(table, 0.5).replicates()
    for place, name in enumerate(table["group"].unique()):
        expected = by_sklearn(table[table["group"] != name])
        assert {metric: replicates[metric][place] for metric in expected} == pytest.approx(expected)


def test_memory_blocks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table(n=100)
    whole = classification.report(table)
    monkeypatch.setattr(classification, "BLOCK", 700)
    blocks = classification.report(table)
    for name in ("auroc", "f1", "loss"):
        assert blocks["overall"][name] == pytest.approx(whole["overall"][name], rel=1e-9)


def test_groups_widen_the_interval_of_clustered_images() -> None:
    random = np.random.default_rng(0)
    patient = np.repeat(np.arange(20), 30)
    labels = patient % 2
    # Images of a patient share most of the error: 600 images have little more information than 20 patients.
    logits = 2.0 * labels - 1 + random.normal(size=20)[patient] + 0.2 * random.normal(size=600)
    grouped = make(range(600), np.zeros(600, int), [f"p{i}" for i in patient], labels, logits)
    width = {}
    for name, table in {"groups": grouped, "images": grouped.assign(group="")}.items():
        result = classification.report(table)["overall"]
        assert result["groups"] == (20 if name == "groups" else 600)
        width[name] = {m: result[m]["high"] - result[m]["low"] for m in ("auroc", "accuracy", "loss")}
    assert all(width["groups"][m] > 2 * width["images"][m] for m in width["images"])


def test_the_report_is_at_its_threshold_and_for_its_negative_class() -> None:
    for table, settings in ((random_table(), {"threshold": 0.8}), (random_table(classes=3), {"negative": 2})):
        result = classification.report(table, **settings)
        for part, rows in (("overall", table), ("1", table[table["center"] == 1])):
            values = result["overall"] if part == "overall" else result["centers"][part]
            for name, expected in classification.compute(rows, **settings).items():
                assert (values[name] if name == "n" else values[name]["value"]) == expected
        assert result["threshold"] == settings.get("threshold", 0.5)
        assert result["negative"] == settings.get("negative", 0)


def test_report_by_center() -> None:
    table = random_table(n=300, groups=40)
    table.loc[:9, "center"] = -1
    result = classification.report(table)
    assert list(result["centers"]) == ["0", "1", "2"]
    assert result["overall"]["n"] == 300
    assert sum(center["n"] for center in result["centers"].values()) == 290
    for center, values in result["centers"].items():
        expected = classification.compute(table[table["center"] == int(center)])
        assert {name: values[name]["value"] for name in expected if name != "n"} == {
            name: value for name, value in expected.items() if name != "n"
        }
        assert values["auroc"]["low"] < values["auroc"]["value"] < values["auroc"]["high"]
    assert classification.report(table) == result
    json.dumps(result, allow_nan=False)


def test_undefined_is_none() -> None:
    values = classification.compute(make("abc", [0] * 3, [""] * 3, [0, 0, 0], [-1.0, -2.0, -3.0]))
    undefined = {name for name, value in values.items() if value is None}
    assert undefined == {"auroc", "average_precision", "balanced_accuracy", "precision", "recall", "f1", *SCREENING}
    assert values["accuracy"] == 1

    values = classification.compute(make("abc", [0] * 3, [""] * 3, [0, 1, 1], [-1.0, -2.0, -3.0]))
    assert (values["precision"], values["recall"], values["f1"], values["auroc"]) == (None, 0, 0, 0)

    only_positive = classification.compute(make("ab", [0] * 2, [""] * 2, [1, 1], [1.0, 2.0]))
    assert only_positive["average_precision"] is None
    assert only_positive["recall"] == 1

    # A class that doesn't occur is left out of the averages.
    three = classification.compute(make("abcd", [0] * 4, [""] * 4, [0, 1, 0, 1], np.eye(3)[[0, 1, 1, 1]]))
    assert three["recall_2"] is None and three["precision_2"] is None
    assert three["recall"] == three["balanced_accuracy"] == 0.75


def of_groups(classes: list[int], images: int = 10) -> pd.DataFrame:
    """A table with `images` images per group, each group of one class; some are predicted wrong."""
    labels = np.repeat(classes, images)
    groups = np.repeat([f"p{i}" for i in range(len(classes))], images)
    random = np.random.default_rng(0)
    table = make(range(len(labels)), np.zeros(len(labels), int), groups, labels, random.normal(2.0 * labels - 1))
    table.attrs["label_names"] = ["normal", "tumor"]
    return table


def test_too_few_groups_of_a_class_have_no_interval_and_the_reason_is_given() -> None:
    found = classification.report(of_groups([0] * 8 + [1] * 3))["overall"]
    assert (found["groups"], found["groups_by_class"]) == (11, {"normal": 8, "tumor": 3})
    for name in ("recall", "auroc", "balanced_accuracy", "average_precision", "sensitivity_at_0.9"):
        assert found[name]["value"] is not None
        assert found[name]["low"] is found[name]["high"] is None
        assert found[name]["withheld"] == "3 groups with tumor, expected at least 5"
    for name in ("accuracy", "loss"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
        assert "withheld" not in found[name]

    single = classification.report(of_groups([0] * 8 + [1] * 3, images=1))["overall"]
    assert (single["groups"], single["groups_by_class"]) == (11, {"normal": 8, "tumor": 3})

    one = classification.report(of_groups([0] * 20 + [1]))["overall"]
    assert one["recall"]["withheld"] == "1 groups with tumor, expected at least 5"
    assert classification.report(of_groups([0, 0, 1, 1]))["overall"]["accuracy"]["withheld"].startswith(
        "4 groups in all"
    )


def test_groups_that_are_nearly_all_of_the_images_count_as_few() -> None:
    table = of_groups([0, 1] * 5)
    large = of_groups([1], images=1000).assign(group="large")
    both = pd.concat([table, large.assign(id="large" + large["id"])], ignore_index=True)
    found = classification.report(both)["overall"]
    assert found["groups"] == 11
    assert "the 11 groups in all differ so much in size that they count as 1.2" in found["accuracy"]["withheld"]


def test_a_rare_class_leaves_its_own_metrics_and_the_means_without_interval() -> None:
    labels = np.array([0] * 30 + [1] * 30 + [2] * 2)
    logits = np.random.default_rng(0).normal(size=(62, 3)) + np.eye(3)[labels]
    found = classification.report(make(range(62), [-1] * 62, [""] * 62, labels, logits))["overall"]
    for name in ("recall_2", "auroc_2", "recall", "balanced_accuracy", "auroc"):
        assert found[name]["withheld"] == "2 groups with 2, expected at least 5"
    for name in ("recall_0", "auroc_0", "precision_1", "accuracy"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]


def test_sensitivity_needs_enough_negative_images_to_place_its_threshold() -> None:
    found = classification.report(of_groups([0, 1] * 6))["overall"]
    assert found["sensitivity_at_0.9"]["low"] < found["sensitivity_at_0.9"]["value"]
    assert found["sensitivity_at_0.95"]["withheld"] == "60 images with normal, expected at least 100"


@pytest.mark.parametrize("classes", [1, 3])
def test_the_evidence_of_each_metric_is_the_images_that_it_is_about(classes: int) -> None:
    table = random_table(n=60, classes=classes, groups=12)
    label, called = table["label"].to_numpy(), table.predicted_classes()
    names = [str(c) for c in range(max(2, classes))]
    found = classification._Rows(table, 0.5, 0).evidence(names)

    def counted(metric: str, *kinds: tuple[str, np.ndarray]) -> None:
        expected = [(kind, int(rows.sum()), table["group"][rows].nunique()) for kind, rows in kinds]
        assert [(of.kind, of.total_images, of.groups) for of in found[metric]] == expected

    each = range(len(names))
    counted("accuracy", ("in all", label >= 0))
    counted("loss", ("in all", label >= 0))
    counted("balanced_accuracy", *((f"with {c}", label == c) for c in each))
    counted("auroc", *((f"with {c}", label == c) for c in each))
    positive = [1] if classes == 1 else list(each)
    counted("recall", *((f"with {c}", label == c) for c in positive))
    counted("precision", *((f"called {c}", called == c) for c in positive))
    counted("f1", *((f"with or called {c}", (label == c) | (called == c)) for c in positive))
    other = "with 1" if classes == 1 else "without 0"
    counted("sensitivity_at_0.9", (other, label != 0), ("with 0", label == 0))
    if classes > 1:
        counted("auroc_2", ("with 2", label == 2), ("without 2", label != 2))
        counted("precision_2", ("called 2", called == 2))


def test_what_is_constant_is_reported() -> None:
    def of(logits: Any, **options: float) -> str | None:
        return classification.report(
            make(range(len(logits)), [-1] * len(logits), [""] * len(logits), [0] * len(logits), logits),
            **options,
        )["constant"]

    assert of([1.0]) is None
    assert of([1.0, 1.0]) == "all 2 images have the same logits"
    assert of([[0.0, 1.0, 2.0]] * 2) == "all 2 images have the same logits"
    assert of([1.0, 1.5]) == "all 2 images are called 1"
    assert of([1.0, 1.5], threshold=0.78) is None
    assert of([-1.0, 1.0]) is None


def test_the_method_of_the_intervals_is_in_the_data() -> None:
    assert classification.report(random_table())["intervals"] == {
        "method": "Wilson, for the effective sample size by the jackknife over groups; loss: on the log scale",
        "confidence": 0.95,
        "unit": "group",
        "least_groups": intervals.MIN_GROUPS,
        "least_correlation": intervals.CORRELATION,
    }


def test_precision_needs_groups_in_which_the_class_is_called() -> None:
    table = of_groups([0, 1] * 6)
    called = table["group"].isin(["p1", "p3"])
    found = classification.report(table.assign(probability=called.astype(float)))["overall"]
    assert found["precision"]["withheld"] == "2 groups called tumor, expected at least 5"


@pytest.mark.parametrize("classes", [1, 3])
def test_hidden_labels_are_left_out(classes: int) -> None:
    table = random_table(n=100, classes=classes)
    hidden = table.copy()
    hidden.loc[60:, "label"] = -1
    assert classification.compute(hidden) == classification.compute(table[:60])
    assert classification.report(hidden) == classification.report(table[:60])
    nothing = classification.report(hidden.assign(label=-1))["overall"]
    assert nothing.pop("n") == nothing.pop("groups") == sum(nothing.pop("groups_by_class").values()) == 0
    assert len(nothing) >= 8
    assert all(value == {"value": None, "low": None, "high": None} for value in nothing.values())


def test_empty_table() -> None:
    values = classification.compute(make([], [], [], [], []))
    assert values.pop("n") == 0
    assert set(values.values()) == {None}


def test_saturated_probabilities_still_rank() -> None:
    values = classification.compute(make("abc", [0] * 3, [""] * 3, [0, 1, 1], [50.0, 60.0, 70.0]))
    assert values["auroc"] == 1
    assert values["loss"] == pytest.approx(50 / 3)


def test_bad_arguments() -> None:
    with pytest.raises(HistoError, match="threshold is -1"):
        classification.compute(random_table(), threshold=-1)


def test_for_trainer() -> None:
    table = random_table(n=50)
    logits, labels = table.logits, table["label"].to_numpy()
    values = classification.for_trainer()(EvalPrediction(predictions=logits[:, None], label_ids=labels))
    expected = classification.compute(table)
    assert values == {name: value for name, value in expected.items() if name != "loss"}
    assert all(type(value) is float for value in values.values())
    with_index = EvalPrediction(predictions=logits, label_ids=(labels, np.arange(50)))
    assert classification.for_trainer()(with_index) == values
    none = EvalPrediction(predictions=np.full((50, 1), -1.0), label_ids=labels)  # no image is called positive
    assert "precision" not in classification.for_trainer()(none)
    assert classification.for_trainer(selection="precision")(none)["precision"] == 0
    assert "auroc" not in classification.for_trainer()(EvalPrediction(predictions=logits, label_ids=np.zeros(50, int)))
    with pytest.raises(HistoError, match="the first ids: 0"):
        classification.for_trainer()(EvalPrediction(predictions=logits * np.nan, label_ids=labels))


def test_threshold_and_negative_class_reach_the_metrics_of_logits_and_of_the_trainer() -> None:
    two, several = random_table(), random_table(classes=3)
    for table, settings in ((two, {"threshold": 0.8}), (several, {"negative": 2})):
        logits, labels = table.logits, table["label"].to_numpy()
        expected, default = classification.compute(table, **settings), classification.compute(table)
        assert expected != default
        assert classification.of_logits(logits, labels, **settings) == expected
        assert classification.of_logits(logits, labels) == default
        found = classification.for_trainer(**settings)(EvalPrediction(predictions=logits, label_ids=labels))
        assert found == {name: value for name, value in expected.items() if name != "loss"}


def test_metrics_by_center_during_training() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=40), rng.integers(0, 2, 40)
    centers = [0, 2, 2, -1] * 10  # by row of the table; evaluation comes in another order
    index = rng.permutation(40)
    evaluation = EvalPrediction(predictions=logits, label_ids=(labels, index))
    plain = classification.for_trainer()(evaluation)
    assert classification.for_trainer(centers=[1] * 40)(evaluation) == plain  # of one center
    found = classification.for_trainer(centers=centers)(evaluation)
    assert found.keys() - plain.keys() == {
        f"center_{center}/{metric}" for center in (0, 2) for metric in ("accuracy", "balanced_accuracy", "auroc")
    }
    assert found == found | plain
    for center in (0, 2):
        rows = np.array(centers)[index] == center
        expected = classification.of_logits(logits[rows], labels[rows])
        assert found[f"center_{center}/auroc"] == expected["auroc"]
        assert found[f"center_{center}/accuracy"] == expected["accuracy"]
    # Names as a tracker takes them, one for each center.
    names = ["a/../b c", "", "Universität", "Universitit"]
    named = classification.for_trainer(centers=[0, 2, 3, 3] * 10, center_names=names)(evaluation)
    keys = {key.split("/")[0] for key in named if key.startswith("center_")}
    assert keys == {"center_a_.._b_c", "center_Universit_t", "center_Universitit"}
    alike = classification.for_trainer(centers=[0, 1] * 20, center_names=["a b", "a/b"])(evaluation)
    assert {key.split("/")[0] for key in alike if key.startswith("center_")} == {"center_a_b_0", "center_a_b_1"}
    many = classification.for_trainer(centers=list(range(60)), center_names=())
    table = EvalPrediction(predictions=np.zeros(60), label_ids=(np.arange(60) % 2, np.arange(60)))
    assert not [key for key in many(table) if key.startswith("center_")]


def test_evaluate_metric_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something connects"))
    metric = ClassificationMetrics()
    logits, labels = np.array([[2.0, 0, 0], [0, 1, 0], [0, 3, 0], [0, 0, 1]]), np.array([0, 1, 2, 2])
    many = metric.compute(predictions=logits, references=labels)
    binary = metric.compute(predictions=logits[:, 1], references=labels % 2, threshold=0.9)
    for i in (0, 2):
        metric.add_batch(predictions=logits[i : i + 2], references=labels[i : i + 2])
    batched = metric.compute()
    assert many == batched == classification.of_logits(logits, [0, 1, 2, 2])
    assert binary == classification.of_logits(logits[:, 1], [0, 1, 0, 0], threshold=0.9)
