"""Leave-one-center-out as a command: a run for each center and seed, resumption, and the summary."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from miniature import SIZE, divide_training, write_data
from recipe_mains import main_of

from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config.commands import AcceptanceStudyOptions
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.experiments.acceptance_study import study
from hf_histo.launch import run

Call = Callable[..., None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Centers 0, 3 and 1, and a labeled test split that must not be used."""
    folder = write_data(tmp_path_factory.mktemp("data") / "mini", {"train": 24, "val": 12, "test": 4})
    divide_training(folder)
    return folder


@pytest.fixture
def call(backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the recipe's main in this process."""
    main = main_of("leave_one_center_out.py")

    def call(output: Path, *more: str) -> None:
        quick = f"--image_size={SIZE} --resize_size={SIZE} --num_train_epochs=1 --method=linear --learning_rate=0.01"
        fixed = f"--data={data} --backbone={backbone} --output_dir={output}"
        monkeypatch.setattr(sys, "argv", ["leave_one_center_out.py", *fixed.split(), *quick.split(), *more])
        run(main)

    return call


def test_every_center_and_seed_summed_up_and_resumed(
    call: Call, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(tmp_path / "out", "--seeds=1", "--seed=4")
    names = {f"center-{center}-seed-4" for center in (0, 1, 3)}
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {*names, "leave_one_center_out.json"}
    stamps = {name: (tmp_path / "out" / name / "adapter" / "metrics.json").stat().st_mtime_ns for name in names}
    capsys.readouterr()

    call(tmp_path / "out", "--seeds=2", "--seed=4")
    names |= {f"center-{center}-seed-5" for center in (0, 1, 3)}
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {*names, "leave_one_center_out.json"}
    for name, stamp in stamps.items():
        assert (tmp_path / "out" / name / "adapter" / "metrics.json").stat().st_mtime_ns == stamp
    fingerprints = set()
    accuracy: dict[str, list[float]] = {}
    for name in sorted(names):
        adapter = tmp_path / "out" / name / "adapter"
        center = name.split("-")[1]
        table = Predictions.read(adapter / "predictions" / "test.parquet")
        assert set(table["center"]) == {int(center)}
        assert len(table) == 12
        fingerprints.add(json.loads((adapter / "hf_histo.json").read_text())["data"]["fingerprint"])
        measured = json.loads((adapter / "metrics.json").read_text())
        accuracy.setdefault(center, []).append(measured["splits"]["test"]["overall"]["accuracy"]["value"])
    assert len(fingerprints) == 6

    written = json.loads((tmp_path / "out" / "leave_one_center_out.json").read_text())
    assert written["seeds"] == 2
    assert written["runs"].keys() == names
    found = written["metrics"]["accuracy"]
    assert {center: spread["mean"] for center, spread in found["centers"].items()} == {
        center: pytest.approx(sum(values) / 2) for center, values in accuracy.items()
    }
    assert found["worst"]["mean"] == pytest.approx(min(sum(values) / 2 for values in accuracy.values()))
    assert found["mean"]["mean"] == pytest.approx(sum(map(sum, accuracy.values())) / 6)
    assert found["mean"]["n"] == 2
    shown = capsys.readouterr().out
    for line in ("center 0", "center 1", "center 3", "mean over centers", "worst center"):
        assert f"| {line}" in shown

    options = AcceptanceStudyOptions(
        runs=tmp_path / "out", data=str(data), output_dir=tmp_path / "study", counts=[6], draws=2
    )
    study(options)
    sites = json.loads((tmp_path / "study" / "acceptance_study.json").read_text())["sites"]
    colors = Sidecar.read(tmp_path / "out" / "center-1-seed-4" / "adapter").colors
    images = ImageTable(load(data)["val"])  # which is all of center 1
    assert colors is not None
    far = [colors.distance(images[row]["image"]) > colors.limit for row in range(len(images))]
    assert sites["center 1"]["6"][0]["beyond"] == pytest.approx(sum(far) / len(far))
    assert all(0 <= run["color_alarms"] <= 1 for run in sites["center 1"]["6"])
    assert "colors beyond the limit" in capsys.readouterr().out
    with pytest.raises(HistoError, match="not the data of --runs"):
        study(dataclasses.replace(options, data=str(write_data(tmp_path / "other"))))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seeds=0", "--seeds is 0"),
        ("--sseeds=1", "did you mean '--seeds'"),
        ("--push_to_hub --hub_model_id=me/model", "--push_to_hub is True"),
        ("--resume_from_checkpoint=last", "--resume_from_checkpoint is 'last'"),
        ("--metric_for_best_model=speed", "--metric_for_best_model"),
        ("--data=nothing", "nothing"),
    ],
)
def test_bad_input_is_one_line(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        call(tmp_path / "out", *option.split())
    assert end.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line


def test_a_config_can_not_set_the_options_of_one_recipe(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.yaml").write_text("seeds: 3\n")
    with pytest.raises(SystemExit):
        call(tmp_path / "out", f"--config={tmp_path / 'options.yaml'}")
    assert "unknown key 'seeds'" in capsys.readouterr().err


def test_help_lists_the_number_of_seeds(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(tmp_path / "out", "--help")
    shown = capsys.readouterr().out
    assert "--seeds" in shown and "--lora_rank" in shown
