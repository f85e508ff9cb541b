"""Training on bags: the gradient of a bag in chunks is that of the whole, and memory is that of a chunk."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from miniature import config, write_backbone, write_bags
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback, TrainingArguments

from hf_histo import finetune
from hf_histo.data import bags
from hf_histo.data.load import load
from hf_histo.data.protocol import prepare
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions
from hf_histo.files import read_json
from hf_histo.models import adapters, backbones, batchnorm, heads
from hf_histo.training import bag_trainer, losses, trainer
from hf_histo.training.bag_trainer import BagTrainer
from hf_histo.transforms.pipeline import Pipeline

LORA = ("--method=lora", "--target_modules=all-conv", "--lora_rank=2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("source")
    return write_backbone(folder / "backbone"), write_bags(folder / "bags")


def session(folder: Path, source: tuple[Path, Path], *more: str, chunk_size: int) -> BagTrainer:
    """A trainer in training mode, with random weights in place of LoRA's zeros."""
    options = config(folder, *source, "--aggregation=abmil", *more)
    torch.manual_seed(0)
    model = backbones.load(str(source[0]), 1, head=heads.HeadConfig.of(options.model))
    batchnorm.freeze(model)
    data = load(source[1])
    training, validation = (bags.find(data[split]) for split in ("train", "val"))
    adapted = adapters.add(model, options.adapter)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    run = trainer.build(
        options,
        folder,
        model=adapted,
        train=ImageTable(data["train"]),
        validation=ImageTable(data["val"]),
        pipeline=Pipeline.of(options, model.config, str(source[0])),
        loss=losses.classification(1),
        compute_metrics=classification.for_trainer(),
        kind=partial(
            BagTrainer, training_bags=training, validation_bags=validation, bag_size=100, chunk_size=chunk_size
        ),
    )
    assert isinstance(run, BagTrainer)
    adapted.train()
    return run


