"""Heat map of a slide: what a model predicts, over an overview of the slide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.patches import Patch
from numpy.typing import NDArray

from hf_histo.evaluation.figures.explanation import blend, heat_colors
from hf_histo.evaluation.figures.style import drawing, short
from hf_histo.evaluation.slide_maps import SlideMap, color_of

OPACITY = 0.6  # of the color of a class, times its probability


def slide_heat_map(
    found: SlideMap,
    overview: NDArray[np.uint8],
    scale: float,
    label_names: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
    shown: str | None = None,
) -> None:
    """Draw the map over an overview (h, w, 3) of the slide, `scale` pixels of level 0 per pixel, as a PNG.

    Of two classes, the probability of the second, or what `shown` names; of more, the color of the predicted one, more
    opaque where its probability is larger. Where no tile is, the overview stays as it is.
    """
    height, width = overview.shape[:2]
    rows, columns, inside = found.at((height, width), scale)
    probabilities = found.probabilities[rows, columns]
    if len(label_names) == 2:
        heat = np.where(inside, probabilities[..., 1], 0).astype(np.float32)
        image = np.where(inside[..., None], blend(overview, heat), overview)
    else:
        classes = np.where(inside, found.classes[rows, columns], 0)
        colors = 255 * np.array([to_rgb(color_of(place)) for place in range(len(label_names))])
        weight = OPACITY * np.where(inside, np.take_along_axis(probabilities, classes[..., None], -1)[..., 0], 0)
        image = np.rint(overview * (1 - weight[..., None]) + colors[classes] * weight[..., None]).astype(np.uint8)
    side = 9 / max(height, width)
    with drawing(path, side * width + 1.5, side * height + 0.7) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.imshow(image)
        axes.set_title(short(title, 60))
        if len(label_names) == 2:
            palette = ListedColormap(heat_colors(np.linspace(0, 1, 256)))
            bar = figure.colorbar(ScalarMappable(Normalize(0, 1), palette), ax=axes, shrink=0.6)
            bar.set_label(shown or f"P({label_names[1]})")
        else:
            handles = [Patch(color=color_of(place), label=name) for place, name in enumerate(label_names)]
            figure.legend(handles=handles, loc="outside right upper")
