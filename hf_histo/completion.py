"""A script by which a shell completes commands, options, their choices, packaged configs and paths.

    source <(hf_histo completion bash)      # in ~/.bashrc
    eval "$(hf_histo completion zsh)"       # in ~/.zshrc, after compinit
    hf_histo completion fish | source       # in ~/.config/fish/config.fish

shtab writes it from the parsers of the commands; a completion starts no Python.
"""

from __future__ import annotations

import argparse
import runpy

import shtab

from hf_histo.config.packaged import ABOUT, COMMANDS, COMPLETION, PROGRAM, SHELLS, config_names, recipes
from hf_histo.config.parser import PATH, parser_of, spellings

CONFIGS = ("config", "rows", "methods")  # options that take the name of a packaged config, or a path
FUNCTION = "_hf_histo_config_files"


def script(shell: str) -> str:
    """The script for one of `SHELLS`."""
    names = " ".join(sorted(config_names()))
    functions = {
        "bash": f'{FUNCTION}() {{\n  compgen -W "{names}" -- "$1"\n  compgen -f -- "$1"\n}}',
        "zsh": f"{FUNCTION}() {{\n  compadd -- {names}\n  _files\n}}",
    }
    configs = {"bash": FUNCTION, "zsh": FUNCTION, "fish": f"{names} {shtab.FILE['fish']}"}
    program = argparse.ArgumentParser(prog=PROGRAM, add_help=False)
    program.add_argument("-h", "--help", action="store_true", help="list the commands")
    program.add_argument("--version", action="store_true", help="show the version")
    commands = program.add_subparsers()
    for command, (recipe, about) in COMMANDS.items():
        parser = parser_of(runpy.run_path(str(recipes() / f"{recipe}.py"), run_name="recipe")["main"])
        for action in parser._actions:
            action.option_strings = spellings(action)
            if action.dest in CONFIGS:
                action.complete = configs  # type: ignore[attr-defined]
            elif action.metavar == PATH:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        commands.add_parser(command, help=about, parents=[parser], add_help=False)
    commands.add_parser(COMPLETION, help=ABOUT, add_help=False).add_argument("shell", choices=SHELLS)
    text: str = shtab.complete(program, shell, preamble=functions)  # type: ignore[arg-type]
    return text
