"""Calibration of probabilities, and temperature scaling.

With two classes, the probability of class 1 is evaluated: of the images with a probability of 0.8, 80% should be of
class 1 (Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI). With more, that of
the predicted class: of the images predicted with 0.8, 80% should be right (Guo et al. 2017, "On Calibration of Modern
Neural Networks", sec. 2). Rows with a hidden label (-1) are always left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from hf_histo.errors import HistoError
from hf_histo.evaluation.figures.style import COLORS, GRAY, drawing, write_message
from hf_histo.evaluation.predictions import Predictions

BINS = 15  # Guo et al. 2017, table 1
LOWEST, HIGHEST = 0.01, 100.0  # beyond these, the optimal temperature is 0 or infinity

Binning = Literal["equal_width", "equal_mass"]


@dataclass(frozen=True)
class Temperature:
    """A number, `value`, to divide logits by; if none could be fitted, it is 1, and `reason` is why, else None."""

    value: float
    reason: str | None = None


def reliability(predictions: Predictions, *, bins: int = BINS, binning: Binning = "equal_width") -> pd.DataFrame:
    """Return the mean probability and the observed frequency in bins of the probability.

    Bins are closed on the right (Guo et al. 2017, sec. 2), the first one on both sides. Equal probabilities share a
    bin, so bins of equal mass have equal numbers of images only as far as ties allow.

    Args:
        predictions: a predictions table.
        bins: number of bins, at least 1.
        binning: "equal_width" divides [0, 1] evenly; "equal_mass" divides at the quantiles of the probabilities
            (Nguyen & O'Connor 2015, "Posterior Calibration and Exploratory Analysis for NLP Models", EMNLP).

    Returns:
        One row for each bin that holds an image, in rising order: `probability`, the mean in the bin, and `frequency`,
        the share of its images that are of class 1 (two classes) or predicted right (more), float64 in [0, 1]; `n`,
        its number of images, int64.

    Raises:
        HistoError: `bins` is less than 1, or `binning` is unknown.
    """
    if bins < 1:
        raise HistoError(f"bins is {bins}, expected at least 1: {BINS} is usual")
    if binning not in ("equal_width", "equal_mass"):
        raise HistoError(f"binning is {binning!r}, expected 'equal_width' or 'equal_mass'")
    probability, outcome = _claims(predictions)
    edges = np.linspace(0, 1, bins + 1)
    if binning == "equal_mass" and len(probability):
        edges = np.quantile(probability, edges)
    place = np.searchsorted(edges[1:-1], probability)
    rows = pd.DataFrame({"probability": probability, "frequency": outcome.astype(np.float64)}).groupby(place)
    return rows.mean().assign(n=rows.size()).reset_index(drop=True)


def expected_calibration_error(
    predictions: Predictions, *, bins: int = BINS, binning: Binning = "equal_width"
) -> float | None:
    """Return the mean of |frequency - probability| of each image's bin, in [0, 1]; None without labels.

    Naeini et al. 2015 for two classes; Guo et al. 2017, eq. 3, for more. Arguments and errors are those of
    `reliability`.
    """
    found = reliability(predictions, bins=bins, binning=binning)
    if found.empty:
        return None
    return float(np.average((found["frequency"] - found["probability"]).abs(), weights=found["n"]))


def brier_score(predictions: Predictions) -> float | None:
    """Return the mean squared error of the probabilities; None without labels.

    With two classes, it is the error of class 1, in [0, 1]; with more, the sum over classes, in [0, 2] (Brier 1950,
    "Verification of Forecasts Expressed in Terms of Probability", eq. 2, which for two classes gives twice this value).
    """
    labeled = predictions.labeled
    if labeled.empty:
        return None
    labels, classes = labeled.labels, labeled.num_classes
    if classes == 2:
        return float(np.mean((labeled.positive_probability - labels) ** 2))
    return float(np.mean(((labeled.class_probabilities - np.eye(classes)[labels]) ** 2).sum(axis=1)))


def compute(predictions: Predictions) -> dict[str, float | None]:
    """Return the number `n` of labeled images, `ece` (equal width), `ece_equal_mass` and `brier`, None if undefined."""
    return {
        "n": len(predictions.labeled),
        "ece": expected_calibration_error(predictions),
        "ece_equal_mass": expected_calibration_error(predictions, binning="equal_mass"),
        "brier": brier_score(predictions),
    }


def report(predictions: Predictions) -> dict[str, Any]:
    """Return `compute` as `{"overall": ..., "centers": {"0": ..., ...}, "bins": ...}`, in JSON values.

    Rows of unknown center (-1) are included in "overall" only.
    """
    return {
        "overall": compute(predictions),
        "centers": {center: compute(rows) for center, rows in predictions.known_centers.items()},
        "bins": BINS,
    }


def fit_temperature(predictions: Predictions) -> Temperature:
    """Return the temperature T that minimizes the negative log likelihood of softmax(logits / T).

    Guo et al. 2017, sec. 4.2; with one logit, softmax is over (0, logit). Fit it on validation predictions, never on
    those that are reported. The log likelihood is concave in 1 / T, so T is the only root of its derivative.

    `value` is 1 and `reason` is given if fewer than two classes are labeled, if the logits separate the classes (T
    would go to 0), or if they are no better than chance (T would go to infinity).

    Args:
        predictions: a labeled table. Its logits are used as stored: for a table that was calibrated before, the result
            is a further factor.
    """
    labeled = predictions.labeled
    labels = labeled.labels
    if len(np.unique(labels)) < 2:
        found = f"only class {labeled.label_names[labels[0]]!r}" if len(labels) else "no image"
        return Temperature(1.0, f"{found} is labeled: at least two classes are needed")
    logits = labeled.class_logits
    # Relative to the true class, so that no term is positive, not even by rounding, if all images are right.
    relative = logits - np.take_along_axis(logits, labels[:, None], axis=1)

    def slope(inverse: float) -> float:
        """Derivative of the negative log likelihood with respect to 1 / T."""
        return float((softmax(inverse * logits, axis=1) * relative).sum(axis=1).mean())

    if slope(1 / HIGHEST) >= 0:
        return Temperature(1.0, f"the logits are no better than chance: the best temperature is beyond {HIGHEST:g}")
    if slope(1 / LOWEST) <= 0:
        return Temperature(1.0, f"the logits separate the classes: the best temperature is below {LOWEST:g}")
    from scipy.optimize import brentq

    return Temperature(1 / brentq(slope, 1 / HIGHEST, 1 / LOWEST))


def reliability_diagram(predictions: Predictions, path: str | Path, *, bins: int = BINS, vector: bool = False) -> None:
    """Draw observed frequency against probability in bins of equal width, and the number of images per bin, as a PNG.

    The first panel shows all images, the others one center each, if several are known. On the dotted diagonal,
    probabilities are calibrated; below it, they are too high.

    Args:
        predictions: a predictions table; rows with a hidden label are left out.
        path: path of the PNG.
        bins: number of bins, at least 1.
        vector: also draw it as an SVG beside the PNG.

    Raises:
        HistoError: `bins` is less than 1.
    """
    names = predictions.label_names
    panels = dict(_panels(predictions.labeled))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with drawing(path, 3.8 * columns + 0.4, 5.0 * rows, vector=vector) as figure:
        if panels["overall"].empty:
            return write_message(figure, "No label is known.")
        grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[4, 1] * rows)
        for axes in grid.ravel():
            axes.set_axis_off()
        for i, (title, labeled) in enumerate(panels.items()):
            row, column = divmod(i, columns)
            upper, lower = grid[2 * row : 2 * row + 2, column]
            found = reliability(labeled, bins=bins)
            upper.plot([0, 1], [0, 1], color=GRAY, linestyle=":", linewidth=1)
            upper.plot("probability", "frequency", data=found, color=COLORS[0], marker="o", clip_on=False)
            lower.hist(_claims(labeled)[0], np.linspace(0, 1, bins + 1), color=COLORS[0], alpha=0.6)
            error = expected_calibration_error(labeled, bins=bins)
            upper.set_title(f"{title}\n{len(labeled):,} images, ECE {error:.3f}")
            upper.set(xlim=(0, 1), ylim=(0, 1), xticklabels=[])
            lower.set(xlim=(0, 1), xlabel=f"probability of {names[1] if len(names) == 2 else 'the predicted class'}")
            if column == 0:
                upper.set_ylabel(f"share of {names[1]}" if len(names) == 2 else "share predicted right")
                lower.set_ylabel("images")
            for axes in (upper, lower):
                axes.set_axis_on()


def _panels(labeled: Predictions) -> Iterator[tuple[str, Predictions]]:
    yield "overall", labeled
    if len(centers := labeled.known_centers) > 1:
        yield from ((f"center {center}", rows) for center, rows in centers.items())


def _claims(predictions: Predictions) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return, for each labeled image, the evaluated probability, and whether the predicted event occurred."""
    labeled = predictions.labeled
    labels = labeled.labels
    if labeled.empty or labeled.num_classes == 2:
        return labeled.positive_probability, labels == 1
    probability = labeled.class_probabilities
    return probability.max(axis=1), labels == probability.argmax(axis=1)
