"""Compare adapters of one backbone on labeled data, in one table; the backbone is loaded once.

    python recipes/compare_adapters.py --adapters runs/A/adapter runs/B/adapter --data DIR --split val
    python recipes/compare_adapters.py --adapters runs/A/adapter runs/B/adapter --data DIR --split val --average

`--average` adds the mean of the adapters as one more: a single model, as fast as each of them. Each adapter predicts
with its own preprocessing, color statistics and views, and decides at probability 0.5. Intervals are 95%, over
groups (patients, slides).
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from hf_histo.experiments.compare_adapters import compare_adapters
from hf_histo.launch import run


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", required=True, nargs="+", help="adapter folders, or names on the Hub")
    parser.add_argument("--backbone", help="the base model, where it is no longer where the adapters were trained")
    parser.add_argument("--data", required=True, help="HDF5 file or folder, with labels")
    parser.add_argument("--split", default="val", help="part of the folder to predict (default: val)")
    parser.add_argument("--average", action="store_true", help="also the mean of the adapters")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--cache_dir", help="folder of the converted data (default: the datasets library's cache)")
    print(compare_adapters(**vars(parser.parse_args())))


if __name__ == "__main__":
    run(main)
