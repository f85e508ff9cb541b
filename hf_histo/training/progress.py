"""Training on the console: one progress bar with the time left, and validation metrics as they come."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

CENTER_METRIC = re.compile(r"eval_center_(.*)/(\w+)")  # see `classification.for_trainer`
SHOWN = ("loss", "accuracy", "auroc")
LOG_SECONDS = 10  # between two updates of the bar in a log file


class Progress(ProgressCallback):
    """`transformers.ProgressCallback` with evaluation in the same bar, and its metrics in a line.

    The bar shows the last training loss and learning rate. It and the lines appear in the first process only.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step, self.evaluated = state.global_step, 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,  # a resumed run's
                desc="training",
                unit="step",
                dynamic_ncols=True,
                smoothing=0,  # mean speed, which includes evaluations
                mininterval=0.1 if sys.stderr.isatty() else LOG_SECONDS,
            )

    def close(self) -> None:
        """End the bar of a training that an error or a signal cut off; nothing after one that ended by itself."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None:  # an evaluation by itself
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)  # type: ignore[no-untyped-call]
        else:
            self.evaluated += 1
            bar, now = self.training_bar, time.time()
            bar.set_description(f"validating {self.evaluated}/{len(eval_dataloader)}", refresh=False)
            if now - bar.last_print_t >= bar.mininterval:
                bar.refresh()
                bar.last_print_t = now

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        self.evaluated = 0
        if self.training_bar is not None:
            self.training_bar.set_description("training")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            shown = {"loss": logs["loss"], "learning rate": logs.get("learning_rate", 0.0)}
            self.training_bar.set_postfix({key: f"{value:.3g}" for key, value in shown.items()}, refresh=False)
        elif "eval_loss" in logs:
            self.training_bar.write(line(logs, state, args.metric_for_best_model or "loss"))


def line(logs: Mapping[str, float], state: TrainerState, metric: str) -> str:
    """Metrics on val as text: `SHOWN`, the one that chooses the checkpoint, and the center that is worst by it."""
    wanted = dict.fromkeys([*SHOWN, metric.removeprefix("eval_")])
    values = [f"{name} {logs[f'eval_{name}']:.3f}" for name in wanted if f"eval_{name}" in logs]
    text = f"step {state.global_step} of {state.max_steps}, epoch {state.epoch or 0:.2f}: val {', '.join(values)}"
    centers = {
        match[1]: value
        for key, value in logs.items()
        if (match := CENTER_METRIC.fullmatch(key)) and match[2] == metric.removeprefix("eval_")
    }
    if centers:
        worst = min(centers, key=lambda center: centers[center])
        text += f"; lowest {metric} by center: {worst} {centers[worst]:.3f}"
    return text
