"""Helpers for tests of HDF5 readers: edit single datasets, check refusals."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from hf_histo.data.load import load
from hf_histo.errors import HistoError


def refused(directory: Path, message: str) -> None:
    """Check that the folder is refused in one line that matches `message`, and nothing is left in the cache."""
    with pytest.raises(HistoError, match=message) as caught:
        load(directory, cache_dir=directory / "cache")
    assert "\n" not in str(caught.value)
    assert not list((directory / "cache").rglob("*.arrow"))


def edit(directory: Path, split: str, key: str, value: object, **options: object) -> None:
    """Replace the dataset `key`, or remove it where `value` is None."""
    with h5py.File(directory / f"{split}.h5", "r+") as file:
        if key in file:
            del file[key]
        if value is not None:
            file.create_dataset(key, data=value, **options)


def image(dtype: str = "uint8") -> np.ndarray:
    return np.full((3, 12, 14), 200).astype(dtype)


def pcam_file(directory: Path, part: str) -> Path:
    return directory / f"camelyonpatch_level_2_split_valid_{part}"
