"""Evaluate predictions: metrics with 95% intervals, calibration, per acquisition center, and figures.

    python recipes/evaluate_predictions.py --predictions OUT/predictions/test.parquet --output_dir report
    python recipes/evaluate_predictions.py --predictions a/val.parquet a/test.parquet --threshold 0.4 --output_dir OUT
    python recipes/evaluate_predictions.py --predictions a/test.parquet --calibrate_on a/val.parquet \\
        --threshold_on a/val.parquet --output_dir report
    python recipes/evaluate_predictions.py --predictions a/test.parquet b/test.parquet --ensemble --balanced \\
        --calibrate_on a/val.parquet b/val.parquet --submission preds.csv --output_dir report

A predictions file is what a training recipe writes, one for each split; its name, without the suffix, is the name of
the split here. With `--ensemble`, all files are predictions of one split by different models, and so are those of
`--calibrate_on` and `--threshold_on`. First the temperature is fitted and applied, then the threshold is chosen. All
files must have the same classes in the same order. `--balanced` is transductive: its threshold is found on the
evaluated images themselves, without their labels, and is none for other images; the results are marked so.

Into the output folder go `metrics.json`, `roc.png`, and for each split `confusion_<split>.png`,
`reliability_<split>.png` and `predictions/<split>.parquet`, the predictions as evaluated. For each split,
`metrics.json` has the values of `classification.report`, "transductive" with "threshold" among them where
that is so, and "threshold_choice": how the threshold was chosen and from which files. Neither a GPU nor the images are
needed.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import EvaluateOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(EvaluateOptions, __doc__)
    from hf_histo.evaluation.evaluate import evaluate

    evaluate(options)


if __name__ == "__main__":
    run(main)
