"""Say what is wrong with a data set, before anything is trained on it.

    python recipes/audit.py --data DIR --output_dir report
    python recipes/audit.py --data train.h5 --output_dir report --strict

`--data` is a folder that a training recipe can read, one of class folders without splits, an HDF5 file with one group
per image, or 'synthetic'. Looked for: images that are also in another split, exactly or but for compression, size,
brightness and color, also turned and mirrored; patients or slides on two sides; copies with different labels; repeats;
blank and tiny images; classes that are missing or rare, or that the center or the image size gives away. Into the
output folder go `audit.json` with the id of every image concerned, `inventory.parquet` with a row for each image, and
figures: the classes and the colors of each center, samples of each class, and pairs of copies; with `--adapter`, a map
of what its model makes of the images, before and after adaptation, by center and by class. With `--strict`, the exit
code is 1 where there are findings, else 0.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import datasets
from peft import PeftModel

from hf_histo import hub
from hf_histo.config import DataOptions
from hf_histo.data.audit import audit
from hf_histo.data.inventory import SIMILARITY, inventory
from hf_histo.data.load import load
from hf_histo.errors import HistoError, run
from hf_histo.evaluation import audit_figures as figures
from hf_histo.evaluation import embedding
from hf_histo.files import atomic_file, write_json


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder, HDF5 file, or 'synthetic'")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for audit.json and the figures")
    help = f"correlation of details, up to 1, from which on images are copies (default: {SIMILARITY})"
    parser.add_argument("--similarity", type=float, default=SIMILARITY, help=help)
    parser.add_argument("--strict", action="store_true", help="exit with code 1 where there are findings")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier audit.json and its figures")
    parser.add_argument("--adapter", help="adapter folder or Hub name, for embedding.png")
    parser.add_argument("--backbone", help="its base model, where that is no longer where the adapter was trained")
    help = "stop at an image that can't be read, or leave it out (default: error)"
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error", help=help)
    parser.add_argument("--cache_dir", help="folder of the converted data (default: the datasets library's cache)")
    options = parser.parse_args()
    output: Path = options.output_dir
    if (output / "audit.json").exists() and not options.overwrite:
        raise HistoError(f"--output_dir {output} already holds an audit.json: pass another folder or --overwrite")

    data = load(DataOptions(data=options.data, cache_dir=options.cache_dir, on_bad_image=options.on_bad_image))
    classes = next(iter(data.values())).features["label"].names
    table = inventory(data, similarity=options.similarity)
    report = audit(table, classes)
    print(report.summary())

    image_of = figures.image_reader(data)
    figures.distribution(report, output / "distribution.png")
    figures.colors(table, output / "colors.png")
    figures.duplicates(report, image_of, output / "duplicates.png")
    figures.samples(table, classes, image_of, output)
    if options.adapter:
        draw_embedding(data, options.adapter, options.backbone, output / "embedding.png")
    with atomic_file(output / "inventory.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    write_json(output / "audit.json", report.to_json())  # last, so that its presence means that all is there
    print(f"\nwrote {output / 'audit.json'}, inventory.parquet and figures")
    if options.strict and report.findings:
        raise HistoError(
            f"--strict: findings in {options.data}: {len(report.findings)}, expected none; see {output / 'audit.json'}"
        )


def draw_embedding(data: datasets.DatasetDict, adapter: str, backbone: str | None, path: Path) -> None:
    model, sidecar, _ = hub.load(adapter, backbone=backbone)
    if not isinstance(model, PeftModel):
        raise HistoError(f"--adapter {adapter}: holds a whole model, so there is no 'before' to draw; pass an adapter")
    every = datasets.concatenate_datasets(list(data.values()))
    color = sidecar.normalizer and sidecar.normalizer.extended(sidecar.preprocessing.read(every))
    with model.disable_adapter():
        before = embedding.features(model, every, sidecar.preprocessing)
    after = embedding.features(model, every, sidecar.preprocessing, normalizer=color)
    names = [*sidecar.label_names, "hidden"]
    embedding.embedding_map(
        {"before adaptation": before, "after adaptation": after},
        {"center": [str(c) for c in every["center"]], "class": [names[label] for label in every["label"]]},
        path,
    )


if __name__ == "__main__":
    run(main)
