"""`hf_histo COMMAND`: the recipes, for an installed package without a checkout.

    hf_histo fine-tune --config histo_ood --data DIR
    accelerate launch -m hf_histo fine-tune --data DIR
    torchrun --nproc_per_node 2 -m hf_histo fine-tune --data DIR

A command is the `main` of a recipe; `hf_histo predict SLIDE ...` is `predict-slides`, and `hf_histo completion SHELL`
prints a script for a shell, see `completion`.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from hf_histo import __version__
from hf_histo.config.packaged import ABOUT, COMMANDS, COMPLETION, PROGRAM, SHELLS, recipes
from hf_histo.errors import HistoError, did_you_mean
from hf_histo.launch import run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments` (default: those of the process) name, with its options."""
    name, *options = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name == "predict" and options and not options[0].startswith("-"):
        name = "predict-slides"
    if name in COMMANDS:
        sys.argv = [f"{PROGRAM} {name}", *options]
        recipe = runpy.run_path(str(recipes() / f"{COMMANDS[name][0]}.py"), run_name="recipe")
        run(recipe["main"])
    elif name == COMPLETION:
        run(lambda: _print_completion(options))
    elif name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    else:
        run(lambda: _refuse(name))


def usage() -> str:
    """The commands, a line each."""
    every = {name: about for name, (_, about) in COMMANDS.items()} | {COMPLETION: ABOUT}
    lines = [f"  {name:<21} {about}" for name, about in every.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [--OPTION VALUE ...]",
            "",
            "Fine-tuning recipes for medical image classification on the Hugging Face stack.",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help shows the options of a command. On several processes, or in mixed precision:",
            f"accelerate launch -m {PROGRAM} COMMAND ...",
        ]
    )


def _print_completion(arguments: Sequence[str]) -> None:
    from hf_histo import completion

    if len(arguments) != 1 or arguments[0] not in SHELLS:
        found = f"found {' '.join(arguments)!r}" if arguments else "found none"
        raise HistoError(f"{PROGRAM} {COMPLETION}: {found}, expected one of {', '.join(SHELLS)}")
    print(completion.script(arguments[0]))


def _refuse(name: str) -> None:
    raise HistoError(f"unknown command {name!r}; {did_you_mean(name, [*COMMANDS, COMPLETION], '--help lists them')}")
