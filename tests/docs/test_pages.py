"""README.md and the documentation: every code block runs, as `pages` describes, and the pages hold together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, Workplace, blocks

NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
BLOCKS = {name: blocks(text, name) for name, text in TEXTS.items()}


def with_blocks(*how: str) -> list[str]:
    return [name for name, found in BLOCKS.items() if any(block.how in how for block in found)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture
def workplace(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    return Workplace(tmp_path / "work", sources, monkeypatch)


@pytest.mark.parametrize("name", with_blocks("run", "options"))
def test_the_blocks_of_a_page(name: str, workplace: Workplace) -> None:
    for block in BLOCKS[name]:
        if block.how in ("run", "options"):
            workplace.run(block, only_options=block.how == "options")


@pytest.mark.slow
@pytest.mark.parametrize("name", with_blocks("slow"))
def test_the_slow_blocks_of_a_page(name: str, workplace: Workplace) -> None:
    for block in BLOCKS[name]:
        if block.how == "slow":
            workplace.run(block)
