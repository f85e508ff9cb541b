"""The folder of a run: which run it holds, whether it is finished, and from which checkpoint it resumes."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_histo import launch
from hf_histo.config import NON_RESULT_OPTIONS, Config, effective
from hf_histo.errors import HistoError
from hf_histo.files import atomic_file, locked, read_checksums, read_text, write_checksums

logger = logging.getLogger(__name__)

RECORD = "run.yaml"
DATA = "data.txt"
ADAPTER = "adapter"
FIGURES = "figures"
COST = "cost.json"
PREVIEW = "preview.png"
NAN_BATCH = "nan_batch.json"
PREDICTIONS = "predictions"
# All that a run writes into its folder beside checkpoints, and all that overwriting it deletes.
WRITTEN = (RECORD, DATA, ADAPTER, FIGURES, COST, PREVIEW, NAN_BATCH, PREDICTIONS)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def folder_of(config: Config) -> Path:
    """`--output_dir`, or runs/DATA-BACKBONE-METHOD-seedN."""
    if config.output.output_dir:
        return Path(config.output.output_dir)
    data, backbone = Path(config.data.data).resolve().name, Path(config.model.backbone).name
    return Path("runs") / f"{data}-{backbone}-{config.adapter.method}-seed{config.training.seed}"


@dataclass(frozen=True)
class Run:
    """A run: where it is, and what decides its result.

    Attributes:
        folder: of the run.
        options: all of them, by name; run.yaml records them.
        data: fingerprint of its data.
        overwrites: delete what an earlier run left in the folder, unless that is an unfinished one of the same command.
        reads: files, folders and Hub names that the run reads, which overwriting must not delete.
    """

    folder: Path
    options: Mapping[str, Any]
    data: str
    overwrites: bool
    reads: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, data: str = "") -> Run:
        """The run that the options ask for, on data of that fingerprint."""
        places = [config.data.data, config.model.backbone, config.adapter.init_adapter, config.data.cache_dir]
        places.append(config.training.resume_from_checkpoint)
        reads = tuple(filter(None, places))
        return cls(folder_of(config), config.flat(), data, config.output.overwrite_output_dir, reads)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result, ready for JSON: the options that do, and the fingerprint of the data."""
        options = {key: value for key, value in self.options.items() if key not in NON_RESULT_OPTIONS}
        return {**options, "data fingerprint": self.data}


def require_agreement(run: Run) -> None:
    """Raise `HistoError` unless the processes of a launch have the same data, options and folder.

    Every process calls it, with its own run. Where the files of the data are may differ.
    """
    launch.process()
    own = run.identity | {
        "mixed_precision": launch.mixed_precision(run.options["mixed_precision"]),
        "output_dir": str(run.folder),
    }
    del own["data"]
    first, *others = gather_object([own])
    for process, other in enumerate(others, start=1):
        if differing := _differences(other, first, f"in process {process}", "in process 0"):
            raise HistoError(
                f"the {len(others) + 1} processes of this launch differ, expected the same data and options in each: "
                f"{differing}; start all of them with the same command on the same files"
            )


def check(run: Run) -> None:
    """Check that `begin` may take the folder of this run. Nothing is written.

    Raises `HistoError` if the folder holds a run with other options or data, unless this one overwrites it, if it
    holds anything but a run, if it is a link or no folder, and if it is a new one in the folder of the data.
    """
    data = Path(str(run.options["data"])).expanduser()
    # Where a run is, it may resume; a new one could be taken for a class of images.
    if data.is_dir() and run.folder.resolve().is_relative_to(data.resolve()) and not (run.folder / RECORD).is_file():
        raise HistoError(f"--output_dir {run.folder}: lies in --data {data}, expected another folder; choose one")
    if other := _other_run(run):
        if not run.overwrites:
            remedy = "choose another --output_dir, or delete the run with --overwrite_output_dir"
            raise HistoError(f"--output_dir {run.folder}: {other}; {remedy}")
        for path in _written(run.folder):
            for place in run.reads:
                if Path(place).expanduser().resolve().is_relative_to(path.resolve()):
                    raise HistoError(
                        f"--overwrite_output_dir: {path} would be deleted, and {place}, which this run reads, is in "
                        "it; choose another --output_dir"
                    )


