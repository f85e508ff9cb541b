"""Classifiers on frozen features, on simple features with known results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from sklearn.linear_model import LogisticRegression

from hf_histo.evaluation import probes
from hf_histo.evaluation.figures import few_labels
from hf_histo.evaluation.reporting.summary import spread

CENTERS = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])


def images(count: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features around the corners, of random lengths, and their labels."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), count)
    features = CENTERS[labels] + noise * random.normal(size=(3 * count, 3))
    return features * random.uniform(0.1, 10, (3 * count, 1)), labels


@pytest.mark.parametrize("name", probes.PROBES)
def test_every_probe_learns_and_length_does_not_matter(name: str) -> None:
    train, labels = images(4, 0.2, 0)
    val, val_labels = images(4, 0.2, 1)
    test, truth = images(30, 0.2, 2)
    scores = probes.PROBES[name](train, labels, val, val_labels, test)
    assert scores.shape == (90, 3)
    assert np.isfinite(scores).all()
    assert (scores.argmax(axis=1) == truth).mean() > 0.9
    again = probes.PROBES[name](7 * train, labels, val, val_labels, test)
    assert np.allclose(scores, again, atol=1e-4)


@pytest.mark.parametrize("name", probes.PROBES)
def test_one_image_of_each_class_is_enough(name: str) -> None:
    train, labels = images(1, 0.0, 0)
    scores = probes.PROBES[name](train, labels, train, labels, train)
    assert scores.argmax(axis=1).tolist() == [0, 1, 2]


def test_a_prototype_is_the_mean_of_its_class() -> None:
    train = np.array([[1.0, 0], [0, 1], [-1, 0]])
    scores = probes.prototype(train, np.array([0, 0, 1]), train, np.array([0, 0, 1]), np.array([[0, 2.0]]))
    assert np.allclose(scores, [[-0.5, -2.0]])  # distances to (1/2, 1/2) and (-1, 0)


def test_the_number_of_neighbors_is_chosen_on_validation() -> None:
    # A stray image of class 1 amid class 0: one neighbor errs beside it, three do not.
    train = np.array([[1, 0.0], [1, 0.1], [1, 0.2], [1, 0.11], [0, 1.0], [0.1, 1.0]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    val, test = np.array([[1, 0.115], [0.05, 1]]), np.array([[1, 0.112]])
    assert probes.knn(train, labels, val, np.array([0, 1]), test).argmax() == 0
    assert probes.knn(train, labels, val, np.array([1, 1]), test).argmax() == 1


def test_the_penalty_is_chosen_on_validation_the_stronger_of_equals() -> None:
    (train, labels), (val, val_labels), (test, _) = images(6, 0.8, 3), images(40, 0.8, 4), images(5, 0.8, 5)
    models = [
        LogisticRegression(C=c, class_weight="balanced", max_iter=2000).fit(probes.unit(train), labels)
        for c in probes.INVERSE_PENALTIES
    ]
    right = [model.score(probes.unit(val), val_labels) for model in models]
    best = right.index(max(right))
    assert models[best].C != 1
    expected = models[best].predict_log_proba(probes.unit(test))
    np.testing.assert_allclose(probes.linear(train, labels, val, val_labels, test), expected)


def test_parameters() -> None:
    assert [probes.trainable(name, 1280, 7) for name in ("prototype", "knn", "linear")] == [0, 0, 1281 * 7]


def test_curves_are_drawn(tmp_path: Path) -> None:
    series = {
        "linear": {1: spread([0.2, 0.3]), 4: spread([0.4, 0.5]), few_labels.ALL: spread([0.7, 0.72])},
        "lora": {1: spread([0.25]), 4: spread([None])},
    }
    few_labels.curves(series, tmp_path / "a.png", title="cells", axis="accuracy")
    few_labels.curves({"lora": {2: spread([0.5])}}, tmp_path / "b.png", title="cells", axis="accuracy")
    with PIL.Image.open(tmp_path / "a.png") as one, PIL.Image.open(tmp_path / "b.png") as other:
        assert one.size == other.size == (1200, 750)
        assert one.tobytes() != other.tobytes()
