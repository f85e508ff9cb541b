"""The cut below the first trained layer, and the store of activations at it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ResNetConfig, ViTConfig

from hf_histo.config import AdapterOptions
from hf_histo.models import adapters, backbones, batchnorm
from hf_histo.models.speed import activation_cut

TIMM = "base_model.model.timm_model"
VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return noise.contiguous(memory_format=torch.channels_last)


def model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "hf-vit":
        return AutoModelForImageClassification.from_config(ViTConfig(patch_size=8, num_labels=3, **VIT))
    if name == "hf-resnet":
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
        return AutoModelForImageClassification.from_config(ResNetConfig(num_labels=3, **sizes))
    return backbones.load(name, 3, random_weights=True, image_size=32)


def adapted(name: str, method: str = "linear", target_modules: str | None = None, **options: int) -> PeftModel:
    whole = model(name)
    batchnorm.freeze(whole)
    wrapped = adapters.add(whole, AdapterOptions(method=method, target_modules=target_modules, **options))  # type: ignore[arg-type]
    return wrapped.to(memory_format=torch.channels_last)


CUTS = [
    ("test_resnet.r160_in1k", "linear", None, f"{TIMM}.fc"),
    ("test_resnet.r160_in1k", "lora", "last-conv", f"{TIMM}.layer4"),  # not conv1 in it, which has a path around it
    ("test_vit.r160_in1k", "linear", None, f"{TIMM}.head"),
    ("test_vit.r160_in1k", "lora", r".*\.blocks\.4\.mlp\.fc1", f"{TIMM}.blocks.4"),
    ("test_vit.r160_in1k", "lora", "attention-qkvo", f"{TIMM}.blocks"),  # behind the patch embedding
    ("test_efficientnet.r160_in1k", "lora", "last-conv", f"{TIMM}.conv_head"),
    ("hf-vit", "linear", None, "base_model.model.classifier"),
    ("hf-vit", "lora", r".*\.2\.attention\.q_proj", "base_model.model.vit.layers.2"),
    ("hf-resnet", "lora", "last-conv", "base_model.model.resnet.encoder.stages.3"),
]


@pytest.mark.parametrize(("name", "method", "target_modules", "place"), CUTS)
def test_a_model_continues_from_the_cut(name: str, method: str, target_modules: str | None, place: str) -> None:
    wrapped = adapted(name, method, target_modules).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)  # a fresh update of LoRA is zero, whatever comes in
    cut = activation_cut.find(wrapped, pixels(5))
    assert cut is not None
    assert cut.module == place
    assert 0 < cut.share < 1
    batch = pixels(3, seed=1)
    whole = wrapped(pixel_values=batch).logits
    stored = cut.activations(wrapped, batch)
    assert not stored.requires_grad
    with cut.entered(wrapped):
        resumed = wrapped(pixel_values=stored).logits
    assert torch.equal(resumed, whole)
    for logits in (whole, resumed):
        logits.square().sum().backward()
    gradients = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert torch.equal(wrapped(pixel_values=batch).logits, whole), "outside the block, the model is whole again"


@pytest.mark.parametrize(("method", "target_modules"), [("lora", "all-conv"), ("full", None)])
def test_nothing_is_before_the_first_layer(method: str, target_modules: str | None) -> None:
    name = "test_resnet.r160_in1k"
    assert (
        activation_cut.find(adapted(name, method, target_modules) if method == "lora" else model(name), pixels(5))
        is None
    )


def test_dropout_in_the_frozen_part_is_seen() -> None:
    torch.manual_seed(0)
    config = ViTConfig(patch_size=8, num_labels=3, hidden_dropout_prob=0.3, **VIT)
    wrapped = adapters.add(AutoModelForImageClassification.from_config(config), AdapterOptions(method="linear"))
    state = torch.get_rng_state()
    assert activation_cut.find(wrapped, pixels(5)) is None
    assert wrapped.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_key_is_of_what_is_before_the_cut() -> None:
    def key(wrapped: PeftModel, *inputs: str) -> str:
        cut = activation_cut.find(wrapped, pixels(5))
        assert cut is not None
        return activation_cut.key(cut, wrapped, *inputs)

    name = "test_vit.r160_in1k"
    wrapped = adapted(name)
    first = key(wrapped, "train")
    assert key(adapted(name), "train") == first
    assert key(wrapped, "val") != first
    with torch.no_grad():
        wrapped.get_submodule(f"{TIMM}.head.modules_to_save.default").weight.add_(1)
        assert key(wrapped, "train") == first, "the head is not before the cut"
        wrapped.get_parameter(f"{TIMM}.pos_embed").add_(0.1)
        assert key(wrapped, "train") != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_store_gives_back_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(activation_cut, "CHUNK_ROWS", 4)
    every = torch.randn(2, 10, 3, 2, 2).to(dtype)
    like = every[0].contiguous(memory_format=torch.channels_last)
    store = activation_cut.Store(tmp_path, rows=10, like=like, views=2)
    shares = [store.missing(process, 2) for process in range(2)]
    assert not {(view, rows.start) for view, rows in shares[0]} & {(view, rows.start) for view, rows in shares[1]}
    for view, rows in [*shares[0], *shares[1]]:
        store.write(view, rows, every[view, rows.start : rows.stop])
    assert store.missing() == []
    again = activation_cut.Store(tmp_path, rows=10, like=like, views=2)
    index = np.array([9, 0, 3, 4, 9])
    found = again.read(1, index)
    assert torch.equal(found, every[1, index])
    assert found.is_contiguous(memory_format=torch.channels_last)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert sum(sizes) == 2 * 10 * store.row_bytes + len(sizes) * activation_cut.DIGEST_BYTES


def test_a_damaged_file_counts_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    like = torch.randn(10, 3, 2, 2)
    activation_cut.Store(tmp_path, rows=10, like=like).write(0, range(10), like)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    assert activation_cut.Store(tmp_path, rows=10, like=like).missing() == []
    flipped = bytearray(whole)
    flipped[200] ^= 1
    for content in (bytes(flipped), whole[:-40], b"", whole + b"0"):
        file.write_bytes(content)
        caplog.clear()
        assert activation_cut.Store(tmp_path, rows=10, like=like).missing() == [(0, range(10))]
        assert f"{file} is damaged" in caplog.text
