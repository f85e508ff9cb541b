"""`--report_to`: what each tracker, the real one, finds in a run; no network is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from miniature import SIZE, write_backbone, write_image_table
from transformers import TrainerCallback

from hf_histo import finetune
from hf_histo.config import parse
from hf_histo.data import protocol
from hf_histo.errors import HistoError
from hf_histo.evaluation.figures import run as run_figures
from hf_histo.result import Result
from hf_histo.training import run_folder, trackers

CENTERS = ("Leipzig", "Halle", "Jena")


@dataclass
class Found:
    """What a tracker holds of one run: its config as text, the values of each curve, and whether it has an image."""

    config: str
    curves: dict[str, list[float]]
    has_image: bool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A backbone and a table of images of named centers; the stores of the trackers lie there, too."""
    folder = tmp_path_factory.mktemp("trackers")
    write_backbone(folder / "backbone")
    write_image_table(folder)
    with pytest.MonkeyPatch.context() as patch:
        # Read when the library is imported: its store is the same in all tests of a process.
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        patch.setattr(run_figures, "draw", lambda *args, **kwargs: {})  # most of the time
        patch.chdir(folder)  # mlflow writes artifacts into the current folder
        yield folder


def options(folder: Path, output: str, *more: str) -> list[str]:
    sizes = f"--image_size={SIZE} --resize_size={SIZE} --per_device_train_batch_size=12 --max_steps=2 --eval_steps=1"
    places = [f"--data={folder / 'table' / 'images.csv'}", f"--backbone={folder / 'backbone'}"]
    return [*sizes.split(), *places, f"--output_dir={folder / output}", "--logging_steps=1", "--warmup_steps=0", *more]


def trained(folder: Path, output: str, *more: str, callbacks: tuple[TrainerCallback, ...] = ()) -> Result:
    config = parse(None, options(folder, output, *more))
    return finetune.run_config(config, protocol.prepare(config), callbacks=callbacks)


