"""Features of a model, and a map of them colored by center and by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import nn

from hf_histo.evaluation.figures.style import COLORS, GRAY, drawing
from hf_histo.evaluation.forward import forward
from hf_histo.models import heads
from hf_histo.transforms.pipeline import Pipeline


def features(
    model: nn.Module,
    dataset: datasets.Dataset,
    pipeline: Pipeline,
    *,
    adapt_batch_norm: bool = False,
    description: str = "Computing features",
) -> NDArray[np.float64]:
    """Features (n, d), the head's input, of the images of a schema table in order; arguments are as for `forward`."""
    return forward(heads.Features(model), dataset, pipeline, adapt_batch_norm=adapt_batch_norm, description=description)


def embedding_map(
    features: Mapping[str, NDArray[np.float64]],
    colorings: Mapping[str, Sequence[str]],
    path: str | Path,
) -> None:
    """Draw the first two principal components of each set of features, as a PNG.

    Args:
        features: features (n, d), d at least 2, by name, e.g. "before adaptation"; each is a row of panels with its own
            PCA.
        colorings: n values that points are colored by, by name, e.g. "center"; each is a column of panels.
        path: path of the PNG.
    """
    with drawing(path, 5.2 * len(colorings), 4.4 * len(features)) as figure:
        panels = figure.subplots(len(features), len(colorings), squeeze=False)
        for line, (name, rows) in zip(panels, features.items(), strict=True):
            analysis = PCA(2, random_state=0)
            points = analysis.fit_transform(rows)
            shares = analysis.explained_variance_ratio_
            for axes, (coloring, values) in zip(line, colorings.items(), strict=True):
                for place, value in enumerate(sorted(set(values))):
                    chosen = np.array(values) == value
                    color = GRAY if value == "hidden" else COLORS[place % len(COLORS)]
                    axes.scatter(*points[chosen].T, s=7, alpha=0.6, linewidths=0, color=color, label=value)
                axes.set_title(f"{name}, by {coloring}")
                axes.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
                axes.set_ylabel(f"second component ({shares[1]:.0%})")
                axes.legend(markerscale=2)
