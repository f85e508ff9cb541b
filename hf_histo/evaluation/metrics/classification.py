"""Classification metrics of a predictions table, overall and per acquisition center, with intervals over groups.

Each metric is a function of row weights: all weights 1 give its value, and setting the weights of some groups to 0
gives the replicates that `intervals` needs. Value and interval therefore use the same definition.

With two classes, metrics are those of the positive class (label 1). With more, they are unweighted (macro) averages
over the classes for which the value is defined, and `precision_<class>`, `recall_<class>` and `auroc_<class>` are
added. Screening metrics need a class that means "nothing found"; with two classes, the default is class 0.

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
| `sensitivity_at_<s>` | highest share of images of the other classes above a threshold on 1 - p(negative), where at \
least the share s (the specificity) of the negative images is below it | either kind does not occur |

An undefined metric is None. Rows with a hidden label (-1) are left out; `n` counts the rest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hf_histo.evaluation.metrics import intervals
from hf_histo.evaluation.metrics.intervals import Evidence
from hf_histo.evaluation.predictions import Predictions, independent_groups

if TYPE_CHECKING:
    from transformers import EvalPrediction  # imports torch, which is not needed here

Floats = NDArray[np.float64]

SPECIFICITIES = (0.9, 0.95)  # of the screening metrics
MIN_ABOVE = 5  # negative images above the threshold that the interval of a screening metric requires
PER_CENTER = ("accuracy", "balanced_accuracy", "auroc")  # during training; reports have every metric
MAX_CENTERS = 50  # shown one by one during training: trackers draw a curve for each
BLOCK = 2**18  # rows × sets of weights computed at once: 2 MiB per float64 array fits into the processor's cache


def compute(
    predictions: Predictions, *, threshold: float = 0.5, negative: int | None = None
) -> dict[str, float | None]:
    """Return each metric of the module's table, and the number `n` of labeled rows.

    Args:
        predictions: a predictions table.
        threshold: for two classes, the smallest probability in [0, 1] at which class 1 is predicted.
        negative: index of the class that means "nothing found"; None is class 0 of two classes, and no screening
            metrics for more.

    Raises:
        HistoError: `threshold` is outside [0, 1].
    """
    rows = _Rows(predictions, threshold, negative)
    return {"n": len(rows.labels)} | {name: _defined(value[0]) for name, value in rows.metrics().items()}


def report(predictions: Predictions, *, threshold: float = 0.5, negative: int | None = None) -> dict[str, Any]:
    """Return each metric with its 95% confidence interval, overall and for each known center.

    Intervals (see `intervals`) account for the similarity of images of one group (patient, slide); an image of unknown
    group is its own group. If there are too few groups for an interval, `low` and `high` are None and "withheld" is the
    reason: a recall needs enough groups with images of its class, an AUROC also enough without, and a mean over classes
    enough of each class that occurs.

    Args:
        predictions: a predictions table. Rows of unknown center (-1) are included in "overall" only.
        threshold, negative: as in `compute`.

    Returns:
        `{"constant": result of `constant`, "transductive": the property of the table, None if not recorded,
        "overall": M, "centers": {"0": M, ...}, "threshold": ..., "negative": ..., "intervals": {"method": ...,
        "confidence": 0.95, "unit": "group", ...}}` in JSON values, where M is `{"n": int, "groups": int,
        "groups_by_class": {"<class>": int, ...}, "<metric>": {"value": v, "low": l, "high": h}, ...}`. A group counts
        for each class that it has images of.

    Raises:
        HistoError: `threshold` is outside [0, 1].
    """
    names = predictions.label_names

    overall = _Rows(predictions, threshold, negative)
    by_center = {center: _Rows(rows, threshold, negative) for center, rows in predictions.known_centers.items()}
    return {
        "constant": constant(predictions, threshold=threshold),
        "transductive": predictions.transductive,
        "overall": _with_intervals(overall, names),
        "centers": {center: _with_intervals(rows, names) for center, rows in by_center.items()},
        "threshold": threshold,
        "negative": overall.negative,
        "intervals": {
            "method": "Wilson, for the effective sample size by the jackknife over groups; loss: on the log scale",
            "confidence": intervals.CONFIDENCE,
            "unit": "group",
            "least_groups": intervals.MIN_GROUPS,
            "least_correlation": intervals.CORRELATION,
        },
    }


def constant(predictions: Predictions, *, threshold: float = 0.5) -> str | None:
    """Return a sentence if all rows (two or more) have the same logits or class: the model may have learned nothing."""
    scores = predictions.logits
    if len(scores) < 2:
        return None
    if (np.ptp(scores, axis=0) < 1e-6).all():
        return f"all {len(scores)} images have the same logits"
    if len(classes := set(predictions.predicted_classes(threshold).tolist())) == 1:
        return f"all {len(scores)} images are called {predictions.label_names[classes.pop()]}"
    return None


def of_logits(
    logits: ArrayLike, labels: ArrayLike, *, threshold: float = 0.5, negative: int | None = None
) -> dict[str, float | None]:
    """Return `compute` for logits, (n,), (n, 1) or (n, K), and labels, (n,), as `Predictions.make` takes them."""
    n = len(np.asarray(logits))
    table = Predictions.make(range(n), np.full(n, -1), [""] * n, labels, logits)
    return compute(table, threshold=threshold, negative=negative)


def for_trainer(
    *,
    threshold: float = 0.5,
    negative: int | None = None,
    centers: Sequence[int] = (),
    center_names: Sequence[str] = (),
    selection: str | None = None,
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` function for `transformers.Trainer`.

    It takes logits of shape (n,), (n, 1) or (n, K), and label ids that are labels (n,) or a tuple that starts with
    them. Undefined metrics are left out, but `selection`, by which checkpoints are compared, is 0 then (precision where
    no image is called positive). So is `loss`, which would replace the Trainer's own `eval_loss`, the value of the
    training objective.

    With `centers`, label ids must be (labels, index). `PER_CENTER` metrics of each known center are added as
    `center_<name>/<metric>`, if there are 2 to `MAX_CENTERS`.

    Args:
        threshold, negative: as in `compute`.
        centers: center of each row of the evaluation set, -1 where unknown.
        center_names: names of the centers; without, their numbers are used.
        selection: name of the metric that chooses the checkpoint.
    """
    of_row = np.asarray(centers)
    known = np.unique(of_row[of_row >= 0]).tolist() if len(of_row) else []
    several = 2 <= len(known) <= MAX_CENTERS
    keys = _center_keys(known, center_names) if several else {}

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        given = evaluation.label_ids
        labels, index = (given[0], given[-1]) if isinstance(given, tuple) else (given, given)
        logits = np.asarray(evaluation.predictions)
        values = of_logits(logits, labels, threshold=threshold, negative=negative)
        values.pop("loss")
        if selection in values and values[selection] is None:
            values[selection] = 0.0
        for center, key in keys.items():
            rows = of_row[index] == center
            own = of_logits(logits[rows], labels[rows], threshold=threshold, negative=negative)
            values |= {f"{key}/{name}": own[name] for name in PER_CENTER}
        return {name: float(value) for name, value in values.items() if value is not None}

    return compute_metrics


