"""Train with each of k folds held out in turn, no copy of an image on two sides, and measure the result.

    accelerate launch recipes/cross_validate.py --config recipes/configs/mri_mobilenetv2_lora.yaml --data DIR \\
        --folds 5 --output_dir OUT

Takes the options of recipes/mri_lora.py, and the same data. All labeled images are put together, families of near
images are found, such as neighboring slices of a volume, and the folds are divided by class and family: one is `test`,
a tenth of the others `val`, which chooses the checkpoint. Families stand in for patients where these are unknown: two
slices of one head that look different are still on two sides. With `--family copies` only copies are kept together,
with `--split clean` one image of each family of copies is kept, and with `--split files` nothing is searched for: the
folds are divided by class and the groups that the files give. Each fold and seed is a run of its own, in
OUT/fold-F-seed-S, so the same command resumes where an earlier one was stopped; --workers and --cluster share the runs.
Into OUT go cross_validate.json, and, with every image predicted by the run that never saw it,
predictions/seed-S.parquet and confusion-seed-S.png.
"""

from hf_histo.config import parse_with
from hf_histo.config.experiments import CrossValidateOptions
from hf_histo.launch import run


def main() -> None:
    config, options = parse_with(CrossValidateOptions, __doc__, split="published")
    from hf_histo.experiments.cross_validate import cross_validate

    cross_validate(config, options)


if __name__ == "__main__":
    run(main)
