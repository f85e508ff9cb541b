"""Make one folder of several finished runs: an ensemble, whose prediction is the mean of their logits.

    python recipes/ensemble.py --adapters runs/A/adapter runs/B/adapter runs/C/adapter --output_dir runs/ensemble
    python recipes/predict.py --adapter runs/ensemble --data test.h5 --output preds.csv

The runs may differ in backbone, adapter, layers and preprocessing, but not in the data and its splits. Nothing is
trained or predicted: temperature and threshold are fitted on the runs' predictions of val. The folder holds the
adapters, and is loaded, predicted with and pushed like one of them.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import EnsembleOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(EnsembleOptions, __doc__)
    from hf_histo.experiments.ensemble import make_ensemble

    print(make_ensemble(options))


if __name__ == "__main__":
    run(main)
