"""How well does `accept` judge sites? Power and false alarms, over many draws of images, without training.

    python recipes/leave_one_center_out.py --data DIR --output_dir OUT
    python recipes/acceptance_study.py --runs OUT --data DIR --output_dir study

From the stored predictions of a finished leave-one-center-out: for each held-out center, `--draws` times `--counts`
random images of it are judged as a new site would be, without their labels; and so is one random half of the slides of
each run's `val`, against the other half, where each alarm is false. `acceptance_study.md` and `acceptance_study.json`
have the share of draws that were not accepted, beside the true drop in accuracy, and the errors of the predicted one.
Colors are tested where `--data` gives the images of the runs: predictions hold none.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import AcceptanceStudyOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(AcceptanceStudyOptions, __doc__)
    from hf_histo.experiments.acceptance_study import study

    study(options)


if __name__ == "__main__":
    run(main)
