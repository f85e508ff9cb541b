"""How good a predictions table is, overall and per acquisition center, with intervals that respect patients.

Every metric is one function of row weights. With all weights 1 it gives the value; with the weights of bootstrap
resamples, a whole block of them at once, it gives the interval. Both therefore mean exactly the same thing.

Two classes give metrics of the positive class (label 1). More classes give the same names as unweighted (macro)
averages over the classes for which the value is defined, and `precision_<class>`, `recall_<class>` and `auroc_<class>`
besides. Screening metrics need a class that means "nothing found", which of two classes is the first one unless told.

| metric | definition | undefined where |
|---|---|---|
| `accuracy` | share of rows predicted right | there is no labeled row |
| `balanced_accuracy` | mean recall over classes (Brodersen et al. 2010, eq. 7) | fewer than two classes occur |
| `auroc` | probability that a positive outranks a negative, ties 1/2 (Hanley & McNeil 1982); one against the rest | \
a class or its rest does not occur |
| `average_precision` | Σ (Rₖ - Rₖ₋₁) Pₖ over distinct scores (Manning et al. 2008, sec. 8.4); one against the rest | \
a class or its rest does not occur |
| `precision` | TP / (TP + FP) | the class is never predicted |
| `recall` | TP / (TP + FN) | the class does not occur |
| `f1` | 2 TP / (2 TP + FP + FN) | the class neither occurs nor is predicted |
| `loss` | unweighted cross entropy in nats, from the logits | there is no labeled row |
| `sensitivity_at_<s>` | highest share of the images of any other class that a threshold on 1 - p(negative) finds, \
leaving at least the share s, the specificity, of the negative images alone | either kind does not occur |

An undefined metric is None. Rows with a hidden label (-1) are left out; `n` counts the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import array, label_names, log_odds, make, predicted

if TYPE_CHECKING:
    from transformers import EvalPrediction  # imports torch, which nothing here needs

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
SPECIFICITIES = (0.9, 0.95)  # of the screening metrics
BLOCK = 2**18  # rows × resamples worked on at once: 2 MiB per float64 array stays near the processor's cache


def compute(
    predictions: pd.DataFrame, *, threshold: float = 0.5, negative: int | None = None
) -> dict[str, float | None]:
    """Return every metric of the module's table, and `n`.

    Args:
        predictions: a predictions table.
        threshold: the probability in [0, 1] from which on class 1 is predicted, where there are two classes.
        negative: the class that means "nothing found"; None is class 0 of two, and no screening metric for more.

    Raises:
        HistoError: `threshold` is outside [0, 1].
    """
    rows = _Rows(predictions, threshold, negative)
    return {"n": len(rows.labels)} | {name: _defined(value[0]) for name, value in rows.metrics().items()}


def report(
    predictions: pd.DataFrame,
    *,
    threshold: float = 0.5,
    negative: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return every metric with its interval, overall and for each known center.

    The interval is the 95% percentile interval (Efron & Tibshirani 1993, sec. 13.3) of a bootstrap that draws whole
    groups with replacement, since images of one patient or slide are not independent (the "cluster bootstrap", Field
    & Welsh 2007, J. R. Stat. Soc. B 69(3):369-390). Resamples on which a metric is undefined are left out; where fewer
    than half are left, or there is only one group, the interval is None.

    Args:
        predictions: a predictions table. Rows of the unknown center (-1) count in "overall" only.
        threshold, negative: as in `compute`.
        resamples: how many bootstrap resamples, at least 1.
        seed: of the bootstrap.

    Returns:
        `{"constant": what `constant` returns, "overall": M, "centers": {"0": M, ...}, "threshold": ...,
        "negative": ..., "bootstrap": {...}}`, ready for JSON, where M is
        `{"n": int, "groups": int, "<metric>": {"value": v, "low": l, "high": h}, ...}`.

    Raises:
        HistoError: `threshold` is outside [0, 1], or `resamples` is less than 1.
    """
    if resamples < 1:
        raise HistoError(f"resamples is {resamples}, expected at least 1: 1000 give a stable 95% interval")
    centers = sorted(set(predictions["center"]) - {-1})

    def with_intervals(part: pd.DataFrame) -> dict[str, Any]:
        return _with_intervals(_Rows(part, threshold, negative), resamples, seed)

    return {
        "constant": constant(predictions, threshold=threshold),
        "overall": with_intervals(predictions),
        "centers": {str(center): with_intervals(predictions[predictions["center"] == center]) for center in centers},
        "threshold": threshold,
        "negative": _Rows(predictions, threshold, negative).negative,
        "bootstrap": {"resamples": resamples, "seed": seed, "unit": "group", "confidence": CONFIDENCE},
    }


