"""Callback that makes each checkpoint of a run one that `run_folder.checkpoint` resumes from."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_histo import launch
from hf_histo.files import write_checksums
from hf_histo.training.run_folder import Run, require_begun


class CheckpointRecord(TrainerCallback):
    """Adds checksums and the run's identity to each checkpoint (`files.write_checksums`), as its last file."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        require_begun(self.run.folder)
        process = launch.process()
        process.wait_for_everyone()  # each process writes its random state
        if process.is_main_process:
            write_checksums(self.run.folder / f"checkpoint-{state.global_step}", run=self.run.identity)
        process.wait_for_everyone()
