"""The one error that a user is meant to read."""

from __future__ import annotations


class HistoError(Exception):
    """Bad input or an impossible request.

    The message is one line that names the argument or file, the value found, what was expected, and the remedy. What a
    terminal would obey in it is escaped, since files bring their own names.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` in one line, with what isn't printable (escape sequences, say) as `repr` writes it."""
    line = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
