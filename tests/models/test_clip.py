"""CLIP models of open_clip: the tower as a classifier, folders of its format, and heads that start from sentences."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip_weights import fuse_attention
from recipe_mains import main_of
from safetensors.torch import load_file, save_file

from hf_histo.config import AdapterOptions
from hf_histo.errors import HistoError
from hf_histo.models import adapters, backbones, clip, heads, registry
from hf_histo.transforms import preprocessing

open_clip = pytest.importorskip("open_clip")

MODEL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
VIEW = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3], "interpolation": "bicubic", "resize_mode": "shortest"}
NAMES = ["high_grade", "normal"]
PROMPT = "A cytological slide showing a {} cell"


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.model.CLIP(**MODEL).eval()


@pytest.fixture(scope="module")
def folder(original: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as open_clip saves it."""
    path = tmp_path_factory.mktemp("clip")
    (path / clip.CONFIG).write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": VIEW}))
    save_file(original.state_dict(), path / clip.WEIGHTS)
    return path


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_tower_gives_open_clips_embeddings(original: torch.nn.Module, folder: Path, images: torch.Tensor) -> None:
    model = backbones.load(str(folder), 5).eval()
    with torch.no_grad():
        assert torch.allclose(model.visual(images), original.encode_image(images), atol=1e-5)
        assert model(pixel_values=images).logits.shape == (3, 5)
    declared = preprocessing.resolve(model.config, str(folder))
    assert (declared.image_size, declared.mean, declared.interpolation) == (32, (0.4, 0.5, 0.6), "bicubic")


def test_a_merged_adapter_goes_back_to_open_clip(folder: Path, images: torch.Tensor) -> None:
    model = adapters.add(backbones.load(str(folder), 2), AdapterOptions(target_modules="attention-qv", lora_rank=2))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    merged = adapters.merged(model).eval()
    again = open_clip.model.CLIP(**MODEL).eval()
    again.visual.load_state_dict(fuse_attention(merged.visual.state_dict()))
    with torch.no_grad():
        assert torch.allclose(again.encode_image(images), merged.visual(images), atol=1e-5)


def test_a_saved_one_loads_like_any_backbone(folder: Path, images: torch.Tensor, tmp_path: Path) -> None:
    model = backbones.load(str(folder), 2).eval()
    model.save_pretrained(tmp_path)
    again = backbones.load(str(tmp_path), 2, keep_head=True).eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images).logits, model(pixel_values=images).logits)
    assert backbones.fingerprint(again) == backbones.fingerprint(model)


def test_a_head_from_sentences_predicts_what_clip_does_zero_shot(
    original: torch.nn.Module, folder: Path, images: torch.Tensor
) -> None:
    classes = backbones.text_embeddings(str(folder), NAMES, PROMPT)
    tokens = open_clip.get_tokenizer("ViT-B-32")([PROMPT.format(name) for name in ("high grade", "normal")])
    with torch.no_grad():
        features, sentences, scale = original(images, tokens)
        zero_shot = scale * features @ sentences.T
        assert torch.allclose(classes, scale * sentences, atol=1e-4)
        model = backbones.load(str(folder), 2).eval()
        embeddings = model.visual(images)
        heads.start_from(model, classes, embeddings.norm(dim=1).mean().item())
        logits = model(pixel_values=images).logits
        assert torch.equal(logits.argmax(1), zero_shot.argmax(1))
        lengths = embeddings.norm(dim=1, keepdim=True)
        assert torch.allclose(logits / lengths * lengths.mean(), zero_shot, atol=1e-3)

        single = backbones.load(str(folder), 1).eval()  # a binary task: the logit of the second class
        heads.start_from(single, classes, lengths.mean().item())
        assert torch.allclose(single(pixel_values=images).logits[:, 0], logits[:, 1] - logits[:, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        (None, "no place for a name", "expected a sentence with {}"),
        ("test_resnet", PROMPT, "has no text tower, expected a folder of open_clip or one of clip-b16"),
    ],
)
def test_sentences_that_can_not_be_used(name: str | None, prompt: str, expected: str, folder: Path) -> None:
    with pytest.raises(HistoError) as caught:
        backbones.text_embeddings(name or str(folder), NAMES, prompt)
    assert expected in str(caught.value)


@pytest.mark.parametrize("fault", ["missing", "truncated", "no config", "shape"])
def test_a_broken_folder(fault: str, folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / clip.WEIGHTS)
    (tmp_path / clip.CONFIG).write_text((folder / clip.CONFIG).read_text())
    save_file({k: v for k, v in state.items() if fault != "missing" or "ln_post" not in k}, tmp_path / clip.WEIGHTS)
    if fault == "truncated":
        (tmp_path / clip.WEIGHTS).write_bytes((tmp_path / clip.WEIGHTS).read_bytes()[:500])
    if fault == "no config":
        (tmp_path / clip.CONFIG).write_text("{}")
    if fault == "shape":
        changed = {**MODEL, "embed_dim": 12}
        (tmp_path / clip.CONFIG).write_text(json.dumps({"model_cfg": changed, "preprocess_cfg": VIEW}))
    with pytest.raises(HistoError, match="the folder can't be loaded"):
        backbones.load(str(tmp_path), 2)


@pytest.mark.parametrize("name", ["uni", "quiltnet"])
def test_a_registered_model_becomes_a_folder_once_its_pickle_is_converted(
    name: str, original: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot, output = tmp_path / "snapshot", tmp_path / "backbone"
    snapshot.mkdir()
    if name == "uni":
        small = {"architecture": "vit_large_patch16_224", "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 2}}
        monkeypatch.setitem(registry.ENTRIES, name, dataclasses.replace(registry.ENTRIES[name], model=small))
        source = backbones.load(name, 3, random_weights=True)
        published = {k: v for k, v in source.timm_model.state_dict().items() if "head." not in k}
        torch.save(published, snapshot / "pytorch_model.bin")
    else:
        (snapshot / clip.CONFIG).write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": VIEW}))
        torch.save(original.state_dict(), snapshot / "open_clip_pytorch_model.bin")
    main = main_of("import_backbone.py")
    arguments = ["--backbone", name, "--snapshot", str(snapshot), "--output_dir", str(output)]
    monkeypatch.setattr(sys, "argv", ["import_backbone.py", *arguments])
    with pytest.raises(HistoError, match="is a pickle, which can run code") as refused:
        main()
    assert not output.exists()
    command = str(refused.value).partition('python -c "')[2].rstrip('"')
    subprocess.run([sys.executable, "-c", command], check=True)
    main()
    assert not list(output.glob("*.bin"))
    model = backbones.load(str(output), 2)
    own = model.timm_model.state_dict() if name == "uni" else fuse_attention(model.visual.state_dict())
    expected = source.timm_model.state_dict() if name == "uni" else original.visual.state_dict()
    assert all(torch.equal(own[key], value) for key, value in expected.items() if "head." not in key)