def _center_keys(centers: Sequence[int], names: Sequence[str]) -> dict[int, str]:
    """A key for each center that every tracker takes: ASCII letters, digits, `_`, `-` and `.`; by its name, if any."""
    texts = {center: re.sub(r"[^\w.-]", "_", names[center][:50], flags=re.ASCII) if names else "" for center in centers}
    found = list(texts.values())
    alike = {center for center, text in texts.items() if found.count(text) > 1}
    return {
        center: f"center_{text}_{center}".replace("__", "_") if center in alike else f"center_{text}"
        for center, text in texts.items()
    }


class _Rows:
    """The labeled rows of a table as arrays, and the metrics as a function of the weights of groups."""

    def __init__(self, predictions: Predictions, threshold: float, negative: int | None = None) -> None:
        groups = independent_groups(predictions["group"], predictions["id"])
        labeled = (predictions["label"] >= 0).to_numpy()
        self.labels = predictions.labels[labeled]
        self.predicted = predictions.predicted_classes(threshold)[labeled]
        self.groups = pd.factorize(groups[labeled])[0]
        self.group_count = int(self.groups.max(initial=-1)) + 1
        odds = predictions.class_log_odds[labeled]
        self.classes = odds.shape[1]
        self.orders = {c: _order(odds[:, c]) for c in predictions.ranked_classes}
        self.negative = 0 if negative is None and self.classes == 2 else negative
        if self.negative is not None:
            self.suspicion = _order(-odds[:, self.negative])
        # -log p of the true class, from its log odds
        self.losses = np.logaddexp(0, -odds[np.arange(len(self.labels)), self.labels])

    def metrics(self, counts: Floats | None = None) -> dict[str, Floats]:
        """Return each metric, (B,), NaN where undefined, for group weights `counts`, (groups, B); default: all 1."""
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

    def replicates(self) -> dict[str, Floats]:
        """Return each metric, (B,), with one block of groups left out at a time."""
        block = intervals.blocks(self.group_count)
        count, step = int(block.max()) + 1, max(1, BLOCK // len(self.labels))
        parts = [
            self.metrics((block[:, None] != np.arange(start, min(start + step, count))).astype(np.float64))
            for start in range(0, count, step)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def evidence(self, names: Sequence[str]) -> dict[str, list[Evidence]]:
        """Return, for each metric, the kinds of images that it depends on; for a mean over classes, those of each."""
        own, called = self._per_group(self.labels), self._per_group(self.predicted)
        both = own + called - self._per_group(self.labels, (self.predicted == self.labels).astype(np.float64))

        def kinds(word: str, counts: Floats) -> list[Evidence]:
            return [Evidence.of(f"{word} {name}", counts[:, c]) for c, name in enumerate(names)]

        label, call, either = kinds("with", own), kinds("called", called), kinds("with or called", both)
        every = [Evidence.of("in all", own.sum(axis=1))]
        binary = self.classes == 2
        others = (own.sum(axis=1) - own[:, c] for c in range(self.classes))
        rest = label[::-1] if binary else kinds("without", np.stack(list(others), axis=1))
        found = {
            "accuracy": every,
            "balanced_accuracy": _present(label),
            "auroc": _present(label),
            "average_precision": _present(label),
            "precision": call[1:] if binary else _present(call),
            "recall": label[1:] if binary else _present(label),
            "f1": either[1:] if binary else _present(either),
            "loss": every,
        }
        for c in range(self.classes):
            found |= {f"precision_{c}": [call[c]], f"recall_{c}": [label[c]], f"auroc_{c}": [label[c], rest[c]]}
        if self.negative is not None:
            healthy = label[self.negative]
            for s in SPECIFICITIES:
                needed = dataclasses.replace(healthy, least_images=round(MIN_ABOVE / (1 - s)))
                found[f"sensitivity_at_{s}"] = [rest[self.negative], needed]
        return found

    def _per_group(self, classes: NDArray[np.int64], weights: Floats | None = None) -> NDArray[Any]:
        """Count rows by group and class, shape (groups, K)."""
        cells = self.group_count * self.classes
        return np.bincount(self.groups * self.classes + classes, weights, cells).reshape(-1, self.classes)


def _order(scores: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the order of falling scores, and the positions in it at which a new distinct score starts."""
    order = np.argsort(-scores)
    return order, np.flatnonzero(np.diff(scores[order], prepend=np.nan))


def _ranking(positive: NDArray[np.bool_], weights: Floats, ties: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Return AUROC and average precision, (B,) each, of rows in order of falling score, with weights (n, B)."""
    positives = np.add.reduceat(weights * positive[:, None], ties, axis=0)
    negatives = np.add.reduceat(weights, ties, axis=0) - positives
    above, total = positives.cumsum(axis=0), (positives + negatives).cumsum(axis=0)
    p, n = positives.sum(axis=0), negatives.sum(axis=0)
    auroc = (negatives * (above - positives / 2)).sum(axis=0) / (p * n)
    # Rows of weight 0 contribute nothing, but would give 0/0 before the first row with another weight.
    precision = np.divide(above, total, out=np.zeros_like(total), where=total > 0)
    average_precision = (positives * precision).sum(axis=0) / p
    return auroc, np.where(n > 0, average_precision, np.nan)


def _sensitivities(positive: NDArray[np.bool_], weights: Floats, ties: NDArray[np.intp]) -> list[Floats]:
    """Return the sensitivity, (B,), at each of `SPECIFICITIES`; arguments are those of `_ranking`."""
    positives = np.add.reduceat(weights * positive[:, None], ties, axis=0).cumsum(axis=0)
    negatives = np.add.reduceat(weights * ~positive[:, None], ties, axis=0).cumsum(axis=0)
    p, n = positives[-1:].sum(axis=0), negatives[-1:].sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found, spared = positives / p, (n - negatives) / n
    return [
        np.where((p > 0) & (n > 0), np.where(spared >= s, found, 0).max(axis=0, initial=0), np.nan)
        for s in SPECIFICITIES
    ]


def _with_intervals(rows: _Rows, names: Sequence[str]) -> dict[str, Any]:
    by_class = (rows._per_group(rows.labels) > 0).sum(axis=0).tolist()
    result: dict[str, Any] = {
        "n": len(rows.labels),
        "groups": rows.group_count,
        "groups_by_class": dict(zip(names, by_class, strict=True)),
    }
    evidence = rows.evidence(names)
    replicates = rows.replicates() if rows.group_count >= intervals.MIN_GROUPS else {}
    for name, (value,) in rows.metrics().items():
        result[name] = {"value": _defined(value), "low": None, "high": None}
        if not np.isfinite(value):
            continue
        if reason := _lack(replicates.get(name), evidence[name]):
            result[name]["withheld"] = reason
        elif name == "loss":
            spread = float(np.var(rows.losses, ddof=1))
            result[name]["low"], result[name]["high"] = intervals.of_positive(
                value, replicates[name], evidence[name], spread
            )
        else:
            result[name]["low"], result[name]["high"] = intervals.of_share(value, replicates[name], evidence[name])
    return result


def _lack(replicates: Floats | None, evidence: Sequence[Evidence]) -> str | None:
    """Why a metric has no interval; None if it has one."""
    fewest = min(evidence, key=lambda kind: (kind.groups, kind.effective_groups))
    if reason := next(filter(None, (kind.lack() for kind in (fewest, *evidence))), None):
        return reason
    if replicates is None or not np.isfinite(replicates).all():
        return "it is undefined without some of the groups"
    return None


def _present(kinds: Sequence[Evidence]) -> list[Evidence]:
    return [kind for kind in kinds if kind.groups]


def _mean(values: Floats) -> Floats:
    """Mean over the last axis of the values that are defined; NaN if none is."""
    mean: Floats = np.nansum(values, axis=-1) / np.isfinite(values).sum(axis=-1)
    return mean


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
