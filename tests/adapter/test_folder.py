"""The adapter folder: its files, their verification, and that it gives the same logits in another process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from adapter_folders import QUICK, logits, refusal
from miniature import config, write_backbone
from safetensors.torch import load_file, save_file

from hf_histo import hub
from hf_histo.adapter import folder as adapter_folder
from hf_histo.adapter import model_card
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.finetune import run_config
from hf_histo.models import adapters
from hf_histo.result import Result
from hf_histo.training import trainer

DESIGNED = {
    "adapter_config.json",
    "preprocessor_config.json",
    "adapter_model.safetensors",
    "hf_histo.json",
    "checksums.json",
    "README.md",
    "metrics.json",
    "report.html",
    "predictions/val.parquet",
    "predictions/test.parquet",
}


def test_the_folder_holds_what_is_designed(results: dict[str, Result]) -> None:
    for result in results.values():
        files = {str(path.relative_to(result.adapter)) for path in result.adapter.rglob("*") if path.is_file()}
        assert {name for name in files if not name.startswith("figures/")} == DESIGNED
        assert any(name.startswith("figures/") for name in files)
        assert all(name.endswith(".png") for name in files if name.startswith("figures/"))
        assert json.loads((result.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert not [path for path in result.adapter.parent.iterdir() if path.name.endswith(".incomplete")]


@pytest.mark.slow  # as tests/test_push.py does with a folder that it pulls
def test_a_new_process_gives_the_same_logits(
    results: dict[str, Result], source: tuple[Path, Path], tmp_path: Path
) -> None:
    code = (
        "import sys; from hf_histo.data.load import load; from hf_histo.inference import Classifier\n"
        "data, folder, *adapters = sys.argv[1:]\n"
        "for i, adapter in enumerate(adapters):\n"
        "    Classifier.from_pretrained(adapter).predict(load(data)['val']).to_parquet(f'{folder}/{i}.parquet')"
    )
    adapters = [str(result.adapter) for result in results.values()]
    subprocess.run([sys.executable, "-c", code, str(source[1]), str(tmp_path), *adapters], check=True)
    for i, result in enumerate(results.values()):
        saved = logits(result.adapter, "val")
        assert np.ptp(saved) > 1e-3
        found = pd.read_parquet(tmp_path / f"{i}.parquet")["logit"]
        np.testing.assert_allclose(found, saved, rtol=0, atol=1e-5)


def test_a_finished_run_is_not_trained_again(
    results: dict[str, Result], source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "build", lambda *args, **kwargs: pytest.fail("trained again"))
    folder = results["frozen"].adapter.parent
    again = run_config(config(folder, *source, *QUICK, "--batch_norm=frozen"), load(source[1]))
    assert again.seconds is None
    assert again.record == results["frozen"].record
    assert "nothing was trained" in again.summary()


@pytest.mark.figures
def test_the_same_command_gives_the_same_bytes(
    results: dict[str, Result], source: tuple[Path, Path], tmp_path: Path
) -> None:
    again = run_config(config(tmp_path / "again", *source, *QUICK), load(source[1]))
    for path in results["frozen"].adapter.rglob("*.*"):
        name = path.relative_to(results["frozen"].adapter)
        if name.name != "README.md":  # it states the seconds
            assert (again.adapter / name).read_bytes() == path.read_bytes(), name


@pytest.mark.parametrize(
    "change",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}},
        {"layer_replication": [[0, 10**6]]},
        {"rank_pattern": {".*": 10**9}},
        {"peft_type": "XLORA"},
        {"bias": "all"},
        {"r": 10**9},
        {"r": "8"},
        {"lora_alpha": "much"},
    ],
)
def test_an_adapter_config_that_asks_for_more_than_lora(adapter: Path, change: dict[str, Any]) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change), encoding="utf-8")
    assert "can't be put on" in refusal(adapter)


def test_no_regex_of_an_adapter_is_run(adapter: Path, results: dict[str, Result]) -> None:
    file = adapter / "adapter_config.json"
    endless = {"target_modules": "(.*)*(.*)*(.*)*(.*)*(.*)*!", "modules_to_save": ["timm_model"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | endless), encoding="utf-8")
    folders = adapter, results["frozen"].adapter
    changed, original = (adapters.weights(hub.load(folder)[0], batch_norm="frozen") for folder in folders)
    assert changed.keys() == original.keys()
    assert all(torch.equal(changed[key], original[key]) for key in original)


@pytest.mark.parametrize("name", ["base_model.model.(.*)*(.*)*(.*)*(.*)*(.*)*!.weight", "(", "a" * 1000])
def test_no_name_of_a_weight_is_run_as_a_regex(adapter: Path, name: str) -> None:
    """transformers compiles them as regexes."""
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights | {name: torch.ones(2)}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "a weight is called" in refusal(adapter)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def test_a_pickle_is_never_opened(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    for name in ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pt", "training_args.bin"):
        torch.save(Bomb(tmp_path / "witness"), adapter / name)
    assert "adapter_model.safetensors" in refusal(adapter)
    torch.save(Bomb(tmp_path / "witness"), adapter / "adapter_model.safetensors")
    assert "can't be put on" in refusal(adapter)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("fault", ["shape", "nan", "missing", "unknown", "rank"])
def test_weights_that_do_not_fit(adapter: Path, fault: str) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(key for key in weights if "lora_B" in key)
    if fault == "shape":
        weights[key] = weights[key][:1].clone()
    if fault == "nan":
        weights[key] = weights[key] / 0
    if fault == "missing":
        del weights[key]
    if fault == "unknown":
        weights["base_model.model.other.weight"] = torch.ones(2)
    if fault == "rank":
        weights = {k: v[:1].clone() if "lora_A" in k else v for k, v in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    refusal(adapter)


def test_a_backbone_with_other_weights_is_refused(adapter: Path, tmp_path: Path, source: tuple[Path, Path]) -> None:
    other = write_backbone(tmp_path / "other", seed=1)
    message = refusal(adapter, backbone=str(other))
    assert "other weights" in message
    assert "--backbone" in message
    moved = shutil.copytree(source[0], tmp_path / "moved")
    hub.load(adapter, backbone=str(moved))


def test_a_changed_bit_is_found_in_every_file_but_the_card(whole: Path) -> None:
    files = [path for path in whole.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        for place in np.linspace(0, len(content) - 1, 5).astype(int):
            damaged = bytearray(content)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            assert path.name in refusal(whole)
        path.write_bytes(content)
    hub.load(whole)


def test_the_card_may_be_edited_and_what_shows_images_removed(whole: Path) -> None:
    (whole / "README.md").write_text("Mine.", encoding="utf-8")
    (whole / "notes.txt").write_text("Mine.", encoding="utf-8")
    for name in ("predictions", "figures"):
        shutil.rmtree(whole / name)
    hub.load(whole)


def test_files_of_two_runs_in_a_folder_are_refused(whole: Path, results: dict[str, Result]) -> None:
    other = results["track"].adapter
    for name in ("adapter_model.safetensors", "hf_histo.json"):
        content = (whole / name).read_bytes()
        shutil.copy(other / name, whole / name)
        assert name in refusal(whole)
        (whole / name).write_bytes(content)
    shutil.copy(other / "predictions" / "val.parquet", whole / "predictions" / "other.parquet")
    assert "other.parquet" in refusal(whole)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "hf_histo.json"])
def test_a_folder_without_what_a_prediction_needs_is_refused(whole: Path, name: str) -> None:
    (whole / name).unlink()
    with pytest.raises(HistoError, match=f"holds no {name}"):
        adapter_folder.verify(whole)
    assert name in refusal(whole)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": []}', '{"files": {"hf_histo.json": 1}}'])
def test_a_list_of_checksums_that_is_damaged(whole: Path, content: str) -> None:
    (whole / "checksums.json").write_text(content, encoding="utf-8")
    refusal(whole)


def test_a_folder_older_than_its_checksums_is_loaded(adapter: Path, whole: Path) -> None:
    old, new = (adapters.weights(hub.load(folder)[0], batch_norm="frozen") for folder in (adapter, whole))
    assert all(torch.equal(old[key], new[key]) for key in new)


def test_no_file_outside_the_folder_is_read(whole: Path, tmp_path: Path) -> None:
    """Neither through a link nor through a name in the checksums; and nothing but regular files."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("hf_histo.json", "adapter_model.safetensors", "README.md"):
        content = (whole / name).read_bytes()
        (whole / name).unlink()
        (whole / name).symlink_to(secret)
        assert "outside" in refusal(whole)
        (whole / name).unlink()
        os.mkfifo(whole / name)
        assert "regular file" in refusal(whole)
        (whole / name).unlink()
        (whole / name).write_bytes(content)
    listed = json.loads((whole / "checksums.json").read_text(encoding="utf-8"))
    listed["files"]["../secret"] = "0" * 32
    (whole / "checksums.json").write_text(json.dumps(listed), encoding="utf-8")
    hub.load(whole)


