"""Figures and tables of a training run and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_histo.data.schema import center_name
from hf_histo.errors import printable
from hf_histo.evaluation import calibration
from hf_histo.evaluation.figures.style import COLORS, GRAY, LINES, drawing, short, write_message
from hf_histo.evaluation.metrics.classification import SPECIFICITIES
from hf_histo.evaluation.predictions import Predictions

HEADLINE = ("accuracy", "balanced_accuracy", "auroc", "f1")


def training_curve(log_history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Draw loss, validation metrics and learning rate over epochs as PNG and SVG; panels without data are left out.

    Args:
        log_history: `trainer.state.log_history`: dicts with `epoch` and some of `loss`, `eval_loss` (nats),
            `eval_accuracy`, `eval_auroc` (0 to 1), `learning_rate`.
        path: path of the PNG.
    """
    panels = {
        "loss (nats)": {"loss": "training", "eval_loss": "validation"},
        "validation metric": {"eval_accuracy": "accuracy", "eval_auroc": "AUROC"},
        "learning rate": {"learning_rate": ""},
    }
    logged = {key for entry in log_history for key in entry}
    shown = {title: series for title, series in panels.items() if logged & set(series)}
    with drawing(path, 7, 0.8 + 2.3 * max(1, len(shown)), vector=True) as figure:
        if not shown:
            return write_message(figure, "Nothing was logged.")
        all_axes = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
        for axes, (title, series) in zip(all_axes, shown.items(), strict=True):
            for color, (key, name) in zip(COLORS, series.items(), strict=False):
                points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
                if points:
                    # Markers for validation, which may have a single point, without a line.
                    axes.plot(*zip(*points, strict=True), color=color, label=name, marker="o" * key.startswith("eval"))
            axes.set_ylabel(title)
            if any(series.values()):
                axes.legend()
        all_axes[-1].set_xlabel("epoch")
        figure.align_ylabels()


def roc_curve(predictions_by_split: Mapping[str, Predictions], path: str | Path, *, vector: bool = False) -> None:
    """Draw ROC curves as a PNG, with `vector` also as an SVG beside it, with the AUROC in the legend.

    With two classes, one panel has a curve for each table. With more, each table has a panel, with a curve for each
    class against the rest. If only one class is labeled, there is a note in the legend instead of a curve.
    """
    from sklearn.metrics import auc
    from sklearn.metrics import roc_curve as rates

    panels: dict[str, dict[str, tuple[NDArray[np.bool_], NDArray[np.float64]]]] = {}
    for split, predictions in predictions_by_split.items():
        names, labeled = predictions.label_names, predictions.labeled
        odds = labeled.class_log_odds
        for c in labeled.ranked_classes:
            panel, curve = ("", split) if len(names) == 2 else (split, names[c])
            panels.setdefault(panel, {})[curve] = labeled.labels == c, odds[:, c]
    with drawing(path, 5.2 * max(1, len(panels)), 5.2, vector=vector) as figure:
        if not panels:
            return write_message(figure, "There are no predictions.")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
            axes.plot([0, 1], [0, 1], color=GRAY, linestyle=":", linewidth=1)
            for (name, (positive, score)), (line, color) in zip(curves.items(), cycle(LINES), strict=False):
                if positive.any() and not positive.all():
                    false_rate, true_rate, _ = rates(positive, score)
                    name = f"{name}  {auc(false_rate, true_rate):.3f}"
                    axes.plot(false_rate, true_rate, line, color=color, label=name)
                else:
                    axes.plot([], [], line, color=color, label=f"{name}  undefined (one class only)")
            axes.set(title=title, xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
            axes.legend(loc="lower right", title="AUROC", alignment="left")


def confusion_matrix(
    predictions: Predictions, path: str | Path, *, threshold: float = 0.5, vector: bool = False
) -> None:
    """Draw the confusion matrix as a PNG: counts by true and predicted class, shaded by their share of the true class.

    Args:
        predictions: a predictions table; rows with a hidden label are left out.
        path: path of the PNG.
        threshold: for two classes, the smallest probability at which class 1 is predicted.
        vector: also draw it as an SVG beside the PNG.
    """
    from sklearn.metrics import confusion_matrix as count_confusions

    labeled = predictions.labeled
    names = predictions.label_names
    side = 2.6 + 0.65 * max(3, len(names))
    with drawing(path, side + 0.8, side, vector=vector) as figure:
        if labeled.empty:
            return write_message(figure, "No label is known.")
        truth, answer = labeled["label"].to_numpy(), labeled.predicted_classes(threshold)
        counts = count_confusions(truth, answer, labels=range(len(names)))
        shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        axes = figure.subplots()
        ticks = range(len(names))
        mesh = axes.pcolormesh(ticks, ticks, shares, cmap="Blues", vmin=0, vmax=1, edgecolors="face")
        axes.set_aspect("equal")
        axes.invert_yaxis()
        for (row, column), share in np.ndenumerate(shares):
            text = f"{counts[row, column]:,}" + (f"\n{share:.0%}" if counts[row].any() else "")
            color = "white" if share > 0.55 else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=10 if len(names) < 6 else 8)
        axes.set_xticks(ticks, names, rotation=45 if len(names) > 2 and max(map(len, names)) > 5 else 0)
        axes.set_yticks(ticks, names)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, label="share of the true class", shrink=0.8)
        assert bar.solids is not None
        bar.solids.set(edgecolor="face", rasterized=False)  # in an SVG: drawn, without white lines between its colors


