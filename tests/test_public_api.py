"""The public API: the names of `hf_histo`, and that importing it is fast."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hf_histo
from hf_histo.api import fine_tune
from hf_histo.config import Config
from hf_histo.data.load import load
from hf_histo.inference import Classifier
from hf_histo.result import Result


def test_names_are_those_of_the_modules() -> None:
    assert hf_histo.Classifier is Classifier
    assert hf_histo.Config is Config
    assert hf_histo.fine_tune is fine_tune
    assert hf_histo.load_dataset is load
    assert hf_histo.Result is Result
    assert hf_histo.__all__ == ["Classifier", "Config", "Result", "fine_tune", "load_dataset"]
    assert set(hf_histo.__all__) < set(dir(hf_histo))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'classifier'"):
        hf_histo.classifier  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from hf_histo import nothing  # type: ignore[attr-defined]  # noqa: F401


def test_the_import_is_light() -> None:
    command = "import sys, hf_histo; sys.exit(bool({'torch', 'datasets', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
