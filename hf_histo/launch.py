"""The process of a run: entry point and signals, device and precision, and which process of a launch writes.

Environment variables are read and written here alone: `RANK`, `LOCAL_WORLD_SIZE` and `ACCELERATE_*` are those of
torchrun and accelerate; `HF_HISTO_TRACEBACK=1` shows the traceback of an error; `THP_MEM_ALLOC_ENABLE` is torch's.

A recipe imports this module before it has parsed its options. So torch and accelerate, which take seconds, are imported
by the functions that need them.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from hf_histo.config.packaged import PROGRAM
from hf_histo.errors import HistoError

if TYPE_CHECKING:
    import psutil
    from accelerate import PartialState

logger = logging.getLogger(__name__)

# The first words of a command that starts processes, and sets OMP_NUM_THREADS=1 for them where nobody did.
LAUNCHERS = {
    *("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
}
# Processes of a launch on this machine: torchrun's variable, then those of kinds of MPI.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end: `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(main: Callable[[], object], *, threads: int | None = None) -> None:
    """Run a recipe's `main`; end in one clear line on standard error and a non-zero exit where it fails.

    It computes with `threads` CPU threads, by default with what `thread_count` gives each process of the launch.

    `HistoError` and `OSError` (a full disk, a read-only folder) exit with 1; SIGTERM and Ctrl-C with 128 and their
    number (143, 130), and a line with the command that resumes. A traceback is shown only where the environment
    variable `HF_HISTO_TRACEBACK` is 1, and for any other exception, which is a bug.
    """

    def start() -> None:
        gc.freeze()  # lets `importing` do so: this process is ours
        if rank() > 0:  # the first process logs the same warnings
            logging.getLogger("hf_histo").setLevel(logging.ERROR)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's tensors from 2 MiB on in huge pages, under Linux
        _use_threads(threads or thread_count(_local_count()))
        main()

    if os.environ.get("HF_HISTO_TRACEBACK") == "1":
        start()
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        start()
    except (HistoError, OSError) as error:
        _write(f"error: {' '.join(str(error).split())}")
        raise SystemExit(1) from None
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        if rank() == 0:
            end = f"interrupted by {signal.Signals(number).name}"
            _write(f"{end}; this command starts it again, a training from its last checkpoint: {command()}")
        raise SystemExit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(line: str) -> None:
    """A line on standard error; a bare print would continue that of a progress bar that an error cut off."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


@contextmanager
def importing() -> Iterator[None]:
    """Import within the block without garbage collection, which takes a sixth of the time of torch's and transformers'.

    Modules are no garbage. In a process of `run`, what was imported is also exempt from all later collections
    (`gc.freeze`), one of which Trainer asks for; a notebook's objects are not touched.
    """
    before, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        if len(sys.modules) > before and gc.get_freeze_count():
            gc.freeze()


def rank() -> int:
    """Number of this process among those of the launch, from 0; known before torch is imported."""
    return _first_number(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0)


