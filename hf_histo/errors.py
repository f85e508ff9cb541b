"""The one error that a user is meant to read, and how a recipe shows it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import psutil
from tqdm import tqdm


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


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end: `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(main: Callable[[], None]) -> None:
    """Run a recipe's `main`; end in one clear line on standard error and a non-zero exit where it fails.

    `HistoError` and `OSError` (a full disk, a read-only folder) exit with 1; SIGTERM and Ctrl-C with 128 and their
    number (143, 130), and a line with the command that resumes. A traceback is shown only where the environment
    variable `HF_HISTO_TRACEBACK` is 1, and for any other exception, which is a bug.
    """
    if os.environ.get("HF_HISTO_TRACEBACK") == "1":
        return main()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except (HistoError, OSError) as error:
        # A bare print would go on the line of a progress bar that the error cut off.
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":
            end = f"interrupted by {signal.Signals(number).name}"
            tqdm.write(f"{end}: this command resumes from the last checkpoint: {command()}", file=sys.stderr)
        raise SystemExit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def command() -> str:
    """The line that resumes this program: the one that started it, with its launcher (accelerate, torchrun, nice, ...).

    Without `--overwrite_output_dir`, by which it would start anew.
    """
    started = [process.cmdline() for process in (psutil.Process(), *psutil.Process().parents())]
    line = ([sys.argv] + [line for line in started if sys.argv[0] in line])[-1]
    kept = re.sub(r"\0--overwrite[_-]output[_-]dir(=[^\0]*|\0[^-\0][^\0]*)?(?=\0|$)", "", "\0".join(line))
    return shlex.join(kept.split("\0"))


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)
