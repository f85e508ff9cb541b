"""Early end of training, at a checkpoint, on a signal (SIGTERM or Ctrl-C)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_histo.launch import Interrupted


class StopAtCheckpoint(TrainerCallback):
    """On SIGTERM or Ctrl-C, finish the step, save a checkpoint and raise `Interrupted`.

    All processes of a launch stop at the same step, even if only one got the signal. A second Ctrl-C stops at once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received: int | None = None
        self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the block, if in the main thread (Python allows handlers only there)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.accelerator.num_processes > 1:
            if self.received:
                self.accelerator.set_trigger()
            self.agreed = self.agreed or self.accelerator.check_trigger()
        else:
            self.agreed = self.received is not None
        # Not where the evaluation of an epoch follows, which is part of that checkpoint.
        if self.agreed and ((state.epoch or 0) % 1 or args.eval_strategy != "epoch"):
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agreed:
            self.accelerator.wait_for_everyone()
            raise Interrupted(self.received or signal.SIGTERM)
