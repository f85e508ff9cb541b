"""Training: it learns, and neither gradient accumulation nor an interruption changes the result."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from miniature import config, write_backbone, write_centers, write_data
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_histo import finetune, launch, stages
from hf_histo.config import parse
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import classification
from hf_histo.files import read_json
from hf_histo.models import adapters, backbones, batchnorm
from hf_histo.training import domain_loss, feature_cache, losses, run_folder, trainer
from hf_histo.transforms import augmentation, pipeline
from hf_histo.transforms.pipeline import Pipeline, collate

PLATEAU = ["--lr_scheduler_type=reduce_lr_on_plateau", "--lr_scheduler_patience=3"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_centers(tmp_path_factory.mktemp("source"))


def session(folder: Path, source: tuple[Path, Path], *more: str, weights: list[float] | None = None) -> trainer.Trainer:
    options = config(folder, *source, *more)
    torch.manual_seed(0)
    model = backbones.load(str(source[0]), 1)
    batchnorm.freeze(model)
    data = load(source[1])
    return trainer.build(
        options,
        folder,
        model=adapters.add(model, options.adapter),
        train=ImageTable(data["train"]),
        validation=ImageTable(data["val"]),
        pipeline=Pipeline.of(options, model.config, str(source[0])),
        loss=losses.classification(1, weights),
        compute_metrics=classification.for_trainer(),
    )


def history(session: trainer.Trainer, key: str) -> list[float]:
    return [line[key] for line in session.state.log_history if key in line]


def trained_weights(session: trainer.Trainer) -> dict[str, torch.Tensor]:
    assert session.model is not None
    return {n: p.detach().clone() for n, p in session.model.named_parameters() if p.requires_grad}


def test_training_learns_its_images(tmp_path: Path, source: tuple[Path, Path]) -> None:
    quick = ["--num_train_epochs=6", "--logging_steps=3", "--augmentation=none", "--target_modules=last-conv"]
    run = session(tmp_path, source, *quick, "--metric_for_best_model=loss")
    run.train()
    loss = history(run, "loss")
    assert len(loss) == 6
    assert loss[-1] < 0.5 * loss[0]


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_accumulation_does_not_change_the_trajectory(
    tmp_path: Path, source: tuple[Path, Path], weights: list[float] | None
) -> None:
    """SGD, whose step is the gradient itself: Adam would hide a wrong scale and blow up rounding."""
    found = []
    for batch, steps in ((8, 1), (1, 8)):
        sizes = [f"--per_device_train_batch_size={batch}", f"--gradient_accumulation_steps={steps}"]
        more = ["--optimizer=sgd", "--learning_rate=0.01", "--logging_steps=1", "--target_modules=last-conv"]
        run = session(tmp_path / str(batch), source, *sizes, *more, weights=weights)
        run.train()
        assert run.state.global_step == 6
        found.append((history(run, "loss"), history(run, "grad_norm"), trained_weights(run)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)
    for key, tensor in found[0][2].items():
        torch.testing.assert_close(tensor, found[1][2][key], rtol=0, atol=1e-5)


class Interrupt(TrainerCallback):
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch >= 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("domain_loss", ["dann", "group_dro"])
def test_an_interrupted_run_ends_in_the_same_bytes(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, domain_loss: str
) -> None:
    more = [
        "--num_train_epochs=3",
        "--target_modules=last-conv",
        "--augmentation=crop-jitter",
        "--lora_dropout=0.1",
        "--head_dropout=0.1",
        "--lora_plus_ratio=4",
        "--mixup_alpha=0.4",
        "--label_smoothing=0.1",
        f"--domain_loss={domain_loss}",
        "--domain_weight=30",
        *PLATEAU,
    ]
    data = load(source[1])
    straight = finetune.run_config(config(tmp_path / "straight", *source, *more), data)

    build = trainer.build

    def build_to_interrupt(*args: Any, **kwargs: Any) -> trainer.Trainer:
        session = build(*args, **kwargs)
        session.add_callback(Interrupt())
        return session

    options = config(tmp_path / "resumed", *source, *more)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "build", build_to_interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune.run_config(options, data)
    assert not (tmp_path / "resumed" / "adapter").exists()
    assert (tmp_path / "resumed" / "checkpoint-6").exists()
    resumed = finetune.run_config(options, data)
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes(), name
    state = json.loads((tmp_path / "resumed" / "checkpoint-9" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 9


def test_every_image_gets_a_new_view_in_every_epoch(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def record(images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.extend((kwargs["epoch"], i) for i in kwargs["index"].tolist())
        return augmentation.augment(images, *args, **kwargs)

    monkeypatch.setattr(pipeline, "augment", record)
    session(tmp_path, source, "--num_train_epochs=3", "--target_modules=last-conv").train()
    assert sorted(seen) == [(epoch, i) for epoch in range(3) for i in range(24)]
    assert [i for _, i in seen[:24]] != [i for _, i in seen[24:48]]


@pytest.mark.parametrize(("metric", "mode"), [("auroc", "max"), ("accuracy", "max"), ("loss", "min")])
def test_the_plateau_follows_the_metric(tmp_path: Path, metric: str, mode: str) -> None:
    arguments = trainer.training_arguments(parse(None, [f"--metric_for_best_model={metric}", *PLATEAU]), tmp_path)
    assert arguments.lr_scheduler_kwargs == {"mode": mode, "patience": 3}
    assert arguments.greater_is_better is (mode == "max")


def test_the_scheduler_built_has_that_mode(tmp_path: Path, source: tuple[Path, Path]) -> None:
    run = session(tmp_path, source, *PLATEAU)
    scheduler = run.create_scheduler(10, run.create_optimizer())
    assert (scheduler.mode, scheduler.patience, scheduler.factor) == ("max", 3, 0.1)


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_is_not_adamw(tmp_path: Path, source: tuple[Path, Path], name: str, kind: type) -> None:
    optimizer = session(tmp_path, source, f"--optimizer={name}", "--weight_decay=0.3").create_optimizer()
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert type(optimizer) is kind
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    decayed = [len(group["params"]) for group in optimizer.param_groups if group["weight_decay"] == 0.3]
    assert sum(decayed) > 0


def test_lora_plus_raises_the_learning_rate_of_the_matrices_b(tmp_path: Path, source: tuple[Path, Path]) -> None:
    run = session(tmp_path, source, "--lora_plus_ratio=4", "--weight_decay=0.3", "--target_modules=last-conv")
    assert run.model is not None
    names = {parameter: name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    optimizer = run.create_optimizer()
    assert type(optimizer) is torch.optim.Adam
    found = {
        names.pop(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert not names
    for name, (rate, decay) in found.items():
        is_fast = ".lora_B." in name or name.endswith(".bias")
        assert rate == pytest.approx(0.04 if is_fast else 0.01), name
        assert decay == (0.0 if name.endswith(".bias") else 0.3), name
    assert len({rate for rate, _ in found.values()}) == 2


def test_options_reach_transformers_under_their_names(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "seed": 7,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 5,
        "per_device_eval_batch_size": 6,
        "learning_rate": 0.02,
        "weight_decay": 0.3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 4.0,
        "eval_steps": 11.0,
        "logging_steps": 9,
    }
    arguments = trainer.training_arguments(
        parse(None, [f"--{name}={value}" for name, value in given.items()]), tmp_path
    )
    assert {name: getattr(arguments, name) for name in given} == given
    assert (arguments.eval_strategy, arguments.save_strategy, arguments.save_steps) == ("steps", "steps", 11)
    workers = trainer.training_arguments(parse(None, ["--num_workers=2"]), tmp_path)
    assert (workers.dataloader_num_workers, workers.dataloader_persistent_workers) == (2, True)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ([], -1),
        (["--max_steps=7"], 7),
        (["--shots=4", "--iterations_per_shot=50", "--warmup_steps=3"], 203),
        (["--shots=4", "--iterations_per_shot=50", "--warmup_steps=0.1"], 200),
    ],
)
def test_the_number_of_steps_is_given_or_follows_the_shots(tmp_path: Path, options: list[str], steps: int) -> None:
    assert trainer.training_arguments(parse(None, options), tmp_path).max_steps == steps


def test_accumulation_comes_from_the_launcher_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert trainer.training_arguments(parse(None, []), tmp_path).gradient_accumulation_steps == 4
    given = parse(None, ["--gradient_accumulation_steps=2"])
    assert trainer.training_arguments(given, tmp_path).gradient_accumulation_steps == 2


def test_an_unknown_scheduler_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(HistoError) as caught:
        trainer.training_arguments(parse(None, ["--lr_scheduler_type=zigzag"]), tmp_path)
    assert "zigzag" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpointed_activations_give_the_same_curve(tmp_path: Path) -> None:
    backbone, data = write_backbone(tmp_path / "vit", "test_vit.r160_in1k"), write_data(tmp_path / "data")
    curves = []
    for name, more in (("plain", []), ("checkpointed", ["--activation_checkpointing=True"])):
        run = session(tmp_path / name, (backbone, data), "--logging_steps=1", "--num_train_epochs=1", *more)
        assert run.model is not None
        assert run.model.get_submodule("base_model.model.timm_model").grad_checkpointing is (name != "plain")
        run.train()
        curves.append((history(run, "loss"), history(run, "grad_norm")))
    assert min(curves[0][1]) > 0
    assert curves[0][0] == pytest.approx(curves[1][0], abs=1e-6)
    assert curves[0][1] == pytest.approx(curves[1][1], rel=1e-4)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_curve(tmp_path: Path, source: tuple[Path, Path]) -> None:
    curves = []
    for compiled in ("False", "True"):
        more = ["--logging_steps=1", "--num_train_epochs=1", "--target_modules=last-conv", "--learning_rate=1e-3"]
        run = session(tmp_path / compiled, source, f"--torch_compile={compiled}", *more)
        with feature_cache.folded_layers(run):
            run.train()
        curves.append(history(run, "loss"))
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


@pytest.mark.parametrize(
    ("launched", "option", "expected"),
    [
        (None, "auto", "no"),
        ("bf16", "auto", "bf16"),
        ("no", "bf16", "bf16"),
        ("bf16", "no", "no"),
        ("bf16", "fp16", "fp16"),
    ],
)
def test_precision_is_the_options_then_the_launchers_then_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: str | None, option: str, expected: str
) -> None:
    monkeypatch.setattr(launch, "use_cpu", lambda: True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    arguments = trainer.training_arguments(parse(None, [f"--mixed_precision={option}"]), tmp_path)
    assert (arguments.bf16, arguments.fp16) == (expected == "bf16", expected == "fp16")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == expected


def test_the_trained_model_computes_in_full_precision_again(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = session(tmp_path, source, "--target_modules=last-conv", "--num_train_epochs=1")
    run.train()
    with torch.no_grad():
        logits = run.whole_model().eval()(pixel_values=torch.randn(8, 3, 32, 32)).logits
    assert (logits != logits.bfloat16().float()).any()


def test_a_gpu_that_has_bf16_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(launch, "use_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert launch.mixed_precision("auto") == expected


def batch(session: trainer.Trainer, rows: int = 8) -> dict[str, Any]:
    """A batch of the first training images."""
    assert session.model is not None
    session.model.train()
    assert isinstance(session.train_dataset, ImageTable)
    return session._prepare_inputs(collate(session.train_dataset.__getitems__(range(rows))))


def domain_session(folder: Path, source: tuple[Path, Path], *more: str) -> trainer.Trainer:
    run = session(folder, source, "--augmentation=none", "--target_modules=last-conv", *more)
    run.state.max_steps = 10
    return run


@pytest.mark.parametrize("items", [None, 32])
def test_the_penalties_are_weighted_parts_of_the_loss(
    tmp_path: Path, source: tuple[Path, Path], items: int | None
) -> None:
    """An update of 32 images takes a quarter of the penalty from a batch of 8, as it does of the loss."""
    plain = domain_session(tmp_path / "plain", source)
    inputs = batch(plain)
    share = 1.0 if items is None else 8 / items
    base = plain.compute_loss(plain.model, dict(inputs), num_items_in_batch=items).item()
    for penalty in ("coral", "dann"):
        for weight in (1.0, 3.0):
            more = [f"--domain_loss={penalty}", f"--domain_weight={weight}"]
            run = domain_session(tmp_path / f"{penalty}{weight}", source, *more)
            loss = run.compute_loss(run.model, dict(inputs), num_items_in_batch=items).item()
            centers = torch.from_numpy(inputs["center"])
            if isinstance(run.domain_loss, domain_loss.Coral):
                members = torch.stack([centers == center for center in (0, 3)])
                expected = domain_loss.coral(run.domain_loss.features.last, members)
            else:
                assert isinstance(run.domain_loss, domain_loss.DomainAdversarial)
                expected = run.domain_loss.classifier(run.domain_loss.features.last, centers, 0.0)
            assert expected.item() > 1e-3
            assert loss - base == pytest.approx(share * weight * expected.item(), rel=1e-4)


def test_group_dro_weighs_the_losses_of_the_centers(tmp_path: Path, source: tuple[Path, Path]) -> None:
    run = domain_session(tmp_path, source, "--domain_loss=group_dro", "--domain_weight=50")
    inputs = batch(run)
    loss, outputs = run.compute_loss(run.model, dict(inputs), return_outputs=True)
    groups = run.domain_loss
    assert isinstance(groups, domain_loss.GroupDRO)
    assert groups in run.callback_handler.callbacks
    centers = torch.from_numpy(inputs["center"])
    means = [
        torch.nn.functional.binary_cross_entropy_with_logits(
            outputs.logits[centers == center, 0], inputs["labels"][centers == center].float()
        ).item()
        for center in (0, 3)
    ]
    raised = np.exp(0.5 * np.array(means))  # a step of 50 hundredths
    np.testing.assert_allclose(groups.weights, raised / raised.sum(), rtol=1e-5)
    assert loss.item() == pytest.approx(np.dot(groups.weights.tolist(), means), rel=1e-5)


class Waits(TorchDispatchMode):
    """Records what makes the host wait for an accelerator: reading a value, and results of a size that data decide."""

    OPS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        for method in ("cpu", "tolist", "numpy"):
            original = getattr(torch.Tensor, method)
            monkeypatch.setattr(torch.Tensor, method, lambda *a, m=method, o=original: self.found.append(m) or o(*a))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        selects = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.OPS or selects:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("penalty", ["none", "group_dro", "coral", "dann"])
def test_no_step_waits_for_the_device(
    tmp_path: Path, source: tuple[Path, Path], penalty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--augmentation=strong", "--normalization=reinhard", "--stain_mixing=0.5", f"--domain_loss={penalty}"]
    options += ["--virtual_stain=0.5"]
    options += ["--label_smoothing=0.1", "--mixup_alpha=0.2", "--cutmix_alpha=1"]
    run = session(tmp_path, source, "--target_modules=last-conv", *options)
    run.state.max_steps = 10
    run._checked_after = 50  # as on an accelerator
    run.pipeline = run.pipeline.fitted(run._training_table(), "reinhard")
    assert run.model is not None
    run.model.train()
    inputs = collate(run._training_table().__getitems__(range(8)))
    waits = Waits(monkeypatch)
    with waits:
        run.compute_loss(run.model, run._prepare_inputs(inputs)).backward()
    assert waits.found == []
    with waits:
        run._check_losses()
    assert waits.found


class Between(TrainerCallback):
    """Notes how many waits there were when each step began."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.counts: list[int] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.counts.append(len(self.waits.found))


