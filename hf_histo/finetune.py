"""The whole way through the house, for one run: what every recipe does with its data."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import TrainerCallback, set_seed

from hf_histo import hub, launch
from hf_histo.adapter import folder as adapter_folder
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import Config, with_role
from hf_histo.data import hierarchy
from hf_histo.data.load import check_trainable, fingerprint
from hf_histo.data.readers.hub import train_stream
from hf_histo.data.readers.streaming import Stream
from hf_histo.data.schema import ImageTable, recorded_bits
from hf_histo.data.splits import few_shot, leakage
from hf_histo.data.splits.checks import composition, shared_groups
from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration, predictions, thresholds
from hf_histo.evaluation.figures.audit import image_reader
from hf_histo.evaluation.figures.embedding import embedding_map, features
from hf_histo.evaluation.metrics import classification, hierarchical_metrics
from hf_histo.evaluation.reporting import report
from hf_histo.files import write_json
from hf_histo.inference import Classifier
from hf_histo.models import adapters, backbones, batchnorm, heads, qkv
from hf_histo.models.model_size import account
from hf_histo.training import feature_cache, losses, pca_probe, run_folder, trainer
from hf_histo.transforms import augmentation, preprocessing
from hf_histo.transforms.color_shift import ColorRange
from hf_histo.transforms.mri import Preparation
from hf_histo.transforms.stain import CenterNormalizer

logger = logging.getLogger(__name__)

COMPONENTS = "components.png"


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        adapter: its folder.
        metrics: what classification.json holds.
        seconds: that it took; None if it was done before.
        address: where it was uploaded, in the process that did so.
    """

    adapter: Path
    metrics: dict[str, Any]
    seconds: float | None
    address: str | None = None

    def summary(self) -> str:
        """A short table of the evaluated splits, then sizes, seconds and the folder."""
        reports = {split: values["overall"] for split, values in self.metrics["splits"].items()}
        named = {split: report.marked(split, values) for split, values in self.metrics["splits"].items()}
        names = ["accuracy", "auroc", "loss"]
        if "recall_0" in reports["val"]:  # of more than two classes
            names[1:1] = ["balanced_accuracy"]
            names += [name for name in reports["val"] if name.startswith("sensitivity_at")]
        rows: list[list[object]] = [["split", "images", *names]]
        for split, overall in reports.items():
            rows.append([named[split], overall["n"], *(overall[name]["value"] for name in names)])
        trained, total, share = (self.metrics["parameters"][key] for key in ("trainable", "total", "share"))
        adapter, model = (self.metrics["bytes"][key] / 2**20 for key in ("adapter", "model"))
        return "\n".join(
            [
                report.table(rows),
                *(
                    f"{split}:\n{hierarchical_metrics.summary(of)}"
                    for split, of in self.metrics.get("levels", {}).items()
                ),
                f"trainable parameters: {trained:,} of {total:,} ({share:.2%})",
                f"adapter: {adapter:.2f} MiB, beside {model:.2f} MiB for the whole model",
                f"seconds: {self.seconds:.0f}" if self.seconds is not None else "finished before, nothing was trained",
                f"adapter folder: {self.adapter}",
                *([f"uploaded: {self.address}"] if self.address else []),
            ]
        )


def fine_tune(config: Config, data: datasets.DatasetDict, *, callbacks: Sequence[TrainerCallback] = ()) -> Result:
    """Train on the split `train`, choose the checkpoint on `val`, predict every other split, save the adapter folder.

    `callbacks` are told of the training besides the package's own; one of them may end it by an exception.

    Of `data`, `--shots`, `--percentage` and `--level` leave what they say (`few_shot.select`).
    With `--push_to_hub`, upload that. Call it in every process of a launch. A run that was interrupted goes on from its
    last checkpoint; one that is finished is not trained again.

    Raises `HistoError` for data or options that can't be trained on and a Hub that can't be written to, before anything
    is trained; and where the upload fails, after.
    """
    started = time.monotonic()
    protocol = config.protocol
    data = few_shot.select(
        data,
        seed=config.training.seed,
        shots=protocol.shots,
        percentage=protocol.percentage,
        level=protocol.level,
    )
    output = config.output
    pushes = output.push_to_hub and launch.is_main_process()
    if pushes:
        hub.check_access(str(output.hub_model_id), pull_request=output.hub_create_pr)
    run_folder.require_agreement(config, fingerprint(data))
    folder = run_folder.check(config, fingerprint(data))
    with run_folder.alone_in(folder), run_folder.system_failures(folder):
        result = _fine_tune(config, data, folder, started, callbacks)
    if not pushes:
        return result
    address = hub.push(
        result.adapter,
        str(output.hub_model_id),
        private=output.hub_private,
        revision=output.hub_revision,
        pull_request=output.hub_create_pr,
        base_model=output.hub_base_model,
    )
    return dataclasses.replace(result, address=address)


