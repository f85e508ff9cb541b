"""The linear probe against a scikit-learn pipeline, and as the start of a run (LP-FT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from miniature import config
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import TrainerCallback

from hf_histo import finetune
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation import probe_first
from hf_histo.files import read_json
from hf_histo.training import linear_probe
from hf_histo.training.linear_probe import INVERSE_PENALTIES, Probe, fit

QUICK = ["--target_modules=last-conv", "--augmentation=flips", "--probe_first"]


def drawn(classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, 120)
    features = random.normal(size=(120, 30)) * np.linspace(3, 0.2, 30) + np.eye(classes, 30)[labels] * 2
    features[:, -1] = 7.0  # constant
    return features, labels


@pytest.mark.parametrize("classes", [2, 4])
def test_it_is_the_pipeline_multiplied_out_with_the_best_penalty(classes: int) -> None:
    features, labels = drawn(classes)
    others, truth = drawn(classes, seed=1)
    seen: list[float] = []

    def score(weight: np.ndarray, bias: np.ndarray) -> float:
        logits = others @ weight.T + bias
        answer = logits.argmax(axis=1) if classes > 2 else (logits[:, 0] > 0).astype(int)
        seen.append(float((answer == truth).mean()))
        return seen[-1]

    probe = fit(features, labels, classes=classes, balanced=True, score=score)
    assert len(seen) == len(INVERSE_PENALTIES) and len(set(seen)) > 1
    assert probe.inverse_penalty == INVERSE_PENALTIES[int(np.argmax(seen))] and probe.value == max(seen)
    regression = LogisticRegression(C=probe.inverse_penalty, max_iter=5000, class_weight="balanced")
    pipeline = make_pipeline(StandardScaler(), regression).fit(features, labels)
    expected = pipeline.decision_function(others).reshape(len(others), -1)
    np.testing.assert_allclose(others @ probe.weight.T + probe.bias, expected, atol=5e-3)


def test_a_class_without_images_is_refused() -> None:
    features, labels = drawn(3)
    with pytest.raises(HistoError, match="expected images of all 4 classes"):
        fit(features, labels, classes=4, balanced=True, score=lambda weight, bias: 0.0)


@pytest.mark.parametrize("more", [["--normalization=rgb"], ["--method=full", "--class_balance=none"]])
def test_a_run_starts_from_the_probe(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, more: list[str], capsys: Any
) -> None:
    found: list[Probe] = []
    start = probe_first.start
    monkeypatch.setattr(probe_first, "start", lambda *args, **how: found.append(start(*args, **how)) or found[-1])
    quick = QUICK[1:] if "--method=full" in more else QUICK
    options = config(tmp_path, *source, *quick, *more, "--learning_rate=1e-30", "--num_train_epochs=1")
    result = finetune.run_config(options, load(source[1]))
    name = "model.safetensors" if "--method=full" in more else "adapter_model.safetensors"
    saved = load_file(result.adapter / name)
    (head,) = [weight for key, weight in saved.items() if key.endswith("fc.weight")]
    (bias,) = [weight for key, weight in saved.items() if key.endswith("fc.bias")]
    np.testing.assert_allclose(head, found[0].weight, rtol=1e-6, atol=1e-20)
    np.testing.assert_allclose(bias, found[0].bias, rtol=1e-6, atol=1e-20)
    assert f"from a linear probe: loss {-found[0].value:.3f} on val" in capsys.readouterr().out
    loss = next(
        line["eval_loss"]
        for line in read_json(tmp_path / "checkpoint-3" / "trainer_state.json")["log_history"]
        if "eval_loss" in line
    )
    assert loss == pytest.approx(-found[0].value, rel=0.1, abs=1e-4)  # large weights of the probe enlarge rounding


class Interrupt(TrainerCallback):
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch >= 1:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_in_the_same_bytes(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, calls = load(source[1]), []
    fit = linear_probe.fit
    monkeypatch.setattr(linear_probe, "fit", lambda *args, **how: calls.append(1) or fit(*args, **how))
    straight = finetune.run_config(config(tmp_path / "straight", *source, *QUICK), data)
    options = config(tmp_path / "resumed", *source, *QUICK)
    with pytest.raises(KeyboardInterrupt):
        finetune.run_config(options, data, callbacks=[Interrupt()])
    resumed = finetune.run_config(options, data)
    assert len(calls) == 2  # none where a checkpoint holds the head
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes(), name
