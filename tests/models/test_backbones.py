"""Backbones: where they are found, errors in them, and what the fingerprint covers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature import write_backbone
from safetensors.torch import load_file, save_file

from hf_histo.config import AdapterOptions
from hf_histo.errors import HistoError
from hf_histo.models import adapters, backbones, heads
from hf_histo.models.speed import activation_cut

WEIGHTS = "model.safetensors"


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    return write_backbone(tmp_path / "resnet")


def refusal(name: str, **options: bool | int | str) -> str:
    with pytest.raises(HistoError) as caught:
        backbones.load(name, 1, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"--backbone {name}: ")
    assert "\n" not in message
    return message


def test_a_folder_is_taken_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert backbones.locate("resnet50") == "timm/resnet50"
    assert backbones.locate("resnet50.a1_in1k") == "timm/resnet50.a1_in1k"
    write_backbone(tmp_path / "resnet50")
    assert backbones.locate("resnet50") == str(tmp_path / "resnet50")


def test_a_name_on_the_hub_is_kept() -> None:
    assert backbones.locate("facebook/dinov2-small") == "facebook/dinov2-small"


def test_an_unknown_name_suggests_the_nearest() -> None:
    message = refusal("resnet05")
    assert "resnet50" in message
    assert "expected 'builtin', a folder with config.json, a timm name, or owner/name" in message


@pytest.mark.parametrize("name", ["./missing/folder", "/missing/folder", "../folder", "a/b/c"])
def test_a_path_that_is_no_folder(name: str) -> None:
    assert "no such folder" in refusal(name)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    assert "holds no config.json" in refusal(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no_such_model"}', '{"model_type": "bert"}'])
def test_a_config_of_no_image_classifier(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    refusal(str(tmp_path))


def test_truncated_weights(resnet: Path) -> None:
    content = (resnet / WEIGHTS).read_bytes()
    (resnet / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert "can't be loaded" in refusal(str(resnet))


def test_no_weights_and_a_pickle_instead(resnet: Path) -> None:
    torch.save(load_file(resnet / WEIGHTS), resnet / "pytorch_model.bin")
    (resnet / WEIGHTS).unlink()
    assert "can't be loaded" in refusal(str(resnet))


def test_weights_missing_beyond_the_head(resnet: Path) -> None:
    state = load_file(resnet / WEIGHTS)
    save_file({k: v for k, v in state.items() if ".fc." not in k}, resnet / WEIGHTS, metadata={"format": "pt"})
    backbones.load(str(resnet), 1)  # the head is new anyway
    save_file({k: v for k, v in state.items() if "layer3" not in k}, resnet / WEIGHTS, metadata={"format": "pt"})
    message = refusal(str(resnet))
    assert "timm_model.layer3" in message
    assert "missing" in message


def test_weights_of_another_shape(resnet: Path) -> None:
    state = load_file(resnet / WEIGHTS)
    key = next(key for key in state if key.endswith("layer2.0.conv1.weight"))
    save_file({**state, key: state[key][:4].contiguous()}, resnet / WEIGHTS, metadata={"format": "pt"})
    assert key in refusal(str(resnet))


@pytest.mark.parametrize("name", ["timm/test_resnet.r160_in1k", "test_resnet.r160_in1k", "nobody/no-model"])
def test_without_a_network_the_remedy_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal(name)
    assert "hf download" in message
    assert "--local-dir DIR" in message
    assert "--random_weights" in message


def test_random_weights_need_no_network_and_know_timm_tags() -> None:
    assert backbones.load("test_resnet", 1, random_weights=True).config.num_labels == 1
    assert "no such weights" in refusal("test_resnet.no_such_tag", random_weights=True)


@pytest.mark.parametrize("outputs", [1, 4])
def test_the_head_is_new_and_the_rest_is_as_saved(resnet: Path, outputs: int) -> None:
    model = backbones.load(str(resnet), outputs)
    saved = load_file(resnet / WEIGHTS)
    for key, tensor in model.state_dict().items():
        if ".fc." in key:
            assert len(tensor) == outputs
            assert tensor.abs().max() < 0.1
        else:
            assert torch.equal(tensor, saved[key]), key
    assert model(pixel_values=torch.zeros(2, 3, 32, 32)).logits.shape == (2, outputs)


def test_the_head_is_new_even_where_it_would_fit(resnet: Path) -> None:
    saved = load_file(resnet / WEIGHTS)["timm_model.fc.weight"]
    assert not torch.equal(backbones.load(str(resnet), 10).state_dict()["timm_model.fc.weight"], saved)
    kept = backbones.load(str(resnet), 10, keep_head=True)
    assert torch.equal(kept.state_dict()["timm_model.fc.weight"], saved)


def test_half_precision_weights_are_loaded_as_float32(resnet: Path) -> None:
    state = load_file(resnet / WEIGHTS)
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, resnet / WEIGHTS, metadata={"format": "pt"})
    assert {p.dtype for p in backbones.load(str(resnet), 1).parameters()} == {torch.float32}


@pytest.mark.parametrize("size", [160, 96, 208])
def test_a_vision_transformer_takes_another_image_size(tmp_path: Path, size: int) -> None:
    folder = write_backbone(tmp_path / "vit", "test_vit.r160_in1k")
    model = backbones.load(str(folder), 1, image_size=size).eval()
    assert torch.isfinite(model(pixel_values=torch.zeros(1, 3, size, size)).logits).all()


def test_dropout_on_the_head_acts_in_training_only(resnet: Path) -> None:
    plain = backbones.load(str(resnet), 1)
    dropping = backbones.load(str(resnet), 1, head_dropout=0.5)
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    dropping.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(pixel_values=image).logits, dropping.eval()(pixel_values=image).logits)
    head = dropping.get_submodule(heads.name_of(dropping)).train()
    pooled = torch.randn(1, 96)
    draws = head(pooled.expand(4000, -1))
    assert draws.std() > 0
    assert (draws.mean() - head.eval()(pooled)).abs() < 5 * draws.std() / 4000**0.5  # scaled by 1 / (1 - p)


def test_patches_are_dropped_in_training_only(resnet: Path) -> None:
    torch.manual_seed(0)
    model = backbones.load("test_vit.r160_in1k", 2, random_weights=True, image_size=64)
    pixels, tokens = torch.randn(2, 3, 64, 64), []
    whole = model.eval()(pixel_values=pixels).logits
    backbones.add_patch_dropout("test_vit", model, 0.75)
    model.timm_model.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    assert torch.equal(model(pixel_values=pixels).logits, whole)
    drawn = [model.train()(pixel_values=pixels).logits for _ in range(2)]
    assert tokens == [17, 5, 5]  # 16 patches and the class token, of which a quarter and the token remain
    assert not torch.equal(*drawn)
    adapted = adapters.add(model, AdapterOptions(target_modules=r".*blocks\.1\..*qkv"))
    assert activation_cut.find(adapted, pixels) is None  # what is below is not the same in each pass
    with pytest.raises(HistoError, match=r"--patch_dropout is 0\.5, found the backbone resnet, expected a vision"):
        backbones.add_patch_dropout("resnet", backbones.load(str(resnet), 1), 0.5)


def test_the_fingerprint_covers_all_but_the_head(resnet: Path) -> None:
    model = backbones.load(str(resnet), 1)
    original = backbones.fingerprint(model)
    assert backbones.fingerprint(backbones.load(str(resnet), 5)) == original
    with torch.no_grad():
        model.timm_model.fc.weight.add_(1)
        assert backbones.fingerprint(model) == original
        model.timm_model.layer4[0].conv1.weight[0, 0, 0, 0] += 1e-3
        assert backbones.fingerprint(model) != original
        model.timm_model.layer4[0].conv1.weight[0, 0, 0, 0] -= 1e-3
        model.timm_model.bn1.running_mean[0] += 1e-3
        assert backbones.fingerprint(model) != original


def test_a_config_that_names_another_number_of_classes(resnet: Path) -> None:
    """timm's own files on the Hub keep `num_classes` beside the architecture."""
    content = json.loads((resnet / "config.json").read_text(encoding="utf-8"))
    content["num_classes"] = 10
    (resnet / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert backbones.load(str(resnet), 2).config.num_labels == 2


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_vit.r160_in1k", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("size", [-1, 0, 1, 7, 9, 100_000])
def test_an_image_size_that_the_backbone_does_not_take(name: str, size: int) -> None:
    try:
        model = backbones.load(name, 2, random_weights=True, image_size=size)
    except HistoError as error:
        assert str(error).startswith(f"--image_size is {size}, expected ")
        assert "\n" not in str(error)
    else:  # a network of convolutions takes small ones
        assert size == 9
        with torch.no_grad():
            assert model.eval()(pixel_values=torch.zeros(1, 3, size, size)).logits.shape == (1, 2)


def test_the_trial_of_an_image_size_changes_nothing(resnet: Path) -> None:
    first, second = (backbones.load(str(resnet), 2, image_size=size) for size in (None, 48))
    assert first.training == second.training
    assert backbones.identity(first) == backbones.identity(second)


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}},
        {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "unheard_of"},
        {"architecture": "local-dir:../elsewhere"},
        {"model_args": {"checkpoint_path": "../elsewhere/weights.pth"}},
        {"_attn_implementation": "nobody/kernel"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"model_args": {"layers": [10**9] * 4}},
        {"model_args": {"stem_width": 10**6}},
        {"model_args": "text"},
        {"pretrained_cfg": {"input_size": [3, 10**9, 10**9], "mean": [0, 0, 0], "std": [1, 1, 1]}},
    ],
)
def test_a_backbone_made_to_do_harm(
    source: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(source[0], tmp_path / "backbone")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')\n")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    with pytest.raises(HistoError) as caught:
        backbones.load(str(folder), 1)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "witness").exists()


def test_random_weights_of_a_backbone_stored_in_half_precision_are_float32() -> None:
    model = backbones.load("builtin", 1, random_weights=True)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
