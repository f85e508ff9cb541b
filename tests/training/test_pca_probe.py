"""The regression on principal components against a scikit-learn pipeline, and as a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from miniature import config, write_backbone, write_data
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from hf_histo.config import with_options
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.finetune import run_config
from hf_histo.inference import Classifier
from hf_histo.training.pca_probe import Probe, fit


def drawn(classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, 120)
    return random.normal(size=(120, 30)) * np.linspace(3, 0.2, 30) + np.eye(classes, 30)[labels] * 2, labels


@pytest.mark.parametrize("classes", [2, 4])
def test_it_is_the_pipeline_multiplied_out_with_the_best_number_of_components(classes: int) -> None:
    features, labels = drawn(classes)
    others, truth = drawn(classes, seed=1)
    seen: dict[int, float] = {}

    def score(probe: Probe) -> float:
        logits = others @ probe.weight.T + probe.bias
        answer = logits.argmax(axis=1) if classes > 2 else (logits[:, 0] > 0).astype(int)
        seen[probe.components] = float((answer == truth).mean())
        return seen[probe.components]

    probe = fit(features, labels, classes=classes, balanced=True, score=score)
    assert list(seen) == [2, 4, 8, 16]
    assert probe.value == max(seen.values()) == seen[probe.components]
    regression = LogisticRegression(max_iter=5000, class_weight="balanced")
    pipeline = make_pipeline(PCA(probe.components, whiten=True, random_state=0), regression).fit(features, labels)
    expected = pipeline.decision_function(others).reshape(len(others), -1)
    np.testing.assert_allclose(others @ probe.weight.T + probe.bias, expected, atol=5e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_copies_leave_no_component_of_rounding_errors(scale: float) -> None:
    features, labels = drawn(2)
    rows = np.repeat(np.arange(6), 20)
    probe = fit(scale * features[rows], labels[rows], classes=2, balanced=False, score=lambda probe: probe.components)
    assert probe.components == 4  # of the five that six pictures span
    assert np.abs(scale * probe.weight).max() < 10


def test_of_equal_scores_the_fewest_components_are_taken() -> None:
    features, labels = drawn(2)
    assert fit(features, labels, classes=2, balanced=True, score=lambda probe: 0.5).components == 2


def test_the_same_features_give_the_same_probe() -> None:
    """So many features that scikit-learn draws a part of the decomposition."""
    features, labels = drawn(2)
    wide = np.random.default_rng(2).normal(size=(520, 340)) + np.tile(features, (5, 12))[:520, :340]
    labels = np.tile(labels, 5)[:520]
    probes = [fit(wide, labels, classes=2, balanced=True, score=lambda probe: 0.5) for _ in range(2)]
    np.testing.assert_array_equal(probes[0].weight, probes[1].weight)


def test_a_class_without_images_is_refused() -> None:
    features, labels = drawn(2)
    with pytest.raises(HistoError, match="expected images of all 3 classes"):
        fit(features, labels, classes=3, balanced=False, score=lambda probe: 0.0)


def test_a_run_leaves_an_adapter_that_predicts_the_same(tmp_path: Path) -> None:
    backbone, data = write_backbone(tmp_path / "backbone"), load(write_data(tmp_path / "data"))
    gradient = config(tmp_path / "run", backbone, tmp_path / "data", "--metric_for_best_model=loss")
    options = with_options(gradient, {"method": "pca"})
    result = run_config(options, data)
    found = result.record["selection"]
    assert found["components"] in (2, 4, 8, 16) and found["metric"] == "loss"
    assert found["value"] == pytest.approx(result.record["splits"]["val"]["overall"]["loss"]["value"], abs=0.2)
    assert (result.adapter / "figures" / "components.png").stat().st_size > 5000
    written = Predictions.read(result.adapter / "predictions" / "test.parquet")
    again = Classifier.from_pretrained(result.adapter).predict(data["test"])
    np.testing.assert_allclose(written["probability"], again["probability"], atol=1e-6)
    assert json.loads((result.adapter / "hf_histo.json").read_text())["method"] == "pca"
    assert run_config(options, data).seconds is None


def test_two_images_have_one_component_and_equal_ones_none() -> None:
    features = np.array([[0.0, 1, 2], [1, 1, 0]])
    assert fit(features, np.array([0, 1]), classes=2, balanced=False, score=lambda _: 1.0).components == 1
    with pytest.raises(HistoError, match="the features of all training images are equal"):
        fit(np.ones((2, 3)), np.array([0, 1]), classes=2, balanced=False, score=lambda _: 1.0)
