"""Calibration against scikit-learn and brute force, and temperatures against planted ones."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from PIL import Image
from scipy.special import expit, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions


def table(logits: np.ndarray, labels: np.ndarray, centers: int = 1) -> pd.DataFrame:
    return Predictions.make(range(len(labels)), np.arange(len(labels)) % centers, [""] * len(labels), labels, logits)


def planted(temperature: float, classes: int = 1, n: int = 3000) -> pd.DataFrame:
    """Labels are drawn from the true probabilities; logits are the true ones times `temperature`."""
    random = np.random.default_rng(0)
    logits = 2 * random.normal(size=(n, classes))
    chance = expit(np.hstack([-logits, logits])) if classes == 1 else softmax(logits, axis=1)
    labels = (random.random((n, 1)) > chance.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return table(logits * temperature, labels, centers=3)


@pytest.mark.parametrize(("binning", "strategy"), [("equal_width", "uniform"), ("equal_mass", "quantile")])
def test_reliability_is_that_of_scikit_learn(binning: calibration.Binning, strategy: str) -> None:
    predictions = planted(2.0)
    found = calibration.reliability(predictions, bins=10, binning=binning)
    frequency, probability = calibration_curve(
        predictions["label"], predictions.probabilities, n_bins=10, strategy=strategy
    )
    np.testing.assert_allclose(found["frequency"], frequency)
    np.testing.assert_allclose(found["probability"], probability)
    assert found["n"].sum() == 3000
    if binning == "equal_mass":
        assert set(found["n"]) == {300}
    error = calibration.expected_calibration_error(predictions, bins=10, binning=binning)
    assert error == pytest.approx(np.abs(frequency - probability) @ found["n"] / 3000)


def test_error_of_several_classes_is_that_of_the_predicted_class() -> None:
    predictions = planted(3.0, classes=4)
    probability = predictions.probabilities
    confidence, right = probability.max(axis=1), probability.argmax(axis=1) == predictions["label"]
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        expected += abs((right[inside] * 1.0 - confidence[inside]).sum()) / 3000
    assert calibration.expected_calibration_error(predictions) == pytest.approx(expected)
    assert expected > 0.05


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_brier_score_is_that_of_scikit_learn(classes: int) -> None:
    predictions = planted(2.0, classes=classes)
    probability = predictions.probabilities
    expected = brier_score_loss(predictions["label"], probability[:, 1] if classes == 2 else probability)
    assert calibration.brier_score(predictions) == pytest.approx(expected)


def test_bins_are_closed_on_the_right_and_ties_share_one() -> None:
    tied = table(np.zeros(8), np.array([0, 1] * 4))
    for binning in ("equal_width", "equal_mass"):
        found = calibration.reliability(tied, bins=2, binning=binning)  # type: ignore[arg-type]
        assert found.to_dict("records") == [{"probability": 0.5, "frequency": 0.5, "n": 8}]
    edges = table(np.array([-800.0, 0.0, 0.1, 800.0]), np.array([0, 1, 1, 1]))  # probabilities 0, 0.5, 0.52, 1
    assert calibration.reliability(edges, bins=2)["n"].tolist() == [2, 2]


@pytest.mark.parametrize("classes", [1, 3])
def test_hidden_labels_are_left_out(classes: int) -> None:
    predictions = planted(2.0, classes=classes)
    hidden = predictions.assign(label=predictions["label"].where(predictions.index < 1000, -1))
    assert calibration.compute(hidden) == calibration.compute(predictions[:1000])
    assert calibration.fit_temperature(hidden) == calibration.fit_temperature(predictions[:1000])
    nothing = predictions.assign(label=-1)
    nothing.attrs["label_names"] = ["normal", "tumor"] if classes == 1 else ["a", "b", "c"]
    undefined = {"n": 0, "ece": None, "ece_equal_mass": None, "brier": None}
    assert calibration.compute(nothing) == undefined
    assert calibration.report(nothing)["centers"]["2"] == undefined


def test_each_error_has_its_own_bins_and_one_bin_is_enough() -> None:
    predictions = planted(2.0)
    found = calibration.compute(predictions)
    for key, binning in (("ece", "equal_width"), ("ece_equal_mass", "equal_mass")):
        assert found[key] == calibration.expected_calibration_error(predictions, binning=binning)  # type: ignore[arg-type]
    assert found["ece"] != found["ece_equal_mass"]
    (row,) = calibration.reliability(predictions, bins=1).to_dict("records")
    assert (row["frequency"], row["n"]) == (pytest.approx(predictions["label"].mean()), 3000)


def test_report_by_center() -> None:
    predictions = planted(2.0)
    predictions.loc[predictions["center"] == 2, "center"] = -1
    found = calibration.report(predictions)
    assert list(found["centers"]) == ["0", "1"]
    assert found["centers"]["1"] == calibration.compute(predictions[predictions["center"] == 1])
    assert (found["overall"]["n"], found["bins"]) == (3000, calibration.BINS)


@pytest.mark.parametrize("temperature", [0.015, 0.5, 1.0, 4.0, 80.0])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_a_planted_temperature_is_found(temperature: float, classes: int) -> None:
    predictions = planted(temperature, classes=classes)
    found = calibration.fit_temperature(predictions)
    assert found.reason is None
    assert found.value == pytest.approx(temperature, rel=0.1)

    def loss(value: float) -> float:
        return float(log_loss(predictions["label"], predictions.with_temperature(value).probabilities))

    assert loss(found.value) < min(loss(found.value * 0.99), loss(found.value * 1.01))


def test_applying_divides_logits_and_mends_probabilities() -> None:
    predictions = planted(4.0).assign(predicted="stale")
    predictions.attrs["label_names"] = ["normal", "tumor"]
    scaled = predictions.with_temperature(4.0)
    np.testing.assert_allclose(scaled["logit"], predictions["logit"] / 4)
    np.testing.assert_allclose(scaled["probability"], expit(predictions["logit"] / 4))
    assert "predicted" not in scaled and scaled.attrs == predictions.attrs
    before, after = calibration.compute(predictions), calibration.compute(scaled)
    assert after["ece"] < before["ece"] / 3  # type: ignore[operator]
    assert after["brier"] < before["brier"]  # type: ignore[operator]
    assert classification.compute(scaled)["auroc"] == classification.compute(predictions)["auroc"]
    assert calibration.fit_temperature(scaled).value == pytest.approx(
        calibration.fit_temperature(predictions).value / 4, rel=1e-6
    )
    for value in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(HistoError, match="temperature is"):
            predictions.with_temperature(value)


@pytest.mark.parametrize(
    ("logits", "labels", "reason"),
    [
        ([1.0, 2.0], [-1, -1], "no image is labeled"),
        ([1.0, -2.0], [1, 1], "only class '1' is labeled"),
        ([-40.0, 40.0], [0, 1], "separate"),
        ([-1e-3, 1e-3], [0, 1], "separate"),
        ([[0.1, 0.3, -0.2], [0.3, 0.1, 0.0]], [1, 0], "separate"),
        ([0.0, 0.0], [0, 1], "chance"),
        ([700.0, 700.0], [0, 1], "chance"),
        ([2.0, -2.0], [0, 1], "chance"),
    ],
)
def test_where_no_temperature_fits_it_is_1_and_the_reason_is_given(
    logits: list[float], labels: list[int], reason: str
) -> None:
    found = calibration.fit_temperature(table(np.array(logits), np.array(labels)))
    assert found.value == 1
    assert reason in str(found.reason)


def test_bad_bins_are_refused() -> None:
    with pytest.raises(HistoError, match="bins is 0"):
        calibration.reliability(planted(1.0), bins=0)
    with pytest.raises(HistoError, match="binning is 'equal'"):
        calibration.reliability(planted(1.0), binning="equal")  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [1, 3])
def test_reliability_diagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    drawn, titles, panels, plot, title = [], [], [], Axes.plot, Axes.set_title
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: (drawn.append(k.get("data")), plot(self, *a, **k))[1])

    def titled(axes: Axes, text: str) -> object:
        titles.append(text)
        panels.append(axes)
        return title(axes, text)

    monkeypatch.setattr(Axes, "set_title", titled)
    predictions = planted(2.0, classes=classes)
    calibration.reliability_diagram(predictions, tmp_path / "reliability.png", bins=10)
    with Image.open(tmp_path / "reliability.png") as image:
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 1
    assert [text.split("\n")[0] for text in titles] == ["overall", "center 0", "center 1", "center 2"]
    assert {(axes.get_xlim(), axes.get_ylim()) for axes in panels} == {((0, 1), (0, 1))}
    assert panels[0].get_ylabel() == ("share of 1" if classes == 1 else "share predicted right")
    error = calibration.expected_calibration_error(predictions, bins=10)
    assert titles[0].endswith(f"3,000 images, ECE {error:.3f}")
    curves = [data for data in drawn if data is not None]
    pd.testing.assert_frame_equal(curves[2], calibration.reliability(predictions[predictions["center"] == 1], bins=10))

    titles.clear()
    calibration.reliability_diagram(predictions.assign(center=4), tmp_path / "one.png")
    assert len(titles) == 1
    calibration.reliability_diagram(predictions.assign(label=-1), tmp_path / "hidden.png")
    assert len(titles) == 1 and (tmp_path / "hidden.png").exists()
