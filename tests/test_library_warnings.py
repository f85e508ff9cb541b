"""Warnings of libraries that a user can't act on: silent, and shown with `--verbose`."""

from __future__ import annotations

import importlib.util
import io
import logging
import re
import warnings
from pathlib import Path

import pytest
from miniature import config

from hf_histo import finetune, library_warnings, stages
from hf_histo.data import protocol
from hf_histo.evaluation.figures import run as run_figures

MODULE = "transformers.trainer_utils"
LOGGED = "mtime may not be reliable on this filesystem, falling back to numerical ordering"
WARNED = "`is_gradient_checkpointing` is deprecated and will be removed"


def emitted() -> tuple[list[str], list[str]]:
    """What is shown of two silenced warnings and two others, by `warnings` and by a logger."""
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger(MODULE)
    logger.addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            shown: list[str] = []
            patch.setattr(warnings, "showwarning", lambda message, *_, **__: shown.append(str(message)))
            for number, text in enumerate((WARNED, "another one")):
                warnings.warn_explicit(text, FutureWarning, "library.py", number, registry={})
            for text in (LOGGED, "something else"):
                logger.warning(text)
    finally:
        logger.removeHandler(handler)
    return shown, stream.getvalue().splitlines()


def test_silenced_by_text_and_shown_on_demand() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        library_warnings.silence()
        assert emitted() == (["another one"], ["something else"])
        with library_warnings.shown():
            assert emitted() == ([WARNED, "another one"], [LOGGED, "something else"])
        assert emitted() == (["another one"], ["something else"])


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_shows_them_in_a_run(
    source: tuple[Path, Path], tmp_path: Path, verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def train(*args: object) -> None:
        shown.append(emitted())
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(run_figures, "draw", lambda *args, **kwargs: {})
    options = config(tmp_path / "run", *source, f"--verbose={verbose}")
    with warnings.catch_warnings(record=True), pytest.raises(KeyboardInterrupt):
        warnings.simplefilter("default")
        library_warnings.silence()
        finetune.run_config(options, protocol.prepare(options))
    assert (WARNED in shown[0][0], LOGGED in shown[0][1]) == (verbose, verbose)


def test_the_texts_are_those_of_the_installed_libraries() -> None:
    """A text that a newer version has changed would be shown again."""
    for name, texts in library_warnings.LOGGED.items():
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        source = re.sub(r'"\s*\n\s*f?"', "", Path(spec.origin).read_text(encoding="utf-8"))
        for text in texts:
            assert re.search(re.escape(text), source), text