def worst_errors(
    predictions: Predictions,
    image_of: Callable[[str], NDArray[np.uint8]],
    path: str | Path,
    n: int = 24,
    *,
    threshold: float = 0.5,
) -> None:
    """Draw the `n` wrongly predicted images with the lowest probability of their true class, as a PNG.

    Titles show the id, the center, the true class, and the predicted probability of the true class.

    Args:
        predictions: a predictions table; rows with a hidden label are left out.
        image_of: function from an id to the image, uint8 (H, W, 3) or (H, W).
        path: path of the PNG.
        n: largest number of images.
        threshold: for two classes, the smallest probability at which class 1 is predicted.
    """
    labels, probability = predictions.labels, predictions.class_probabilities
    of_truth = np.take_along_axis(probability, np.maximum(labels, 0)[:, None], axis=1)[:, 0]
    wrong = np.flatnonzero((labels >= 0) & (predictions.predicted_classes(threshold) != labels))
    worst = predictions.assign(of_truth=of_truth).iloc[wrong[np.argsort(of_truth[wrong], kind="stable")][:n]]
    names, columns = predictions.label_names, 6
    rows = max(1, -(-len(worst) // columns))
    with drawing(path, 2.0 * columns, 0.5 + 2.5 * rows) as figure:
        if worst.empty:
            return write_message(figure, f"No error among {(labels >= 0).sum():,} labeled images.")
        total = f"{len(wrong):,} errors among {(labels >= 0).sum():,} images"
        figure.suptitle(
            f"The {len(worst)} most confident of {total}: true class, and the probability that it was given"
        )
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, row in zip(panels, worst.to_dict("records"), strict=False):
            axes.imshow(image_of(row["id"]), cmap="gray", vmin=0, vmax=255)
            center = "" if row["center"] < 0 else f"center {center_name(row['center'], predictions.center_names)}\n"
            axes.set_title(f"{short(row['id'])}\n{center}{names[row['label']]}, P = {row['of_truth']:.2g}", fontsize=9)


def cell(value: object) -> str:
    """Format a table cell: floats with three decimals, None as a dash, control characters escaped."""
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else printable(str(value))


def table(rows: Sequence[Sequence[object]]) -> str:
    """Return rows, of which the first is the header, as a Markdown table that is aligned as plain text, too.

    Values are formatted by `cell`; the first column is aligned left, the others right.
    """
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        f"| {' | '.join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))} |"
        for row in cells
    )


def center_table(report: Mapping[str, Any], metrics: Sequence[str] = HEADLINE) -> str:
    """Return `center_rows` as a `table`, followed by the sentences of `withheld`."""
    return _with_notes(table(center_rows(report, metrics)), withheld(report, metrics))


def center_rows(report: Mapping[str, Any], metrics: Sequence[str] = HEADLINE) -> list[list[object]]:
    """Return rows of a `classification.report`: a header, a row for each center and one overall, with intervals."""
    return interval_rows(_parts(report), metrics)


def withheld(report: Mapping[str, Any], metrics: Sequence[str] = HEADLINE) -> list[str]:
    """Return why values of a `classification.report` have no interval, a sentence for each center and reason."""
    return _withheld(_parts(report), metrics)


def overall_table(reports: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = HEADLINE) -> str:
    """Return a table like `center_table` with the overall values of several `classification.report`s, by name."""
    named = {marked(name, report): report["overall"] for name, report in reports.items()}
    return _with_notes(table(interval_rows(named, metrics)), _withheld(named, metrics))


def _parts(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    named = {f"center {center}": values for center, values in report["centers"].items()}
    return {marked(name, report): values for name, values in [*named.items(), ("overall", report["overall"])]}


def marked(name: str, report: Mapping[str, Any]) -> str:
    """Return the name of a table row, marked as transductive if the `classification.report` in it is."""
    return f"{name} (transductive)" if report.get("transductive") else name


def transductive(report: Mapping[str, Any], split: str) -> str:
    """Return a sentence on how a split's predictions used its own unlabeled images; "" if they did not."""
    if report["transductive"] is None:
        return f"It is not recorded whether the predictions used the unlabeled images of {split} as a whole."
    if not report["transductive"]:
        return ""
    return f"Transductive: used the unlabeled images of {split} as a whole, for {', '.join(report['transductive'])}."


def interval_rows(named: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = HEADLINE) -> list[list[object]]:
    """Return a header and a row for each of some parts of `classification.report`s by name, with intervals."""
    rows: list[list[object]] = [["", "images", "groups (of each class)", *metrics]]
    for name, values in named.items():
        groups = f"{values['groups']} ({', '.join(map(str, values['groups_by_class'].values()))})"
        rows.append([name, values["n"], groups, *(_interval(values[metric]) for metric in metrics)])
    return rows


def _withheld(named: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, values in named.items():
        for metric in metrics:
            if "withheld" in values[metric]:
                reasons.setdefault((name, values[metric]["withheld"]), []).append(metric)
    return [printable(f"{name}, {', '.join(of)}: no interval, {reason}.") for (name, reason), of in reasons.items()]


def _with_notes(table: str, notes: Sequence[str]) -> str:
    return "\n".join([table, *(["", *notes] if notes else [])])


def error_rows(predictions: Predictions, threshold: float = 0.5) -> list[list[object]]:
    """Return how many images of each class are called another one: a header, a row for each center and one overall.

    Args:
        predictions: a predictions table; rows with a hidden label are left out.
        threshold: for two classes, the smallest probability at which class 1 is predicted.
    """
    labeled = predictions.labeled
    truth, wrong = labeled["label"].to_numpy(), labeled.predicted_classes(threshold) != labeled["label"].to_numpy()
    centers = labeled["center"].to_numpy()
    parts = {
        f"center {center_name(center, predictions.center_names)}": centers == center
        for center in sorted(set(centers[centers >= 0]))
    }
    rows: list[list[object]] = [["", *predictions.label_names]]
    for name, part in [*parts.items(), ("overall", np.ones(len(truth), bool))]:
        cells: list[object] = []
        for label in range(len(predictions.label_names)):
            count, errors = (part & (truth == label)).sum(), (part & wrong & (truth == label)).sum()
            cells.append(f"{errors:,} of {count:,} ({errors / count:.0%})" if count else None)
        rows.append([name, *cells])
    return rows


def error_tables(tables: Mapping[str, Predictions], threshold: float) -> dict[str, list[list[object]]]:
    """Return the `error_rows` of each split that has labels."""
    return {split: error_rows(table, threshold) for split, table in tables.items() if not table.labeled.empty}


def calibration_rows(predictions: Predictions, temperature: float) -> list[list[object]]:
    """Return calibration errors and the Brier score: a header, a row for each center and one overall.

    Args:
        predictions: a labeled table; rows with a hidden label are left out.
        temperature: number that logits are divided by for the "calibrated" values, left out if it is 1.
    """
    tables = {"": predictions}
    if temperature != 1:
        tables["calibrated "] = predictions.with_temperature(temperature)
    measures = {"ece": "ECE", "brier": "Brier score"}
    reports = {prefix: calibration.report(table) for prefix, table in tables.items()}
    rows: list[list[object]] = [["", "images", *(f"{prefix}{name}" for prefix in tables for name in measures.values())]]
    for center in [*reports[""]["centers"], None]:
        parts = [found["overall"] if center is None else found["centers"][center] for found in reports.values()]
        name = "overall" if center is None else f"center {center}"
        rows.append([name, parts[0]["n"], *(part[measure] for part in parts for measure in measures)])
    return rows


def robustness_rows(found: Mapping[str, Any]) -> list[list[object]]:
    """Return the "robustness" of metrics.json as a header and rows, one value before training and one after."""
    sides = [found["before"], found["after"]]
    rows: list[list[object]] = [["", "before training", "after training"]]
    rows.append(["robustness index (1: the class alone, 0: the center alone)", *(side["index"] for side in sides)])
    centers = [side["center"] for side in sides]
    if all(centers):
        about = f"center found from the features, balanced accuracy (chance: {centers[0]['chance']:.3f})"
        rows.append([about, *map(_interval, centers)])
    drops = [side["drop"] for side in sides]
    if all(drops):
        about = "average performance drop, where class and center go together in training (0 is best)"
        rows.append([about, *(drop["average_performance_drop"] for drop in drops)])
    return rows


def class_rows(report: Mapping[str, Any], names: Sequence[str]) -> list[list[object]]:
    """Return rows of a `classification.report` of more than two classes: a header and a row for each class."""
    metrics = ("precision", "recall", "auroc")
    rows: list[list[object]] = [["", "groups", *metrics]]
    for place, (name, groups) in enumerate(zip(names, report["overall"]["groups_by_class"].values(), strict=True)):
        rows.append([name, groups, *(_interval(report["overall"][f"{metric}_{place}"]) for metric in metrics)])
    return rows


def screening(report: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the screening metrics of a `classification.report` as a sentence; "" if it has none."""
    if report["negative"] is None:
        return ""
    found = [f"{_interval(report['overall'][f'sensitivity_at_{s}']) or '–'} at specificity {s}" for s in SPECIFICITIES]
    return printable(f"Sensitivity for any class but {names[report['negative']]}: {', '.join(found)}.")


def size_rows(metrics: Mapping[str, Any]) -> list[list[object]]:
    """Return the "parameters" and "bytes" of a run (see `model_size.account`) as a header and rows, bytes in MiB."""
    parameters, size = metrics["parameters"], metrics["bytes"]
    rows: list[list[object]] = [
        ["", "model", "adapter", "share"],
        ["parameters", f"{parameters['total']:,}", f"{parameters['trainable']:,}", f"{parameters['share']:.2%}"],
    ]
    for name, suffix in (("MiB", ""), ("MiB as fp16", "_fp16")):
        model, adapter = size[f"model{suffix}"], size[f"adapter{suffix}"]
        rows.append([name, f"{model / 2**20:.2f}", f"{adapter / 2**20:.2f}", f"{adapter / model:.2%}"])
    return rows


def cost_sentence(cost: Mapping[str, Any]) -> str:
    """The content of a run's cost.json as a sentence."""
    device = f"CPU (threads: {cost['threads']})" if cost["device"] == "cpu" else cost["device"]
    precision = "float32" if cost["precision"] == "no" else f"mixed precision {cost['precision']}"
    since = " since it was resumed from a checkpoint" if cost["resumed"] else ""
    return (
        f"{cost['seconds']:,.0f} seconds{since}, predictions and figures included; {cost['epochs']:g} epochs on "
        f"{cost['processes']} × {device}, {precision}."
    )


def _interval(entry: Mapping[str, float | None]) -> str | None:
    if entry["value"] is None:
        return None
    value = f"{entry['value']:.3f}"
    return value if entry["low"] is None else f"{value} ({entry['low']:.3f}–{entry['high']:.3f})"