def in_tensorboard(folder: Path, name: str) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / name.removeprefix(f"{folder.name}-") / run_folder.TENSORBOARD))
    events.Reload()
    tags = events.Tags()
    (config,) = events.Tensors("args/text_summary")
    text = config.tensor_proto.string_val[0].decode()
    curves = {tag: [event.value for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return Found(text, curves, "preview" in tags["images"])


def in_trackio(folder: Path, name: str) -> Found:
    from trackio.sqlite_storage import SQLiteStorage

    lines: list[dict[str, Any]] = SQLiteStorage.get_logs("huggingface", name)
    curves: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if isinstance(value, int | float):
                curves.setdefault(key, []).append(value)
    config = json.dumps(SQLiteStorage.get_run_config("huggingface", name))
    return Found(config, curves, any("preview" in line for line in lines))


def in_mlflow(folder: Path, name: str) -> Found:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs(["0"], f"tags.mlflow.runName = '{name}'")
    metrics = run.data.metrics
    curves = {key: [point.value for point in client.get_metric_history(run.info.run_id, key)] for key in metrics}
    # As the two others name them.
    curves = {
        f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": values for key, values in curves.items()
    }
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert run.info.status == "FINISHED"
    return Found(json.dumps(run.data.params), curves, files == [run_folder.PREVIEW])


@pytest.mark.parametrize(
    ("tracker", "read"), [("tensorboard", in_tensorboard), ("trackio", in_trackio), ("mlflow", in_mlflow)]
)
def test_a_tracker_shows_the_run(tracker: str, read: Callable[[Path, str], Found], folder: Path) -> None:
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    result = trained(folder, tracker, f"--report_to={tracker}", "--preview", "--lora_rank=2")
    found = read(folder, f"{folder.name}-{tracker}")
    assert found.curves["train/learning_rate"] == pytest.approx([1e-3, 5e-4])
    assert len(found.curves["train/loss"]) == 2 and np.isfinite(found.curves["train/loss"]).all()
    best = max(found.curves["eval/auroc"])
    assert best == pytest.approx(result.record["selection"]["value"], abs=1e-6)
    for center in CENTERS:
        assert len(found.curves[f"eval/center_{center}/accuracy"]) == 2
        assert len(found.curves[f"eval/center_{center}/auroc"]) == 2
    assert found.has_image
    assert '"lora_rank"' in found.config and "images.csv" in found.config
    assert str(folder) not in found.config and folder.name not in found.config


def test_a_name_several_trackers_and_a_second_run_of_the_process(folder: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    for name in ("first", "second"):
        trained(folder, name, "--report_to=tensorboard, mlflow", f"--run_name={name} run")
        found = in_mlflow_by_name(folder, f"{name} run")
        assert len(found) == 1
        assert len(in_tensorboard(folder, name).curves["train/loss"]) == 2
    assert not in_tensorboard(folder, "first").has_image  # without --preview, no image leaves the run


def in_mlflow_by_name(folder: Path, name: str) -> list[Any]:
    from mlflow import MlflowClient

    runs = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_runs(["0"], f"tags.mlflow.runName = '{name}'")
    return list(runs)


class Broken(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_run_is_closed(folder: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    import mlflow

    with pytest.raises(KeyboardInterrupt):
        trained(folder, "interrupted", "--report_to=mlflow", "--run_name=broken", callbacks=(Broken(),))
    assert mlflow.active_run() is None
    (run,) = in_mlflow_by_name(folder, "broken")
    assert run.info.status == "FAILED"


def test_overwriting_a_run_deletes_its_curves(folder: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    for _ in range(2):
        trained(folder, "again", "--report_to=tensorboard", "--overwrite_output_dir")
    assert len([*(folder / "again" / run_folder.TENSORBOARD).iterdir()]) == 1


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("tensorbord", "'tensorbord': .*tensorboard.*trackio"),
        ("tensorboard none", "'none': "),
        ("missing", "--report_to is 'missing'"),
    ],
)
def test_an_unknown_tracker_is_refused_before_training(folder: Path, report_to: str, message: str) -> None:
    with pytest.raises(HistoError, match=message) as caught:
        trained(folder, "refused", f"--report_to={report_to}")
    assert "\n" not in str(caught.value)
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("tracker", ["wandb", "comet_ml", "flyte", "codecarbon"])
def test_a_missing_tracker_is_refused_with_how_to_install_it(folder: Path, tracker: str) -> None:
    package = trackers.PACKAGES.get(tracker, tracker)
    if find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    with pytest.raises(
        HistoError, match=f"--report_to {tracker}: .*; pip install {package}, or leave it out"
    ) as caught:
        trackers.create(parse(None, [f"--report_to={tracker}"]))
    assert "\n" not in str(caught.value)


def test_a_tracker_that_fails_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_RUN_ID", "of no run")
    with pytest.raises(HistoError, match=r"--report_to mlflow: failed \(.*of no run.*; .* resumes"):
        trained(folder, "failing", "--report_to=mlflow")


def test_the_names_of_runs() -> None:
    def name(*arguments: str) -> str:
        return trackers.run_name(parse(None, arguments))

    assert name() == "synthetic-builtin-lora-seed0"
    assert name("--output_dir=out/lora/seed-0") == "lora-seed-0"
    assert name("--output_dir=/out") == "out"
    assert name("--output_dir=out", "--report_to=wandb", "--run_name=mine") == "mine"


def test_trackers_get_names_and_no_paths(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    config = parse(None, [f"--data={tmp_path / 'data'}", "--backbone=timm/resnet18", f"--cache_dir={tmp_path}"])
    described = trackers.described(config)
    assert (described["data"], described["backbone"], described["lora_rank"]) == ("data", "timm/resnet18", 8)
    assert str(tmp_path) not in str(described)
    shards = parse(None, [f"--data=hub:{tmp_path / 'data'}"])
    assert trackers.described(shards)["data"] == "data"