def process_count() -> int:
    """Number of processes of the launch; known before torch is imported."""
    return _first_number(("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), 1)


def _local_count() -> int:
    """Number of processes of the launch on this machine."""
    return _first_number(LOCAL_SIZES, 1)


def _first_number(names: Sequence[str], default: int) -> int:
    """The number in the first of some environment variables that is set."""
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def thread_count(processes: int = 1) -> int:
    """CPU threads for each of `processes` on this machine: OMP_NUM_THREADS, else an even share of its cores.

    The cores are the physical ones that this process may use: of its affinity and its control group
    (`joblib.cpu_count`), and no more than SLURM gave the task. Raises HistoError where OMP_NUM_THREADS is not a number.
    """
    if (chosen := _chosen_threads()) is not None:
        if not chosen.isdecimal() or int(chosen) < 1:
            raise HistoError(f"OMP_NUM_THREADS is {chosen!r}, expected a number from 1 on; set or unset it")
        return int(chosen)
    from joblib import cpu_count

    cores: int = min(cpu_count(only_physical_cores=True), _first_number(("SLURM_CPUS_PER_TASK",), sys.maxsize))
    return max(cores // processes, 1)


def _chosen_threads() -> str | None:
    """OMP_NUM_THREADS where a person set it; None for the 1 of accelerate and torchrun, which nobody asked for."""
    import psutil

    own, *parents = _processes()
    value: str | None = own.environ().get("OMP_NUM_THREADS")  # as this process was started
    if value != "1":
        return value
    launchers = [process for process in parents if LAUNCHERS & _words(process)]
    try:
        was_set = any(
            "OMP_NUM_THREADS" in process.environ() or "--num_cpu_threads_per_process" in _words(process)
            for process in launchers
        )
    except psutil.Error:  # somebody else's process, whose environment can't be read
        was_set = True
    return value if was_set or not launchers else None


def _processes() -> list[psutil.Process]:
    """This process, the one that started it, and so on, as far as the system shows them."""
    import psutil

    found = [psutil.Process()]
    with suppress(psutil.Error):
        while (parent := found[-1].parent()) is not None:
            found.append(parent)
    return found


def _line(process: psutil.Process) -> list[str]:
    """The command that started a process; none where the system hides it, as macOS and `hidepid` do."""
    import psutil

    try:
        line: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return line


def _words(process: psutil.Process) -> set[str]:
    """The words of a process's command: programs without their folders, options without their values."""
    words = (Path(word.split("=")[0]).name for word in _line(process))
    return {"--" + word[2:].replace("-", "_") if word.startswith("--") else word for word in words}


def _use_threads(number: int) -> None:
    """Compute with this number of CPU threads, whether or not torch is imported yet."""
    os.environ["OMP_NUM_THREADS"] = str(number)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(number)


def show(text: str) -> None:
    """Print in the first process of the launch alone."""
    if rank() == 0:
        print(text, flush=True)


def command() -> str:
    """The line that resumes this program: the one that started it, with its launcher (accelerate, torchrun, nice, ...).

    Without `--overwrite_output_dir`, which would start it from the beginning.
    """
    started = map(_line, _processes())
    program = sys.argv[0].removeprefix(f"{PROGRAM} ")  # of `hf_histo COMMAND`, the command
    line = ([sys.argv] + [line for line in started if program in line])[-1]
    kept = re.sub(r"\0--overwrite[_-]output[_-]dir(=[^\0]*|\0[^-\0][^\0]*)?(?=\0|$)", "", "\0".join(line))
    return shlex.join(kept.split("\0"))


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def use_cpu() -> bool:
    """Whether the launcher asks for the CPU, or there is no accelerator."""
    import torch

    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not torch.accelerator.is_available()


def reading_processes() -> int:
    """Processes that read for a model beside it: 1 on the CPU, whose cores the model computes on.

    On an accelerator one for each of this process's other cores, up to 8.
    """
    return 1 if use_cpu() else min(8, max(1, thread_count(_local_count()) - 1))


def use_gpu(number: int) -> None:
    """Let this process see one GPU alone where there are several: the one of this number, counted round.

    To be called before anything uses a GPU.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(gpu) for gpu in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


def process() -> PartialState:
    """This process among those of the launch.

    accelerate needs `cpu`: without it, each of the processes that torchrun starts on a machine without a GPU takes
    itself for the only one.
    """
    from accelerate import PartialState

    return PartialState(cpu=use_cpu())


def is_main_process() -> bool:
    """Whether this process writes files and prints: the first of the launch."""
    return bool(process().is_main_process)


def mixed_precision(wanted: str) -> str:
    """ "no", "bf16" or "fp16": `wanted`, where "auto" is the launcher's setting, else by the device.

    On a GPU that computes in bf16, that is bf16. A CPU stays in float32, where a run gives the same bits on every
    machine of its kind; where it has bf16, the log mentions it.
    """
    if wanted != "auto":
        return wanted
    import torch

    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":
        return launched
    if not use_cpu():
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if cpu_has_bf16():
        logger.info("this CPU computes in bf16, too, which --mixed_precision bf16 makes use of")
    return "no"


def cpu_has_bf16() -> bool:
    """Whether the processor computes in bfloat16: AVX-512 BF16 or AMX."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def set_mixed_precision(precision: str) -> None:
    """Make "no", "bf16" or "fp16" what transformers and accelerate use: `TrainingArguments` has no value for "no"."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision


@contextmanager
def own_precision() -> Iterator[None]:
    """Within the block, a run chooses its mixed precision; the next one in this process has the launcher's again."""
    from accelerate.state import AcceleratorState

    before = os.environ.get("ACCELERATE_MIXED_PRECISION")
    try:
        yield
    finally:
        AcceleratorState._reset_state()  # it keeps the first precision, and refuses another one
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        if before is not None:
            os.environ["ACCELERATE_MIXED_PRECISION"] = before


def gradient_accumulation_steps() -> int:
    """Steps per update that the launcher asks for; 1 where it does not."""
    return int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1))
