"""Predict images with a trained adapter and write a table of ID, Pred, Prob.

    python recipes/predict.py --adapter runs/NAME/adapter --data test.h5 --output preds.csv

`--data` is an HDF5 file with one group per image, or a folder that recipes/histo_lora.py can train on (then `--split`
says which part). `ID` is the image's key in the file, `Pred` the class index at the adapter's threshold, `Prob` the
probability of class 1 (for more than two classes: of the predicted one).
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from hf_histo.data.load import load
from hf_histo.errors import HistoError, run
from hf_histo.evaluation import predictions
from hf_histo.inference import Classifier


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="adapter folder, or its name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of an adapter on the Hub")
    parser.add_argument("--backbone", help="the base model, where it is no longer where the adapter was trained")
    parser.add_argument("--data", required=True, help="HDF5 file or folder")
    parser.add_argument("--split", default="test", help="part of a folder to predict (default: test)")
    parser.add_argument("--output", required=True, type=Path, help="CSV file to write")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--cache_dir", help="folder of the converted data (default: the datasets library's cache)")
    options = parser.parse_args()

    classifier = Classifier.from_pretrained(options.adapter, revision=options.revision, backbone=options.backbone)
    data = load(options.data, cache_dir=options.cache_dir)
    if options.split not in data:
        raise HistoError(f"--split {options.split}: {options.data} has {', '.join(data)}")
    table = classifier.predict(data[options.split], batch_size=options.batch_size)

    predictions.write_submission(options.output, table, classifier.sidecar.threshold)
    print(f"{len(table)} predictions: {options.output}")


if __name__ == "__main__":
    run(main)
