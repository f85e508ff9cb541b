"""Warnings of libraries that a user can't act on, by their text: silenced, unless `--verbose` shows all warnings.

Warnings that a user can act on, and all of this package's own, are always shown.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Starts of messages by category, for `warnings`.
WARNED: dict[type[Warning], tuple[str, ...]] = {
    FutureWarning: (
        "`is_gradient_checkpointing` is deprecated",  # transformers calls it itself, whenever a model is wrapped
        "`torch.jit.",  # deprecated, but what WSInfer reads
    ),
    Warning: (
        "Converting a tensor to a Python",  # torch's tracer; the export compares the logits
    ),
    UserWarning: (
        "LoRA adapter added to ConvNd layer with groups",  # peft; merging such layers is refused with the reason
        "Failed to load the CUDA extension",  # peft's BOFT, which computes the same without it
        "Setting boft_n_butterfly_factor to 1 to speed up",
        "Unsupported layer type",  # peft, of any norm with --adapter ln_tuning
        "Attempting to set identical low and high [xy]lims",  # matplotlib; a curve of one point
    ),
}
# Starts of messages by the name of the logger.
LOGGED: dict[str, tuple[str, ...]] = {
    "transformers.configuration_utils": ("You passed `num_labels=",),  # the new head has other classes
    "transformers.trainer_utils": ("mtime may not be reliable",),  # checkpoints are sorted by their steps
    "transformers.training_args": ("The speedups for torchdynamo mostly come with GPU",),  # --torch_compile
}

_shows_all = False


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return _shows_all or not record.getMessage().startswith(LOGGED[record.name])


_FILTER = _Filter()


def silence() -> None:
    """Silence these warnings in this process."""
    for category, texts in WARNED.items():
        for text in texts:
            warnings.filterwarnings("ignore", message=text, category=category)
    for name in LOGGED:
        logging.getLogger(name).addFilter(_FILTER)  # once, however often it is added


@contextmanager
def shown() -> Iterator[None]:
    """Within the block, show every warning once per place, also those that Python hides by default."""
    global _shows_all
    before, _shows_all = _shows_all, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    finally:
        _shows_all = before
