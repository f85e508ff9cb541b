"""Experiment trackers (`--report_to`): those of transformers, the run's own options as their config, and images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from hf_histo.config import HUB, Config
from hf_histo.errors import HistoError
from hf_histo.training.run_folder import TENSORBOARD, folder_of

# Names for `pip install` where they differ from those of `--report_to`: docstrings of `transformers.integrations`.
PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow", "flyte": "flytekit"}


@dataclass
class Arguments(TrainingArguments):
    """`TrainingArguments` that trackers know by the run's own options: theirs hold paths, and defaults it has not."""

    described: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.described)


class Tracker(TrainerCallback):
    """Before a tracker of transformers: it gets no model, whose config holds paths; its failures are `HistoError`s."""

    name: str  # in `--report_to`
    is_open = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.is_open = True
        self.guarded(super().on_train_begin, args, state, control, model=None, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.guarded(super().on_log, args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.guarded(super().on_train_end, args, state, control, **kwargs)
        if self.name == "wandb" and state.is_world_process_zero:
            import wandb

            wandb.finish()  # transformers leaves it open, and the next run of this process would continue it
        self.is_open = False

    def close(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """End the tracker's run if training failed or was interrupted: the next one would continue it."""
        if not self.is_open:
            return
        with suppress(Exception):  # perhaps it is the tracker that failed
            if self.name == "mlflow" and state.is_world_process_zero:
                import mlflow

                mlflow.end_run("FAILED")
            self.on_train_end(args, state, control)
        self.is_open = False

    def guarded(self, event: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `event`; raises `HistoError` for any exception: no credentials, a server that does not answer, ..."""
        try:
            event(*args, **kwargs)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            remedy = "see its documentation, or leave it out; the same command resumes"
            raise HistoError(f"--report_to {self.name}: failed ({reason}); {remedy}") from error


def create(config: Config) -> list[Tracker]:
    """The trackers that `--report_to` names: none for "none", the installed ones for "all".

    TensorBoard writes into the run's folder, unless TENSORBOARD_LOGGING_DIR is set. Raises `HistoError` for a tracker
    that transformers does not know, or that is not installed.
    """
    names = list(dict.fromkeys(config.output.report_to.replace(",", " ").split()))
    if names == ["all"]:
        names = get_available_reporting_integrations()
    trackers = [] if names == ["none"] else [_create(name) for name in names]
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
            tracker.logging_dir = str(folder_of(config) / TENSORBOARD)
    return trackers


def _create(name: str) -> Tracker:
    try:
        (kind,) = get_reporting_integration_callbacks([name])
    except ValueError as error:
        raise HistoError(f"--report_to is {name!r}: {error} Choose among these, or leave it out") from None
    try:
        tracker: Tracker = type(kind.__name__, (Tracker, kind), {"name": name})()
    except Exception as error:  # of several types, by the tracker
        reason = " ".join(str(error).split())
        install = f"pip install {PACKAGES.get(name, name)}, or " if "install" in reason else ""
        raise HistoError(f"--report_to {name}: can't be used ({reason}); {install}leave it out") from None
    return tracker


def run_name(config: Config) -> str:
    """`--run_name`, or by the run's folder: two levels of `--output_dir`, of which experiments use both."""
    folder = folder_of(config)
    levels = folder.parts[-2:] if config.output.output_dir else folder.parts[-1:]
    return config.output.run_name or "-".join(level for level in levels if level != folder.anchor)


def described(config: Config) -> dict[str, Any]:
    """The options that trackers get as the run's config: those with an effect on its result, without local paths."""
    return {"data": _name(config.data.data), "backbone": _name(config.model.backbone), **config.recorded()}


def _name(source: str) -> str:
    """A local folder or file by its name, anything else as it is."""
    path = Path(source.removeprefix(HUB)).expanduser()
    return path.resolve().name if path.exists() else source


class ShowImage(TrainerCallback):
    """Log an image file when training begins, to those of `callbacks` that are trackers and take images.

    These are trackio, tensorboard, wandb and mlflow. It must be added after them.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback], name: str, file: Path) -> None:
        self.trackers = [each for each in callbacks if isinstance(each, Tracker) and each.name in TAKES_IMAGES]
        self.name, self.file = name, file

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            for tracker in self.trackers:
                tracker.guarded(TAKES_IMAGES[tracker.name], tracker, self.name, self.file)


def _to_tensorboard(tracker: Any, name: str, file: Path) -> None:
    with PIL.Image.open(file) as image:
        tracker.tb_writer.add_image(name, np.asarray(image.convert("RGB")), 0, dataformats="HWC")


def _to_wandb(tracker: Any, name: str, file: Path) -> None:
    import wandb

    wandb.log({name: wandb.Image(str(file))})


def _to_trackio(tracker: Any, name: str, file: Path) -> None:
    import trackio

    trackio.log({name: trackio.Image(file)})


def _to_mlflow(tracker: Any, name: str, file: Path) -> None:
    import mlflow

    mlflow.log_artifact(str(file))


TAKES_IMAGES: Mapping[str, Callable[[Any, str, Path], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "mlflow": _to_mlflow,
}
