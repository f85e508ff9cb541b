"""Do prediction sets keep their coverage at a center never seen? Before and after calibration on some of its images.

    python recipes/leave_one_center_out.py --data DIR --output_dir OUT
    python recipes/coverage.py --runs OUT --output_dir coverage

It takes the stored predictions of a finished leave-one-center-out and trains nothing. For each held-out center, sets
are calibrated on the run's own `val`, which has the other centers, and then on `--labeled` images of the held-out
center, drawn `--draws` times, and measured on its other images, without the groups that were drawn. `coverage.md` and
`coverage.json` have for each center:

- the share of its images whose class is in their set, and the same of the class where it is lowest;
- the share of images with exactly one class in their set, which are decided, and the errors among them;
- the errors among the 80% of images that the model is most certain of.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import CoverageOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(CoverageOptions, __doc__)
    from hf_histo.experiments.coverage import coverage

    coverage(options)


if __name__ == "__main__":
    run(main)
