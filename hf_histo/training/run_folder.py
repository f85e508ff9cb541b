"""The folder of a run: the run's identity, whether it is finished, and the checkpoint that it resumes from."""

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
from safetensors import SafetensorError

from hf_histo import launch
from hf_histo.config import NON_RESULT_OPTIONS, Config, current, effective
from hf_histo.errors import HistoError
from hf_histo.files import atomic_file, locked, read_checksums, read_text

logger = logging.getLogger(__name__)

RECORD = "run.yaml"
DATA = "data.txt"
ADAPTER = "adapter"
FIGURES = "figures"
COST = "cost.json"
CHECKLIST = "checklist.md"
PREVIEW = "preview.png"
NAN_BATCH = "nan_batch.json"
PREDICTIONS = "predictions"
TENSORBOARD = "tensorboard"
# Everything that a run writes into its folder besides checkpoints, and that overwriting it deletes.
WRITTEN = (RECORD, DATA, ADAPTER, FIGURES, COST, CHECKLIST, PREVIEW, NAN_BATCH, PREDICTIONS, TENSORBOARD)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def folder_of(config: Config) -> Path:
    """`--output_dir`, or runs/DATA-BACKBONE-METHOD-seedN."""
    if config.output.output_dir:
        return Path(config.output.output_dir)
    data, backbone = Path(config.data.data).resolve().name, Path(config.model.backbone).name
    return Path("runs") / f"{data}-{backbone}-{config.adapter.name}-seed{config.training.seed}"


@dataclass(frozen=True)
class Run:
    """A run: its folder, and what determines its result.

    Attributes:
        folder: the run's folder.
        options: all options by name, recorded in run.yaml.
        data: fingerprint of its data.
        overwrites: delete an earlier run in the folder, unless it is an unfinished run of the same command.
        reads: files, folders and Hub names that the run reads, which overwriting must not delete.
    """

    folder: Path
    options: Mapping[str, Any]
    data: str
    overwrites: bool
    reads: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, data: str = "") -> Run:
        """The run with these options, on data with this fingerprint."""
        places = [config.data.data, config.model.backbone, config.adapter.init_adapter, config.data.cache_dir]
        places.append(config.training.resume_from_checkpoint)
        reads = tuple(filter(None, places))
        return cls(folder_of(config), config.flat(), data, config.output.overwrite_output_dir, reads)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the result, as JSON values: the options with an effect on it, and the data's fingerprint."""
        options = {key: value for key, value in self.options.items() if key not in NON_RESULT_OPTIONS}
        return {**options, "data fingerprint": self.data}


def require_agreement(run: Run) -> None:
    """Raise `HistoError` unless all processes of a launch have the same data, options and folder.

    Each process must call it, with its own run. Paths of the data may differ.
    """
    if launch.process_count() == 1:
        return
    from accelerate.utils import gather_object  # imports torch, which a finished run does without

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
    """Check that `begin` may use the folder of this run, without writing anything.

    Raises `HistoError` if the folder holds a run with other options or data, unless this one overwrites it; if it
    holds other files; if it is a link or not a folder; and if it would be created inside the folder of the data.
    """
    data = Path(str(run.options["data"])).expanduser()
    # An existing run may resume; a new folder there could be taken for a class of images.
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
    """Create the folder of this run, unless the same command did so before, and record what determines its result.

    run.yaml gets the options, and data.txt the fingerprint of the data. If this run overwrites, a finished run, or one
    with other options or data, is deleted: only the files that it wrote. An unfinished run of the same command is kept,
    so that a job that is queued again resumes.

    Each process of a launch must call it. Raises `HistoError` as `check` does.
    """
    check(run)
    state = launch.process()
    deletes = _deletes(run)
    state.wait_for_everyone()
    if state.is_main_process:
        if deletes:
            _delete(_written(run.folder))
        run.folder.mkdir(parents=True, exist_ok=True)
        _delete(run.folder.glob(".*.incomplete*"))  # left by a process that was killed
        options = {**run.options, "overwrite_output_dir": False}  # the record may serve as --config
        for name, content in ((RECORD, yaml.safe_dump(options, sort_keys=False)), (DATA, run.data)):
            if not (run.folder / name).exists():
                with atomic_file(run.folder / name) as temporary:
                    temporary.write_text(content, encoding="utf-8")
    state.wait_for_everyone()