def _fine_tune(
    config: Config, data: datasets.DatasetDict, folder: Path, started: float, callbacks: Sequence[TrainerCallback]
) -> Result:
    adapter = folder / run_folder.ADAPTER
    if run_folder.is_finished(folder) and not config.output.overwrite_output_dir:
        adapter_folder.verify(adapter)
        return Result(adapter, adapter_folder.read_metrics(adapter), None)

    set_seed(config.training.seed)
    names = next(iter(data.values())).features["label"].names
    num_outputs = 1 if len(names) == 2 else len(names)
    negative = predictions.class_index(names, config.data.negative_class)
    _check(config, data, num_outputs, negative)

    options = config.model
    head = heads.HeadConfig.of(options)
    model = backbones.load(
        options.backbone,
        num_outputs,
        revision=options.revision,
        random_weights=options.random_weights,
        image_size=options.image_size,
        head=head,
        head_dropout=options.head_dropout,
    )
    source = backbones.locate(options.backbone)
    views = preprocessing.resolve(model.config, source, options.image_size, options.resize_size, options.fit)
    bits = recorded_bits(data["train"])
    views = dataclasses.replace(views, preparation=Preparation.of(config.preparation), gray_bits=bits)
    changes = augmentation.preset(config.augmentation.augmentation)
    train = _stream(config, len(data["train"]), views) or views.read(data["train"], changes.side(views.image_size))
    validation = views.read(data["val"])
    color = config.centers.normalization
    normalizer = None if color == "none" or isinstance(train, Stream) else CenterNormalizer.fit(train, color)
    sidecar = Sidecar(
        method=config.adapter.method,
        label_names=names,
        num_outputs=num_outputs,
        backbone={
            "name": "builtin" if options.backbone == "builtin" else source,
            "revision": options.revision,
            **backbones.identity(model),
        },
        batch_norm=options.batch_norm,
        preprocessing=views,
        head=head,
        normalizer=normalizer,
        colors=None if config.data.streaming else ColorRange.fit(ImageTable(data["train"])),
        views=augmentation.TestTimeViews.of(config),
        adapt_batch_norm=config.prediction.adapt_batch_norm,
        data={
            "name": Path(config.data.data).resolve().name,
            "fingerprint": fingerprint(data),
            "splits": composition(data),
            "description": data["train"].info.description,
            "near_copies_searched": leakage.were_searched(data),
        },
    )
    if config.prediction.adapt_batch_norm:
        batchnorm.require(model)
    if options.text_prompt:
        words = [hierarchy.path_of(name)[-1] for name in names]
        classes = backbones.text_embeddings(options.backbone, words, options.text_prompt, options.revision)
        some = data["train"].select(range(min(len(data["train"]), 64)))
        length = float(np.linalg.norm(features(model, some, views), axis=1).mean())
        heads.start_from(model, classes, length)
    if options.batch_norm == "frozen":
        batchnorm.freeze(model)
    trained: nn.Module = model if config.adapter.method == "full" else adapters.add(model, config.adapter)
    if config.adapter.init_adapter:
        adapter_folder.start_from(trained, hub.fetch(config.adapter.init_adapter), sidecar)
    sidecar = dataclasses.replace(sidecar, bare=not qkv.is_split(trained) and backbones.is_bare(options.backbone))
    sizes = account(trained, batch_norm=options.batch_norm)

    train_labels = data["train"]["label"]
    balance = config.training.class_balance == "weights"
    session = trainer.build(
        config,
        folder,
        model=trained,
        train=train,
        validation=validation,
        preprocessing=views,
        augmentation=changes,
        normalizer=normalizer and normalizer.extended(validation),
        loss=losses.classification(num_outputs, losses.balancing_weights(train_labels, names) if balance else None),
        compute_metrics=classification.for_trainer(negative=negative),
        callbacks=[run_folder.CheckpointRecord(folder, run_folder.identity(config, fingerprint(data))), *callbacks],
    )
    resumed = run_folder.checkpoint(config, folder, fingerprint(data))
    run_folder.begin(config, fingerprint(data))  # not before all options have been tried
    if config.output.preview and isinstance(train, ImageTable) and session.is_world_process_zero():
        _preview(session, data["train"], train, folder / run_folder.PREVIEW)
    selection: dict[str, Any] = {"split": "val", "metric": config.training.metric_for_best_model}
    if config.adapter.method == "pca":
        selection |= _fit_components(config, trained, data, sidecar, folder / run_folder.FIGURES / COMPONENTS)
    else:
        with feature_cache.folded_layers(session), feature_cache.cached_prefix(session, config):
            session.train(resume_from_checkpoint=resumed)
        selection |= {"value": session.state.best_metric, "step": session.state.best_global_step}

    final = session.whole_model()
    classifier = Classifier(final, sidecar)
    tables = {
        split: classifier.predict(
            rows,
            batch_size=config.training.per_device_eval_batch_size,
            num_workers=config.data.num_workers,
            description=f"Predicting {split}",
        )
        for split, rows in data.items()
        if split != "train"
    }
    temperature = calibration.fit_temperature(tables["val"])
    measured = {
        "selection": selection,
        "calibration": {"split": "val", **dataclasses.asdict(temperature)},
        "splits": {split: classification.report(table, negative=negative) for split, table in tables.items()},
        **sizes,
        "options": _recorded(config),
    }
    if by_level := {
        split: hierarchical_metrics.scores(table)
        for split, table in tables.items()
        if hierarchical_metrics.are_in(table)
    }:
        measured["levels"] = by_level
    for split, values in measured["splits"].items():
        if values["constant"]:
            logger.warning("%s: %s; the model may have learned nothing", split, values["constant"])
    sidecar = dataclasses.replace(
        sidecar, thresholds=_thresholds(tables) if num_outputs == 1 else {}, temperature=temperature.value
    )
    if session.is_world_process_zero():
        figures = _draw(folder / run_folder.FIGURES, session.state.log_history, tables, data["val"])
        if config.adapter.method == "pca":
            figures["The first two principal components of the features"] = folder / run_folder.FIGURES / COMPONENTS
        if config.output.explain:
            explanations = folder / run_folder.FIGURES / "explanations.png"
            classifier.draw(data["val"], tables["val"], explanations)
            figures["Where the model sees the class that it predicts, on val"] = explanations
        cost = {
            "seconds": time.monotonic() - started,
            "processes": session.args.world_size,
            "device": torch.cuda.get_device_name() if session.args.device.type == "cuda" else session.args.device.type,
            "threads": torch.get_num_threads(),
            "precision": session.accelerator.mixed_precision,
            "epochs": session.state.epoch or 0,
            "resumed": resumed is not None,
        }
        run_folder.require_begun(folder)
        write_json(folder / run_folder.COST, cost)
        adapter_folder.save(
            adapter, final, sidecar, metrics=measured, tables=tables, figures=figures, cost=report.cost_sentence(cost)
        )
    launch.process().wait_for_everyone()
    return Result(adapter, measured, time.monotonic() - started)


