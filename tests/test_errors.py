"""The one error of the package, and the words of its messages."""

from __future__ import annotations

from pathlib import Path

import pytest

import hf_histo
from hf_histo.errors import HistoError, did_you_mean


def test_a_message_is_one_printable_line() -> None:
    assert str(HistoError("a\nb \x1b[31mred")) == "a b \\x1b[31mred"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("lora_rnk", "did you mean 'lora_rank'?"),
        ("lora_alph", "did you mean 'lora_alpha'?"),
        ("zzz", "see the list"),
    ],
)
def test_the_nearest_name_is_the_remedy_where_one_is_near(name: str, remedy: str) -> None:
    assert did_you_mean(name, iter(["lora_rank", "lora_alpha"]), "see the list") == remedy


def test_one_function_finds_near_names() -> None:
    package = Path(hf_histo.__file__).parent
    users = {path.name for path in package.rglob("*.py") if "import difflib" in path.read_text(encoding="utf-8")}
    assert users == {"errors.py", "backbones.py"}  # the latter lists several near names of timm
