"""Predict images with a trained adapter and write a table of ID, Pred, Prob.

    python recipes/predict.py --adapter runs/NAME/adapter --data test.h5 --output preds.csv

`--data` is an HDF5 file with one group per image, or a folder that recipes/histo_lora.py can train on (then `--split`
names the part). `ID` is the image's key in the file, `Pred` the class index at the adapter's threshold, `Prob` the
probability of class 1 (for more than two classes: of the predicted one). These are the columns that challenges ask for;
`--details` adds `Label`, the class's name, and `Calibrated`, `Prob` after the adapter's temperature.

`--coverage 0.9` adds `Set`, the classes that the image may have, so that 90% of the images of each class have it in
their set, and `Decision`, the set's only class, or "refer to a pathologist". The adapter's predictions of `val` decide,
which says nothing about another center: there, give `--calibration`, a table or folder with some of its labeled images,
at best with a column of slides or patients. With fewer than 9 of them for each class, no set is claimed at 90%.

An `ID` or `Label` that a spreadsheet would run as a formula (`=...`) gets a leading apostrophe; others stay unchanged.
`--balanced` is transductive: its threshold predicts class 1 for a share of these images, and is not valid for others.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import PredictOptions
from hf_histo.launch import importing, run


def main() -> None:
    options = parse_command(PredictOptions, __doc__)
    with importing():
        from hf_histo.experiments.predict import predict

    print(predict(options))


if __name__ == "__main__":
    run(main)
