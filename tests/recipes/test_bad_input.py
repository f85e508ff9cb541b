"""For any bad input, a recipe ends with one clear line and a non-zero exit code, and keeps existing files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from fixtures import damage_chunk, truncate
from miniature import write_data
from recipe_mains import RECIPES, main_of

from hf_histo.launch import run


def only_error(text: str) -> str:
    """The one line of an error stream that names the fault; a progress bar may close after it."""
    assert "Traceback" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    return line


@pytest.fixture
def fails(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run histo_lora.py's main in this process; return the line it ends in."""
    main = main_of("histo_lora.py")

    def call(data: Path, *more: str) -> str:
        quick = "--image_size=32 --resize_size=32 --per_device_train_batch_size=8 --num_train_epochs=1"
        fixed = f"--data={data} --backbone={backbone} --output_dir={tmp_path / 'run'} --cache_dir={tmp_path / 'cache'}"
        monkeypatch.setattr(sys, "argv", ["histo_lora.py", *quick.split(), *fixed.split(), *more])
        with pytest.raises(SystemExit) as end:
            run(main)
        assert end.value.code == 1
        error = only_error(capsys.readouterr().err)
        assert not (tmp_path / "run" / "adapter").exists()
        return error

    return call


def test_a_missing_folder(fails: Callable[..., str], tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in fails(tmp_path / "nothing")


def test_a_missing_file(fails: Callable[..., str], tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    (data / "val.h5").unlink()
    assert "val.h5" in fails(data)


def test_a_truncated_file(fails: Callable[..., str], tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    truncate(data / "train.h5")
    assert "train.h5" in fails(data)


def test_one_corrupt_image_among_many(fails: Callable[..., str], tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    damage_chunk(data / "train.h5", "7/img")
    error = fails(data)
    assert "train.h5" in error
    assert "7" in error


def test_an_empty_split(fails: Callable[..., str], tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    with h5py.File(data / "val.h5", "w"):
        pass
    assert "val.h5" in fails(data)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_single_class(fails: Callable[..., str], tmp_path: Path, split: str) -> None:
    data = write_data(tmp_path / "data")
    with h5py.File(data / f"{split}.h5", "r+") as file:
        for group in file.values():
            group["label"][()] = 1
    error = fails(data)
    assert split in error
    assert "tumor" in error


def test_an_image_of_another_size(fails: Callable[..., str], tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    with h5py.File(data / "train.h5", "r+") as file:
        image = file["3/img"][:, :16]
        del file["3/img"]
        file["3/img"] = image
    error = fails(data)
    assert "train.h5" in error
    assert "3" in error


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--backbone=resnet51", "resnet50"),
        ("--backbone=timm/resnet18.a1_in1k", "hf download"),
        ("--target_modules=nothing_like_it", "all-conv"),
        ("--metric_for_best_model=speed", "accuracy"),
        ("--augmentation=unknown", "crop-jitter"),
        ("--learning_rat=1", "--learning_rate"),
        ("--resume_from_checkpoint=nowhere", "nowhere"),
        ("--lr_scheduler_type=cosine_with_min_lr", "cosine_with_restarts"),
        ("--lr_scheduler_type=warmup_stable_decay", "cosine"),
    ],
)
def test_an_impossible_option(fails: Callable[..., str], tmp_path: Path, option: str, expected: str) -> None:
    error = fails(write_data(tmp_path / "data"), option)
    assert option.split("=")[-1 if "learning" not in option else 0] in error
    assert expected in error
    assert not (tmp_path / "run" / "run.yaml").exists()  # the corrected command is not refused


def test_a_folder_that_holds_other_files_keeps_them(fails: Callable[..., str], tmp_path: Path) -> None:
    thesis = tmp_path / "run" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    assert "holds other files, and no run" in fails(write_data(tmp_path / "data"))
    fails(write_data(tmp_path / "more"), "--overwrite_output_dir")
    assert thesis.read_text() == "years of work"


def test_a_full_disk(tmp_path: Path, backbone: Path) -> None:
    """On a file system of 400 KiB, which takes root to mount; what was there stays whole."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system takes root")
    try:
        (small / "precious").write_text("kept")
        data = write_data(tmp_path / "data")
        options = f"--data {data} --backbone {backbone} --image_size 32 --resize_size 32 --num_train_epochs 1"
        command = [sys.executable, str(RECIPES / "histo_lora.py"), *options.split(), "--output_dir", str(small / "run")]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 1
        assert "the disk is full" in only_error(ended.stderr)
        assert not (small / "run" / "adapter").exists()
        assert (small / "precious").read_text() == "kept"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_output_folder_that_is_read_only(fails: Callable[..., str], tmp_path: Path) -> None:
    data, locked = write_data(tmp_path / "data"), tmp_path / "locked"
    locked.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(locked)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a read-only file system takes root")
    try:
        assert "Read-only file system" in fails(data, f"--output_dir={locked / 'run'}")
        assert "Read-only file system" in fails(data, f"--cache_dir={locked / 'cache'}")
    finally:
        subprocess.run(["umount", str(locked)], check=True)


def test_no_home_to_keep_a_cache_in(tmp_path: Path, backbone: Path) -> None:
    """Without a writable home, one line names the folder; with `--cache_dir`, the run succeeds."""
    names = ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in names} | {"HOME": "/proc/nobody"}
    options = f"--data {write_data(tmp_path / 'data')} --backbone {backbone} --image_size 32 --resize_size 32"
    command = [sys.executable, str(RECIPES / "histo_lora.py"), *options.split(), "--num_train_epochs", "1"]
    command += ["--output_dir", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 1
    assert "/proc/nobody" in only_error(ended.stderr)
    ended = subprocess.run(
        [*command, "--cache_dir", str(tmp_path / "cache")], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr
