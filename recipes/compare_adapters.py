"""Compare adapters of one backbone on labeled data, in one table; the backbone is loaded once.

    python recipes/compare_adapters.py --adapters runs/A/adapter runs/B/adapter --data DIR --split val
    python recipes/compare_adapters.py --adapters runs/A/adapter runs/B/adapter --data DIR --split val --average

`--average` adds the mean of the adapters as one more: a single model, as fast as each of them. Each adapter predicts
with its own preprocessing, color statistics and views, and decides at probability 0.5. Intervals are 95%, over
groups (patients, slides).
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import CompareAdaptersOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(CompareAdaptersOptions, __doc__)
    from hf_histo.experiments.compare_adapters import compare_adapters

    print(compare_adapters(options))


if __name__ == "__main__":
    run(main)
