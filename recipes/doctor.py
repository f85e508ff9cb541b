"""Report what this machine has for a run, and what it lacks, each with the command that provides it.

    python recipes/doctor.py

Versions of the packages, CPU threads, GPUs and the precisions that they compute in, free disk space for converted data,
backbones and runs, whether a token for the Hub is stored, and which extras are missing. The exit code is 1 where no run
can work like this.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import DoctorOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(DoctorOptions, __doc__)
    from hf_histo.doctor import doctor

    print(doctor(options))


if __name__ == "__main__":
    run(main)
