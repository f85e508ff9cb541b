"""The command that evaluates files of predictions: metrics, calibration, thresholds, ensembles, figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from hf_histo.config.commands import EvaluateOptions
from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration, thresholds
from hf_histo.evaluation.ensembling import average
from hf_histo.evaluation.metrics.classification import report
from hf_histo.evaluation.predictions import Predictions, class_index
from hf_histo.evaluation.reporting.report import center_table, confusion_matrix, roc_curve, table, transductive
from hf_histo.files import require_output, write_json


def read(option: str, paths: list[str], ensemble: bool) -> Predictions:
    """The table in an option's file, or with `ensemble` the average of several. Raises `HistoError` for others."""
    if len(paths) > 1 and not ensemble:
        raise HistoError(f"{option} has {len(paths)} files, expected 1: add --ensemble to average several models")
    return average({path: Predictions.read(path) for path in paths}) if ensemble else Predictions.read(paths[0])


def check_classes(where: str, predictions: Predictions, names: list[str]) -> None:
    """Raise `HistoError` unless the predictions are of the classes `names`, in this order."""
    if (found := predictions.label_names) != names:
        raise HistoError(
            f"{where} has the classes {found}, expected {names}, in this order: pass predictions of one task"
        )


def evaluate(options: EvaluateOptions) -> None:
    """Print tables of the predictions, and write metrics.json, predictions and figures.

    Raises HistoError for files that can't be read or are of different tasks, and for outputs among the inputs.
    """
    output = options.output_dir
    if (output / "metrics.json").exists() and not options.overwrite:
        raise HistoError(f"--output_dir {output} already holds a metrics.json: pass another folder or --overwrite")
    stems = [Path(path).stem for path in options.predictions]
    if options.ensemble:
        files = {stems[0] if len(set(stems)) == 1 else "ensemble": options.predictions}
    else:
        files = {stem: [path] for stem, path in zip(stems, options.predictions, strict=True)}
        if len(files) < len(stems):
            raise HistoError(
                f"--predictions {options.predictions} share a file name: rename them after their splits, or add "
                "--ensemble if they are of different models"
            )
    if options.submission and len(files) > 1:
        raise HistoError(f"--submission takes one split, found {', '.join(files)}: pass one file, or --ensemble")

    read_files = [*options.predictions, *(options.calibrate_on or ()), *(options.threshold_on or ())]
    require_output(output, read_files, folder=True)
    evaluated = {Path(path).resolve() for path in options.predictions}
    for name, paths in (("calibrate_on", options.calibrate_on), ("threshold_on", options.threshold_on)):
        if both := [path for path in paths or () if Path(path).resolve() in evaluated]:
            found = f"{both[0]} is among --predictions, and would be judged by what its own labels chose"
            raise HistoError(f"--{name}: {found}; give the predictions of another split, such as val")
    written = [output / "predictions" / f"{split}.parquet" for split in files]
    for path in filter(None, (options.submission, *written)):
        require_output(path, read_files)

    splits = {split: read("--predictions", paths, options.ensemble) for split, paths in files.items()}
    names = next(iter(splits.values())).label_names
    for split, predictions in splits.items():
        check_classes(f"--predictions {files[split][0]}", predictions, names)
    if options.threshold is not None and len(names) > 2:
        raise HistoError(f"--threshold is for two classes, found {len(names)}: the most probable one is predicted")
    negative = class_index(names, options.negative_class)
    temperature = calibration.Temperature(1.0, "--calibrate_on was not given")
    if options.calibrate_on:
        validation = read("--calibrate_on", options.calibrate_on, options.ensemble)
        check_classes(f"--calibrate_on {options.calibrate_on[0]}", validation, names)
        temperature = calibration.fit_temperature(validation)
        print(f"temperature {temperature.value:.3f}" + (f": {temperature.reason}" if temperature.reason else ""))
        splits = {split: predictions.with_temperature(temperature.value) for split, predictions in splits.items()}
    chosen = None
    if options.threshold_on:
        validation = read("--threshold_on", options.threshold_on, options.ensemble)
        check_classes(f"--threshold_on {options.threshold_on[0]}", validation, names)
        if options.calibrate_on:
            validation = validation.with_temperature(temperature.value)
        chosen = thresholds.choose(
            validation,
            options.criterion,
            specificity=options.specificity,
        )

    metrics = {}
    for split, predictions in splits.items():
        source = options.threshold_on or []
        if options.balanced is not None:
            chosen, source = thresholds.for_share(predictions, options.balanced), files[split]
        threshold = chosen.value if chosen else 0.5 if options.threshold is None else options.threshold
        result = report(predictions, threshold=threshold, negative=negative)
        if options.balanced is not None:
            result["transductive"] = [*(result["transductive"] or ()), "threshold"]
        calibrated = calibration.report(predictions)
        metrics[split] = {
            "predictions": files[split],
            **result,
            "threshold_choice": {**asdict(chosen), "files": source} if chosen else None,
            "calibration": {**calibrated, "temperature": asdict(temperature), "fitted_on": options.calibrate_on},
        }
        origin = f" from {', '.join(source)}" if chosen else ""
        print(f"\n{split} at threshold {threshold:.3f}{origin}, 95% intervals over groups\n\n{center_table(result)}")
        if note := transductive(result, split):
            print(f"\n{note}")
        overall = calibrated["overall"]
        print("\n" + table([["calibration", *overall], ["overall", *overall.values()]]))

    for split, predictions in splits.items():
        threshold = metrics[split]["threshold"]
        confusion_matrix(predictions, output / f"confusion_{split}.png", threshold=threshold)
        calibration.reliability_diagram(predictions, output / f"reliability_{split}.png")
        predictions.write(output / "predictions" / f"{split}.parquet")
        if options.submission:
            predictions.write_submission(options.submission, threshold)
    roc_curve(splits, output / "roc.png")
    write_json(output / "metrics.json", metrics)  # last: if it exists, all files do
    print(f"\nwrote {output / 'metrics.json'} and {2 * len(splits) + 1} figures")
