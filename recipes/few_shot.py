"""Learn from a handful of labels: methods x shots x seeds x backbones x data sets, as one command that resumes.

    accelerate launch recipes/few_shot.py --data_sets DIR DIR2 --backbones uni biomedclip --output_dir OUT \\
        --methods prototype knn linear recipes/configs/cytology_lora.yaml --shot_counts 1 2 4 8 16 all --seeds 3

A method is a probe of frozen features (prototype: the nearest class mean; knn; linear: a logistic regression), or a
config of recipes/cytology_lora.py, any of whose options, given here, holds for every method. All methods learn from the
same images of a seed, choose what they choose on the same validation images, and are judged on the whole test split.
Probes see the images that a training would predict from: prepared and normalized alike, in all test-time views. Each
backbone sees a data set once for all probes, or, with --normalization, once for each draw. Every training is a run of
its own, in OUT/DATA/BACKBONE/METHOD/SHOTS-SEED, so the same command resumes where an earlier one was stopped; --workers
and --cluster share the trainings. Into OUT go few_shot.md, .json and a figure for each data set.
"""

from hf_histo.config import parse_with
from hf_histo.config.experiments import FewShotOptions
from hf_histo.launch import run


def main() -> None:
    config, options = parse_with(FewShotOptions, __doc__, is_shared=True)
    from hf_histo.experiments.few_shot import few_shot

    few_shot(config, options)


if __name__ == "__main__":
    run(main)