def test_no_update_waits_for_the_device_either(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer's part of a step: clipping of gradients, update, schedule, sum of losses, progress bar.

    By SGD, since Adam reads its counts of steps on a CPU, one for each weight, and not in its forms for accelerators.
    """
    more = ["--optimizer=sgd", "--num_train_epochs=1", "--target_modules=last-conv", "--domain_loss=group_dro"]
    run = session(tmp_path, source, *more, "--weight_averaging=ema", "--per_device_train_batch_size=4")
    run._checked_after = 50  # as on an accelerator
    assert run.args.max_grad_norm
    waits = Waits(monkeypatch)
    between = Between(waits)
    run.add_callback(between)
    with waits:
        run.train()
    assert len(between.counts) == run.state.global_step == 6
    first, last = between.counts[0], between.counts[-2]  # with the last one, the sampler of images starts anew
    assert waits.found[first:last] == []
    assert waits.found[last:]  # losses are checked and logged, images predicted


@pytest.mark.parametrize("more", [["--label_smoothing=0.2"], ["--mixup_alpha=0.5", "--label_smoothing=0.2"]])
@pytest.mark.parametrize("penalty", ["none", "group_dro"])
def test_soft_labels_are_of_training_alone(
    tmp_path: Path, source: tuple[Path, Path], more: list[str], penalty: str
) -> None:
    run = domain_session(tmp_path, source, f"--domain_loss={penalty}", *more)
    inputs, plain = batch(run), domain_session(tmp_path / "plain", source)
    whole = batch(plain)
    same = torch.isclose(inputs["pixel_values"], whole["pixel_values"]).flatten(1).all(1)
    assert inputs["labels"].shape == (8, 2) and bool(same.all()) is (len(more) == 1)
    torch.testing.assert_close(inputs["labels"].sum(1), torch.ones(8))
    assert inputs["labels"].min() >= 0.1 - 1e-6
    loss, outputs = run.compute_loss(run.model, dict(inputs), return_outputs=True)
    logits, targets = outputs.logits[:, 0], inputs["labels"][:, 1]
    parts = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if penalty == "none":
        expected = parts.mean()
    else:
        assert isinstance(run.domain_loss, domain_loss.GroupDRO)
        means = [parts[torch.from_numpy(inputs["center"]) == center].mean() for center in (0, 3)]
        expected = (run.domain_loss.weights * torch.stack(means)).sum()
    torch.testing.assert_close(loss, expected)
    assert run.model is not None
    run.model.eval()
    images = collate(run._training_table().__getitems__(range(8)))
    assert torch.equal(run._prepare_inputs(images)["labels"], whole["labels"])


def test_a_loss_that_is_checked_later_is_reported_with_its_own_batch(tmp_path: Path, source: tuple[Path, Path]) -> None:
    run = session(tmp_path, source, "--augmentation=none")
    run._checked_after = 3
    table = run._training_table()
    for step, value in enumerate((0.5, math.nan, 0.4)):
        run.state.global_step = step
        rows = list(range(4 * step, 4 * step + 4))
        inputs = run._prepare_inputs(collate(table.__getitems__(rows)))
        run.compute_loss_func = lambda *args, value=value, **kwargs: torch.tensor(value)
        assert run.model is not None
        run.model.train()
        if step < 2:
            run.compute_loss(run.model, inputs)
    with pytest.raises(HistoError, match="the loss is nan at step 2, expected a finite number"):
        run.compute_loss(run.model, inputs)
    assert read_json(tmp_path / run_folder.NAN_BATCH)["ids"] == table.ids(range(4, 8))


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (["--class_balance=sampling"], ["labels"]),
        (["--balance_centers"], ["centers"]),
        (["--class_balance=sampling", "--balance_centers"], ["labels", "centers"]),
    ],
)
def test_what_is_balanced_is_drawn_equally_often(
    tmp_path: Path, source: tuple[Path, Path], options: list[str], columns: list[str]
) -> None:
    run = session(tmp_path, source, *options)
    table = run.train_dataset
    assert isinstance(table, ImageTable)
    rows = [row for row in range(24) if table.labels[row] == 0 or table.centers[row] == 0 or row < 4]
    run.train_dataset = table.select(rows)  # neither labels nor centers, nor both, are balanced by themselves
    values = np.stack([getattr(run.train_dataset, column) for column in columns], axis=1)
    cells, counts = np.unique(values, axis=0, return_counts=True)
    assert len(set(counts)) > 1
    sampler = run._get_train_sampler()
    first = list(sampler)
    run.state.epoch = 2.5  # where a run resumes, and accelerate does not reach the sampler
    run.callback_handler.on_epoch_begin(run.args, run.state, run.control)
    resumed = list(sampler)
    sampler.set_epoch(2)
    assert resumed == list(sampler) != first
    drawn = [values[row] for epoch in range(200) for _ in [sampler.set_epoch(epoch)] for row in sampler]
    _, found = np.unique(drawn, axis=0, return_counts=True)
    expected = len(drawn) / len(cells)
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize(("patience", "epochs"), [(0, 7), (2, 3), (4, 5)])
def test_training_stops_when_patience_ends(
    tmp_path: Path, source: tuple[Path, Path], patience: int, epochs: int
) -> None:
    """Nothing is learned, so the first epoch stays the best."""
    more = ["--num_train_epochs=7", "--learning_rate=1e-30", "--augmentation=none", "--target_modules=last-conv"]
    run = session(tmp_path, source, *more, f"--early_stopping_patience={patience}")
    run.train()
    assert run.state.global_step == 3 * epochs
    assert run.state.best_global_step == 3


def test_a_run_that_stopped_early_stays_so_where_it_resumes_in_a_moved_folder(
    tmp_path: Path, source: tuple[Path, Path]
) -> None:
    quick = ["--num_train_epochs=7", "--learning_rate=1e-30", "--augmentation=none", "--target_modules=last-conv"]
    session(tmp_path / "run", source, *quick, "--early_stopping_patience=2").train()
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    again = session(moved, source, *quick, "--early_stopping_patience=2")
    again.train(resume_from_checkpoint=str(moved / "checkpoint-9"))
    assert again.state.global_step == 9
    assert again.state.best_model_checkpoint == str(moved / "checkpoint-3")
    assert again.control.should_training_stop


@pytest.mark.parametrize(("warmup", "steps"), [("0.5", 3), ("2", 2), ("0", 0)])
def test_the_learning_rate_rises_over_the_warm_up(
    tmp_path: Path, source: tuple[Path, Path], warmup: str, steps: int
) -> None:
    more = ["--logging_steps=1", "--target_modules=last-conv", "--lr_scheduler_type=constant_with_warmup"]
    run = session(tmp_path, source, *more, f"--warmup_steps={warmup}")
    run.train()
    expected = [0.01 * min(1.0, step / max(1, steps)) if steps else 0.01 for step in range(6)]
    assert history(run, "learning_rate") == pytest.approx(expected)


def test_dropout_is_on_the_input_of_the_update(tmp_path: Path, source: tuple[Path, Path]) -> None:
    run = session(tmp_path, source, "--target_modules=last-conv", "--lora_dropout=0.3")
    assert run.model is not None
    layers = [module.lora_dropout["default"] for module in run.model.modules() if hasattr(module, "lora_dropout")]
    assert layers and all(isinstance(layer, torch.nn.Dropout) and layer.p == 0.3 for layer in layers)


@pytest.mark.parametrize(("balance", "expected"), [("weights", [1.0, 3.0]), ("none", None), ("sampling", None)])
def test_an_imbalance_weighs_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balance: str, expected: list[float] | None
) -> None:
    backbone, data = write_backbone(tmp_path / "backbone"), write_data(tmp_path / "data")
    with h5py.File(data / "train.h5", "r+") as file:
        for key in [key for key in file if file[key]["label"][()] == 1][:8]:
            del file[key]
    given = []
    classification = losses.classification

    def watched(num_outputs: int, class_weights: Any = None) -> losses.Loss:
        given.append(class_weights)
        return classification(num_outputs, class_weights)

    monkeypatch.setattr(stages.losses, "classification", watched)
    options = ["--num_train_epochs=1", "--target_modules=last-conv", f"--class_balance={balance}"]
    finetune.run_config(config(tmp_path / "run", backbone, data, *options), load(data))
    assert given == [expected]
