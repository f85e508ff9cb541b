"""What a threshold means at a center, in numbers of images and in words: false alarms, misses, and which one to use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hf_histo.data.splits.checks import Composition
from hf_histo.errors import printable
from hf_histo.evaluation import thresholds
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting.report import marked

DEFAULT = 0.5
ABOUT = {
    "default": "the default",
    "validation": "chosen on val: --threshold validation",
    "balanced": "half are called so: --balanced, transductive",
}


def decisions(
    tables: Mapping[str, Predictions], splits: Mapping[str, Composition], chosen: Mapping[str, float]
) -> dict[str, Any]:  # Any: JSON
    """Wrong decisions between two classes on labeled images of each split, for metrics.json.

    Args:
        tables: predictions by split, of two classes.
        splits: composition of each, and of `train`.
        chosen: thresholds that the run chose on val, by name; see `Sidecar.thresholds`.

    Returns:
        "classes": the two names; "splits": for each split with labels its "centers", those of them that are "new", i.e.
        not in `train`, its "images" of each class, and by "thresholds" the "value" and the images of each class that
        are "wrong", i.e. called the other one. "default" is 0.5, and "balanced", of all splits but val, the one by
        which half of the images are called the second class; it is transductive.
    """
    seen = splits["train"].centers.keys()
    found = {}
    for split, table in tables.items():
        labeled = table.labeled
        if labeled.empty:
            continue
        truth, centers = labeled["label"].to_numpy(), list(splits[split].centers)
        values = {"default": DEFAULT, **chosen}
        if split != "val":
            values["balanced"] = thresholds.for_share(table).value
        wrong = {name: labeled.predicted_classes(value) != truth for name, value in values.items()}
        found[split] = {
            "centers": centers,
            "new": [center for center in centers if center not in seen],
            "images": np.bincount(truth, minlength=2).tolist(),
            "thresholds": {
                name: {"value": values[name], "wrong": np.bincount(truth[of], minlength=2).tolist()}
                for name, of in wrong.items()
            },
        }
    return {"classes": list(tables["val"].label_names), "splits": found}


def in_words(metrics: Mapping[str, Any]) -> list[str]:
    """Sentences on the "decisions" in metrics.json: each split at each threshold, then which threshold to use and why.

    None with more than two classes, and for runs of earlier versions.
    """
    if "decisions" not in metrics:
        return []
    found = metrics["decisions"]
    negative, positive = map(printable, found["classes"])
    sentences = []
    for split, of in found["splits"].items():
        parts = [
            f"at {at['value']:.3g} ({ABOUT[name]}), {_of(at['wrong'][0], of['images'][0])} {negative} are called "
            f"{positive}, and {_of(at['wrong'][1], of['images'][1])} {positive} are missed"
            for name, at in of["thresholds"].items()
        ]
        sentences.append(f"{marked(split, metrics['splits'][split])}{_where(of)}: {'; '.join(parts)}.")
    return [*sentences, advice(metrics)]


def rows(metrics: Mapping[str, Any]) -> list[list[object]]:
    """The "decisions" in metrics.json as a header and a row for each split and threshold; none as for `in_words`."""
    if "decisions" not in metrics:
        return []
    found = metrics["decisions"]
    negative, positive = found["classes"]
    table: list[list[object]] = [["", "threshold", f"{negative} called {positive}", f"{positive} missed"]]
    for split, of in found["splits"].items():
        name = marked(split, metrics["splits"][split]) + _where(of)
        for threshold, at in of["thresholds"].items():
            wrong = [_of(count, images) for count, images in zip(at["wrong"], of["images"], strict=True)]
            table.append([name, f"{at['value']:.3g}, {ABOUT[threshold]}", *wrong])
    return table


def advice(metrics: Mapping[str, Any]) -> str:
    """Which threshold to use at a new center, and why; "" as for `in_words`."""
    return " ".join(_advice(metrics["decisions"])) if "decisions" in metrics else ""


def _of(wrong: int, images: int) -> str:
    return f"{wrong:,} of {images:,}" + (f" ({wrong / images:.0%})" if images else "")


def _where(of: Mapping[str, Any]) -> str:
    if not of["centers"]:
        return ""
    names = ", ".join(map(printable, of["centers"]))
    some = "" if len(of["new"]) == len(of["centers"]) else f"{', '.join(map(printable, of['new']))} "
    new = f"; {some}not in train" if of["new"] else "; in train as well"
    return f" (center {names}{new})"


def _advice(found: Mapping[str, Any]) -> Iterator[str]:
    """Which threshold to use at a new center: that of val, where val is of centers that training never saw."""
    positive, val = printable(found["classes"][1]), found["splits"].get("val", {"thresholds": {}})
    if "validation" not in val["thresholds"]:
        yield "Threshold at a new center: none was chosen, since val lacks labels of both classes; 0.5 is in use."
    elif val["centers"] and val["new"] == val["centers"]:
        yield (
            f"Threshold at a new center: {val['thresholds']['validation']['value']:.3g}, which has the best balanced "
            "accuracy on val, whose centers training never saw; elsewhere the best one may differ."
        )
    else:
        yield (
            "Threshold at a new center: not known. That of val is for centers that training saw, or unknown ones, and "
            "probabilities may be shifted elsewhere."
        )
    yield f"If the share of {positive} there is known, `hf_histo predict --balanced SHARE` finds it (transductive)."
