"""What the recipes are run on."""

from __future__ import annotations

from pathlib import Path

import pytest
from miniature import write_backbone


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "model")
