"""The one error that a user is meant to read, and how a recipe shows it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from tqdm import tqdm


class HistoError(Exception):
    """Bad input or an impossible request.

    The message is one line that names the argument or file, the value found, what was expected, and the remedy.
    """


def run(main: Callable[[], None]) -> None:
    """Run a recipe's `main`; end in one clear line on standard error and a non-zero exit where it fails.

    `HistoError` and `OSError` (a full disk, a read-only folder) exit with 1, an interrupt with 130. A traceback is
    shown only where the environment variable `HF_HISTO_TRACEBACK` is 1, and for any other exception, which is a bug.
    """
    if os.environ.get("HF_HISTO_TRACEBACK") == "1":
        return main()
    try:
        main()
    except (HistoError, OSError) as error:
        # A bare print would go on the line of a progress bar that the error cut off.
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        tqdm.write("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
