"""The audit of a data set as a command: findings, an inventory, and figures."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray
from peft import PeftModel

from hf_histo import hub
from hf_histo.config import DataOptions
from hf_histo.data.audit.findings import audit
from hf_histo.data.audit.near_duplicates import NEAR, SIMILARITY, inventory
from hf_histo.data.load import load
from hf_histo.data.splits.checks import with_families
from hf_histo.errors import HistoError
from hf_histo.evaluation.figures import audit as figures
from hf_histo.evaluation.figures import embedding
from hf_histo.evaluation.metrics.two_sample_test import Separation, separations
from hf_histo.evaluation.reporting.report import table as table_of
from hf_histo.files import atomic_file, require_output, write_json
from hf_histo.models import backbones
from hf_histo.transforms import preprocessing
from hf_histo.transforms.pipeline import Pipeline


def main(usage: str | None) -> None:
    parser = ArgumentParser(description=usage, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder, HDF5 file, or 'synthetic'")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for audit.json and the figures")
    help = f"correlation of details, up to 1, from which on images are copies (default: {SIMILARITY})"
    parser.add_argument("--similarity", type=float, default=SIMILARITY, help=help)
    help = f"also count families of near images, such as neighboring slices (every pair is compared, from {NEAR} on)"
    parser.add_argument("--near", action="store_true", help=help)
    parser.add_argument("--strict", action="store_true", help="exit with code 1 where there are findings")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier audit.json and its figures")
    parser.add_argument("--adapter", help="adapter folder or Hub name, for a map before and after adaptation")
    help = "model whose frozen features measure how unlike the splits are; with --adapter, its base model"
    parser.add_argument("--backbone", help=help)
    help = "stop at an image that can't be read, or leave it out (default: error)"
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error", help=help)
    parser.add_argument("--cache_dir", help="folder of the converted data (default: the datasets library's cache)")
    options = parser.parse_args()
    output: Path = options.output_dir
    require_output(output, [options.data, options.adapter, options.backbone], folder=True)
    if (output / "audit.json").exists() and not options.overwrite:
        raise HistoError(f"--output_dir {output} already holds an audit.json: pass another folder or --overwrite")

    data = load(DataOptions(data=options.data, cache_dir=options.cache_dir, on_bad_image=options.on_bad_image))
    classes = next(iter(data.values())).features["label"].names
    table = inventory(data, similarity=options.similarity, near=NEAR if options.near else None)
    report = audit(table, classes)
    print(report.summary())
    found = report.to_json()

    image_of = figures.image_reader(data)
    figures.distribution(report, output / "distribution.png")
    figures.colors(table, output / "colors.png")
    figures.duplicates(report, image_of, output / "duplicates.png")
    figures.samples(table, classes, image_of, output)
    if options.adapter or options.backbone:
        every = datasets.concatenate_datasets(list(data.values()))
        features = features_of(every, options.adapter, options.backbone)
        centers = [str(center) for center in every["center"]]
        names = [*classes, "hidden"]
        colorings = {"center": centers} if set(centers) != {"-1"} else {"split": table["split"].tolist()}
        colorings["class"] = [names[label] for label in every["label"]]
        embedding.embedding_map(features, colorings, output / "embedding.png")

        groups = [group for split in with_families(data, table).values() for group in split["group"]]
        measured = separations(next(iter(features.values())), table.assign(group=groups), classes)
        found["separations"] = [dataclasses.asdict(separation) for separation in measured]
        if measured:
            print(f"\n{described(measured)}")
    with atomic_file(output / "inventory.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    write_json(output / "audit.json", found)  # last, so that its presence means that all is there
    print(f"\nwrote {output / 'audit.json'}, inventory.parquet and figures")
    if options.strict and report.findings:
        raise HistoError(
            f"--strict: findings in {options.data}: {len(report.findings)}, expected none; see {output / 'audit.json'}"
        )


def described(measured: list[Separation]) -> str:
    lines: list[list[object]] = [["split, class", "train images", "of the split", "AUROC", "95% interval"]]
    for of in measured:
        interval = None if of.low is None or of.high is None else f"{of.low:.3f}–{of.high:.3f}"
        lines.append([f"{of.split}, {of.label}", of.train, of.images, of.auroc, interval])
    about = "How well images of another split are separated from those of train, without copies and shared groups"
    return f"{about} (0.5: not at all):\n\n{table_of(lines)}"


def features_of(every: datasets.Dataset, adapter: str | None, backbone: str | None) -> dict[str, NDArray[np.float64]]:
    """Of all images, (n, d): what the frozen backbone makes of them, and then the adapter."""
    if adapter is None:
        assert backbone is not None
        frozen = backbones.load(backbone, 2)
        declared = preprocessing.resolve(frozen.config, backbones.locate(backbone))
        return {"frozen features": embedding.features(frozen, every, Pipeline(declared))}
    model, sidecar = hub.load(adapter, backbone=backbone)
    if not isinstance(model, PeftModel):
        raise HistoError(f"--adapter {adapter}: holds a whole model, so there is no 'before' to draw; pass an adapter")
    with model.disable_adapter():
        before = embedding.features(model, every, Pipeline(sidecar.preprocessing))
    after = embedding.features(model, every, sidecar.pipeline.single_view)
    return {"before adaptation": before, "after adaptation": after}
