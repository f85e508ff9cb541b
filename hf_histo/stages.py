"""The stages of a fine-tuning run, from options and data to an adapter folder: check, build, train, evaluate, write."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hf_histo import hub, launch
from hf_histo.adapter import checklist
from hf_histo.adapter import folder as adapter_folder
from hf_histo.adapter.sidecar import BackboneRecord, DataRecord, Sidecar
from hf_histo.config import Config
from hf_histo.data import bags, hierarchy
from hf_histo.data.bags import Bags
from hf_histo.data.load import check_trainable, fingerprint
from hf_histo.data.protocol import refuse
from hf_histo.data.readers.hub import train_stream
from hf_histo.data.readers.streaming import Stream
from hf_histo.data.schema import ImageTable, center_names, recorded
from hf_histo.data.splits import leakage
from hf_histo.data.splits.checks import composition, shared_groups
from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration, decisions, predictions, thresholds
from hf_histo.evaluation.figures import run as run_figures
from hf_histo.evaluation.figures.preview import preview
from hf_histo.evaluation.metrics import classification, hierarchical_metrics
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import report
from hf_histo.files import atomic_file, write_json
from hf_histo.inference import Classifier
from hf_histo.models import adapters, backbones, batchnorm, heads, qkv
from hf_histo.models.model_size import account
from hf_histo.training import feature_cache, losses, run_folder, trackers, trainer
from hf_histo.training.bag_trainer import BagTrainer
from hf_histo.training.checkpoint_record import CheckpointRecord
from hf_histo.training.run_folder import Run
from hf_histo.transforms.color_shift import ColorRange
from hf_histo.transforms.pipeline import Pipeline
from hf_histo.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

UPDATE_SCALES = tuple(step / 10 for step in range(11))
COMPONENTS, EXPLANATIONS = "components.png", "explanations.png"


@dataclass(frozen=True)
class Task:
    """The classification task.

    Attributes:
        label_names: class names in the order of their indices.
        num_outputs: number of logits: 1 for two classes, else one per class.
        negative: index of the class that means "nothing found" (`--negative_class`), or None.
        fingerprint: content hash of the data.
        bags: the bags of each split with `--aggregation`, else None.
    """

    label_names: list[str]
    num_outputs: int
    negative: int | None
    fingerprint: str
    bags: dict[str, Bags] | None = None


@dataclass(frozen=True)
class Setup:
    """A model that is ready for training, and its data.

    Attributes:
        model: backbone, head and adapter; a "full" run has no adapter.
        pipeline: from stored pixels to model input, with color statistics of the training images.
        train: training images.
        validation: images of the split `val`.
        sizes: sizes of model and adapter, see `model_size.account`.
        sidecar: sidecar of the adapter folder, without thresholds and temperature.
    """

    model: nn.Module
    pipeline: Pipeline
    train: ImageTable | Stream
    validation: ImageTable
    sizes: dict[str, dict[str, Any]]  # Any: JSON
    sidecar: Sidecar


@dataclass(frozen=True)
class Trained:
    """A model with the weights that were best on `val`.

    Attributes:
        session: the trainer.
        model: the unsharded model, in each process.
        selection: "split" and "metric" that the weights were chosen by, its "value" and the "step" of the checkpoint.
        resumed: whether training started from a checkpoint.
    """

    session: trainer.Trainer
    model: nn.Module
    selection: dict[str, Any]  # Any: JSON
    resumed: bool


@dataclass(frozen=True)
class Evaluation:
    """Predictions and metrics of all splits except `train`.

    Attributes:
        classifier: the classifier that made the predictions, without threshold and temperature.
        tables: predictions by split.
        metrics: content of metrics.json.
        sidecar: the sidecar with thresholds and temperature.
    """

    classifier: Classifier
    tables: dict[str, Predictions]
    metrics: dict[str, Any]  # Any: JSON
    sidecar: Sidecar


def check(config: Config, data: datasets.DatasetDict) -> Task:
    """Check options and data, and return the task. Raises `HistoError` if they can't be trained on."""
    names = next(iter(data.values())).features["label"].names
    num_outputs = 1 if len(names) == 2 else len(names)
    negative = predictions.class_index(names, config.data.negative_class)
    is_plain = heads.HeadConfig.of(config.model).is_plain
    if config.adapter.method == "pca" and not is_plain:
        raise HistoError("--method pca fits one linear layer, expected --head linear on features; leave out the others")
    if config.adapter.method == "full" and not is_plain:
        raise HistoError("--method full saves a model of transformers, expected --head linear on features; use lora")
    trainer.require_scheduler(config.training.lr_scheduler_type)
    trackers.create(config)
    if config.output.explain and find_spec("captum") is None:
        raise HistoError("--explain needs captum: pip install 'hf_histo[explain]', or leave it out")
    missing = {"train", "val"} - data.keys()
    if missing:
        raise HistoError(f"--data {config.data.data}: has no split {missing.pop()!r}, only {', '.join(data)}; make one")
    check_trainable(data["train"])
    for (one, other), groups in shared_groups(data).items():
        if "train" in (one, other):
            logger.warning("%d groups are both in %s and %s, e.g. %s", len(groups), one, other, groups[0])
    of_bags = None
    if heads.HeadConfig.of(config.model).is_of_bags:
        of_bags = {split: bags.find(rows) for split, rows in data.items()}
    labels = data["val"]["label"][:] if of_bags is None else of_bags["val"].labels
    # Of predictions that are right, so that only the labels of val can make a metric undefined.
    right = np.eye(max(num_outputs, 2))[np.maximum(labels, 0)]
    possible = classification.of_logits(right[:, -num_outputs:] * 2 - 1, labels, negative=negative)
    del possible["n"]
    wanted = config.training.metric_for_best_model
    if wanted not in possible:
        raise HistoError(f"--metric_for_best_model is {wanted!r}, expected one of {', '.join(possible)}")
    if possible[wanted] is None:
        present = sorted({data["val"].features["label"].names[label] for label in labels if label >= 0})
        raise HistoError(
            f"--metric_for_best_model {wanted} is undefined on val, where the labeled classes are {present}; choose "
            "another metric or another validation split"
        )
    return Task(names, num_outputs, negative, fingerprint(data), of_bags)


