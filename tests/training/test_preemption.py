"""Training that ends early: no progress is lost, and the error names the cause."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import pytest
import torch
from miniature import config, write_data
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_histo import finetune, launch, stages
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.files import read_checksums, write_checksums
from hf_histo.launch import Interrupted
from hf_histo.training import trainer
from hf_histo.training.preemption import StopAtCheckpoint

QUICK = ["--target_modules=last-conv", "--lora_dropout=0.1", "--logging_steps=2"]


@pytest.fixture(scope="module")
def straight(source: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of an uninterrupted run: two epochs of three steps."""
    folder = tmp_path_factory.mktemp("straight")
    return finetune.run_config(config(folder / "run", *source, *QUICK), load(source[1])).adapter


class Signal(TrainerCallback):
    def __init__(self, step: int, number: int, times: int) -> None:
        self.step, self.number, self.times = step, number, times

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def signaled(monkeypatch: pytest.MonkeyPatch, step: int, number: int, times: int = 1) -> None:
    """Send a signal to the next training run during a step."""
    build = trainer.build

    def build_signaled(*args: Any, **kwargs: Any) -> trainer.Trainer:
        session = build(*args, **kwargs)
        session.add_callback(Signal(step, number, times))
        return session

    monkeypatch.setattr(trainer, "build", build_signaled)


# Of three steps in an epoch: within the first, at its end (where the evaluation belongs into the checkpoint), after it.
@pytest.mark.parametrize(("step", "number"), [(2, signal.SIGTERM), (3, signal.SIGTERM), (4, signal.SIGINT)])
def test_a_signal_ends_in_a_checkpoint_that_loses_nothing(
    tmp_path: Path, source: tuple[Path, Path], straight: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: int
) -> None:
    data, options = load(source[1]), config(tmp_path / "run", *source, *QUICK)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        signaled(patch, step, number)
        with pytest.raises(Interrupted) as end:
            finetune.run_config(options, data)
    assert end.value.number == number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").is_file()
    result = finetune.run_config(options, data)
    for name in ("adapter_model.safetensors", "metrics.json", "predictions/val.parquet"):
        assert (result.adapter / name).read_bytes() == (straight / name).read_bytes(), name


def test_a_signal_is_heard_at_the_end_of_an_epoch_without_an_evaluation(tmp_path: Path) -> None:
    stop = StopAtCheckpoint(SimpleNamespace(num_processes=1))  # type: ignore[arg-type]
    stop.received = signal.SIGTERM
    for strategy, saves in (("epoch", False), ("steps", True)):
        arguments = TrainingArguments(str(tmp_path), eval_strategy=strategy, eval_steps=100)
        control = stop.on_step_end(arguments, TrainerState(epoch=2.0), TrainerControl())
        assert control.should_save == saves


