"""The files of an adapter folder: their names, and whether they are unchanged.

It is known before torch and peft are imported, which take seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from hf_histo.errors import HistoError
from hf_histo.files import CHECKSUMS, read_checksums, read_json
from hf_histo.training.run_folder import FIGURES, PREDICTIONS

SIDECAR = "hf_histo.json"
CARD = "README.md"
METRICS = "metrics.json"
ENSEMBLE = "ensemble.json"  # in a folder of several adapters, see `hf_histo.adapter.ensemble`
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # peft's files; a "full" run has MODEL instead
MODEL = ("config.json", "model.safetensors")
# The files that this package writes into an adapter folder. Other files in it are neither read nor uploaded.
FILES = (
    *(SIDECAR, CARD, CHECKSUMS, *ADAPTER, *MODEL, "preprocessor_config.json", METRICS, "report.html"),
    *(f"{PREDICTIONS}/*.parquet", f"{FIGURES}/*.png"),
)


def files_of(folder: Path, patterns: Iterable[str] = FILES) -> dict[str, Path]:
    """The files in an adapter folder that this package writes (`patterns`), by relative name.

    Raises `HistoError` for one that is not a regular file in the folder, such as a pipe, a device or a link to another
    place; links within the Hub's cache are allowed.
    """
    roots, cache = [folder.resolve()], Path(constants.HF_HUB_CACHE).resolve()
    if roots[0].is_relative_to(cache) and roots[0] != cache:
        # Where the links of a snapshot in the Hub's cache lead.
        roots.append(cache / roots[0].relative_to(cache).parts[0] / "blobs")
    found = {}
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise HistoError(f"{path}: is a link to a file outside the folder, expected a file; put the file there")
        if not path.is_file():
            raise HistoError(f"{path}: is not a regular file, expected what a run wrote; copy the folder again")
        found[path.relative_to(folder).as_posix()] = path
    return found


def check(folder: Path) -> dict[str, Path]:
    """The files of an adapter folder (`files_of`), after checking that none differs from its recorded checksum.

    Files may be missing, apart from the sidecar, and the card may differ, which people edit. A folder from a version
    without checksums is not checked for changes.

    Raises `HistoError` as `files_of` does; for a damaged file, a missing sidecar, and an ensemble.
    """
    files = files_of(folder)
    if (folder / ENSEMBLE).is_file():
        raise HistoError(
            f"{folder}: is an ensemble of several adapters, expected one; give one of its members, e.g. "
            f"{folder / 'members' / '0'}"
        )
    if SIDECAR not in files:
        raise HistoError(f"{folder}: holds no {SIDECAR}; expected the adapter folder of a finished run")
    if CHECKSUMS in files:
        try:
            read_checksums(folder, hashed(files))
        except (OSError, ValueError) as error:
            raise HistoError(
                f"{folder}: {error}, expected the files of one run, unchanged; copy or download the folder again"
            ) from None
    return files


def hashed(files: Iterable[str]) -> list[str]:
    """The files whose checksums are recorded: all except the list itself, and the card, which people edit."""
    return [name for name in files if name not in (CARD, CHECKSUMS)]


def read_metrics(folder: Path) -> dict[str, Any]:
    """Content of metrics.json of an adapter folder. Raises `HistoError` if it can't be read."""
    try:
        content: dict[str, Any] = read_json(folder / METRICS)
    except (OSError, ValueError) as error:
        raise HistoError(f"{folder / 'metrics.json'}: can't be read ({error}); the adapter folder is damaged") from None
    return content