@pytest.mark.parametrize("change", [{"model_args": {"act_layer": "gelu"}}, {"do_pooling": False}])
def test_a_backbone_with_another_configuration_is_refused(
    whole: Path, source: tuple[Path, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    moved = shutil.copytree(source[0], tmp_path / "moved")
    file = moved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change), encoding="utf-8")
    message = refusal(whole, backbone=str(moved))
    assert next(iter(change)) in message
    assert str(moved) in message


@pytest.mark.parametrize(("module", "part"), [(model_card, "card"), (adapter_folder, "write_json")])
def test_a_save_that_fails_leaves_the_old_folder(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, Result], module: ModuleType, part: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    model, sidecar = hub.load(adapter)
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    monkeypatch.setattr(module, part, fail)
    with pytest.raises(OSError, match="disk full"):
        adapter_folder.save(adapter, model, sidecar, metrics=results["frozen"].record, tables={})
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_a_save_replaces_an_older_folder(adapter: Path, results: dict[str, Result]) -> None:
    (adapter / "old.txt").touch()
    model, sidecar = hub.load(adapter)
    adapter_folder.save(adapter, model, sidecar, metrics=results["frozen"].record, tables={})
    assert not (adapter / "old.txt").exists()
    assert hub.load(adapter)[1] == sidecar


def test_an_adapter_that_lost_its_checksums_is_refused(results: dict[str, Result], tmp_path: Path) -> None:
    folder = shutil.copytree(results["frozen"].adapter, tmp_path / "adapter")
    (folder / "checksums.json").unlink()
    with pytest.raises(HistoError, match=r"holds no checksums\.json, expected it beside hf_histo\.json"):
        adapter_folder.verify(folder)
