"""Train with each of k folds held out in turn, no copy of an image on two sides, and say how good the result is.

    accelerate launch recipes/cross_validate.py --config recipes/configs/mri_mobilenetv2_lora.yaml --data DIR \\
        --folds 5 --output_dir OUT

Takes the options of recipes/mri_lora.py, and the same data. All labeled images are put together, families of near
images are found, such as neighboring slices of a volume, and the folds are divided by class and family: one is `test`,
a tenth of the others `val`, which chooses the checkpoint. Families stand in for patients where these are unknown: two
slices of one head that look different are still on two sides. With `--family copies` only copies are kept together,
with `--split clean` one image of each family of copies is kept, and with `--split files` nothing is searched for: the
folds are divided by class and the groups that the files give. Each fold and seed is a run of its own, in
OUT/fold-F-seed-S, so the same command goes on where an earlier one was stopped. Into OUT go cross_validate.json, and,
with every image predicted by the run that never saw it, predictions/seed-S.parquet and confusion-seed-S.png.
"""

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from hf_histo import launch
from hf_histo.config import option, parse_with
from hf_histo.data.load import fingerprint, load
from hf_histo.data.protocol import refuse
from hf_histo.data.splits.folds import k_folds
from hf_histo.data.splits.leakage import grouped
from hf_histo.errors import HistoError
from hf_histo.evaluation import predictions
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.reporting import report
from hf_histo.evaluation.reporting.summary import METRICS, spread
from hf_histo.files import write_json
from hf_histo.finetune import fine_tune
from hf_histo.launch import run


@dataclass
class Options:
    _argument_group_name = "cross-validation"

    folds: int = option(5, "number of folds")
    seeds: int = option(1, "number of seeds, each with folds and runs of its own, counted up from --seed")


def main() -> None:
    config, options = parse_with(Options, __doc__, split="published")
    folder = config.parent_folder()
    if options.seeds < 1:
        raise HistoError(f"--seeds is {options.seeds}, expected at least 1")
    state = launch.process()

    refuse(config, {"pool_centers": "all splits are put together"})
    files = load(config.data)
    split, family = config.data.split, config.data.family or "near"
    if split == "files":
        refuse(config, {"family": "--split files searches for none"})
    data = files if split == "files" else grouped(files, family, only_one=split == "clean")
    units = {"files": "groups of the files", "near": "families of near images"}
    unit = units.get(split, units.get(family, "families of copies"))
    runs: dict[str, dict[str, float | None]] = {}
    pooled: dict[int, dict[str, Any]] = {}
    for seed in range(config.training.seed, config.training.seed + options.seeds):
        tables = []
        for fold, splits in k_folds(data, folds=options.folds, seed=seed).items():
            name = f"fold-{fold}-seed-{seed}"
            result = fine_tune(config.at(folder / name, seed), splits)
            overall = result.metrics["splits"]["test"]["overall"]
            runs[name] = {metric: overall[metric]["value"] for metric in METRICS}
            tables.append(predictions.read(result.adapter / "predictions" / "test.parquet"))
            if state.is_main_process:
                print(f"{name}: balanced accuracy {overall['balanced_accuracy']['value']:.3f}", flush=True)
        if state.is_main_process:
            names = predictions.label_names(tables[0])
            every = pd.concat(tables, ignore_index=True)
            every.attrs["label_names"] = names
            predictions.write(folder / "predictions" / f"seed-{seed}.parquet", every, names)
            report.confusion_matrix(every, folder / f"confusion-seed-{seed}.png")
            negative = predictions.class_index(names, config.data.negative_class)
            pooled[seed] = classification.report(every, negative=negative)

    if not state.is_main_process:
        return
    spreads = {metric: spread(values[metric] for values in runs.values()) for metric in METRICS}
    print(f"\nHeld-out folds of {config.data.data}: mean ± sample deviation (folds: {options.folds})\n")
    print(
        report.table(
            [
                ["held out", *METRICS.values()],
                *([name, *values.values()] for name, values in runs.items()),
                ["mean", *spreads.values()],
            ]
        )
    )
    for seed, of_seed in pooled.items():
        print(f"\nAll folds together, seed {seed}, 95% intervals over {unit}\n")
        print(report.center_table(of_seed))
        if len(names) > 2:
            print("\n" + report.table(report.class_rows(of_seed, names)))
        print("\n" + report.screening(of_seed, names))
    write_json(
        folder / "cross_validate.json",
        {
            "data": {"name": config.data.data, "fingerprint": fingerprint(files)},
            "options": config.flat(),
            "folds": options.folds,
            "held_out_together": unit,
            "seeds": options.seeds,
            "metrics": {metric: asdict(value) for metric, value in spreads.items()},
            "runs": runs,
            "pooled": pooled,
        },
    )
    print(f"\nwrote {folder / 'cross_validate.json'}")


if __name__ == "__main__":
    run(main)
