"""Train the rows of a table and set what they reach beside what was published: the report's table, as one command.

    accelerate launch recipes/compare.py --rows recipes/configs/report --data DIR --seeds 2 --output_dir OUT
    accelerate launch recipes/compare.py --rows a.yaml b.yaml --data DIR --protocol leave_one_center_out \\
        --select worst --output_dir OUT --backbone NAME_OR_FOLDER

    accelerate launch recipes/compare.py --data DIR --output_dir OUT \\
        --rows recipes/configs/mri_vgg16_lora.yaml recipes/configs/mri_backbones

A row is a config of a training recipe; a folder stands for those in it. Any option of a run given here holds for every
row. `reported.yaml`, in its folder or that of another row, declares, by the config's file name without suffix, the
row's `name`, the published test accuracy (`reported`, with its `source`), and whether predictions are `balanced`: class
1 for half of a split's images, labels unseen. Rows that differ in nothing else, or only in options of prediction
(--test_time_views and the like), share a training.

With `--protocol validation` every split with labels beside train is evaluated, with `leave_one_center_out` each center
that training never saw. `--baseline ROW` adds how much more accurate than that row each other one is, paired by image,
center and seed, with an interval over other slides and seeds. Each row, seed and center is a run of its own in OUT/ROW,
so the same command resumes where an earlier one was stopped, and several launches share the runs, as --workers and
--cluster do. Into OUT go PROTOCOL.md, .json and .png.
"""

from hf_histo.config import parse_with
from hf_histo.config.experiments import CompareOptions
from hf_histo.launch import run


def main() -> None:
    config, options = parse_with(CompareOptions, __doc__, is_shared=True)
    from hf_histo.experiments.compare import compare

    compare(config, options)


if __name__ == "__main__":
    run(main)
