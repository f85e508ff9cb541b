"""Run the training recipe and write the ids of this process's training images to FOLDER/RANK.

Arguments: FOLDER RECIPE_ARGUMENTS...
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import soak

from hf_histo.training.trainer import Trainer

compute_loss = Trainer.compute_loss


def noted(session: Trainer, model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
    if model.training:
        with log.open("a", encoding="utf-8") as file:
            ids = session.train_dataset.ids(inputs["index"].tolist())  # type: ignore[union-attr]
            file.writelines(f"{int(session.state.epoch or 0)} {name}\n" for name in ids)
    return compute_loss(session, model, inputs, *more, **options)


if __name__ == "__main__":
    log = Path(sys.argv.pop(1)) / os.environ["RANK"]
    Trainer.compute_loss = noted  # type: ignore[method-assign]
    runpy.run_path(str(soak.RECIPE), run_name="__main__")
