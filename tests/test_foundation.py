"""Runs on backbones that transformers and peft alone can't build: adapters load again, and cards state it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from miniature import SIZE, config, write_backbone, write_data
from safetensors.torch import load_file, save_file

from hf_histo.data.load import load
from hf_histo.finetune import run_config
from hf_histo.inference import Classifier
from hf_histo.models import backbones, clip

QUICK = ("--num_train_epochs=1", "--target_modules=attention-qv", "--lora_rank=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "mini")


def check_it_loads_again(adapter: Path, data: Path) -> None:
    """The same predictions from the folder, and a card without the lines of bare transformers."""
    recorded = pd.read_parquet(adapter / "predictions" / "test.parquet")
    again = Classifier.from_pretrained(adapter).predict(load(data)["test"])
    assert again["logit"].tolist() == pytest.approx(recorded["logit"].tolist(), abs=1e-6)
    card = (adapter / "README.md").read_text()
    assert "Needs this package" in card
    assert "bare transformers and peft:" not in card


def test_slices_of_fused_attention(data: Path, tmp_path: Path) -> None:
    vit = write_backbone(tmp_path / "vit", "test_vit.r160_in1k")
    adapter = run_config(config(tmp_path / "run", vit, data, *QUICK, "--lora_blocks=top3"), load(data)).adapter
    matrices = {key for key in load_file(adapter / "adapter_model.safetensors") if "lora_A" in key}
    assert {key.split(".attn.")[1].split(".lora")[0] for key in matrices} == {"qkv.q", "qkv.v"}
    assert len({key.split(".blocks.")[1][0] for key in matrices}) == 3
    check_it_loads_again(adapter, data)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model in open_clip's format."""
    open_clip = pytest.importorskip("open_clip")
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    view = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    (folder / clip.CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": view}))
    save_file(open_clip.model.CLIP(**model).state_dict(), folder / clip.WEIGHTS)
    return folder


def test_a_clip_model_that_starts_from_sentences(clip_folder: Path, data: Path, tmp_path: Path) -> None:
    sentences = ("--text_prompt=a slide of {} tissue", "--learning_rate=1e-30", "--weight_decay=0")  # learns nothing
    adapter = run_config(config(tmp_path / "run", clip_folder, data, *QUICK, *sentences), load(data)).adapter
    state = load_file(adapter / "adapter_model.safetensors")
    (head,) = (tensor for key, tensor in state.items() if key.endswith("classifier.weight"))
    names = load(data)["train"].features["label"].names
    normal, tumor = backbones.text_embeddings(str(clip_folder), names, "a slide of {} tissue")
    assert torch.allclose(torch.nn.functional.normalize(head[0], dim=0),
                          torch.nn.functional.normalize(tumor - normal, dim=0), atol=1e-5)  # fmt: skip
    check_it_loads_again(adapter, data)


def test_a_clip_model_that_is_trained_whole(clip_folder: Path, data: Path, tmp_path: Path) -> None:
    whole = ("--method=full", "--num_train_epochs=1")
    adapter = run_config(config(tmp_path / "run", clip_folder, data, *whole), load(data)).adapter
    recorded = pd.read_parquet(adapter / "predictions" / "test.parquet")
    again = Classifier.from_pretrained(adapter).predict(load(data)["test"])
    assert again["logit"].tolist() == pytest.approx(recorded["logit"].tolist(), abs=1e-6)
