"""Train with each acquisition center held out in turn, and measure the result on the one never seen.

    accelerate launch recipes/leave_one_center_out.py --config recipes/configs/histo_resnet50_lora.yaml --data DIR \\
        --seeds 2 --output_dir OUT

Takes every option of recipes/histo_lora.py, and the same data, whose train and val are put together and split anew: one
center is `test`, the others give `train` and `val`. Each held-out center and seed is a run of its own, in
OUT/center-C-seed-S, so the same command resumes where an earlier one was stopped; --workers and --cluster share the
runs. Into OUT goes leave_one_center_out.json.
"""

from hf_histo.config import parse_with
from hf_histo.config.experiments import LeaveOneCenterOutOptions
from hf_histo.launch import run


def main() -> None:
    config, options = parse_with(LeaveOneCenterOutOptions, __doc__)
    from hf_histo.experiments.leave_one_center_out import leave_one_center_out

    leave_one_center_out(config, options)


if __name__ == "__main__":
    run(main)
