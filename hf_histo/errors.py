"""`HistoError`, the one error that this package raises for bad input, and helpers that write its message."""

from __future__ import annotations


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


def idle_option(name: str, value: object, reason: str) -> HistoError:
    """The `HistoError` for an option that was set to `value` but has no effect, and why: `reason`, a sentence."""
    return HistoError(f"--{name} is {value!r}, which can't act here: {reason}; leave it out")
