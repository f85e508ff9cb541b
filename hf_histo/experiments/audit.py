"""The command that audits a data set: findings, an inventory, and figures."""

from __future__ import annotations

import dataclasses

import datasets
import numpy as np
from numpy.typing import NDArray
from peft import PeftModel

from hf_histo import hub
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import columns_of
from hf_histo.config.commands import AuditOptions
from hf_histo.data.audit import findings
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


def audit(options: AuditOptions) -> None:
    """Print the findings, and write audit.json, inventory.parquet and figures.

    Raises HistoError for data that can't be read, for outputs among the inputs, and, with `strict`, for findings.
    """
    output = options.output_dir
    require_output(output, [options.data, options.adapter, options.backbone], folder=True)
    if (output / "audit.json").exists() and not options.overwrite:
        raise HistoError(f"--output_dir {output} already holds an audit.json: pass another folder or --overwrite")

    table_options = columns_of(options)
    given = {"cache_dir": options.cache_dir, "on_bad_image": options.on_bad_image, **table_options}
    if options.adapter:  # whose images are read as in its training
        given["reading"] = Sidecar.read(hub.fetch(options.adapter)).preprocessing.reading
    data = load(options.data, **given)
    classes = next(iter(data.values())).features["label"].names
    similarity = SIMILARITY if options.similarity is None else options.similarity
    table = inventory(data, similarity=similarity, near=NEAR if options.near else None)
    report = findings.audit(table, classes)
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
        known = set(table["center"]) - set(findings.UNKNOWN)
        names = [*classes, "hidden"]
        coloring = "center" if known else "split"
        colorings = {coloring: table[coloring].astype(str).to_list()}
        colorings["class"] = [names[label] for label in every["label"][:]]
        embedding.embedding_map(features, colorings, output / "embedding.png")

        groups = [group for split in with_families(data, table).values() for group in split["group"][:]]
        measured = separations(next(iter(features.values())), table.assign(group=groups), classes)
        found["separations"] = [dataclasses.asdict(separation) for separation in measured]
        if measured:
            print(f"\n{described(measured)}")
    with atomic_file(output / "inventory.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    write_json(output / "audit.json", found)  # last: if it exists, all files do
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
    """Features (n, d) of all images by name: those of the frozen backbone, and with `adapter` also the adapted ones.

    Raises HistoError for an adapter that holds a whole model, and as `hub.load` does.
    """
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
    after = embedding.features(model, sidecar.with_known_centers(every), sidecar.pipeline.single_view)
    return {"before adaptation": before, "after adaptation": after}
