"""The sweep as a command: each grid point once, a search with pruning, a kill, and two processes on one study."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from miniature import SIZE, write_data
from recipe_mains import RECIPES, main_of

from hf_histo.config import parse
from hf_histo.launch import run

optuna = pytest.importorskip("optuna")
sweep = pytest.importorskip("hf_histo.experiments.sweep")


RECIPE = RECIPES / "sweep.py"
STUDIES = sorted((RECIPE.parent / "configs" / "sweep").glob("*.yaml"))
GRID = "grid: {learning_rate: [1.0e-2, 1.0e-4], optimizer: [adam, sgd]}"
Command = Callable[..., list[str]]
Call = Callable[..., None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "mini")


@pytest.fixture
def command(backbone: Path, data: Path, tmp_path: Path) -> Command:
    """The command line of a sweep in `tmp_path`/out."""

    def command(study: str, *more: str) -> list[str]:
        (tmp_path / "study.yaml").write_text(study)
        quick = f"--image_size={SIZE} --resize_size={SIZE} --num_train_epochs=2 --method=linear"
        fixed = f"--study={tmp_path / 'study.yaml'} --data={data} --backbone={backbone} --output_dir={tmp_path / 'out'}"
        return [str(RECIPE), *fixed.split(), *quick.split(), *more]

    return command


@pytest.fixture
def call(command: Command, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the recipe's main in this process."""
    main = main_of(RECIPE.name)

    def call(study: str, *more: str) -> None:
        monkeypatch.setattr(sys, "argv", command(study, *more))
        run(main)

    return call


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of optuna take as long as the trials in miniature."""
    monkeypatch.setattr(sweep.Sweep, "draw", lambda trials: None)


def trials(out: Path) -> list[optuna.trial.FrozenTrial]:
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{out / 'study.db'}")
    return list(study.get_trials())


def test_a_grid_is_run_once_and_its_best_cell_is_a_config(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call(GRID)
    written = json.loads((out / "sweep.json").read_text())
    cells = {(t["params"]["learning_rate"], t["params"]["optimizer"]) for t in written["trials"].values()}
    assert cells == {(rate, name) for rate in (1e-2, 1e-4) for name in ("adam", "sgd")}
    values = {number: trial["value"] for number, trial in written["trials"].items()}
    for number, value in values.items():
        metrics = json.loads((out / f"trial-{number}" / "adapter" / "metrics.json").read_text())
        assert metrics["selection"]["value"] == value
        assert list(metrics["splits"]) == ["val"]  # test was not even predicted
    assert values[str(written["best"])] == max(values.values())

    best = parse(None, ["--config", str(out / "best.yaml")])
    assert best.training.learning_rate == written["trials"][str(written["best"])]["params"]["learning_rate"]
    assert best.output.output_dir is None and best.model.image_size == SIZE
    assert (out / "sweep.md").read_text().count("| complete |") == 4
    plots = ("optimization_history", "intermediate_values", "slice", "parallel_coordinate")
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in plots)

    call(GRID)  # nothing is left to do
    assert len(trials(out)) == 4
    assert "finished before" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call(GRID, "--weight_decay=0.5")
    assert "a sweep of other weight_decay" in capsys.readouterr().err


@pytest.mark.usefixtures("without_plots")
def test_a_search_prunes_and_resumes(call: Call, tmp_path: Path) -> None:
    space = "space: {learning_rate: {low: 1.0e-7, high: 1.0e-1, log: true}, head_dropout: [0.0, 0.5]}"
    more = ("--num_train_epochs=3", "--metric_for_best_model=loss")
    call(f"trials: 6\n{space}", *more)
    call(f"trials: 9\n{space}", *more)
    found = trials(tmp_path / "out")
    assert len(found) == 9
    pruned = [trial for trial in found if trial.state == optuna.trial.TrialState.PRUNED]
    assert pruned and all(1 < len(trial.intermediate_values) < 4 for trial in pruned)
    assert len({trial.params["learning_rate"] for trial in found}) == 9
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    done = [trial.value for trial in found if trial.state == optuna.trial.TrialState.COMPLETE]
    assert written["trials"][str(written["best"])]["value"] == min(done)


@pytest.mark.usefixtures("without_plots")
@pytest.mark.slow
def test_a_killed_trial_is_repeated_and_two_processes_share_a_study(
    command: Command, call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def start_until_it_trains(slot: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, *command(GRID)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list((out / f"trial-{slot}").glob("checkpoint-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return process

    first = start_until_it_trains(0)
    first.kill()
    first.wait()
    (killed,) = (trial for trial in trials(out) if trial.state == optuna.trial.TrialState.RUNNING)

    second = start_until_it_trains(killed.number + 1)
    second.send_signal(signal.SIGSTOP)  # amid a trial, whose lock it keeps
    try:
        call(GRID)
        asleep = [trial for trial in trials(out) if trial.state == optuna.trial.TrialState.RUNNING]
    finally:
        os.kill(second.pid, signal.SIGCONT)
    assert second.wait(120) == 0

    every = trials(out)
    assert len(asleep) == 1
    failed = [trial for trial in every if trial.state == optuna.trial.TrialState.FAIL]
    assert [trial.number for trial in failed] == [killed.number]
    complete = [trial for trial in every if trial.state == optuna.trial.TrialState.COMPLETE]
    assert sorted(trial.user_attrs.get("slot", trial.number) for trial in complete) == [0, 1, 2, 3]
    (again,) = (trial for trial in complete if "slot" in trial.user_attrs)
    assert again.user_attrs["slot"] == killed.number and again.params == killed.params
    assert {path.name for path in out.glob("trial-*")} == {f"trial-{number}" for number in range(4)}
    assert (out / "sweep.md").read_text().count("| complete |") == 4


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("moment", ["enqueue_trial", "tell"])
def test_a_kill_while_a_killed_trial_is_queued_again(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for method in ("tell", moment):
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
            patch.setattr(optuna.Study, method, die)
            call("grid: {learning_rate: [1.0e-2]}")
    call("grid: {learning_rate: [1.0e-2]}")
    assert (tmp_path / "out" / "sweep.md").read_text().count("| complete |") == 1
    assert [path.name for path in (tmp_path / "out").glob("trial-*")] == ["trial-0"]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("grid: {lora_rnk: [1]}", "did you mean 'lora_rank'"),
        ("grid: {lora_rank: [0]}", "--lora_rank is 0"),
        ("grid: {optimizer: [adagrad]}", "optimizer"),
        ("grid: {metric_for_best_model: [auroc, loss]}", "metric_for_best_model is the same for all trials"),
        ("grid: {shots: [1, 2]}", "shots is the same for all trials"),
        ("space: {lora_rank: {low: 1, high: 4}}", "KeyError: 'trials'"),
        ("trials: 3\nspace: {lora_rank: {low: 4}}", "--study"),
        ("[", "--study"),
    ],
)
def test_a_bad_study_is_one_line(call: Call, capsys: pytest.CaptureFixture[str], study: str, message: str) -> None:
    with pytest.raises(SystemExit) as end:
        call(study)
    assert end.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line


def test_settings_that_no_run_takes_are_named(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("grid: {target_modules: [nothing]}", "--method=lora")
    assert "finished; the first error: --target_modules 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_in_the_tree(path: Path) -> None:
    plan = sweep.read_plan(str(path), parse(None, []))
    assert len(plan.points) == {"mri_report_grid": 8, "mri_search": 24}[path.stem]
    assert len(STUDIES) == 2
    assert "ours" in path.read_text() and yaml.safe_load(path.read_text())
