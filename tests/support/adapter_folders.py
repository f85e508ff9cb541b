"""Helpers for tests of adapter folders: recorded logits, and the error for a refused folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hf_histo import hub
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions

QUICK = ["--target_modules=last-conv"]


def logits(folder: Path, split: str) -> np.ndarray:
    return Predictions.read(folder / "predictions" / f"{split}.parquet").logits


def refusal(folder: Path, **options: str) -> str:
    with pytest.raises(HistoError) as caught:
        hub.load(folder, **options)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message