def gradients(run: BagTrainer, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of the loss of the first batch."""
    model = run.model
    assert model is not None
    batch = next(iter(run.get_train_dataloader()))
    torch.manual_seed(seed)
    with run.accelerator.autocast():  # as the model that Trainer prepares
        loss = run.compute_loss(model, run._prepare_inputs(batch))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("aggregation", ["abmil", "mean", "max"])
def test_the_gradient_in_chunks_is_that_of_the_bag(tmp_path: Path, source: tuple[Path, Path], aggregation: str) -> None:
    """To 1e-5, with augmentation, which is drawn again; in a batch of three bags of 6 images, and in chunks of 4."""
    more = (*LORA, f"--aggregation={aggregation}", "--per_device_train_batch_size=3", "--augmentation=strong")
    whole, chunked = (gradients(session(tmp_path, source, *more, chunk_size=size)) for size in (1000, 4))
    assert whole.keys() == chunked.keys()
    assert any("lora_A" in name for name in whole)
    assert any("attention" in name for name in whole) == (aggregation == "abmil")
    for name, expected in whole.items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(chunked[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_loss_is_that_of_the_equations(tmp_path: Path, source: tuple[Path, Path]) -> None:
    """Ilse et al. 2018, eq. 7 to 9, by hand, for the batch as the model sees it."""
    run = session(tmp_path, source, *LORA, "--per_device_train_batch_size=2", "--augmentation=none", chunk_size=5)
    batch = next(iter(run.get_train_dataloader()))
    assert run.model is not None
    with torch.no_grad():
        found = run.compute_loss(run.model, run._prepare_inputs(dict(batch)))
        features = heads.Features(run.model)(run.pipeline.evaluate(batch)).logits.numpy()
        head = heads.bag_head(run.model)
        attention, layers = head.get_submodule("attention"), head.get_submodule("layers")
    weights = {name: value.detach().numpy() for name, value in attention.named_parameters() if "modules_to" in name}
    v, u, w = (next(value for name, value in weights.items() if part in name) for part in ("signal", "gate", "score"))
    logits = []
    for h in (features[:6], features[6:]):
        scores = (np.tanh(h @ v.T) / (1 + np.exp(-h @ u.T))) @ w[0]
        a = np.exp(scores) / np.exp(scores).sum()
        logits.append(layers(torch.from_numpy(a @ h)[None])[0].detach())
    labels = batch["labels"][[0, 6]]
    expected = losses.classification(1)(SimpleNamespace(logits=torch.stack(logits)), labels)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_dropout_is_the_same_when_activations_are_computed_again(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (*LORA, "--lora_dropout=0.5")
    again = gradients(session(tmp_path, source, *more, chunk_size=4))
    monkeypatch.setattr(bag_trainer, "checkpoint", lambda function, *given, use_reentrant: function(*given))
    kept = gradients(session(tmp_path, source, *more, chunk_size=4))
    other = gradients(session(tmp_path, source, *more, chunk_size=4), seed=1)
    for name, expected in kept.items():
        torch.testing.assert_close(again[name], expected)
    assert any(not torch.allclose(other[name], expected) for name, expected in kept.items())


def test_no_activation_of_the_backbone_is_kept(tmp_path: Path, source: tuple[Path, Path]) -> None:
    """What a step keeps for the gradient is of the features alone, and the model never sees more than a chunk."""
    kept = {}
    for size in (1000, 4):
        run, total, seen = session(tmp_path, source, *LORA, chunk_size=size), [0], []
        assert run.model is not None
        run.model.register_forward_pre_hook(
            lambda module, args, given, seen=seen: seen.append(len(given["pixel_values"])), with_kwargs=True
        )

        def pack(tensor: torch.Tensor, total: list[int] = total) -> torch.Tensor:
            total[0] += tensor.nbytes
            return tensor

        batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = run.compute_loss(run.model, batch)
        loss.backward()
        kept[size] = total[0]
        assert max(seen) <= size
        assert sum(seen) == (1 if size == 1000 else 2) * len(batch["index"])
    assert kept[4] < 0.1 * kept[1000]


def run_of(folder: Path, source: tuple[Path, Path], *more: str, **given: Any) -> Any:
    quick = ("--augmentation=none", "--per_device_train_batch_size=4", "--chunk_size=8", "--aggregation=abmil")
    options = config(folder, *source, *quick, *more)
    return finetune.run_config(options, prepare(options), **given)


def test_frozen_features_come_from_the_cache(tmp_path: Path, source: tuple[Path, Path]) -> None:
    """The same to the last bit as without; metrics are of bags, and a row of predictions is one."""
    cached, computed = (
        run_of(tmp_path / mode, source, "--method=linear", f"--cache_features={mode}", f"--cache_dir={tmp_path}")
        for mode in ("on", "off")
    )
    assert list((tmp_path / "hf_histo_features").iterdir())
    weights = [result.adapter / "adapter_model.safetensors" for result in (cached, computed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    table = cached.predictions["test"]
    assert isinstance(table, Predictions)
    assert table["id"].tolist() == table["group"].tolist() == ["G6", "G7", "G14", "G15", "G22", "G23"]
    assert cached.record["splits"]["test"]["overall"]["n"] == 6
    # What chose the checkpoint is what is reported of val.
    chosen = cached.record["selection"]
    assert chosen["value"] == pytest.approx(cached.record["splits"]["val"]["overall"][chosen["metric"]]["value"])


def test_lora_learns_and_a_resumed_run_is_the_same(tmp_path: Path, source: tuple[Path, Path]) -> None:
    """Resumed in the middle of the second epoch, whose first batch is skipped."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    more = ("--method=lora", "--target_modules=last-conv", "--num_train_epochs=3", "--bag_size=5", "--eval_steps=4")
    more = (*more, "--metric_for_best_model=loss")
    whole = run_of(tmp_path / "whole", source, *more)
    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path / "resumed", source, *more, callbacks=[Stop()])
    resumed = run_of(tmp_path / "resumed", source, *more)
    weights = [result.adapter / "adapter_model.safetensors" for result in (whole, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert read_json(tmp_path / "resumed" / "cost.json")["resumed"]
    assert whole.record["splits"]["test"]["overall"]["auroc"]["value"] == 1


def test_accumulation_does_not_change_the_trajectory(tmp_path: Path, source: tuple[Path, Path]) -> None:
    """Two steps of two bags are an update of four: the loss is divided by the number of bags, not of images."""
    found = []
    for batch, steps in ((4, 1), (2, 2)):
        sizes = (f"--per_device_train_batch_size={batch}", f"--gradient_accumulation_steps={steps}")
        more = (
            "--method=linear",
            "--optimizer=sgd",
            "--learning_rate=0.01",
            "--augmentation=none",
            "--logging_steps=1",
        )
        run = session(tmp_path / str(batch), source, *sizes, *more, "--num_train_epochs=1", chunk_size=100)
        run.train()
        assert run.state.global_step == 3
        found.append([line[key] for line in run.state.log_history for key in ("loss", "grad_norm") if key in line])
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_labels_and_centers_are_balanced_over_bags(tmp_path: Path, source: tuple[Path, Path]) -> None:
    more = ("--class_balance=sampling", "--balance_centers", "--method=linear", "--per_device_train_batch_size=12")
    run = session(tmp_path, source, *more, chunk_size=100)
    assert sorted(run.balanced) == ["centers", "labels"]
    batch = next(iter(run.get_train_dataloader()))
    assert len(batch["index"]) == 12 * 6


def test_chunks_are_computed_again_in_the_same_precision(tmp_path: Path, source: tuple[Path, Path]) -> None:
    """In bfloat16, the gradient in chunks is that in one piece."""
    exact, whole, chunked = (
        gradients(session(tmp_path, source, *LORA, "--per_device_train_batch_size=3", *more, chunk_size=size))
        for more, size in (((), 1000), (("--mixed_precision=bf16",), 1000), (("--mixed_precision=bf16",), 4))
    )
    for name, expected in whole.items():
        assert not torch.allclose(exact[name], expected, rtol=1e-5), name
        torch.testing.assert_close(chunked[name], expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_several_processes_are_refused(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(HistoError, match="--aggregation trains in one process on one device, and this launch has sev"):
        session(tmp_path, source, *LORA, chunk_size=4)
