"""Two processes of a launch give the same updates as one, and predict each image exactly once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import psutil
import pytest
from miniature import SIZE, divide_training, write_backbone, write_data, write_shards
from recipe_mains import RECIPES, main_of
from safetensors.numpy import load_file

from hf_histo.evaluation.predictions import Predictions

RECIPE = RECIPES / "histo_lora.py"
COUNTS = {"train": 24, "val": 37, "test": 11}
# SGD, whose step is the gradient itself: Adam would hide a wrong scale and blow up rounding.
OPTIONS = f"""--image_size={SIZE} --resize_size={SIZE} --num_train_epochs=2 --optimizer=sgd --learning_rate=0.05
    --per_device_eval_batch_size=4 --target_modules=last-conv --logging_steps=1 --domain_loss=dann
    --weight_averaging=ema --label_smoothing=0.1 --probe_first""".split()


def launch(arguments: Sequence[str], script: Path = RECIPE) -> subprocess.Popen[str]:
    """Start two processes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(script), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run's folder, by the number of processes, at a global batch of 8."""
    folder = tmp_path_factory.mktemp("launch")
    backbone, data = write_backbone(folder / "backbone"), write_data(folder / "data", COUNTS)
    divide_training(data)
    common = [f"--backbone={backbone}", f"--data={data}", f"--cache_dir={folder / 'cache'}", *OPTIONS]
    process = launch([*common, f"--output_dir={folder / 'of2'}", "--per_device_train_batch_size=4"])
    with pytest.MonkeyPatch.context() as patch:  # the one process is this one
        alone = [*common, f"--output_dir={folder / 'of1'}", "--per_device_train_batch_size=8"]
        patch.setattr(sys, "argv", [str(RECIPE), *alone])
        main_of(RECIPE.name)()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("adapter folder:") == 1  # only one process prints
    return {n: folder / f"of{n}" for n in (1, 2)}


def table(run: Path, split: str) -> pd.DataFrame:
    return Predictions.read(run / "adapter" / "predictions" / f"{split}.parquet")


def test_two_processes_really_ran(runs: dict[int, Path]) -> None:
    for processes, run in runs.items():
        assert json.loads((run / "cost.json").read_text(encoding="utf-8"))["processes"] == processes


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_image_is_predicted_once_and_alike(runs: dict[int, Path], split: str) -> None:
    one, two = (table(runs[n], split) for n in (1, 2))
    assert len(two) == two["id"].nunique() == COUNTS[split]
    pd.testing.assert_frame_equal(two[["id", "center", "group", "label"]], one[["id", "center", "group", "label"]])
    assert one["logit"].std() > 1e-3
    np.testing.assert_allclose(two["logit"], one["logit"], rtol=0, atol=1e-5)


def test_the_metrics_agree(runs: dict[int, Path]) -> None:
    one, two = (json.loads((runs[n] / "adapter" / "metrics.json").read_text(encoding="utf-8")) for n in (1, 2))
    assert two["splits"]["val"]["overall"]["n"] == 37
    for split in ("val", "test"):
        for name, value in one["splits"][split]["overall"].items():
            other = two["splits"][split]["overall"][name]
            if isinstance(value, dict) and "value" in value:
                assert other["value"] == pytest.approx(value["value"], abs=1e-5)
            else:  # numbers of images and groups
                assert other == value
    assert two["selection"]["step"] == one["selection"]["step"]
    assert two["selection"]["value"] == pytest.approx(one["selection"]["value"], abs=1e-5)