def begin(run: Run) -> None:
    """Make the folder of this run, or find the one that the same command began, and record what decides its result.

    run.yaml gets the options, and data.txt the fingerprint of the data. Where this run overwrites, one with other
    options or data, or a finished one, is deleted: the files that it wrote and nothing else. A run that the same
    command began and did not finish stays, so that a job that is queued again resumes.

    Every process of a launch calls it. Raises `HistoError` as `check` does.
    """
    check(run)
    state = launch.process()
    deletes = _deletes(run)
    state.wait_for_everyone()
    if state.is_main_process:
        if deletes:
            _delete(_written(run.folder))
        run.folder.mkdir(parents=True, exist_ok=True)
        _delete(run.folder.glob(".*.incomplete*"))  # of a process that was killed
        options = {**run.options, "overwrite_output_dir": False}  # the record may serve as --config
        for name, content in ((RECORD, yaml.safe_dump(options, sort_keys=False)), (DATA, run.data)):
            if not (run.folder / name).exists():
                with atomic_file(run.folder / name) as temporary:
                    temporary.write_text(content, encoding="utf-8")
    state.wait_for_everyone()


def require_begun(folder: Path) -> None:
    """Raise `HistoError` if the folder of a run that is being trained lost its record: someone moved or deleted it."""
    if not (folder / RECORD).is_file():
        raise HistoError(
            f"{folder}: was deleted or moved while this run was trained (no {RECORD}); leave the folder in place, and "
            "give the same command again"
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the block, no other launch trains in the folder of this run: it would find that half done and delete it.

    The lock is the file `.NAME.lock` beside the folder; it ends with the process, however that ends. Raises
    `HistoError`, in the main process, if another one has it.
    """
    if not launch.is_main_process():
        yield
        return
    place = folder.resolve()
    with locked(place.parent / f".{place.name}.lock") as is_ours:
        if not is_ours:
            raise HistoError(
                f"--output_dir {folder}: another process is training there; wait until it has ended, or choose another "
                "one"
            )
        yield


@contextmanager
def system_failures(folder: Path) -> Iterator[None]:
    """Within the block, what fails for want of disk or memory ends in one line.

    torch and safetensors report a full disk as a RuntimeError or an error of their own. Raises `HistoError` where
    writing failed and fewer than 16 MiB are left beside `folder`, where the system reported a full device, and where a
    process that reads batches was killed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if "DataLoader worker" in str(error):
            raise HistoError(
                f"a process that reads batches ended ({' '.join(str(error).split())[:200]}), mostly because memory ran "
                "out; lower --num_workers, or 0 to read without such processes"
            ) from error
        left = shutil.disk_usage(folder).free if folder.exists() else 0
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and left >= 2**24:
            raise
        remedy = "make room and give the same command again: it resumes from the last complete checkpoint"
        if left < 2**24:
            raise HistoError(f"{folder}: the disk is full ({left / 2**20:.1f} MiB left); {remedy}") from error
        reason = os.strerror(getattr(error, "errno", errno.ENOSPC))
        file = getattr(error, "filename", None) or "another place than this, e.g. --cache_dir, TMPDIR or /dev/shm"
        raise HistoError(f"{reason}: {file} ({folder} has {left / 2**20:,.0f} MiB left); {remedy}") from error


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has written its adapter; `adapter.folder.save` does so whole and last."""
    return (folder / ADAPTER).is_dir()


class CheckpointRecord(TrainerCallback):
    """Binds each checkpoint to its run: `files.write_checksums` with the run's identity, once all else is written."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        require_begun(self.run.folder)
        process = launch.process()
        process.wait_for_everyone()  # each writes its random state
        if process.is_main_process:
            write_checksums(self.run.folder / f"checkpoint-{state.global_step}", run=self.run.identity)
        process.wait_for_everyone()


def checkpoint(run: Run, wanted: str | None = None) -> str | None:
    """The checkpoint to resume from: the one that is wanted, else the last complete one in the folder, else None.

    A checkpoint is complete if all files that `CheckpointRecord` listed last are as they were written. An incomplete
    one in the folder is reported in the log and the one before it is taken.

    Args:
        run: that resumes.
        wanted: path of a checkpoint, or "last" for one that must be in the folder.

    Raises `HistoError` if the one that is wanted is incomplete, or of a run with other options or data.
    """
    if wanted and wanted != "last":
        if fault := _fault(Path(wanted), run.identity):
            raise HistoError(
                f"--resume_from_checkpoint {wanted}: {fault}; expected a complete checkpoint of a run with these "
                "options and this data"
            )
        return wanted
    kept = [] if _deletes(run) else run.folder.glob("*")
    steps = {int(match[1]): path for path in kept if (match := CHECKPOINT.fullmatch(path.name))}
    for path in (steps[step] for step in sorted(steps, reverse=True)):
        fault = _fault(path, run.identity)
        if fault is None:
            logger.warning("resuming from %s", path)
            return str(path)
        logger.warning("%s is not used: %s", path, fault)
    if wanted:
        raise HistoError(f"--resume_from_checkpoint last: {run.folder} holds no complete checkpoint")
    return None


def require_intact(checkpoint: Path) -> None:
    """Raise `HistoError` unless a checkpoint of this run is as it was written."""
    try:
        read_checksums(checkpoint)
    except (OSError, ValueError) as error:
        raise HistoError(
            f"{checkpoint}: the best checkpoint is damaged ({error}); delete the run, or restore this folder, and give "
            "the same command again"
        ) from None


def _fault(checkpoint: Path, run: Mapping[str, Any]) -> str | None:
    """Why a checkpoint can't be resumed from by a run of that identity."""
    try:
        found = read_checksums(checkpoint).get("run", {})
    except OSError as error:
        return f"no complete checkpoint ({error.strerror}: {Path(error.filename or checkpoint).name})"
    except ValueError as error:
        return f"damaged checkpoint ({error})"
    differing = _differences(effective(found), effective(run), "there", "here")
    return f"is of another run: {differing}" if differing else None


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], here: str, there: str) -> str:
    """The entries that differ, in words; "" where none does."""
    keys = [key for key in {**other, **one} if one.get(key) != other.get(key)]
    return ", ".join(f"{key} {one.get(key)!r} {here} and {other.get(key)!r} {there}" for key in keys)


