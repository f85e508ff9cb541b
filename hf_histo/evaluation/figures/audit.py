"""Figures of a data set and its audit: class distribution, colors, samples, copies."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hf_histo.data.audit.findings import HIDDEN, UNKNOWN, Audit, Image
from hf_histo.data.audit.near_duplicates import CHANNELS
from hf_histo.data.schema import ImageTable
from hf_histo.evaluation.figures.style import COLORS, GRAY, drawing, short, write_message

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHANNEL_COLORS = ("#D55E00", "#009E73", "#0072B2")  # the red, green and blue of the palette
SPACED = re.compile(r"[^\w.-]+")  # what file names have none of
MOST_CLASSES = 20  # largest number of rows of a figure of samples
ImageOf = Callable[[str, str], NDArray[np.uint8]]


def image_reader(data: datasets.DatasetDict) -> ImageOf:
    """Return a function from the name of a split and an id to the image, uint8 (H, W, 3)."""
    images = {split: ImageTable(rows) for split, rows in data.items()}
    places = {split: {key: row for row, key in enumerate(rows["id"][:])} for split, rows in data.items()}

    def image_of(split: str, key: str) -> NDArray[np.uint8]:
        return images[split][places[split][key]]["image"].permute(1, 2, 0).numpy()

    return image_of


def distribution(audit: Audit, path: str | Path) -> None:
    """Draw the number of images per class for each center of each split, as a PNG; hidden labels are gray."""
    from matplotlib.colors import to_rgb

    strata = {_where(split.name, s.center): s.classes for split in audit.splits for s in split.centers}
    names = [*audit.classes, *([HIDDEN] if any(HIDDEN in counts for counts in strata.values()) else [])]
    palette = [to_rgb(color) for color in COLORS]
    shades = [*palette, *(tuple((x + 1) / 2 for x in color) for color in palette)]  # then a lighter shade of each
    colors = dict(zip(names, cycle(shades), strict=False)) | {HIDDEN: to_rgb("#BBBBBB")}
    with drawing(path, 9, 1.8 + 0.5 * len(strata)) as figure:
        axes = figure.subplots()
        left = np.zeros(len(strata))
        total = max(sum(counts.values()) for counts in strata.values())
        for name in names:
            counts = np.array([counts.get(name, 0) for counts in strata.values()])
            axes.barh(list(strata), counts, left=left, color=colors[name], label=name, edgecolor="white", height=0.7)
            dark = np.dot(colors[name], (0.299, 0.587, 0.114)) < 0.55
            for row, count in enumerate(counts):
                if count > 0.04 * total:
                    where = left[row] + count / 2, row
                    axes.text(*where, f"{count:,}", ha="center", va="center", color="white" if dark else "black")
            left += counts
        for row, images in enumerate(left):
            axes.text(images + 0.01 * total, row, f"{images:,.0f}", va="center", color=GRAY)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
        axes.set(xlabel="images", xlim=(0, 1.1 * total))
        figure.legend(loc="outside upper center", ncols=min(4, len(names)))


def colors(table: pd.DataFrame, path: str | Path) -> None:
    """Draw box plots of the images' channel means for each center of each split, as a PNG.

    Boxes span the middle 50% of the images, whiskers the middle 90%.
    """
    strata = _strata(table)
    with drawing(path, 2.2 + 1.3 * max(3, len(strata)), 4.4) as figure:
        axes = figure.subplots()
        for shift, channel, color in zip((-0.24, 0, 0.24), CHANNELS, CHANNEL_COLORS, strict=True):
            axes.boxplot(
                [rows[channel] for rows in strata.values()],
                positions=np.arange(len(strata)) + shift,
                widths=0.2,
                whis=(5, 95),
                showfliers=False,
                patch_artist=True,
                manage_ticks=False,
                boxprops={"facecolor": color, "edgecolor": color, "alpha": 0.75},
                medianprops={"color": "black"},
                whiskerprops={"color": color},
                capprops={"color": color},
                label=channel,
            )
        axes.set_xticks(range(len(strata)), [name.replace(", ", "\n") for name in strata])
        axes.grid(axis="x", visible=False)
        axes.set(ylabel="mean of the image (gray levels)", ylim=(0, 255))
        figure.legend(loc="outside upper center", ncols=3)


def samples(table: pd.DataFrame, classes: list[str], image_of: ImageOf, folder: str | Path, n: int = 8) -> None:
    """Draw sample images of each class (at most 20) for each center of each split, as PNGs.

    Args:
        table: an `inventory`.
        classes: class names in the order of their labels.
        image_of: function from a split and an id to the image, uint8 (H, W, 3).
        folder: folder of the PNGs, `samples_train_center_0.png` and so on.
        n: images per class, evenly spread over its rows.
    """
    for where, rows in _strata(table).items():
        present = [label for label in (*range(len(classes)), -1) if (rows["label"] == label).any()][:MOST_CLASSES]
        path = Path(folder) / f"samples_{SPACED.sub('_', where)}.png"
        with drawing(path, 1.35 * n + 1.6, 0.6 + 1.45 * len(present)) as figure:
            figure.suptitle(where)
            panels = figure.subplots(len(present), n, squeeze=False)
            for line, label in zip(panels, present, strict=True):
                of_class = rows[rows["label"] == label]
                chosen = of_class.iloc[np.unique(np.linspace(0, len(of_class) - 1, n).round().astype(int))]
                for axes in line:
                    _bare(axes)
                for axes, split, key in zip(line, chosen["split"], chosen["id"], strict=False):
                    axes.imshow(image_of(split, key))
                name = HIDDEN if label < 0 else classes[label]
                line[0].set_ylabel(f"{short(name, 22)}\n{len(of_class):,}", rotation=0, ha="right", va="center")


def duplicates(audit: Audit, image_of: ImageOf, path: str | Path, n: int = 4) -> None:
    """Draw the first `n` pairs of each finding about copies as a PNG, with split, id and class above each image.

    Args:
        audit: audit of the data set.
        image_of: function from a split and an id to the image, uint8 (H, W, 3).
        path: path of the PNG.
        n: pairs per finding.
    """
    kinds = {"overlap", "similar_overlap", "label_conflict", "similar_label_conflict", "repeats", "similar_repeats"}
    findings = [finding for finding in audit.findings if finding.kind in kinds]
    with drawing(path, 3.3 * n, max(1.5, 2.4 * len(findings))) as figure:
        if not findings:
            return write_message(figure, "No image is a copy of another.")
        parts = np.atleast_1d(np.array(figure.subfigures(len(findings), 1, hspace=0.02)))
        for part, finding in zip(parts, findings, strict=True):
            part.suptitle(finding.message, x=0.01, ha="left", weight="bold", fontsize=11)
            # The two images of a pair are adjacent, and pairs are separated by a narrow column.
            panels = part.subplots(1, 3 * n - 1, width_ratios=([1, 1, 0.12] * n)[:-1])
            for axes in panels:
                _bare(axes)
            for place, group in enumerate(finding.groups[:n]):
                for axes, image in zip(panels[3 * place :], _pair(group), strict=False):
                    axes.imshow(image_of(image.split, image.id))
                    axes.set_title(f"{image.split}\n{short(image.id, 20)}\n{short(image.label, 20)}", fontsize=7.5)


def _pair(group: list[Image]) -> list[Image]:
    """Two of the images, with different labels if possible."""
    others = [image for image in group[1:] if image.label not in (group[0].label, HIDDEN)]
    return [group[0], (others or group[1:])[0]]


def _strata(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each center of each split, by a name such as "train, center 0"."""
    split, center = table["split"], table["center"]
    return {
        _where(s, c): table[(split == s) & (center == c)]
        for s in split.unique()
        for c in sorted(center[split == s].unique())
    }


def _where(split: str, center: int | str) -> str:
    return split if center in UNKNOWN else f"{split}, center {center}"


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
