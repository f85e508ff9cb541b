"""What this machine has for a run, and what it lacks, each with the command that provides it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import datasets
import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from hf_histo import launch
from hf_histo.config.commands import DoctorOptions
from hf_histo.errors import HistoError

PACKAGE = "hf_histo"
SHOWN = (
    "torch",
    "transformers",
    "peft",
    "timm",
    "datasets",
    "accelerate",
)  # required packages with a line of their own
ENOUGH = 10 * 2**30  # bytes of free disk: a data set of 100,000 patches takes 3 of them, a large backbone 4


@dataclass(frozen=True)
class Line:
    """A line of the report.

    Attributes:
        name: what was looked at.
        found: what was found.
        remedy: the command, or what else to do, where something is missing; None where nothing is.
        is_fatal: whether no run can work like this.
    """

    name: str
    found: str
    remedy: str | None = None
    is_fatal: bool = False


def doctor(options: DoctorOptions) -> str:
    """The report as text. Raises HistoError, after the report as its first lines, where no run can work."""
    lines = [*_packages(), *_devices(), *_disk(options.cache_dir), _token(), *_extras()]
    width = max(len(line.name) for line in lines)
    text = "\n".join(
        f"{line.name:<{width}}  {line.found}" + (f"  ->  {line.remedy}" if line.remedy else "") for line in lines
    )
    if fatal := [line for line in lines if line.is_fatal]:
        print(text)
        raise HistoError(f"{fatal[0].name}: {fatal[0].found}; {fatal[0].remedy}")
    return text


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in metadata.requires(PACKAGE) or []]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Line]:
    yield Line(PACKAGE, f"{metadata.version(PACKAGE)}, Python {platform.python_version()}, {platform.platform()}")
    for needed in _requirements():
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found = _version(needed.name)
        if found is None or not needed.specifier.contains(found, prereleases=True):
            missing = f"{found or 'not installed'}, expected {needed.specifier or 'any version'}"
            yield Line(needed.name, missing, f'pip install "{needed.name}{needed.specifier}"', is_fatal=True)
        elif needed.name in SHOWN:
            yield Line(needed.name, found)


def _devices() -> Iterator[Line]:
    precisions = "float32, bf16 (--mixed_precision bf16)" if launch.cpu_has_bf16() else "float32"
    yield Line("CPU", f"{launch.thread_count()} threads for a run; {precisions}")
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        precisions = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        yield Line(f"GPU {number}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB; float32, {precisions}")
    if torch.accelerator.is_available() and not torch.cuda.is_available():
        yield Line("GPU", f"{torch.accelerator.current_accelerator()}; float32")
    elif not torch.accelerator.is_available() and shutil.which("nvidia-smi"):
        found = f"one of NVIDIA, which torch {torch.__version__} can't use"
        yield Line(
            "GPU", found, "nvidia-smi for the driver, then the command of https://pytorch.org/get-started/locally"
        )
    elif not torch.accelerator.is_available():
        yield Line("GPU", "none")


def _disk(cache_dir: str | None) -> Iterator[Line]:
    places = {
        "converted data": (Path(cache_dir or datasets.config.HF_DATASETS_CACHE), "--cache_dir or HF_DATASETS_CACHE"),
        "backbones": (Path(constants.HF_HUB_CACHE), "HF_HUB_CACHE"),
        "runs": (Path.cwd() / "runs", "--output_dir"),
    }
    for name, (folder, option) in places.items():
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        found = f"{free / 2**30:.0f} GiB free for {folder}"
        if not os.access(existing, os.W_OK):
            yield Line(name, f"{existing} can't be written to", f"give another folder by {option}", is_fatal=True)
        elif free < ENOUGH:
            yield Line(name, found, f"make room, or give another folder by {option}")
        else:
            yield Line(name, found)


def _token() -> Line:
    if constants.HF_HUB_OFFLINE:
        return Line("Hub", "offline, by HF_HUB_OFFLINE: backbones come from the cache or a folder")
    if get_token():
        return Line("Hub", "a token is stored")
    return Line("Hub", "no token: public models only, nothing can be uploaded", "hf auth login")


def _extras() -> Iterator[Line]:
    requirements = _requirements()
    for extra in metadata.metadata(PACKAGE).get_all("Provides-Extra") or []:
        of_extra = [
            needed.name
            for needed in requirements
            if needed.marker is not None
            and needed.marker.evaluate({"extra": extra})
            and not needed.marker.evaluate({"extra": ""})
        ]
        if missing := [name for name in of_extra if _version(name) is None]:
            yield Line(f"[{extra}]", f"without {', '.join(missing)}", f'pip install "{PACKAGE}[{extra}]"')
        else:
            yield Line(f"[{extra}]", "installed")