def _preview(
    session: trainer.Trainer, rows: datasets.Dataset, images: ImageTable, path: Path, count: int = 8, epochs: int = 7
) -> None:
    """Some training images of every center as stored, as prepared, and as training sees them in its first epochs."""
    centers = np.array(images.centers)
    places = [np.flatnonzero(centers == center) for center in np.unique(centers)]
    each = -(-count // len(places))
    chosen = np.concatenate([found[np.linspace(0, len(found) - 1, each).astype(int)] for found in places]).tolist()
    batch = trainer.collate(images.__getitems__(chosen))
    columns = [[sample["image"] for sample in ImageTable(rows).__getitems__(chosen)]]
    if not session.preprocessing.preparation.is_none:
        columns.append([session.preprocessing.preparation(image) for image in columns[0]])
    columns = [[image / 255 for image in column] for column in columns]
    for epoch in range(epochs):
        columns.append(list(session.training_views(batch["image"], batch["center"], batch["index"], epoch)))
    report.views_sheet(
        {
            f"{rows[row]['id']}, center {centers[row]}": [column[place].permute(1, 2, 0).numpy() for column in columns]
            for place, row in enumerate(chosen)
        },
        path,
    )


def _stream(config: Config, total: int, views: preprocessing.Preprocessing) -> Stream | None:
    """The training images where they are streamed; all made squares of one size, since none is known before."""
    if not config.data.streaming:
        return None
    state = launch.process()
    square = partial(views.prepared, side=views.resize_size)
    return train_stream(
        config.data.data, total, config.training.seed, state.process_index, state.num_processes, square, views.gray_bits
    )


def _fit_components(
    config: Config, model: nn.Module, data: datasets.DatasetDict, sidecar: Sidecar, figure: Path
) -> dict[str, Any]:
    """Set the head to the regression on principal components that is best on `val`, and draw the first two."""
    normalizer, wanted = sidecar.normalizer, config.training.metric_for_best_model
    found = {
        split: features(model, rows, sidecar.preprocessing, normalizer=normalizer and normalizer.extended(rows))
        for split, rows in data.items()
        if not split.endswith("_clean")
    }

    def score(probe: pca_probe.Probe) -> float:
        logits = found["val"] @ probe.weight.T + probe.bias
        value = classification.of_logits(logits, data["val"]["label"], negative=negative)[wanted]
        assert value is not None  # `_check` looked
        return -value if wanted == "loss" else value

    names = sidecar.label_names
    negative = predictions.class_index(names, config.data.negative_class)
    probe = pca_probe.fit(
        found["train"],
        np.array(data["train"]["label"]),
        classes=len(names),
        balanced=config.training.class_balance != "none",
        score=score,
    )
    parts = heads.module_of(model).modules()  # the frozen original and the copy that is saved
    (head,) = (part for part in parts if isinstance(part, nn.Linear) and part.weight.requires_grad)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(probe.weight))
        head.bias.copy_(torch.from_numpy(probe.bias))
    every = [(split, [*names, "hidden"][label]) for split in found for label in data[split]["label"]]
    splits, classes = zip(*every, strict=True)
    embedding_map(
        {"frozen backbone": np.concatenate(list(found.values()))}, {"class": classes, "split": splits}, figure
    )
    return {"value": abs(probe.value), "step": None, "components": probe.components}