def test_the_updates_agree(runs: dict[int, Path]) -> None:
    one, two = (load_file(runs[n] / "adapter" / "adapter_model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    for key, weight in one.items():
        np.testing.assert_allclose(two[key], weight, rtol=0, atol=1e-5, err_msg=key)


def log(run: Path) -> list[dict[str, float]]:
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    return [line for line in state["log_history"] if "loss" in line]


def test_the_losses_agree(runs: dict[int, Path]) -> None:
    one, two = log(runs[1]), log(runs[2])
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "differs",
    ["labels", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fewer images", "--seed=3", "--learning_rate=0.5"))],
)
def test_processes_that_differ_are_refused(runs: dict[int, Path], tmp_path: Path, differs: str) -> None:
    """Each would train on other data or options, and the averaged model would fit neither."""
    source = runs[1].parent
    data = {"0": source / "data", "1": tmp_path / "data"}
    shutil.copytree(data["0"], data["1"])
    with h5py.File(data["1"] / "train.h5", "r+") as file:
        for key, group in list(file.items()) if not differs.startswith("--") else []:
            if differs == "labels":
                group["label"][()] = 1 - group["label"][()]
            elif int(key) >= 16:
                del file[key]
    script = tmp_path / "differing.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"data, other = { ({rank: str(folder) for rank, folder in data.items()})!r}, {differs!r}\n"
        "rank = os.environ['RANK']\n"
        "sys.argv += ['--data=' + data[rank], *([other] if rank == '1' and other.startswith('--') else [])]\n"
        f"runpy.run_path({str(RECIPE)!r}, run_name='__main__')\n"
    )
    common = [f"--backbone={source / 'backbone'}", f"--cache_dir={source / 'cache'}"]
    process = launch([*common, *OPTIONS, f"--output_dir={tmp_path / 'run'}"], script)
    output, _ = process.communicate(timeout=300)
    assert process.returncode not in (0, None)
    found = differs.removeprefix("--").split("=")[0] if differs.startswith("--") else "data fingerprint"
    assert f"the 2 processes of this launch differ, expected the same data and options in each: {found} " in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_dies_takes_the_launch_down(runs: dict[int, Path], tmp_path: Path) -> None:
    """Otherwise the other process would hang in the next reduction."""
    source = runs[1].parent
    common = [f"--backbone={source / 'backbone'}", f"--data={source / 'data'}", f"--cache_dir={source / 'cache'}"]
    process = launch([*common, *OPTIONS, f"--output_dir={tmp_path / 'run'}", "--num_train_epochs=1000"])
    try:
        for _ in range(3000):
            if list((tmp_path / "run").glob("checkpoint-*/trainer_state.json")):
                break
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        children = psutil.Process(process.pid).children()
        (victim,) = (child for child in children if child.environ().get("RANK") == "1")
        victim.kill()
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    assert "Signal 9 (SIGKILL)" in output
    assert not (tmp_path / "run" / "adapter").exists()
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_two_processes_stream_every_image_once(tmp_path: Path) -> None:
    shards, seen = write_shards(tmp_path / "shards"), tmp_path / "seen"
    seen.mkdir()
    folders = [f"--backbone={write_backbone(tmp_path / 'backbone')}", f"--output_dir={tmp_path / 'run'}"]
    streamed = [f"--data=hub:{shards}", "--streaming", "--per_device_train_batch_size=4", "--target_modules=last-conv"]
    size = [f"--image_size={SIZE}", f"--resize_size={SIZE}", "--num_train_epochs=2"]
    script = Path(__file__).parents[1] / "support" / "streamed.py"
    process = launch([str(seen), *folders, *streamed, *size], script)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    lines = [path.read_text().splitlines() for path in sorted(seen.iterdir())]
    assert [len(mine) for mine in lines] == [48, 48]  # two passes over 24 of 48 images
    assert sorted(chain(*lines)) == sorted(f"{epoch} image {i}" for epoch in range(2) for i in range(48))


@pytest.mark.slow
def test_a_model_divided_by_fsdp2_is_the_whole_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    backbone = write_backbone(tmp_path / "backbone", "test_vit.r160_in1k")
    process = launch([str(backbone), str(tmp_path / "out")], Path(__file__).parents[1] / "support" / "sharded.py")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert output.count("weights moved") == 2
