"""The averaged weights are what is validated, chosen and saved; training itself goes on as without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from miniature import config
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from hf_histo import finetune
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.files import read_json
from hf_histo.result import Result
from hf_histo.training import trainer
from hf_histo.training.weight_averaging import LAST, WeightAverage

BUILD = trainer.build
SHORT = ["--num_train_epochs=3", "--logging_steps=1"]
LORA = ["--target_modules=last-conv", "--augmentation=flips"]


@pytest.fixture(scope="module")
def data(source: tuple[Path, Path]) -> datasets.DatasetDict:
    return load(source[1])


class Recorded(TrainerCallback):
    """The trained weights after each update, when they are evaluated, and when training is over."""

    def __init__(self, model: nn.Module, stops_in: float) -> None:
        self.model = model
        self.stops_in = stops_in
        self.updates: list[dict[str, torch.Tensor]] = []
        self.evaluated: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch >= self.stops_in:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updates.append(self.weights())

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(self.weights())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []


def run(
    folder: Path,
    source: tuple[Path, Path],
    data: datasets.DatasetDict,
    monkeypatch: pytest.MonkeyPatch,
    *more: str,
    stops_in: float = 9,
) -> tuple[Result | None, Recorded]:
    """A run and what happened in it; without a result if it is interrupted, in an epoch from 0."""
    found: list[Recorded] = []

    def build(*args: Any, model: nn.Module, **kwargs: Any) -> trainer.Trainer:
        session = BUILD(*args, model=model, **kwargs)
        found.append(Recorded(model, stops_in))
        session.add_callback(found[0])
        return session

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "build", build)
        try:
            result = finetune.run_config(config(folder, *source, *SHORT, *more), data)
        except KeyboardInterrupt:
            result = None
    return result, found[0]


@pytest.mark.parametrize(("decay", "start"), [(0.5, 0.0), (None, 0.0), (None, 0.5)])
def test_the_average_is_that_of_the_weights_after_each_update(decay: float | None, start: float) -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, decay=decay, start=start, batch_norm="frozen")
    state, history = trainer.transformers.TrainerState(max_steps=8), []
    for step in range(1, 9):
        history.append(torch.randn(2, 3))
        model.weight.data.copy_(history[-1])
        state.global_step = step
        average.on_step_end(None, state, None)  # type: ignore[arg-type]
    if decay is None:
        expected = torch.stack(history[int(8 * start) :]).mean(0)
    else:
        expected = history[0]
        for count, weight in enumerate(history[1:], start=2):  # n / (9 + n) is below the decay up to the ninth
            expected = expected * min(decay, count / (9 + count)) + weight * (1 - min(decay, count / (9 + count)))
    assert average.average is not None and average.average.keys() == {"weight"}
    torch.testing.assert_close(average.average["weight"], expected)
    with average.in_place():
        torch.testing.assert_close(model.weight.data, expected)
    assert torch.equal(model.weight.data, history[-1])


@pytest.mark.parametrize("more", [["--weight_averaging=ema", "--ema_decay=0.8"], ["--weight_averaging=dense"]])
def test_the_average_is_evaluated_and_saved_and_training_is_the_same(
    tmp_path: Path,
    source: tuple[Path, Path],
    data: datasets.DatasetDict,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
) -> None:
    plain, without = run(tmp_path / "plain", source, data, monkeypatch, *LORA)
    averaged, recorded = run(tmp_path / "averaged", source, data, monkeypatch, *LORA, *more)
    assert recorded.losses == without.losses and len(without.losses) == 9
    for one, other in zip(recorded.updates, without.updates, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert plain is not None and averaged is not None
    step = read_json(averaged.adapter / "metrics.json")["selection"]["step"]
    checkpoint = averaged.adapter.parent / f"checkpoint-{step}"
    saved, last = load_file(checkpoint / "adapter_model.safetensors"), load_file(checkpoint / LAST)
    assert all(torch.equal(last[name], weight) for name, weight in recorded.updates[step - 1].items())
    if more == ["--weight_averaging=dense"]:
        heads = [
            update[name]
            for update in recorded.updates[2:step]
            for name in update
            if name.endswith("fc.modules_to_save.default.weight")
        ]
        (name,) = [name for name in saved if name.endswith("fc.weight")]
        torch.testing.assert_close(saved[name], torch.stack(heads).mean(0))
    final = load_file(averaged.adapter / "adapter_model.safetensors")
    assert all(torch.equal(final[name], saved[name]) for name in saved)
    line = next(
        line
        for line in read_json(checkpoint / "trainer_state.json")["log_history"]
        if line.get("step") == step and "eval_auroc" in line
    )
    own = read_json(averaged.adapter / "metrics.json")["splits"]["val"]["overall"]["auroc"]["value"]
    assert own == pytest.approx(line["eval_auroc"], abs=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        ["--weight_averaging=ema", "--batch_norm=track", "--lora_dropout=0.1", *LORA],
        ["--weight_averaging=dense", "--averaging_start=0.7", "--gradient_accumulation_steps=2", *LORA],
        ["--weight_averaging=ema", "--method=linear", "--training_views=1", "--cache_features=on"],
        ["--weight_averaging=dense", "--adapter=ln_tuning", "--augmentation=flips"],
    ],
    ids=["tracked", "accumulated", "cached", "norms"],
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    tmp_path: Path,
    source: tuple[Path, Path],
    data: datasets.DatasetDict,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
) -> None:
    straight, _ = run(tmp_path / "straight", source, data, monkeypatch, *more)
    stopped, _ = run(tmp_path / "resumed", source, data, monkeypatch, *more, stops_in=2)
    assert stopped is None
    resumed, recorded = run(tmp_path / "resumed", source, data, monkeypatch, *more)
    assert straight is not None and resumed is not None
    assert len(recorded.updates) == (2 if "--gradient_accumulation_steps=2" in more else 3)
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes(), name


def test_a_model_divided_over_processes_is_refused(
    tmp_path: Path, source: tuple[Path, Path], data: datasets.DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = trainer.transformers.Trainer.create_accelerator_and_postprocess

    def sharded(session: trainer.Trainer) -> None:
        create(session)
        session.is_fsdp_enabled = True

    monkeypatch.setattr(trainer.transformers.Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(HistoError, match="--weight_averaging needs the whole model"):
        run(tmp_path, source, data, monkeypatch, "--weight_averaging=ema")
