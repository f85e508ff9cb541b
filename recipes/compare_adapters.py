"""Compare adapters of one backbone on labeled data, in one table; the backbone is loaded once.

    python recipes/compare_adapters.py --adapters runs/A/adapter runs/B/adapter --data DIR --split val
    python recipes/compare_adapters.py --adapters runs/A/adapter runs/B/adapter --data DIR --split val --average

`--average` adds the mean of the adapters as one more: a single model, as fast as each of them. Each adapter predicts
with its own preprocessing, color statistics and views, and decides at probability 0.5. Intervals are 95%, over
groups (patients, slides).
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

from hf_histo import Classifier
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.reporting.report import overall_table
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
    options = parser.parse_args()

    data = load(options.data, cache_dir=options.cache_dir)
    if options.split not in data:
        raise HistoError(f"--split {options.split}: {options.data} has {', '.join(data)}")
    rows = data[options.split]
    if set(rows["label"]) == {-1}:
        raise HistoError(f"--data {options.data}: no label is known in {options.split}, expected some to compare by")
    first, *others = options.adapters
    classifier = Classifier.from_pretrained(first, backbone=options.backbone)
    for place, adapter in enumerate(others):
        classifier.load_adapter(adapter, f"other{place}", backbone=options.backbone)
    names = dict(zip(classifier.sidecars, options.adapters, strict=True))
    if options.average:
        classifier.average(list(names))
        names["average"] = f"mean of the {len(names)}"
    found: dict[str, Any] = {}
    for name, shown in names.items():
        classifier.set_adapter(name)
        table = classifier.predict(rows, batch_size=options.batch_size, description=f"Predicting with {shown}")
        found[shown] = classification.report(table)
    print(overall_table(found))


if __name__ == "__main__":
    run(main)