def _recorded(config: Config) -> dict[str, Any]:
    """The options that decided the result and are not in the sidecar, without a path of this machine."""
    recorded = {key: value for key, value in config.flat().items() if key in with_role("result")}
    start = recorded["init_adapter"]
    if start and (folder := Path(start).expanduser()).is_dir():
        recorded["init_adapter"] = "/".join(folder.resolve().parts[-2:])  # RUN/adapter
    return recorded


def _thresholds(tables: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Thresholds to choose from by name, for new images: none that was found on unlabeled images of these splits."""
    labels = tables["val"]["label"]
    return {"validation": thresholds.choose(tables["val"]).value} if labels[labels >= 0].nunique() > 1 else {}


def _check(config: Config, data: datasets.DatasetDict, num_outputs: int, negative: int | None) -> None:
    if config.adapter.method == "pca" and not heads.HeadConfig.of(config.model).is_plain:
        raise HistoError("--method pca fits one linear layer, expected --head linear on features; leave out the others")
    if config.adapter.method == "full" and not heads.HeadConfig.of(config.model).is_plain:
        raise HistoError("--method full saves a model of transformers, expected --head linear on features; use lora")
    trainer.require_scheduler(config.training.lr_scheduler_type)
    if config.output.explain and find_spec("captum") is None:
        raise HistoError("--explain needs captum: pip install hf_histo[explain], or leave it out")
    missing = {"train", "val"} - data.keys()
    if missing:
        raise HistoError(f"--data {config.data.data}: has no split {missing.pop()!r}, only {', '.join(data)}; make one")
    check_trainable(data["train"])
    for (one, other), groups in shared_groups(data).items():
        if "train" in (one, other):
            logger.warning("%d groups are both in %s and %s, e.g. %s", len(groups), one, other, groups[0])
    labels = data["val"]["label"]
    possible = classification.of_logits(np.zeros((len(labels), num_outputs)), labels, negative=negative)
    wanted = config.training.metric_for_best_model
    if wanted not in possible:
        raise HistoError(f"--metric_for_best_model is {wanted!r}, expected one of {', '.join(possible)}")
    if possible[wanted] is None:
        present = sorted({data["val"].features["label"].names[label] for label in labels if label >= 0})
        raise HistoError(
            f"--metric_for_best_model {wanted} is undefined on val, where the labeled classes are {present}; choose "
            "another metric or another validation split"
        )


def _draw(
    folder: Path, history: list[dict[str, float]], tables: dict[str, pd.DataFrame], validation: datasets.Dataset
) -> dict[str, Path]:
    """The figures of a run by what they show, in the order of reading."""
    labeled = {split: table for split, table in tables.items() if (table["label"] >= 0).any()}
    report.training_curve(history, folder / "training_curve.png")
    report.roc_curve(labeled, folder / "roc.png")
    figures = {"Training: loss, validation metric and learning rate": folder / "training_curve.png"}
    figures |= {"ROC curves": folder / "roc.png"}
    for split, table in labeled.items():
        confusion, reliability = folder / f"confusion_{split}.png", folder / f"reliability_{split}.png"
        report.confusion_matrix(table, confusion)
        calibration.reliability_diagram(table, reliability)
        figures |= {f"Confusion matrix of {split}": confusion, f"Reliability of {split}": reliability}
    image_of = image_reader(datasets.DatasetDict(val=validation))
    report.worst_errors(tables["val"], partial(image_of, "val"), folder / "worst_errors.png")
    return figures | {"The worst errors of val": folder / "worst_errors.png"}
