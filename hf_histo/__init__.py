"""Fine-tuning recipes for medical image classification on the Hugging Face stack.

The public API, imported when it is first used, so that `import hf_histo` stays light:

- `fine_tune`: one run, from data and keyword options to a `Result`.
- `Result`: the metrics, predictions, classifier and folder of a run.
- `Classifier`: predictions for new images, from an adapter folder or its name on the Hub.
- `load_dataset`: a folder, file or table in any supported layout as a `datasets.DatasetDict` of one schema.
- `Config`: the options of a run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_histo.api import fine_tune
    from hf_histo.config import Config
    from hf_histo.data.load import load as load_dataset
    from hf_histo.inference import Classifier
    from hf_histo.result import Result

__version__ = "0.1.0"
__all__ = ["Classifier", "Config", "Result", "fine_tune", "load_dataset"]

_HOMES = {
    "Classifier": ("hf_histo.inference", "Classifier"),
    "Config": ("hf_histo.config", "Config"),
    "Result": ("hf_histo.result", "Result"),
    "fine_tune": ("hf_histo.api", "fine_tune"),
    "load_dataset": ("hf_histo.data.load", "load"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