def constant(predictions: pd.DataFrame, *, threshold: float = 0.5) -> str | None:
    """Say what is the same for all of two rows or more, which a model that sees the images hardly gives; else None."""
    scores = array(predictions, "logit")
    if len(scores) < 2:
        return None
    if (np.ptp(scores, axis=0) < 1e-6).all():
        return f"all {len(scores)} images have the same logits"
    if len(classes := set(predicted(predictions, threshold).tolist())) == 1:
        return f"all {len(scores)} images are called {label_names(predictions)[classes.pop()]}"
    return None


def of_logits(
    logits: ArrayLike, labels: ArrayLike, *, threshold: float = 0.5, negative: int | None = None
) -> dict[str, float | None]:
    """Return `compute` of bare logits, (n,), (n, 1) or (n, K), and labels, (n,), as `predictions.make` takes them."""
    n = len(np.asarray(logits))
    return compute(make(range(n), np.full(n, -1), [""] * n, labels, logits), threshold=threshold, negative=negative)


def for_trainer(*, threshold: float = 0.5, negative: int | None = None) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` for `transformers.Trainer`.

    It takes logits of shape (n,), (n, 1) or (n, K), and label ids that are labels of shape (n,) or a tuple that
    starts with them. Undefined metrics are left out, and so is `loss`: it would replace the Trainer's own `eval_loss`,
    which is the objective that is trained.
    """

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        labels = evaluation.label_ids
        labels = labels[0] if isinstance(labels, tuple) else labels
        values = of_logits(evaluation.predictions, labels, threshold=threshold, negative=negative)
        return {name: float(value) for name, value in values.items() if value is not None and name != "loss"}

    return compute_metrics


class _Rows:
    """The labeled rows of a table as arrays, and the metrics as a function of how often each group of rows counts."""

    def __init__(self, predictions: pd.DataFrame, threshold: float, negative: int | None = None) -> None:
        own = "\0" + predictions["id"]  # no name of a group starts with this: an image without one is its own group
        groups = predictions["group"].where(predictions["group"] != "", own)
        labeled = (predictions["label"] >= 0).to_numpy()
        self.labels = predictions["label"].to_numpy(np.int64)[labeled]
        self.predicted = predicted(predictions, threshold)[labeled]
        self.groups = pd.factorize(groups[labeled])[0]
        self.group_count = int(self.groups.max(initial=-1)) + 1
        scores = {c: score[labeled] for c, score in log_odds(predictions).items()}
        self.orders = {c: _order(score) for c, score in scores.items()}
        self.classes = max(scores) + 1
        self.negative = 0 if negative is None and self.classes == 2 else negative
        if self.negative is not None:
            suspicion = -scores[self.negative] if self.negative in scores else scores[1]
            self.suspicion = _order(suspicion)
        if self.classes == 2:
            of_truth = np.where(self.labels == 1, scores[1], -scores[1])
        else:
            of_truth = np.stack(list(scores.values()))[self.labels, np.arange(len(self.labels))]
        self.losses = np.logaddexp(0, -of_truth)  # -log p of the true class, from its log odds

    def metrics(self, counts: Floats | None = None) -> dict[str, Floats]:
        """Return every metric, shape (B,), NaN where undefined, under `counts`: (groups, B), default all 1, B = 1."""
        counts = np.ones((self.group_count, 1)) if counts is None else counts
        correct = (self.predicted == self.labels).astype(np.float64)
        support = counts.T @ self._per_group(self.labels)
        called = counts.T @ self._per_group(self.predicted)
        hits = counts.T @ self._per_group(self.labels, correct)
        n = support.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            recall, precision, f1 = hits / support, hits / called, 2 * hits / (support + called)
            accuracy = hits.sum(axis=1) / n
            balanced = np.where((support > 0).sum(axis=1) > 1, _mean(recall), np.nan)
            loss = counts.T @ np.bincount(self.groups, self.losses, self.group_count) / n
            ranking = [
                _ranking((self.labels == c)[order], counts[self.groups[order]], ties)
                for c, (order, ties) in self.orders.items()
            ]
            aurocs, average_precisions = (np.stack(values, axis=1) for values in zip(*ranking, strict=True))
            binary = self.classes == 2
            values = {
                "accuracy": accuracy,
                "balanced_accuracy": balanced,
                "auroc": _mean(aurocs),
                "average_precision": _mean(average_precisions),
                "precision": precision[:, 1] if binary else _mean(precision),
                "recall": recall[:, 1] if binary else _mean(recall),
                "f1": f1[:, 1] if binary else _mean(f1),
                "loss": loss,
            }
        if not binary:
            values |= {f"precision_{c}": precision[:, c] for c in range(self.classes)}
            values |= {f"recall_{c}": recall[:, c] for c in range(self.classes)}
            values |= {f"auroc_{c}": aurocs[:, c] for c in range(self.classes)}
        if self.negative is not None:
            order, ties = self.suspicion
            positive = (self.labels != self.negative)[order]
            sensitivities = _sensitivities(positive, counts[self.groups[order]], ties)
            values |= {f"sensitivity_at_{s}": of for s, of in zip(SPECIFICITIES, sensitivities, strict=True)}
        return values

    def _per_group(self, classes: NDArray[np.int64], weights: Floats | None = None) -> NDArray[Any]:
        """Count rows by group and class, shape (groups, K)."""
        cells = self.group_count * self.classes
        return np.bincount(self.groups * self.classes + classes, weights, cells).reshape(-1, self.classes)


def _order(scores: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the order of falling scores, and the places in it where a new distinct score starts."""
    order = np.argsort(-scores)
    return order, np.flatnonzero(np.diff(scores[order], prepend=np.nan))


def _ranking(positive: NDArray[np.bool_], weights: Floats, ties: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Return the AUROC and the average precision, (B,) each, of rows, (n,), with weights, (n, B), by falling score."""
    positives = np.add.reduceat(weights * positive[:, None], ties, axis=0)
    negatives = np.add.reduceat(weights, ties, axis=0) - positives
    above, total = positives.cumsum(axis=0), (positives + negatives).cumsum(axis=0)
    p, n = positives.sum(axis=0), negatives.sum(axis=0)
    auroc = (negatives * (above - positives / 2)).sum(axis=0) / (p * n)
    # Scores that a resample leaves out add nothing, but 0/0 before the first that it holds would.
    precision = np.divide(above, total, out=np.zeros_like(total), where=total > 0)
    average_precision = (positives * precision).sum(axis=0) / p
    return auroc, np.where(n > 0, average_precision, np.nan)


def _sensitivities(positive: NDArray[np.bool_], weights: Floats, ties: NDArray[np.intp]) -> list[Floats]:
    """Return the sensitivity, (B,), at each of `SPECIFICITIES`, of rows as `_ranking` takes them."""
    positives = np.add.reduceat(weights * positive[:, None], ties, axis=0).cumsum(axis=0)
    negatives = np.add.reduceat(weights * ~positive[:, None], ties, axis=0).cumsum(axis=0)
    p, n = positives[-1:].sum(axis=0), negatives[-1:].sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found, spared = positives / p, (n - negatives) / n
    return [
        np.where((p > 0) & (n > 0), np.where(spared >= s, found, 0).max(axis=0, initial=0), np.nan)
        for s in SPECIFICITIES
    ]


def _with_intervals(rows: _Rows, resamples: int, seed: int) -> dict[str, Any]:
    groups = rows.group_count
    result: dict[str, Any] = {"n": len(rows.labels), "groups": groups}
    samples: dict[str, Floats] = {}
    if groups > 1:
        random = np.random.default_rng(seed)
        block = max(1, BLOCK // len(rows.labels))
        blocks = []
        for start in range(0, resamples, block):
            drawn = (random.integers(groups, size=groups) for _ in range(min(block, resamples - start)))
            counts = np.stack([np.bincount(draw, minlength=groups) for draw in drawn], axis=1)
            blocks.append(rows.metrics(counts.astype(np.float64)))
        samples = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    for name, value in rows.metrics().items():
        sample = samples.get(name, np.empty(0))
        sample = sample[np.isfinite(sample)]
        low = high = None
        if len(sample) and len(sample) >= resamples / 2:
            low, high = np.quantile(sample, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
        result[name] = {"value": _defined(value[0]), "low": low, "high": high}
    return result


def _mean(values: Floats) -> Floats:
    """Average over the last axis the values that are defined; NaN where none is."""
    return np.nansum(values, axis=-1) / np.isfinite(values).sum(axis=-1)


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
