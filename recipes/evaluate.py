"""Say how good predictions are: metrics with 95% intervals, overall and per acquisition center, and figures.

    python recipes/evaluate.py --predictions output/predictions/test.parquet --output_dir report
    python recipes/evaluate.py --predictions output/predictions/val.parquet output/predictions/test.parquet \
        --output_dir report --threshold 0.4

A predictions file is what a training recipe writes, one for each split; its name, without the suffix, is the name of
the split here. Into the output folder go `metrics.json`, `roc.png`, and `confusion_<split>.png` for each split. Neither
a GPU nor the images are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_histo.errors import HistoError, run
from hf_histo.evaluation import predictions as tables
from hf_histo.evaluation.metrics import report
from hf_histo.evaluation.report import center_table, confusion_matrix, roc_curve
from hf_histo.files import write_json


@dataclass
class Arguments:
    """What to evaluate, and where the result goes."""

    predictions: list[str] = field(metadata={"help": "predictions files (.parquet), one for each split"})
    output_dir: str = field(metadata={"help": "folder for metrics.json and the figures"})
    threshold: float = field(default=0.5, metadata={"help": "probability from which on class 1 is predicted, 0 to 1"})
    resamples: int = field(default=1000, metadata={"help": "bootstrap resamples for the intervals"})
    seed: int = field(default=0, metadata={"help": "seed of the bootstrap"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier metrics.json and its figures"})


def main() -> None:
    arguments = Arguments(**vars(HfArgumentParser(Arguments).parse_args()))  # type: ignore[arg-type]
    output = Path(arguments.output_dir)
    if (output / "metrics.json").exists() and not arguments.overwrite:
        raise HistoError(f"--output_dir {output} already holds a metrics.json: pass another folder or --overwrite")
    paths = {Path(path).stem: path for path in arguments.predictions}
    if len(paths) < len(arguments.predictions):
        raise HistoError(f"--predictions {arguments.predictions} share a file name: rename them after their splits")

    splits = {split: tables.read(path) for split, path in paths.items()}
    metrics = {}
    for split, predictions in splits.items():
        result = report(predictions, threshold=arguments.threshold, resamples=arguments.resamples, seed=arguments.seed)
        metrics[split] = {"predictions": paths[split], **result}
        print(f"\n{split}, 95% intervals from resampled groups\n\n{center_table(result)}")

    for split, predictions in splits.items():
        confusion_matrix(predictions, output / f"confusion_{split}.png", threshold=arguments.threshold)
    roc_curve(splits, output / "roc.png")
    write_json(output / "metrics.json", metrics)  # last, so that its presence means that all is there
    print(f"\nwrote {output / 'metrics.json'} and {len(splits) + 1} figures")


if __name__ == "__main__":
    run(main)
