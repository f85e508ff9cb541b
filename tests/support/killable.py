"""Run recipes in separate processes that end, as by SIGKILL, at a chosen event.

Events are: a file or folder below the root is opened, created, renamed or removed; a backward pass; a file is written
by torch, of which half is left.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe_mains import RECIPES

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
# A server that imports everything once, and forks.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["killable", "hf_histo.stages", "hf_histo.data.splits.folds", "hf_histo.evaluation.figures.pareto"]
)


def run(
    recipe: str, arguments: Sequence[str], root: Path, *, kill: int | None = None, hub: str | None = None
) -> tuple[int, str, list[tuple[str, str]]]:
    """Return the exit code (-9: killed), the output, and the events (kind, path), the last of which was fatal.

    Args:
        recipe: file name.
        arguments: of the command line.
        root: folder whose files count.
        kill: number of the event to die at, from 0; None lets the recipe finish.
        hub: address of the Hub that the recipe is to push to.
    """
    log = root / f"{recipe}.{kill}.log"
    process = _server.Process(target=_child, args=(recipe, list(arguments), str(root), str(log), kill, hub))
    process.start()
    process.join(600)
    assert process.exitcode is not None, "the recipe hangs"
    events = [tuple(json.loads(line)) for line in Path(f"{log}.events").read_text().splitlines()]
    return process.exitcode, log.read_text(errors="replace"), events


def _child(recipe: str, arguments: list[str], root: str, log: str, kill: int | None, hub: str | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    record = os.open(f"{log}.events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def happens(kind: str, path: str) -> bool:
        """Record an event; return whether it is the one to die at."""
        nonlocal count
        os.write(record, json.dumps((kind, path)).encode() + b"\n")
        count += 1
        return kill is not None and count == kill + 1

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and isinstance(arguments[0], str | os.PathLike):
            path = str(arguments[0])
            if path.startswith(root) and not path.startswith(log) and happens(event, path):
                die()

    import huggingface_hub
    import torch

    backward, save = torch.Tensor.backward, torch.save

    def watched_backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if happens("backward", ""):
            die()
        backward(tensor, *args, **kwargs)

    def watched_save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(content, path, *args, **kwargs)
        if happens("torch.save", str(path)):
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    torch.Tensor.backward, torch.save = watched_backward, watched_save  # type: ignore[method-assign, assignment]
    torch.set_num_threads(1)
    if hub:
        constants = huggingface_hub.constants
        constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = hub, False, True
        constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{hub}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        from hub_server import TOKEN

        os.environ["HF_TOKEN"] = TOKEN
    sys.argv = [str(RECIPES / recipe), *arguments]
    sys.addaudithook(audit)
    runpy.run_path(sys.argv[0], run_name="__main__")
