"""A fine-tuning run: one that is finished is recognized at once, any other goes through the stages of `stages`.

What takes seconds to import, torch among it, is imported only where something is trained.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import datasets

from hf_histo import launch, library_warnings
from hf_histo.adapter import files as adapter_files
from hf_histo.adapter.files import ADAPTER, MODEL
from hf_histo.config import FOR_CENTERS, OPTIONS, Config, require_effective
from hf_histo.data.load import fingerprint
from hf_histo.data.protocol import complete, refuse
from hf_histo.data.splits import few_shot
from hf_histo.files import CHECKSUMS
from hf_histo.result import Result
from hf_histo.training import run_folder
from hf_histo.training.run_folder import Run

if TYPE_CHECKING:
    from transformers import TrainerCallback


def run_config(config: Config, data: datasets.DatasetDict, *, callbacks: Sequence[TrainerCallback] = ()) -> Result:
    """Train on `train`, choose the checkpoint on `val`, predict all splits but `train`, and save the adapter folder.

    `--shots`, `--percentage` and `--level` select from `data` (see `few_shot.select`). With `--push_to_hub`, the folder
    is uploaded. Each process of a launch must call this function. An interrupted run resumes from its last checkpoint;
    a finished one is not trained again.

    Args:
        config: all options.
        data: splits with the columns of `hf_histo.data.schema.features`; `protocol.complete` makes missing ones.
        callbacks: additional callbacks of training; an exception raised by one of them ends the run.

    Returns:
        The adapter folder, its metrics, and the duration.

    Raises `HistoError` before training for data or options that can't be trained on, and a Hub repository that can't be
    written to; and after training if the upload fails.
    """
    with library_warnings.shown() if config.output.verbose else nullcontext():
        return _fine_tune_and_push(config, data, callbacks)


def _fine_tune_and_push(config: Config, data: datasets.DatasetDict, callbacks: Sequence[TrainerCallback]) -> Result:
    started = time.monotonic()
    protocol = config.protocol
    data = few_shot.select(
        complete(data),
        seed=config.training.seed,
        shots=protocol.shots,
        percentage=protocol.percentage,
        level=protocol.level,
    )
    config = settled(config, data)
    output = config.output
    pushes = output.push_to_hub and launch.is_main_process()
    if pushes:
        from hf_histo import hub

        hub.check_access(str(output.hub_model_id), pull_request=output.hub_create_pr)
    run = Run.of(config, fingerprint(data))
    run_folder.require_agreement(run)
    run_folder.check(run)
    with run_folder.alone_in(run.folder), run_folder.system_failures(run.folder):
        result = _finished(run) or _fine_tune(config, data, run, started, callbacks)
    if not pushes:
        return result
    address = hub.push(
        result.adapter,
        str(output.hub_model_id),
        private=output.hub_private,
        revision=output.hub_revision,
        pull_request=output.hub_create_pr,
        base_model=output.hub_base_model,
    )
    return dataclasses.replace(result, address=address)


def settled(config: Config, data: datasets.DatasetDict) -> Config:
    """The same options, of which those in `Config.unchosen` take their defaults if `train` is not of several centers.

    Raises `HistoError` for others that cannot act then.
    """
    if "train" not in data or (not config.data.streaming and len(data["train"].unique("center")) > 1):
        return config
    reason = "the training images are not of several centers"
    idle = {"stain_mixing", "virtual_stain", "balance_centers", "domain_loss"} - config.unchosen
    refuse(config, dict.fromkeys(sorted(idle), reason))
    if not config.unchosen:
        return config
    defaults = {name: OPTIONS[name].default for name in FOR_CENTERS if name in config.unchosen}
    chosen = config.flat() | defaults
    require_effective(chosen)
    launch.show(f"{reason}: {', '.join(f'--{name} {value}' for name, value in defaults.items())}, not as for several")
    return Config.of(chosen)


def _finished(run: Run) -> Result | None:
    """Result of a run that is finished, after checking its adapter folder; None if there is something to do."""
    if not run_folder.is_finished(run.folder) or run.overwrites:
        return None
    adapter = run.folder / run_folder.ADAPTER
    files = adapter_files.check(adapter)
    if CHECKSUMS not in files or not any(files.keys() >= {*names} for names in (ADAPTER, MODEL)):
        from hf_histo.adapter.folder import verify

        verify(adapter)  # from an older version, or incomplete, which it refuses with the reason
    return Result(run.folder, adapter_files.read_metrics(adapter), None)


def _fine_tune(
    config: Config, data: datasets.DatasetDict, run: Run, started: float, callbacks: Sequence[TrainerCallback]
) -> Result:
    with launch.importing():
        from transformers import set_seed

        from hf_histo import stages

    with launch.own_precision():
        set_seed(config.training.seed)
        task = stages.check(config, data)
        setup = stages.build(config, data, task)
        trained = stages.train(config, data, task, setup, run, callbacks)
        evaluation = stages.evaluate(config, data, task, setup, trained)
        if trained.session.is_world_process_zero():
            stages.write(config, data, trained, evaluation, run.folder, started)
        launch.process().wait_for_everyone()
    return Result(run.folder, evaluation.metrics, time.monotonic() - started)
