"""The package's classification metrics as an `evaluate.Metric`, for use in other code; model cards refer to it.

The package itself uses `hf_histo.evaluation.metrics.classification`, since `import evaluate` takes seconds.
"""

from __future__ import annotations

import datasets
from evaluate.info import MetricInfo
from evaluate.module import Metric
from numpy.typing import ArrayLike

from hf_histo.evaluation.metrics.classification import of_logits


class ClassificationMetrics(Metric):
    """`classification.compute` as an `evaluate.Metric` that needs no network.

    `ClassificationMetrics().compute(predictions=logits, references=labels, threshold=0.5)` takes logits of shape (n,)
    or (n, K) and labels of shape (n,), -1 where hidden; `add_batch` collects them in parts.
    """

    def _info(self) -> MetricInfo:
        label, logit = datasets.Value("int64"), datasets.Value("float64")
        return MetricInfo(
            description="Metrics of binary and K-class classification, from logits.",
            citation="",
            inputs_description="predictions: logits, (n,) or (n, K). references: class indices, (n,), -1 if hidden.",
            features=[
                datasets.Features({"predictions": datasets.Sequence(logit), "references": label}),
                datasets.Features({"predictions": logit, "references": label}),
            ],
        )

    def _compute(
        self, predictions: ArrayLike, references: ArrayLike, threshold: float = 0.5
    ) -> dict[str, float | None]:
        return of_logits(predictions, references, threshold=threshold)