def build(config: Config, data: datasets.DatasetDict, task: Task) -> Setup:
    """Load the backbone with a new head, fit color normalization on the training images, and add the adapter."""
    options = config.model
    backbone = _backbone(config, task)
    if options.patch_dropout:
        backbones.add_patch_dropout(options.backbone, backbone, options.patch_dropout)
    source = backbones.locate(options.backbone)
    pipeline = Pipeline.of(config, backbone.config, source, recorded(data["train"]))
    train: ImageTable | Stream
    if config.data.streaming:
        train = _stream(config, len(data["train"]), pipeline.preprocessing)
    else:
        train = pipeline.read_training(data["train"])
        pipeline = pipeline.fitted(train, config.centers.normalization)
    sidecar = Sidecar(
        method=config.adapter.method,
        adapter=config.adapter.adapter,
        label_names=task.label_names,
        num_outputs=task.num_outputs,
        backbone=BackboneRecord(
            "builtin" if options.backbone == "builtin" else source, options.revision, *backbones.identity(backbone)
        ),
        batch_norm=options.batch_norm,
        preprocessing=pipeline.preprocessing,
        head=heads.HeadConfig.of(options),
        normalizer=pipeline.normalizer,
        center_names=center_names(data["train"]),
        colors=None if config.data.streaming else ColorRange.fit(ImageTable(data["train"])),
        views=pipeline.test_time_views,
        adapt_batch_norm=config.prediction.adapt_batch_norm,
        data=DataRecord(
            name=Path(config.data.data).resolve().name,
            fingerprint=task.fingerprint,
            splits=composition(data),
            description=data["train"].info.description,
            near_copies_searched=leakage.were_searched(data),
        ),
    )
    if not batchnorm.layers(backbone):
        refuse(config, dict.fromkeys(("batch_norm", "adapt_batch_norm"), f"{options.backbone} has no batch norm"))
    if options.text_prompt:
        _start_from_text(config, backbone, data["train"], task, pipeline)
    if options.batch_norm == "frozen":
        batchnorm.freeze(backbone)
    model: nn.Module = backbone if config.adapter.method == "full" else adapters.add(backbone, config.adapter)
    if config.adapter.init_adapter:
        adapter_folder.start_from(model, hub.fetch(config.adapter.init_adapter), sidecar)
    sidecar = dataclasses.replace(sidecar, bare=not qkv.is_split(model) and backbones.is_bare(options.backbone))
    sizes = account(model, batch_norm=options.batch_norm)
    return Setup(model, pipeline, train, pipeline.read(data["val"]), sizes, sidecar)


