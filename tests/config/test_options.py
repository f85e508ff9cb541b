"""The output folder of an experiment must be new or a regular folder, like any other output."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_histo.config import parse
from hf_histo.errors import HistoError


@pytest.mark.parametrize("kind", ["link", "pipe", "file"])
def test_the_folder_of_several_runs_is_a_regular_one(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "output"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(output)
    else:
        output.write_text("")
    with pytest.raises(HistoError, match=f"output {output}: is "):
        parse(None, ["--output_dir", str(output)]).parent_folder()


def test_the_folder_of_several_runs_is_given(tmp_path: Path) -> None:
    assert parse(None, ["--output_dir", str(tmp_path)]).parent_folder() == tmp_path
    with pytest.raises(HistoError, match="--output_dir is not given"):
        parse(None, []).parent_folder()
