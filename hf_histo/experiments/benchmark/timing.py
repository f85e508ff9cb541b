"""Time the sides of a comparison in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

Timings = dict[str, list[float] | str]  # seconds of each side, one value per repetition, or why there are none

OURS, TUNED, STOCK, STOCK_FLOAT32 = "this package", "tuned peer", "stock", "stock, float32"


class Unavailable(Exception):
    """A side can't be measured here; the message says why."""


def in_turn(sides: Mapping[str, Callable[[], float]], repetitions: int, title: str) -> Timings:
    """Seconds of each side: all sides once, then all of them again, so that a busy moment hits no side alone.

    Each repetition begins with the next side: the first one pays for what a process does once.
    """
    found: Timings = {name: [] for name in sides}
    names = list(sides)
    for repetition in tqdm(range(repetitions), desc=title):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            seconds, measure = found[name], sides[name]
            if isinstance(seconds, str):
                continue
            AcceleratorState._reset_state()  # or the first side's precision would be everybody's
            try:
                seconds.append(measure())
            except Unavailable as reason:
                found[name] = str(reason)
    return found


class Clock(TrainerCallback):
    """When each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.times.append(time.perf_counter())


def synchronize() -> None:
    """Wait for what the GPU was given to do, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_step(session: transformers.Trainer, steps: int) -> float:
    """Seconds of the median of `steps` training steps after a first one, each with the reading of its batch."""
    clock = Clock()
    session.add_callback(clock)
    quiet(session)
    session.args.max_steps = steps + 1
    for strategy in ("eval_strategy", "save_strategy", "logging_strategy"):
        setattr(session.args, strategy, "no")
    session.args.load_best_model_at_end = False
    session.train()
    return statistics.median(np.diff(clock.times))


def quiet(session: transformers.Trainer) -> None:
    """Without a bar, and without a line for each logged loss."""
    for callback in (ProgressCallback, PrinterCallback):
        session.remove_callback(callback)
