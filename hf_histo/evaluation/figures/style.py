"""Style of all figures, and a context to draw one, without a display or pyplot's global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_histo.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable for colorblind readers: Okabe & Ito 2008, "Color Universal Design", fig. 16, without black and yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = tuple(product(("-", "--", "-."), COLORS))
GRAY = "#666666"
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,  # no grid over bars
    "axes.edgecolor": GRAY,
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "hf_histo",  # otherwise ids are random
    "text.parse_math": False,  # an id or a class name may hold dollar signs
}


@contextmanager
def drawing(path: str | Path, width: float, height: float, *, vector: bool = False) -> Iterator[Figure]:
    """Yield an empty figure of `width` x `height` inches; at the end of the block, write it to `path` as a PNG.

    With `vector`, also write it as an SVG beside the PNG; the same figure gives the same bytes.
    """
    import matplotlib as mpl  # takes a second, and most commands draw nothing, or only at their end
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
        if vector:
            with atomic_file(Path(path).with_suffix(".svg")) as temporary:
                figure.savefig(temporary, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def short(text: str, most: int = 22) -> str:
    """Shorten text to its last `most` characters, since file names differ at the end."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def write_message(figure: Figure, message: str) -> None:
    """Draw `message` in place of a plot that has no data."""
    figure.text(0.5, 0.5, message, ha="center", va="center", fontsize=14, color=GRAY)
