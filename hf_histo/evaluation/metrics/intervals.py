"""95% confidence intervals for metrics of images that come in groups: patients, slides, families of tiles.

Images of one group are similar, so groups rather than images count as independent. For each metric in [0, 1]:

1. The variance v of the metric is estimated by the jackknife that leaves out one group at a time (Shao & Tu 1995, "The
   Jackknife and Bootstrap", sec. 1.3); with more than `BLOCKS` groups, one random block of groups at a time (Kott 2001,
   "The delete-a-group jackknife", Journal of Official Statistics 17:521-526).
2. The effective sample size n = p (1 - p) / v of a metric p is the number of independent images from which a share
   would have this variance (Korn & Graubard 1998, "Confidence intervals for proportions with small expected number of
   positive counts estimated from survey data", Survey Methodology 24:193-201). A few groups that agree by chance make v
   too small; therefore n is at most the number of images of each kind divided by their design effect (Kish 1965,
   "Survey Sampling", sec. 5.4) at an intraclass correlation of `CORRELATION`. For a mean over k kinds of images with
   n_i each, n is at most k² / Σ 1 / n_i, by the variance of such a mean.
3. The interval is Wilson's (1927, Journal of the American Statistical Association 22:209-212) for n, which holds at 0
   and 1 as well (for shares in surveys: Franco et al. 2019, "Comparative study of confidence intervals for proportions
   in complex sample surveys", Journal of Survey Statistics and Methodology 7:334-364; for the AUROC: Kottas et al.
   2014, BMC Medical Research Methodology 14:26), with the quantile of Student's t instead of the normal one. Its
   degrees of freedom are one less than the effective number of groups of the kind with the fewest, (Σ m)² / Σ m² for
   groups of m images (Carter et al. 2017, "Asymptotic behavior of a t-test robust to cluster heterogeneity", Review of
   Economics and Statistics 99:698-709, where images of a group are fully alike).

For the loss, a positive metric without an upper bound, the interval is that of its logarithm, by the delta method.

`tests/evaluation/metrics/test_coverage.py` simulates the coverage: for accuracy, balanced accuracy, recall and AUROC,
at least 0.92 with 10 groups of 20 images, 5 of each class, and 0.93 with 20 groups; for the sensitivity at a
specificity, 0.88. With fewer groups than `MIN_GROUPS` or `MIN_EFFECTIVE_GROUPS`, there is no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
MIN_GROUPS = 5  # groups with each kind of image that a metric depends on; with fewer, intervals are as wide as [0.4, 1]
MIN_EFFECTIVE_GROUPS = 4.0  # the same, for groups of different sizes
CORRELATION = 0.15  # assumed intraclass correlation of correct predictions; at 0.1, the simulation just passes
BLOCKS = 200  # largest number of blocks that the jackknife leaves out; more would hardly narrow an interval


@dataclass(frozen=True)
class Evidence:
    """Number of images of one kind, and of their groups.

    Attributes:
        kind: description of the kind, as in "3 groups KIND".
        groups: number of groups with such an image.
        effective_groups: number of equally large groups with the same information, at most `groups`.
        images: number of independent images with the same information at the assumed correlation, at most
            `total_images`.
        total_images: number of images.
        least_images: number of images that the metric requires, if any.
    """

    kind: str
    groups: int
    effective_groups: float
    images: float
    total_images: int
    least_images: int = 0

    @classmethod
    def of(cls, kind: str, sizes: Floats) -> Evidence:
        """Create it from the number of such images in each group, `sizes` (groups,)."""
        sizes = sizes[sizes > 0]
        total = sizes.sum()
        if not total:
            return cls(kind, 0, 0.0, 0.0, 0)
        alike = (sizes * (1 + (sizes - 1) * CORRELATION)).sum()
        effective, images = total**2 / (sizes**2).sum(), total**2 / alike
        return cls(kind, len(sizes), float(effective), float(images), int(total))

    def lack(self) -> str | None:
        """Why there are too few groups or images for an interval; None if there are enough."""
        if self.groups < MIN_GROUPS:
            return f"{self.groups} groups {self.kind}, expected at least {MIN_GROUPS}"
        if self.effective_groups < MIN_EFFECTIVE_GROUPS:
            return (
                f"the {self.groups} groups {self.kind} differ so much in size that they count as "
                f"{self.effective_groups:.1f}, expected at least {MIN_EFFECTIVE_GROUPS:g}"
            )
        if self.total_images < self.least_images:
            return f"{self.total_images} images {self.kind}, expected at least {self.least_images}"
        return None


def blocks(groups: int) -> NDArray[np.int64]:
    """Return the block of each group, (groups,): one per group, or a fixed random one of `BLOCKS` of similar size."""
    if groups <= BLOCKS:
        return np.arange(groups)
    return np.random.default_rng(0).permutation(np.arange(groups) % BLOCKS)


def variance(replicates: Floats) -> float:
    """Return the jackknife variance of a metric from its values without one block each, (B,)."""
    return float((len(replicates) - 1) * np.var(replicates))


def of_share(value: float, replicates: Floats, evidence: Sequence[Evidence]) -> tuple[float, float]:
    """Return the interval of a metric in [0, 1].

    Args:
        value: the metric's value.
        replicates: its values without one block of groups each, (B,), B >= 2.
        evidence: of each kind of image that the metric depends on.
    """
    most = len(evidence) ** 2 / sum(1 / kind.images for kind in evidence)
    return wilson(value, variance(replicates), most, _quantile(len(replicates), evidence))


def wilson(value: float, variance: float, most: float, quantile: float) -> tuple[float, float]:
    """Return Wilson's interval of a share in [0, 1] from the variance of its estimate.

    Args:
        value: the share.
        variance: of the estimate.
        most: largest number of independent images that it can be worth, see step 2 above.
        quantile: of the normal or Student's distribution, in standard errors.
    """
    inner = np.clip(value, 0.5 / most, 1 - 0.5 / most)  # at 0 and 1, p (1 - p) would be 0
    n = min(most, inner * (1 - inner) / max(variance, 1e-300))
    k = quantile**2 / n
    middle, half = (value + k / 2) / (1 + k), np.sqrt(k * (value * (1 - value) + k / 4)) / (1 + k)
    return max(0.0, min(value, float(middle - half))), min(1.0, max(value, float(middle + half)))


def of_positive(
    value: float, replicates: Floats, evidence: Sequence[Evidence], image_variance: float
) -> tuple[float, float]:
    """Return the interval of a positive mean over images; arguments as for `of_share`.

    `image_variance`, the variance of the images' values, gives a lower bound on the variance of the mean.
    """
    least = image_variance / min(kind.images for kind in evidence)
    error = np.sqrt(max(variance(replicates), least)) / value
    factor = float(np.exp(_quantile(len(replicates), evidence) * error))
    return value / factor, value * factor


def _quantile(blocks: int, evidence: Sequence[Evidence]) -> float:
    from scipy.stats import t as student  # takes as long to import as pandas

    freedom = min(blocks, *(kind.effective_groups for kind in evidence)) - 1
    return float(student.ppf((1 + CONFIDENCE) / 2, freedom))