def require_begun(folder: Path) -> None:
    """Raise `HistoError` if the folder of a run was moved or deleted during training, so that `RECORD` is missing."""
    if not (folder / RECORD).is_file():
        raise HistoError(
            f"{folder}: was deleted or moved while this run was trained (no {RECORD}); leave the folder in place, and "
            "give the same command again"
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the block, lock the folder of this run, so that no other launch trains in it or deletes it.

    The lock is the file `.NAME.lock` beside the folder; it is released when the process ends, even if it is killed.
    Raises `HistoError`, in the main process, if another launch holds it.
    """
    if launch.rank() > 0:
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
    """Within the block, raise `HistoError` for errors caused by a full disk or by a lack of memory.

    torch and safetensors report a full disk as RuntimeError or as an exception of their own. Converted are write
    errors if less than 16 MiB are left beside `folder`, errors of the system about a full device, and the end of a
    data loader's worker process, usually for lack of memory.
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
    """Whether the run in `folder` has written its adapter, which is its last step, and atomic."""
    return (folder / ADAPTER).is_dir()


def checkpoint(run: Run, wanted: str | None = None) -> str | None:
    """The checkpoint to resume from: `wanted`, else the last complete one in the folder, else None.

    A checkpoint is complete if all files listed by `CheckpointRecord` match their checksums. An incomplete one in the
    folder is logged, and the one before it is used.

    Args:
        run: the run to resume.
        wanted: path of a checkpoint, or "last" to require one in the run's folder.

    Raises `HistoError` if `wanted` is incomplete or is from a run with other options or data, and for "last" if there
    is no complete checkpoint.
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
    """Raise `HistoError` unless a checkpoint of this run matches its checksums."""
    try:
        read_checksums(checkpoint)
    except (OSError, ValueError) as error:
        raise HistoError(
            f"{checkpoint}: the best checkpoint is damaged ({error}); delete the run, or restore this folder, and give "
            "the same command again"
        ) from None


def _fault(checkpoint: Path, run: Mapping[str, Any]) -> str | None:
    """Why a run with the identity `run` can't resume from a checkpoint; None if it can."""
    try:
        found = read_checksums(checkpoint).get("run", {})
    except OSError as error:
        return f"no complete checkpoint ({error.strerror}: {Path(error.filename or checkpoint).name})"
    except ValueError as error:
        return f"damaged checkpoint ({error})"
    before = _as_now(found)
    differing = _differences({key: before.get(key) for key in run}, effective(run), "there", "here")
    return f"is of another run: {differing}" if differing else None


def _as_now(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded options, completed by the defaults of those that did not exist yet: that is what the run did."""
    return effective(Config().flat() | current(recorded))


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], here: str, there: str) -> str:
    """The entries that differ, as text; "" if none does."""
    keys = [key for key in {**other, **one} if one.get(key) != other.get(key)]
    return ", ".join(f"{key} {one.get(key)!r} {here} and {other.get(key)!r} {there}" for key in keys)


def _written(folder: Path) -> list[Path]:
    """Files and folders that a run wrote into its folder."""
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
    """Whether the run in the folder is to be deleted: not if it is unfinished and has the same options and data."""
    return run.overwrites and (is_finished(run.folder) or _other_run(run) is not None)


def _other_run(run: Run) -> str | None:
    """How the run in the folder differs from this one; None if it does not, or there is no run.

    Raises `HistoError` for a folder with other files, a link, and a path that is not a folder.
    """
    folder, data = run.folder, run.data
    if folder.is_symlink():
        raise HistoError(f"--output_dir {folder}: a link to {folder.resolve()}, expected a folder; give that itself")
    # Unfinished files of a killed process don't count.
    if not folder.exists() or (folder.is_dir() and all(".incomplete" in path.name for path in folder.iterdir())):
        return None
    if not (folder / RECORD).is_file():
        raise HistoError(f"--output_dir {folder}: holds other files, and no run (no {RECORD}); choose another one")
    try:
        before = yaml.safe_load(read_text(folder / RECORD))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        before = None
    if not isinstance(before, dict):
        return f"its {RECORD} is damaged, expected the options of a run"
    before, now = _as_now(before), effective(run.options)
    changed = [key for key in now if key not in NON_RESULT_OPTIONS and before.get(key) != now[key]]
    if changed:
        return f"holds another run: {', '.join(f'{key} {before.get(key)!r} (now {now[key]!r})' for key in changed)}"
    recorded = (folder / DATA).read_text(encoding="utf-8") if (folder / DATA).is_file() else data
    if recorded != data:
        found = f"its run was on other data than --data {run.options['data']} holds now"
        return f"{found} (fingerprint {recorded}, now {data})"
    return None