def _written(folder: Path) -> list[Path]:
    """What a run wrote into its folder."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name in WRITTEN or CHECKPOINT.fullmatch(path.name)]


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _deletes(run: Run) -> bool:
    """Whether what is in the folder is to be deleted: not an unfinished run of the same options and data."""
    return run.overwrites and (is_finished(run.folder) or _other_run(run) is not None)


def _other_run(run: Run) -> str | None:
    """How the run in the folder differs from this one; None if it does not, or the folder holds no run.

    Raises `HistoError` for a folder that holds something else, and what is no folder.
    """
    folder, data = run.folder, run.data
    if folder.is_symlink():
        raise HistoError(f"--output_dir {folder}: a link to {folder.resolve()}, expected a folder; give that itself")
    # What a killed process left unfinished is nothing.
    if not folder.exists() or (folder.is_dir() and all(".incomplete" in path.name for path in folder.iterdir())):
        return None
    if not (folder / RECORD).is_file():
        raise HistoError(f"--output_dir {folder}: holds no run but other files (no {RECORD}); choose another one")
    try:
        before = yaml.safe_load(read_text(folder / RECORD))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        before = None
    if not isinstance(before, dict):
        return f"its {RECORD} is damaged, expected the options of a run"
    # An option that is newer than the run: its default is what the run did.
    before = effective(Config().flat() | before)
    now = effective(run.options)
    changed = [key for key in now if key not in NON_RESULT_OPTIONS and before.get(key) != now[key]]
    if changed:
        return f"holds another run: {', '.join(f'{key} {before.get(key)!r} (now {now[key]!r})' for key in changed)}"
    recorded = (folder / DATA).read_text(encoding="utf-8") if (folder / DATA).is_file() else data
    if recorded != data:
        found = f"its run was on other data than --data {run.options['data']} holds now"
        return f"{found} (fingerprint {recorded}, now {data})"
    return None
