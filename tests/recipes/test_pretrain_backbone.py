"""The recipe that makes the packaged backbone, and the packaged backbone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recipe_mains import RECIPES
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import hf_histo.models

RECIPE = RECIPES / "pretrain_backbone.py"
BUILTIN = Path(next(iter(hf_histo.models.__path__))) / "builtin"


def pretrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, RECIPE, *arguments], env=environment, capture_output=True, text=True)


def check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 3 MB of finite fp16 weights that load with a new one-logit head and without the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3e6
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        assert weight.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float16), name
        assert torch.isfinite(weight).all(), name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert {"input_size", "mean", "std", "interpolation", "crop_pct", "license"} <= config["pretrained_cfg"].keys()
    assert {"command", "pretext_accuracy", "versions"} <= config["pretrained_cfg"]["made_by"].keys()

    model = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=1, ignore_mismatched_sizes=True, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        logits = model(torch.zeros(2, 3, 96, 96)).logits
    assert (logits.shape, logits.dtype) == ((2, 1), torch.float32)
    for name, weight in model.state_dict().items():
        if ".fc." not in name:
            torch.testing.assert_close(weight, weights[name].to(weight.dtype), rtol=0, atol=0)


@pytest.mark.slow
def test_the_recipe_makes_the_same_backbone_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "again"):
        done = pretrain("--output_dir", str(tmp_path / name), "--steps", "2", "--images", "20")
        assert done.returncode == 0, done.stderr
        assert "held-out accuracy" in done.stdout
        check(tmp_path / name, monkeypatch)
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again"))
    assert first == again


def test_an_existing_folder_is_refused_before_any_work(
    in_process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = in_process(RECIPE.name, "--output_dir", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("exists, expected a new folder; remove it or choose another")


def test_the_packaged_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    check(BUILTIN, monkeypatch)
