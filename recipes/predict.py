"""Predict images with a trained adapter and write a table of ID, Pred, Prob.

    python recipes/predict.py --adapter runs/NAME/adapter --data test.h5 --output preds.csv

`--data` is an HDF5 file with one group per image, or a folder that recipes/histo_lora.py can train on (then `--split`
says which part). `ID` is the image's key in the file, `Pred` the class index at the adapter's threshold, `Prob` the
probability of class 1 (for more than two classes: of the predicted one). These are the columns that challenges ask for;
`--details` adds `Label`, the class's name, and `Calibrated`, `Prob` after the adapter's temperature.

An `ID` or `Label` that a spreadsheet would run as a formula (`=...`) gets a leading apostrophe; others stay unchanged.
`--balanced` is transductive: its threshold calls a share of these very images class 1, and is none for others.
"""

from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

import numpy as np

from hf_histo import Classifier
from hf_histo.config import DataOptions
from hf_histo.data.load import load
from hf_histo.data.protocol import complete
from hf_histo.errors import HistoError
from hf_histo.evaluation import thresholds
from hf_histo.files import require_output
from hf_histo.launch import run


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="adapter folder, or its name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of an adapter on the Hub")
    parser.add_argument("--backbone", help="the base model, where it is no longer where the adapter was trained")
    parser.add_argument("--data", required=True, help="HDF5 file or folder")
    parser.add_argument("--split", default="test", help="part of a folder to predict (default: test)")
    parser.add_argument("--output", required=True, type=Path, help="CSV file to write")
    parser.add_argument("--details", action="store_true", help="also the class's name and the calibrated probability")
    decision = parser.add_mutually_exclusive_group()
    decision.add_argument("--threshold", help="a probability, or a name that the adapter holds, e.g. validation")
    decision.add_argument(
        "--balanced", type=float, nargs="?", const=0.5, metavar="SHARE", help="call this share of the images 1 (0.5)"
    )
    parser.add_argument(
        "--test_time_views", type=int, help="mean logit of 1 or 8 views of the square, or any drawn ones"
    )
    parser.add_argument("--test_time_augmentation", help="square, or a preset of --augmentation to draw views from")
    parser.add_argument(
        "--adapt_batch_norm", action=BooleanOptionalAction, help="take batch-norm statistics from these images"
    )
    parser.add_argument("--explain", type=Path, metavar="PNG", help="draw where the model sees the predicted class")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--cache_dir", help="folder of the converted data (default: the datasets library's cache)")
    options = parser.parse_args()
    if options.batch_size < 1:
        raise HistoError(f"--batch_size is {options.batch_size}, expected at least 1")

    for output in filter(None, (options.output, options.explain)):
        require_output(output, [options.data, options.adapter, options.backbone])

    classifier = Classifier.from_pretrained(options.adapter, revision=options.revision, backbone=options.backbone)
    if options.threshold is not None and classifier.sidecar.num_outputs > 1:
        names = classifier.sidecar.label_names
        raise HistoError(f"--threshold is for two classes, found {len(names)}, of which the most probable is predicted")
    bits = classifier.sidecar.preprocessing.gray_bits
    data = load(DataOptions(data=options.data, cache_dir=options.cache_dir, gray_bits=bits))
    if options.split not in data:
        data = complete(data)
    if options.split not in data:
        raise HistoError(f"--split {options.split}: {options.data} has {', '.join(data)}")
    views = {"count": options.test_time_views, "augmentation": options.test_time_augmentation}
    given = {key: value for key, value in views.items() if value is not None}
    table = classifier.predict(
        data[options.split],
        test_time_views=replace(classifier.sidecar.views, **given),
        adapt_batch_norm=options.adapt_batch_norm,
        batch_size=options.batch_size,
    )
    if options.balanced is not None:
        threshold = thresholds.for_share(table, options.balanced).value
        origin = f"transductive: it calls {options.balanced:.0%} of these images 1, and is none for others"
        table.attrs["transductive"].append("threshold")
    else:
        threshold = classifier.sidecar.threshold_named(options.threshold)
        origin = "the adapter's own" if options.threshold is None else f"--threshold {options.threshold}"
    table["predicted"] = np.array(classifier.sidecar.label_names)[table.predicted_classes(threshold)]
    table.write_submission(options.output, threshold, details=options.details)
    if options.explain:
        classifier.draw(data[options.split], table, options.explain)
    shown = f" at threshold {threshold:.4f} ({origin})" if classifier.sidecar.num_outputs == 1 else ""
    print(f"{len(table)} predictions{shown}: {options.output}")
    if measured := table.attrs["transductive"]:
        print(f"transductive: used the images of {options.data} as a whole, for {', '.join(measured)}")


if __name__ == "__main__":
    run(main)
