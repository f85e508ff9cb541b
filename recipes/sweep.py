"""Try many settings of a training recipe: every point of a grid, or a search that learns from what it has seen.

    python recipes/sweep.py --study recipes/configs/sweep/mri_search.yaml \\
        --config recipes/configs/mri_mobilenetv2_lora.yaml --data DIR --output_dir OUT

Takes every option of the training recipes, and the same data. A study is a YAML file with one of

- `grid`: options with a list of values each; every combination is a trial, and runs to its end
- `space`: options with a list, or with `low` and `high` (and `log: true`), and `trials`: how many; they are proposed by
  Optuna's TPE sampler, and those below the median of the earlier ones at the same epoch are stopped (after one epoch,
  and with four trials done)

What counts is `--metric_for_best_model` on val, the best epoch's; no other split is looked at. Each trial is a run of
its own in OUT/trial-N, and the study is kept in OUT/study.db (SQLite), or in the database at `--storage URL`, such as
postgresql+psycopg2://USER@HOST/NAME. The same command resumes where an earlier one was stopped, a trial that was killed
included; given several times at once, on machines that share OUT, the processes share the trials. Into OUT go sweep.md,
sweep.json, best.yaml for `--config` (beside --data), and plots.
"""

from hf_histo.config import parse_with
from hf_histo.config.experiments import SweepOptions
from hf_histo.launch import run


def main() -> None:
    config, options = parse_with(SweepOptions, __doc__)
    from hf_histo.experiments.sweep import sweep

    sweep(config, options)


if __name__ == "__main__":
    run(main)
