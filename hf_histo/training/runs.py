"""The folder of a run: which run it holds, whether it is done, and where to go on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from hf_histo.config import Config
from hf_histo.errors import HistoError
from hf_histo.files import atomic_file, read_json, read_text

logger = logging.getLogger(__name__)

RECORD = "run.yaml"
DATA = "data.txt"
ADAPTER = "adapter"
# Options that decide where and how fast a run goes, not what comes out of it.
INDIFFERENT = {
    "cache_dir",
    "activation_checkpointing",
    "cache_features",
    "num_workers",
    "per_device_eval_batch_size",
    "resume_from_checkpoint",
    "output_dir",
    "overwrite_output_dir",
    "preview",
    "explain",
    "push_to_hub",
    "hub_model_id",
    "hub_base_model",
    "hub_private",
    "hub_revision",
    "hub_create_pr",
}


def use_cpu() -> bool:
    """Whether the launcher asks for the CPU or there is nothing else.

    accelerate must be told: unless it is, each of the processes that torchrun starts without a GPU takes itself for the
    only one.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not torch.accelerator.is_available()


def mixed_precision(config: Config) -> str:
    """ "no", "bf16" or "fp16": what `--mixed_precision` says; "auto" is what the launcher says, else by the device.

    On a GPU that computes in bf16, that is bf16. A CPU stays in float32, where a run gives the same bits on every
    machine of its kind; where it has bf16, the log says so.
    """
    wanted = config.speed.mixed_precision
    if wanted != "auto":
        return wanted
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":
        return launched
    if not use_cpu():
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        logger.info("this CPU computes in bf16, too, which --mixed_precision bf16 makes use of")
    return "no"


def folder_of(config: Config) -> Path:
    """`--output_dir`, or runs/DATA-BACKBONE-METHOD-seedN."""
    if config.output.output_dir:
        return Path(config.output.output_dir)
    data, backbone = Path(config.data.data).resolve().name, Path(config.model.backbone).name
    return Path("runs") / f"{data}-{backbone}-{config.adapter.method}-seed{config.training.seed}"


def begin(config: Config, data: str = "") -> Path:
    """Make the folder of this run, or find the one that the same command began, and record what decides its result.

    run.yaml gets the options, and data.txt the fingerprint of the data, `data`.

    Every process of a launch calls it. Raises `HistoError` if the folder holds a run with other options or data, unless
    `--overwrite_output_dir` says to delete that, or if it holds anything but a run.
    """
    folder = folder_of(config)
    state = PartialState(cpu=use_cpu())
    _check(folder, config, data)
    state.wait_for_everyone()
    if state.is_main_process:
        if config.output.overwrite_output_dir and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.incomplete*"):  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for name, content in ((RECORD, yaml.safe_dump(config.flat(), sort_keys=False)), (DATA, data)):
            if not (folder / name).exists():
                with atomic_file(folder / name) as temporary:
                    temporary.write_text(content, encoding="utf-8")
    state.wait_for_everyone()
    return folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the block, no other launch trains in the folder of this run: it would find that half done and delete it.

    The lock is the file `.NAME.lock` beside the folder; it ends with the process, however that ends. Raises
    `HistoError`, in the main process, if another one has it.
    """
    if not PartialState(cpu=use_cpu()).is_main_process:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise HistoError(
            f"--output_dir {folder}: another process is training there; wait until it has ended, or choose another one"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_space_for(folder: Path) -> Iterator[None]:
    """Tell a full disk from other failures: torch and safetensors report it as a RuntimeError or an error of their own.

    Raises `HistoError` where writing failed and fewer than 16 MiB are left, or the system said so itself.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        left = shutil.disk_usage(folder).free if folder.exists() else 0
        if getattr(error, "errno", None) != errno.ENOSPC and left >= 2**24:
            raise
        raise HistoError(
            f"{folder}: the disk is full ({left / 2**20:.1f} MiB left); make room and give the same command again: it "
            "goes on from the last complete checkpoint"
        ) from error


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has written its adapter; `hub.save` does so whole and last."""
    return (folder / ADAPTER).is_dir()


def checkpoint(config: Config, folder: Path) -> str | None:
    """The checkpoint to go on from: the one asked for, else the last complete one in `folder`, else None.

    A checkpoint is complete once it holds the trainer's state, which is written last. Raises `HistoError` if the one
    that is asked for is not.
    """
    wanted = config.training.resume_from_checkpoint
    if wanted and wanted != "last":
        if not _is_complete(Path(wanted)):
            raise HistoError(f"--resume_from_checkpoint {wanted}: no complete checkpoint (no {TRAINER_STATE_NAME})")
        return wanted
    complete = [path for path in folder.glob("checkpoint-*") if _is_complete(path)]
    if not complete:
        if wanted:
            raise HistoError(f"--resume_from_checkpoint last: {folder} holds no complete checkpoint")
        return None
    last = max(complete, key=lambda path: int(path.name.split("-")[-1]))
    logger.warning("going on from %s", last)
    return str(last)


def _is_complete(path: Path) -> bool:
    try:
        read_json(path / TRAINER_STATE_NAME)
    except (OSError, ValueError):
        return False
    return True


def _check(folder: Path, config: Config, data: str) -> None:
    # What a killed process left unfinished is nothing.
    if not folder.exists() or (folder.is_dir() and all(".incomplete" in path.name for path in folder.iterdir())):
        return
    if not (folder / RECORD).is_file():
        raise HistoError(f"--output_dir {folder}: holds no run but other files (no {RECORD}); choose another one")
    if config.output.overwrite_output_dir:
        return
    remedy = "choose another --output_dir, or delete the run with --overwrite_output_dir"
    try:
        before = yaml.safe_load(read_text(folder / RECORD))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise HistoError(f"--output_dir {folder}: its {RECORD} is damaged, expected the options of a run; {remedy}")
    before = Config().flat() | before  # an option that is newer than the run: its default is what the run did
    now = config.flat()
    changed = [key for key in now if key not in INDIFFERENT and before.get(key) != now[key]]
    if changed:
        was = ", ".join(f"{key} {before.get(key)!r} (now {now[key]!r})" for key in changed)
        raise HistoError(f"--output_dir {folder}: holds another run: {was}; {remedy}")
    recorded = (folder / DATA).read_text(encoding="utf-8") if (folder / DATA).is_file() else data
    if recorded != data:
        raise HistoError(
            f"--output_dir {folder}: its run was on other data than --data {config.data.data} holds now (fingerprint "
            f"{recorded}, now {data}); {remedy}"
        )
