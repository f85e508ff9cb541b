"""`fine_tune` of the public API: a run by keyword options, on data by its path or in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_histo.config import Config, parse_options
from hf_histo.data.load import READING, Source, fingerprint, load
from hf_histo.data.protocol import prepare
from hf_histo.finetune import run_config
from hf_histo.result import Result

if TYPE_CHECKING:
    from transformers import TrainerCallback

MEMORY = "memory"  # name of data that is not a path, before the start of its fingerprint


def fine_tune(
    data: Source | None = None,
    labels: Sequence[Any] | None = None,
    *,
    config: str | Path | Config | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> Result:
    """Fine-tune a backbone on a data set; returns its metrics, its classifier and its folder.

    Examples:
        >>> result = fine_tune("DIR", backbone="facebook/dinov2-small", method="lora", lora_rank=8)
        >>> result.metrics, result.classifier(["a.png"])
        >>> fine_tune(table, config="histo_ood", label_column="diagnosis", test_centers="Leipzig")

    The options are those of `hf_histo fine-tune --help_all`, by the same names, with the same checks and, without
    `config`, the same defaults; an error names an option as the command line does. Without `output_dir`, the folder is
    the command line's as well, runs/DATA-BACKBONE-METHOD-seedN below the current folder; for data in memory, DATA is
    "memory-" and the first 8 digits of its fingerprint. A call with the same options and data returns the finished run,
    or resumes an interrupted one; with others, it is refused, unless `output_dir` is another folder, or with
    `overwrite_output_dir=True`.

    Args:
        data: what `load_dataset` takes: a path, a name on the Hub, a `DataFrame`, a `Dataset`, paths of images, or the
            `DatasetDict` that `load_dataset` returned, perhaps with fewer rows; splits that are missing are made.
            Default: the one of `config`, else the built-in data.
        labels: a label for each path, if `data` is a list of paths.
        config: a YAML file, the name of a packaged config, or a `Config`; `options` win over it.
        callbacks: additional callbacks of training.
        **options: fields of the groups of `Config`. None is the default.

    Raises `HistoError` for an unknown option (with the nearest known one), an invalid value, an option that cannot act,
    data that can't be read or trained on, and as `finetune.run_config` does.
    """
    if isinstance(data, str | Path) and labels is None:
        options["data"], data = data, None
    chosen = parse_options(options, config)
    if data is None and labels is None:
        return run_config(chosen, prepare(chosen), callbacks=callbacks)
    reading = {name: getattr(chosen.data, name) for name in READING}
    files = load([] if data is None else data, labels, cache_dir=chosen.data.cache_dir, **reading)
    named = dataclasses.replace(chosen.data, data=f"{MEMORY}-{fingerprint(files)[:8]}")
    chosen = dataclasses.replace(chosen, data=named)
    return run_config(chosen, prepare(chosen, files), callbacks=callbacks)
