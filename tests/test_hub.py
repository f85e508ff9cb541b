"""Adapter folders from the Hub and to it, without a network."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from adapter_folders import refusal
from miniature import write_adapter

from hf_histo import hub
from hf_histo.errors import HistoError

ROOT = Path(hub.__file__).parents[1]


def test_nothing_is_unpickled_and_no_remote_code_trusted() -> None:
    files = [path for name in ("hf_histo", "recipes") for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 50
    never = {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "eval", "exec"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in never, (path, node.lineno)
                trusted = [k.value for k in node.keywords if k.arg == "trust_remote_code"]
                assert not any(ast.unparse(value) != "False" for value in trusted), (path, node.lineno)


def test_a_folder_of_no_run_and_a_name_without_a_network(tmp_path: Path) -> None:
    assert "hf_histo.json" in refusal(tmp_path)
    assert "give a folder that exists, or owner/name" in refusal(tmp_path / "missing" / "adapter")
    for name in ("nobody/nothing", "./missing/folder", ""):
        with pytest.raises(HistoError, match=r"no such folder|holds no hf_histo\.json"):
            hub.load(name)


def test_a_refused_upload_is_one_line(source: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", source[0])
    with pytest.raises(HistoError) as caught:
        hub.push(adapter, "nobody/nothing")
    assert str(caught.value).startswith("--hub_model_id nobody/nothing: ")
    assert "\n" not in str(caught.value)