def test_a_second_control_c_ends_at_once(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    signaled(monkeypatch, 2, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt) as end:
        finetune.run_config(config(tmp_path / "run", *source, *QUICK), load(source[1]))
    assert not isinstance(end.value, Interrupted)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_recipe_names_the_command_that_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["recipe.py", "--data", "a folder"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        launch.run(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before
    assert end.value.code == 128 + signal.SIGTERM
    shown = capsys.readouterr().err
    assert "interrupted by SIGTERM; this command starts it again, a training from its last checkpoint" in shown
    assert shown.rstrip().endswith("recipe.py --data 'a folder'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_its_images(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def broken(*args: Any) -> Any:
        return lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum() * value

    monkeypatch.setattr(stages.losses, "classification", broken)
    bars = set(tqdm._instances)
    with pytest.raises(HistoError, match=r"the loss is (nan|inf|-inf) at step 1, expected a finite number") as caught:
        finetune.run_config(config(tmp_path / "run", *source, *QUICK), load(source[1]))
    assert set(tqdm._instances) <= bars  # an open one would be drawn beside those of the next job
    found = json.loads((tmp_path / "run" / "nan_batch.json").read_text(encoding="utf-8"))
    assert str(tmp_path / "run" / "nan_batch.json") in str(caught.value)
    assert (found["step"], found["epoch"], len(set(found["ids"]))) == (1, 0, 8)
    assert set(found["ids"]) <= set(load(source[1])["train"]["id"])
    assert not (tmp_path / "run" / "adapter").exists()


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_is_never_unpickled(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data, options = load(source[1]), config(tmp_path / "run", *source, *QUICK)
    with monkeypatch.context() as patch:
        signaled(patch, 2, signal.SIGTERM)
        with pytest.raises(Interrupted):
            finetune.run_config(options, data)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    file, run = checkpoint / name, read_checksums(checkpoint)["run"]
    assert not list(tmp_path.rglob("training_args.bin"))
    torch.save(Touch(tmp_path / "witness"), file)
    write_checksums(checkpoint, run=run)  # as somebody would who planted it
    with pytest.raises(HistoError, match=r"its last checkpoint holds more than tensors and numbers"):
        finetune.run_config(options, data)
    assert not (tmp_path / "witness").exists()


def test_a_model_that_predicts_the_same_for_every_image_is_flagged(
    tmp_path: Path, source: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    data = write_data(tmp_path / "data")
    for file in data.glob("*.h5"):
        with h5py.File(file, "r+") as h5:
            for group in h5.values():
                group["img"][...] = 128
    options = config(tmp_path / "run", source[0], data, *QUICK, "--augmentation=none", "--num_train_epochs=1")
    result = finetune.run_config(options, load(data))
    assert result.record["splits"]["val"]["constant"] == "all 13 images have the same logits"
    assert "val: all 13 images have the same logits" in caplog.text
    assert "all 13 images have the same logits" in (result.adapter / "README.md").read_text(encoding="utf-8")


class AtTheEnd(TrainerCallback):
    """Calls `change` with the run's folder after the first epoch or, with `last`, at the end of the last."""

    def __init__(self, change: Callable[[Path], None], *, last: bool) -> None:
        self.change, self.last = change, last

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.last and state.epoch == 1:
            self.change(Path(args.output_dir))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.last and state.global_step == state.max_steps:
            self.change(Path(args.output_dir))


def test_a_run_whose_folder_vanishes_fails(tmp_path: Path, source: tuple[Path, Path]) -> None:
    options, data = config(tmp_path / "run", *source, *QUICK), load(source[1])
    with pytest.raises(HistoError, match="was deleted or moved while this run was trained"):
        finetune.run_config(options, data, callbacks=[AtTheEnd(shutil.rmtree, last=False)])
    assert not (tmp_path / "run" / "adapter").exists()


def flip_a_bit_of_the_best(folder: Path) -> None:
    (state,) = sorted(folder.glob("checkpoint-*/trainer_state.json"))[-1:]
    best = folder / Path(json.loads(state.read_text())["best_model_checkpoint"]).name / "adapter_model.safetensors"
    content = bytearray(best.read_bytes())
    content[-1] ^= 1
    best.write_bytes(content)


def remove_the_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


@pytest.mark.parametrize("change", [flip_a_bit_of_the_best, remove_the_checkpoints])
def test_the_best_weights_or_none_are_saved(
    tmp_path: Path, source: tuple[Path, Path], change: Callable[[Path], None]
) -> None:
    """Not the last weights, which transformers would silently keep."""
    options, data = config(tmp_path / "run", *source, *QUICK), load(source[1])
    with pytest.raises(HistoError, match="the best checkpoint is damaged"):
        finetune.run_config(options, data, callbacks=[AtTheEnd(change, last=True)])
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_finished_run_without_its_weights_is_not_taken_for_one(
    tmp_path: Path, source: tuple[Path, Path], straight: Path, damage: str
) -> None:
    shutil.copytree(straight.parent, tmp_path / "run")
    options, data = config(tmp_path / "run", *source, *QUICK), load(source[1])
    assert finetune.run_config(options, data).seconds is None
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(HistoError, match=r"adapter_model\.safetensors"):
        finetune.run_config(options, data)
    again = finetune.run_config(config(tmp_path / "run", *source, *QUICK, "--overwrite_output_dir"), data)
    assert (again.adapter / weights.name).read_bytes() == (straight / weights.name).read_bytes()
