"""`HistoError`, the one error that this package raises for bad input, and helpers that write its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HistoError(Exception):
    """Bad input or an impossible request.

    The message is one line that names the argument or file, the value found, what was expected, and the remedy. Control
    characters in it are escaped, since it may quote names from files.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` in one line, with characters that aren't printable (e.g. escape sequences) written as `repr` does."""
    line = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown `name`: the nearest one of `known`, or `otherwise` where none is near."""
    near = difflib.get_close_matches(name, [*known], n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def idle_option(name: str, value: object, reason: str) -> HistoError:
    """The `HistoError` for an option that was set to `value` but has no effect, and why: `reason`, a sentence."""
    return HistoError(f"--{name} is {value!r}, which can't act here: {reason}; leave it out")
