"""Fill a published table in one command: what was reported beside what is obtained here.

    python recipes/reproduce.py dlmi --data DIR --output_dir OUT
    python recipes/reproduce.py cytology --data DIR --output_dir OUT --workers 2
    python recipes/reproduce.py mnist-cases --dry_run --output_dir OUT

Studies: dlmi (histology of several centers: five rows of the challenge's report, two of ours), brain-mri (the eight
cells of a report's grid), cytology (five foundation models, four data sets, linear and LoRA, arXiv 2411.14975), and
mnist-cases (four cases on ResNet-50, with sizes on disk). Backbones come from the Hub, or from the folders in
`--backbones_dir`. A row that can't be run, such as one with a gated backbone, is in the table with the reason; the
others continue, and the exit code is 1. Each row and seed is a run of its own in OUT/ROW/seed-S, so the same command
resumes; --workers and --cluster share the runs. Into OUT go STUDY.md and .json. `--dry_run` shows that each row runs,
with random weights and a few generated images, and measures nothing.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import ReproduceOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(ReproduceOptions, __doc__, first="study")
    from hf_histo.experiments.reproduce import reproduce

    reproduce(options)


if __name__ == "__main__":
    run(main)
