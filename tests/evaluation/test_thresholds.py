"""Thresholds against brute force over every possible one, and their behavior on ties."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk

from hf_histo.errors import HistoError
from hf_histo.evaluation import thresholds
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions

make = Predictions.make


def table(logits: object, labels: object = None, centers: object = None) -> pd.DataFrame:
    n = len(np.asarray(logits))
    hidden = np.full(n, -1)
    return make(
        range(n), hidden if centers is None else centers, [""] * n, hidden if labels is None else labels, logits
    )


def random_table(n: int = 300, classes: int = 1, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    labels = random.integers(0, max(2, classes), n)
    noise = (8 * random.normal(size=(n, classes))).round() / 8  # scores tie
    return table(noise + (labels[:, None] if classes == 1 else np.eye(classes)[labels]), labels, labels * 0 + seed)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_share_is_met_without_labels(share: float) -> None:
    predictions = table(np.random.default_rng(0).normal(3, 1, size=1000))
    found = thresholds.for_share(predictions, share)
    assert found.achieved == share
    assert predictions.predicted_classes(found.value).mean() == share
    assert (found.criterion, found.n) == ("share", 1000)


def test_two_logits_are_the_same_as_one() -> None:
    logits = np.random.default_rng(0).normal(size=100)
    two = thresholds.for_share(table(np.stack([-logits, logits], axis=1)), 0.3)
    assert two.value == pytest.approx(thresholds.for_share(table(2 * logits), 0.3).value)


@pytest.mark.parametrize(
    ("logits", "share", "achieved"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.5, 0.0),  # all or none are equally near: the smaller share
        ([1.0, 1.0, 1.0, 1.0], 0.6, 1.0),
        ([-1.0, 0.0, 0.0, 2.0], 0.5, 0.25),  # 1/4 and 3/4 are equally near
        ([-1.0, 0.0, 0.0, 2.0], 0.6, 0.75),
        ([1.0, 2.0, 3.0], 0.5, 1 / 3),
        ([-800.0, -800.0], 1.0, 1.0),  # probability 0: threshold 0
        ([-800.0, 800.0], 0.5, 0.5),
        ([800.0, 800.0], 0.0, 1.0),  # probability 1 is above every threshold
        ([40.0, 36.0], 0.5, 0.5),  # 1 and its neighbors
    ],
)
def test_ties_and_ends(logits: list[float], share: float, achieved: float) -> None:
    predictions = table(logits)
    found = thresholds.for_share(predictions, share)
    assert found.achieved == achieved
    assert 0 <= found.value <= 1
    assert predictions.predicted_classes(found.value).mean() == achieved
    assert thresholds.for_share(predictions[::-1], share) == found


@pytest.mark.parametrize("low", [0.3, np.nextafter(0.3, 1)])  # the mean of the two is rounded up, and down
def test_neighboring_floats_are_parted(low: float) -> None:
    predictions = table([0.0, 0.0]).assign(probability=[low, np.nextafter(low, 1)])
    assert predictions.predicted_classes(thresholds.for_share(predictions).value).tolist() == [0, 1]


def test_thresholds_keep_a_distance_from_the_probabilities() -> None:
    predictions = table([-1.0, 1.0])
    assert thresholds.for_share(predictions).value == pytest.approx(0.5)


SCORES: dict[str, Callable[..., float]] = {
    "balanced_accuracy": sk.balanced_accuracy_score,
    "f1": sk.f1_score,
    "accuracy": sk.accuracy_score,
}


@pytest.mark.parametrize("criterion", [*SCORES, "sensitivity"])
@pytest.mark.parametrize("seed", range(3))
def test_chosen_threshold_is_the_best_of_all(criterion: thresholds.Criterion, seed: int) -> None:
    predictions = random_table(seed=seed)
    found = thresholds.choose(predictions, criterion, specificity=0.9)
    labels = predictions["label"].to_numpy()

    def value(threshold: float) -> float:
        answer = predictions.predicted_classes(threshold)
        if criterion != "sensitivity":
            return SCORES[criterion](labels, answer)
        enough = sk.recall_score(labels, answer, pos_label=0) >= 0.9
        return sk.recall_score(labels, answer) if enough else -1.0

    possible = [value(t) for t in [*np.unique(predictions.probabilities), 1.0]]
    assert found.achieved == pytest.approx(max(possible))
    assert value(found.value) == pytest.approx(found.achieved)
    if criterion != "sensitivity":
        assert classification.compute(predictions, threshold=found.value)[criterion] == pytest.approx(found.achieved)
    assert (found.criterion, found.n) == (criterion, 300)


def test_of_equally_good_thresholds_the_nearest_to_one_half() -> None:
    p = np.array([0.1, 0.3, 0.5, 0.8, 0.88, 0.92])
    # From 0.4 or from 0.9 on, one of six is wrong; in the reverse, from 0.1 or from 0.6 on.
    for probability, labels, value in ((p, [0, 0, 1, 0, 1, 1], 0.4), (1 - p[::-1], [0, 0, 1, 0, 1, 1], 0.6)):
        predictions = table(np.log(probability / (1 - probability)), labels)
        assert thresholds.choose(predictions, "accuracy").value == pytest.approx(value)


def test_of_equally_sensitive_thresholds_the_most_specific() -> None:
    p = np.array([0.1, 0.2, 0.3, 0.9])
    predictions = table(np.log(p / (1 - p)), [0, 0, 0, 1])
    assert thresholds.choose(predictions, "sensitivity", specificity=0.5).value == pytest.approx(0.6)


@pytest.mark.parametrize(("specificity", "value"), [(0.0, 1.0), (1.0, 0.5)])
def test_no_and_full_specificity_can_be_asked_for(specificity: float, value: float) -> None:
    predictions = table([-1.0, 1.0, 0.0, 2.0], [0, 0, 1, 1])
    assert thresholds.choose(predictions, "sensitivity", specificity=specificity).achieved == value


def test_hidden_labels_are_left_out() -> None:
    predictions = random_table()
    predictions.loc[100:, "label"] = -1
    for criterion in (*SCORES, "sensitivity"):
        assert thresholds.choose(predictions, criterion) == thresholds.choose(predictions[:100], criterion)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: thresholds.for_share(table([0.0]), 1.5), "share is 1.5"),
        (lambda: thresholds.for_share(table([]), 0.5), "no image"),
        (lambda: thresholds.for_share(table(np.eye(3))), "3 classes"),
        (lambda: thresholds.choose(table(np.eye(3), [0, 1, 2])), "3 classes"),
        (lambda: thresholds.choose(table([0.0, 1.0], [1, 1])), "only '1' is labeled"),
        (lambda: thresholds.choose(table([0.0, 1.0])), "no class is labeled"),
        (lambda: thresholds.choose(table([0.0, 1.0], [0, 1]), "auroc"), "criterion is 'auroc'"),  # type: ignore[arg-type]
        (
            lambda: thresholds.choose(table([0.0, 1.0], [0, 1]), "sensitivity", specificity=1.5),
            "1.5, expected a number",
        ),
        (lambda: thresholds.choose(table([800.0, 800.0], [0, 1]), "sensitivity"), "no threshold reaches"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(HistoError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
