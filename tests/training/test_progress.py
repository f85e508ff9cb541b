"""What training shows on the console."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from miniature import config, write_backbone, write_image_table
from transformers import TrainerState

from hf_histo import finetune
from hf_histo.data import protocol
from hf_histo.evaluation.figures import run as run_figures
from hf_histo.training import progress


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("source")
    return write_backbone(folder / "backbone"), write_image_table(folder)


def test_one_bar_and_a_line_for_each_evaluation(
    tmp_path: Path, source: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_figures, "draw", lambda *args, **kwargs: {})
    options = config(tmp_path / "run", *source, "--num_train_epochs=1", "--eval_steps=3", "--logging_steps=1")
    finetune.run_config(options, protocol.prepare(options))
    out, err = capsys.readouterr()
    number = r"\d\.\d{3}"
    values = (
        rf"val loss {number}, accuracy {number}, auroc {number}; lowest auroc by center: (Halle|Jena|Leipzig) {number}"
    )
    evaluations = [line for line in out.splitlines() if line.startswith("step ")]
    for step, line in zip((3, 5), evaluations, strict=True):
        assert re.fullmatch(rf"step {step} of 5, epoch \d\.\d\d: {values}", line), line
    assert "{" not in out  # no dictionary of transformers
    bars = {part.split(":")[0].strip() for part in re.split(r"[\r\n]", err) if "%|" in part}
    assert {bar for bar in bars if not bar.startswith(("Generating", "Predicting"))} <= {"training", "validating 1/1"}
    assert "training" in bars
    assert re.search(r"5/5 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(step/s|s/step), loss=[\d.]+, learning rate=", err)


def test_the_line_has_the_metric_that_chooses_the_checkpoint() -> None:
    state = TrainerState(global_step=3, max_steps=9, epoch=0.5)
    logs = {"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_f1": 0.25, "eval_n": 8.0}
    logs |= {"eval_center_2/accuracy": 0.5, "eval_center_Rome_b/accuracy": 0.7}
    start = "step 3 of 9, epoch 0.50: val loss 0.500, accuracy 0.750"
    assert progress.line(logs, state, "f1") == f"{start}, f1 0.250"
    assert progress.line(logs, state, "accuracy") == f"{start}; lowest accuracy by center: 2 0.500"


def test_a_resumed_bar_starts_at_its_step() -> None:
    shown = progress.Progress()
    state = TrainerState(global_step=6, max_steps=10, is_world_process_zero=True)
    shown.on_train_begin(None, state, None)  # type: ignore[arg-type]
    assert (shown.training_bar.n, shown.training_bar.initial, shown.training_bar.total) == (6, 6, 10)
    shown.training_bar.close()


@pytest.mark.parametrize("process", [0, 1])
def test_other_processes_show_nothing(process: int, capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress.Progress()
    state = TrainerState(global_step=0, max_steps=1, is_world_process_zero=process == 0)
    for event in (bar.on_train_begin, bar.on_prediction_step):
        event(None, state, None, eval_dataloader=[None])  # type: ignore[arg-type]
    shown = "".join(capsys.readouterr())
    assert bool(shown) is (process == 0)
    if bar.training_bar is not None:
        bar.training_bar.close()
