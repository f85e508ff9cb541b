"""Audit a data set before anything is trained on it.

    python recipes/audit.py --data DIR --output_dir report
    python recipes/audit.py --data train.h5 --output_dir report --strict
    python recipes/audit.py --data DIR --output_dir report --backbone NAME_OR_FOLDER

`--data` is a folder that a training recipe can read, one of class folders without splits, an HDF5 file with one group
per image, or 'synthetic'. Looked for: images that are also in another split, exactly or but for compression, size,
brightness and color, also turned and mirrored; patients or slides on two sides; copies with different labels; repeats;
blank and tiny images; classes that are missing or rare, or that the center or the image size gives away. Into the
output folder go `audit.json` with the id of every image concerned, `inventory.parquet` with a row for each image, and
figures: the classes and the colors of each center, samples of each class, and pairs of copies. With `--strict`, the
exit code is 1 where there are findings, else 0.

With `--backbone`, its frozen features measure how unlike the images of each other split are to those of train, class by
class and copies left out: the AUROC of a classifier that separates the two, 0.5 where they are of one source. A map
of the features (PCA) is drawn by class, and by center, or split where there are no centers. With `--adapter`, both are
of its base model, and the map is drawn after adaptation, too.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import AuditOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(AuditOptions, __doc__)
    from hf_histo.experiments.audit import audit

    audit(options)


if __name__ == "__main__":
    run(main)
