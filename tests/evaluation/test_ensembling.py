"""Averages of logits, matched by id, and tables that can't be averaged."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration
from hf_histo.evaluation.ensembling import average, compare
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions

make = Predictions.make


def random_table(classes: int = 1, n: int = 50, seed: int = 0) -> pd.DataFrame:
    labels = np.random.default_rng(0).integers(0, max(2, classes), n)
    logits = 2 * np.random.default_rng(seed).normal(size=(n, classes))
    return make([f"i{i}" for i in range(n)], np.arange(n) % 3, [f"g{i}" for i in range(n)], labels, logits)


def shuffled(table: pd.DataFrame) -> pd.DataFrame:
    return table.sample(frac=1, random_state=0).reset_index(drop=True)


@pytest.mark.parametrize("weights", [None, [1, 3], [0, 2]])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_probabilities_are_geometric_means(classes: int, weights: list[float] | None) -> None:
    tables = [random_table(classes, seed=0), random_table(classes, seed=1)]
    found = average([tables[0], shuffled(tables[1])], weights)
    shares = np.array(weights or [1, 1]) / sum(weights or [1, 1])
    p = [table.probabilities for table in tables]
    p = [np.stack([1 - q, q], axis=1) if q.ndim == 1 else q for q in p]
    expected = p[0] ** shares[0] * p[1] ** shares[1]
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, expected if classes > 2 else expected[:, 1])
    for column in ("id", "center", "group", "label"):
        assert found[column].equals(tables[0][column])


def test_one_table_stays_and_a_constant_per_image_does_not_matter() -> None:
    one = random_table(4)
    pd.testing.assert_frame_equal(average([one]), one)
    shifted = make(one["id"], one["center"], one["group"], one["label"], one.logits + np.arange(50)[:, None])
    np.testing.assert_allclose(average([shifted, one]).probabilities, one.probabilities)


def test_one_and_two_logits_of_two_classes_are_averaged() -> None:
    one = random_table()
    logits = one.logits
    two = make(one["id"], one["center"], one["group"], one["label"], np.stack([5 - logits, 5 + logits], axis=1))
    np.testing.assert_allclose(average([one, two])["logit"], 1.5 * logits)


def test_names_of_classes_stay() -> None:
    named = random_table()
    named.attrs["label_names"] = ["normal", "tumor"]
    assert average([named, random_table(seed=1)]).attrs["label_names"] == ["normal", "tumor"]


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ([[], []], []),
        ([["color statistics"], []], ["color statistics"]),
        ([["threshold"], ["color statistics", "threshold"]], ["color statistics", "threshold"]),
        ([["color statistics"], None], ["color statistics"]),
        ([[], None], None),
    ],
)
def test_an_average_is_transductive_where_one_of_its_parts_is(
    recorded: list[list[str] | None], expected: list[str] | None
) -> None:
    tables = [random_table(seed=seed) for seed in range(len(recorded))]
    for table, measured in zip(tables, recorded, strict=True):
        if measured is not None:
            table.attrs["transductive"] = measured
    averaged = average(tables)
    assert averaged.attrs["transductive"] == expected
    assert classification.report(averaged)["transductive"] == expected
    assert classification.report(averaged.with_temperature(2.0))["transductive"] == expected
    assert [table.attrs.get("transductive") for table in tables] == recorded


def renamed(names: list[str]) -> pd.DataFrame:
    table = random_table()
    table.attrs["label_names"] = names
    return table


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average([]), "tables are empty"),
        (lambda: average([random_table(), random_table()[:-2]]), "table 1 and table 0 differ in 2 ids, e.g. i48"),
        (lambda: average([random_table()[:-2], random_table()]), "differ in 2 ids"),
        (lambda: average([random_table(), random_table(3)]), r"table 1 has the classes \['0', '1', '2'\]"),
        (lambda: average([renamed(["a", "b"]), renamed(["b", "a"])]), r"expected those of table 0, \['a', 'b'\]"),
        (lambda: average([random_table(), random_table().assign(label=-1)]), "has label -1 for id i0"),
        (lambda: average({"a": random_table(), "b": random_table()[1:]}), "^b and a differ in 1 ids"),
        (lambda: average([random_table()], [1, 2]), "expected 1 numbers"),
        (lambda: average([random_table()] * 2, [0, 0]), "not all 0"),
        (lambda: average([random_table()] * 2, [2, -1]), "at least 0"),
        (lambda: average([random_table()] * 2, [1, np.nan]), "weights are"),
        (lambda: compare({"mine": random_table(), "theirs": random_table()[1:]}), "theirs and mine differ in 1 ids"),
    ],
)
def test_what_does_not_match_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(HistoError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_compare() -> None:
    tables = {"first": random_table(), "second": shuffled(random_table(seed=1))}
    found = compare(tables, threshold=0.7)
    assert list(found.index) == ["first", "second"]
    assert found.loc["second", "f1"] == pytest.approx(classification.compute(tables["second"], threshold=0.7)["f1"])
    assert found.loc["second", "ece"] == pytest.approx(calibration.compute(tables["second"])["ece"])
    hidden = compare({"hidden": random_table().assign(label=-1)})
    assert hidden.loc["hidden", "n"] == 0
    assert set(found.dtypes) == set(hidden.dtypes) == {np.dtype(np.float64)}
    assert np.isnan(hidden.loc["hidden", ["auroc", "brier"]].to_numpy(np.float64)).all()