def _backbone(config: Config, task: Task) -> PreTrainedModel:
    """The backbone before training, with a new head."""
    options = config.model
    return backbones.load(
        options.backbone,
        task.num_outputs,
        revision=options.revision,
        random_weights=options.random_weights,
        image_size=options.image_size,
        head=heads.HeadConfig.of(options),
        head_dropout=options.head_dropout,
    )


def train(
    config: Config,
    data: datasets.DatasetDict,
    task: Task,
    setup: Setup,
    run: Run,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train head and adapter, or fit the head with `--method pca`, and keep the weights that are best on `val`."""
    labels: Sequence[int] = data["train"]["label"][:]
    centers = setup.validation.centers
    kind: Callable[..., trainer.Trainer] = trainer.Trainer
    if task.bags is not None:
        labels, centers = task.bags["train"].labels.tolist(), task.bags["val"].centers.tolist()
        kind = partial(
            BagTrainer,
            training_bags=task.bags["train"],
            validation_bags=task.bags["val"],
            bag_size=config.training.bag_size,
            chunk_size=config.speed.chunk_size,
        )
    balanced = config.training.class_balance == "weights"
    weights = losses.balancing_weights(labels, task.label_names) if balanced else None
    session = trainer.build(
        config,
        run.folder,
        model=setup.model,
        train=setup.train,
        validation=setup.validation,
        pipeline=setup.pipeline.extended(data["val"]),
        loss=losses.classification(task.num_outputs, weights),
        compute_metrics=classification.for_trainer(
            negative=task.negative,
            centers=centers,
            center_names=center_names(data["val"]),
            selection=config.training.metric_for_best_model,
        ),
        callbacks=[CheckpointRecord(run), *callbacks],
        kind=kind,
    )
    checkpoint = run_folder.checkpoint(run, config.training.resume_from_checkpoint)
    run_folder.begin(run)  # after all options were checked
    precision = session.accelerator.mixed_precision.replace("no", "float32")
    launch.show(f"training on {session.args.device.type} in {precision}, {torch.get_num_threads()} CPU threads")
    if config.output.preview and isinstance(setup.train, ImageTable) and session.is_world_process_zero():
        file = run.folder / run_folder.PREVIEW
        preview(session.pipeline, data["train"], file)
        session.add_callback(trackers.ShowImage(session.callback_handler.callbacks, "preview", file))
    selection: dict[str, Any] = {"split": "val", "metric": config.training.metric_for_best_model}
    if config.adapter.method == "pca":
        from hf_histo.evaluation import pca_baseline

        selection |= pca_baseline.fit(
            setup.model,
            data,
            setup.pipeline,
            metric=config.training.metric_for_best_model,
            negative=task.negative,
            balanced=config.training.class_balance != "none",
            figure=run.folder / run_folder.FIGURES / COMPONENTS,
        )
    else:
        if config.model.probe_first and checkpoint is None:
            _start_from_probe(config, data, setup)
        caching = feature_cache.cached_prefix(session, config.speed.cache_features, config.data.cache_dir)
        with feature_cache.folded_layers(session), caching:
            session.train(resume_from_checkpoint=checkpoint)
        selection |= {"value": session.state.best_metric, "step": session.state.best_global_step}
    return Trained(session, session.whole_model(), selection, checkpoint is not None)


def evaluate(config: Config, data: datasets.DatasetDict, task: Task, setup: Setup, trained: Trained) -> Evaluation:
    """Scale the update as the options say, predict all splits except `train`, calibrate on `val`, compute metrics."""
    classifier = Classifier(trained.model, setup.sidecar)
    scaling = _scale_update(config, data["val"], task, classifier)
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
    metrics = {
        "selection": trained.selection,
        "calibration": {"split": "val", **dataclasses.asdict(temperature)},
        "splits": {split: classification.report(table, negative=task.negative) for split, table in tables.items()},
        **setup.sizes,
        "options": config.recorded(),
    }
    by_level = {
        split: hierarchical_metrics.scores(table)
        for split, table in tables.items()
        if hierarchical_metrics.are_in(table)
    }
    if by_level:
        metrics["levels"] = by_level
    if config.output.robustness:
        metrics["robustness"] = _robustness(config, data, task, setup, trained.model)
    chosen = thresholds.named(tables["val"]) if task.num_outputs == 1 else {}
    if task.num_outputs == 1:
        metrics["decisions"] = decisions.decisions(tables, setup.sidecar.data.splits, chosen)
    if scaling:
        metrics["update_scale"] = scaling
    for split, values in metrics["splits"].items():
        if values["constant"]:
            logger.warning("%s: %s; the model may have learned nothing", split, values["constant"])
    sidecar = dataclasses.replace(
        setup.sidecar,
        thresholds=chosen,
        temperature=temperature.value,
        update_scale=scaling["value"] if scaling else 1.0,
    )
    return Evaluation(classifier, tables, metrics, sidecar)


def _robustness(
    config: Config, data: datasets.DatasetDict, task: Task, setup: Setup, model: nn.Module
) -> dict[str, Any]:  # Any: JSON
    """Robustness of the features to the center "before" and "after" training, on all "splits" but `train`."""
    from hf_histo.evaluation.figures.embedding import features
    from hf_histo.evaluation.metrics import robustness

    splits = [split for split in leakage.whole(data) if split != "train"]
    every = datasets.concatenate_datasets([data[split] for split in splits])
    table = every.select_columns(["label", "center", "group"]).to_pandas()
    known = robustness.known(table)
    rows, table = every.select(np.flatnonzero(known)), table[known]
    before = adapters.channels_last(_backbone(config, task)).to(launch.process().device)
    found = {
        "before": features(before, rows, Pipeline(setup.pipeline.preprocessing)),
        "after": features(model, rows, setup.sidecar.pipeline.single_view),
    }
    return {"splits": splits, **{when: robustness.robustness(rows, table) for when, rows in found.items()}}


def _scale_update(
    config: Config, validation: datasets.Dataset, task: Task, classifier: Classifier
) -> dict[str, Any] | None:
    """Multiply the trained update by `--update_scale`, in place; for "auto", by the best of `UPDATE_SCALES` on `val`.

    Returns what metrics.json records: "value"; for "auto" also "split", "metric" and its "values" by scale. Of scales
    that are equally good, the largest is taken. None if the update stays as it is.
    """
    wanted = config.adapter.update_scale
    if wanted != "auto" and float(wanted) == 1:
        return None
    model = classifier.model
    assert isinstance(model, PeftModel)
    if wanted != "auto":
        adapters.scale_update(model, float(wanted))
        return {"value": float(wanted)}
    trained, name = adapters.update_factors(model), config.training.metric_for_best_model
    found: dict[float, float] = {}
    for scale in UPDATE_SCALES:
        adapters.scale_update(model, scale, trained)
        table = classifier.predict(
            validation,
            batch_size=config.training.per_device_eval_batch_size,
            num_workers=config.data.num_workers,
            description=f"Predicting val, update times {scale:g}",
        )
        found[scale] = float(classification.compute(table, negative=task.negative)[name] or 0.0)
    sign = -1 if name == "loss" else 1
    best = max(found, key=lambda scale: (sign * found[scale], scale))
    adapters.scale_update(model, best, trained)
    return {"value": best, "split": "val", "metric": name, "values": {f"{s:g}": of for s, of in found.items()}}


def write(
    config: Config,
    data: datasets.DatasetDict,
    trained: Trained,
    evaluation: Evaluation,
    folder: Path,
    started: float,
) -> None:
    """Draw the figures, write the checklist and save the adapter folder, in the main process."""
    place, is_of_bags = folder / run_folder.FIGURES, evaluation.sidecar.head.is_of_bags
    history = trained.session.state.log_history
    figures = run_figures.draw(place, history, evaluation.tables, None if is_of_bags else data["val"])
    if config.adapter.method == "pca":
        figures["The first two principal components of the features"] = place / COMPONENTS
    if config.output.explain:
        evaluation.classifier.draw(data["val"], evaluation.tables["val"], place / EXPLANATIONS)
        figures["Where the model sees the class that it predicts, on val"] = place / EXPLANATIONS
    cost = _cost(trained, time.monotonic() - started)
    run_folder.require_begun(folder)
    write_json(folder / run_folder.COST, cost)
    draft = checklist.text(evaluation.sidecar, evaluation.metrics, evaluation.tables, figures)
    with atomic_file(folder / run_folder.CHECKLIST) as temporary:
        temporary.write_text(draft, encoding="utf-8")
    adapter_folder.save(
        folder / run_folder.ADAPTER,
        trained.model,
        evaluation.sidecar,
        metrics=evaluation.metrics,
        tables=evaluation.tables,
        figures=figures,
        cost=report.cost_sentence(cost),
    )


def _stream(config: Config, total: int, preprocessing: Preprocessing) -> Stream:
    """Streamed training images, all resized to squares of one size, since their sizes are not known beforehand."""
    state = launch.process()
    square = partial(preprocessing.prepared, side=preprocessing.resize_size)
    return train_stream(
        config.data.data,
        total,
        config.training.seed,
        state.process_index,
        state.num_processes,
        square,
        preprocessing.reading,
    )


def _start_from_text(
    config: Config, model: PreTrainedModel, train: datasets.Dataset, task: Task, pipeline: Pipeline
) -> None:
    """Initialize the head with the text embedding of each class name in `--text_prompt`."""
    from hf_histo.evaluation.figures.embedding import features

    options = config.model
    words = [hierarchy.path_of(name)[-1] for name in task.label_names]
    classes = backbones.text_embeddings(options.backbone, words, str(options.text_prompt), options.revision)
    some = train.select(range(min(len(train), 64)))
    length = float(np.linalg.norm(features(model, some, Pipeline(pipeline.preprocessing)), axis=1).mean())
    heads.start_from(model, classes, length)


def _start_from_probe(config: Config, data: datasets.DatasetDict, setup: Setup) -> None:
    """Initialize the head with a regression on the features of `train`, and print its loss on `val`."""
    from hf_histo.evaluation import probe_first

    balanced = config.training.class_balance != "none"
    probe = probe_first.start(setup.model, data, setup.pipeline, balanced=balanced)
    launch.show(
        f"the classifier starts from a linear probe: loss {-probe.value:.3f} on val, C {probe.inverse_penalty:g}"
    )


def _cost(trained: Trained, seconds: float) -> dict[str, Any]:
    """Duration and hardware of the run, for cost.json and `report.cost_sentence`."""
    session = trained.session
    return {
        "seconds": seconds,
        "processes": session.args.world_size,
        "device": torch.cuda.get_device_name() if session.args.device.type == "cuda" else session.args.device.type,
        "threads": torch.get_num_threads(),
        "precision": session.accelerator.mixed_precision,
        "epochs": session.state.epoch or 0,
        "resumed": trained.resumed,
    }
