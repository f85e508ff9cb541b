"""Each foundation model is built from its entry, and its LoRA on the layers of the study is saved and merged."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_histo.config import AdapterOptions
from hf_histo.errors import HistoError
from hf_histo.models import adapters, backbones, heads, lora_targets, qkv, registry
from hf_histo.transforms import preprocessing

pytest.importorskip("open_clip")

# Millions of parameters without a head, as the model cards and papers round them.
MILLIONS = {
    "vit-b16": 86,
    "clip-b16": 86,
    "clip-l14": 304,
    "biomedclip": 86,
    "quiltnet": 88,
    "uni": 303,
    "uni2-h": 681,
    "virchow2": 631,
    "h-optimus-0": 1135,
    "phikon-v2": 303,
    "midnight": 1135,
    "dinov2": 87,
    "dinov2-small": 22,
    "dinov3": 86,
}
SIZE = 112  # pixels: a multiple of 14 and 16


def shrunken(entry: registry.Entry) -> dict[str, Any]:
    """The entry's arguments for two narrow blocks."""
    model = copy.deepcopy(entry.model)
    if entry.library == "timm":
        # Heads stay of a width that divides by four, which rotary positions need.
        model["model_args"] = {**model["model_args"], "img_size": SIZE, "depth": 2, "embed_dim": 48, "num_heads": 3}
    elif entry.library == "transformers":
        model |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        model["image_size"] = SIZE
    elif "timm_model_name" in model["vision_cfg"]:
        model["vision_cfg"]["timm_model_name"] = "test_vit"
        model["vision_cfg"]["image_size"] = 160
    else:
        model["vision_cfg"] |= {"image_size": SIZE, "layers": 2, "width": 64, "head_width": 32}
    return model


FAMILIES = ["vit-b16", "clip-b16", "biomedclip", "uni", "uni2-h", "virchow2", "midnight", "dinov3"]


@pytest.fixture(params=FAMILIES)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """A short name whose entry is a shrunken one, and the pixels on a side that it takes."""
    entry = registry.ENTRIES[request.param]
    size = 160 if request.param == "biomedclip" else SIZE
    changed = dataclasses.replace(entry, model=shrunken(entry), image_size=size)
    monkeypatch.setitem(registry.ENTRIES, request.param, changed)
    return request.param, size


def logits(model: torch.nn.Module, size: int) -> torch.Tensor:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits


def disturb(model: torch.nn.Module) -> None:
    """Give every LoRA matrix random weights, as training would."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)


def test_a_shrunken_one_takes_lora_saves_it_and_merges_it(small: tuple[str, int], tmp_path: Path) -> None:
    """On q, k, v and o with rank 16, as in the study's third experiment."""
    name, size = small
    torch.manual_seed(0)
    model = backbones.load(name, 3, random_weights=True)
    original = {key: value.clone() for key, value in model.state_dict().items()}
    before = logits(model, size)
    assert preprocessing.resolve(model.config, name).image_size == size

    options = AdapterOptions(target_modules="attention-q-k-v-o", lora_rank=16)
    adapted = adapters.add(copy.deepcopy(model), options)
    assert torch.equal(logits(adapted, size), before)
    # The requested layers of each block, and no fused one.
    matrices = {key for key, _ in adapted.named_parameters() if "lora_A" in key}
    depth = 6 if name == "biomedclip" else 2
    assert len(matrices) == depth * 4
    assert all(p.shape[0] == 16 for key, p in adapted.named_parameters() if "lora_A" in key)
    widths = {p.shape[0] for key, p in adapted.named_parameters() if "lora_B" in key}
    assert len(widths) == 1

    disturb(adapted)
    moved = logits(adapted, size)
    assert not torch.equal(moved, before)
    adapters.save(adapted, tmp_path, batch_norm="frozen")
    restored = adapters.restore(copy.deepcopy(model), tmp_path, batch_norm="frozen")
    assert torch.equal(logits(restored, size), moved)

    merged = adapters.merged(restored)
    assert not qkv.is_split(merged)
    state = merged.state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: v.shape for key, v in original.items()}
    assert torch.allclose(logits(merged, size), moved, atol=1e-5)
    bare = copy.deepcopy(model)  # what was merged is a model of the original architecture
    bare.load_state_dict(state)
    assert torch.equal(logits(bare, size), logits(merged, size))


def test_only_the_slices_asked_for_move(small: tuple[str, int]) -> None:
    name, _ = small
    model = backbones.load(name, 3, random_weights=True)
    adapted = adapters.add(copy.deepcopy(model), AdapterOptions(target_modules="attention-qv", lora_rank=2))
    disturb(adapted)
    state = adapters.merged(adapted).state_dict()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    for key in changed - {f"{heads.name_of(model)}.{part}" for part in ("weight", "bias")}:
        if ".qkv." in key:
            was, now = (tensor[key].chunk(3) for tensor in (model.state_dict(), state))
            assert [torch.equal(*pair) for pair in zip(was, now, strict=True)] == [False, True, False]
        else:
            assert key.split(".")[-2] in ("q_proj", "v_proj", "query", "value"), key
    fused = any(".qkv." in key for key in changed)
    assert len(changed) == (6 if name == "biomedclip" else 2 if fused else 4)


@pytest.mark.parametrize("name", MILLIONS)
def test_the_architecture_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageClassification.from_config(registry.ENTRIES[name].config(1))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == MILLIONS[name]


@pytest.mark.parametrize(
    ("blocks", "wanted"),
    [
        ("all", range(12)),
        ("bottom", range(4)),
        ("mid", range(4, 8)),
        ("up", range(8, 12)),
        ("half-bottom", range(6)),
        ("half-up", range(6, 12)),
        ("top3", range(9, 12)),
    ],
)
@pytest.mark.parametrize("name", ["vit-b16", "clip-b16", "dinov3"])
def test_blocks_are_those_of_the_publication(name: str, blocks: str, wanted: range) -> None:
    """Zanella & Ben Ayed 2024 list them for twelve blocks."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(registry.ENTRIES[name].config(3))
        chosen = lora_targets.targets(model, "attention-q-k-v-o", 16, blocks)
    names = [key for key, _ in model.named_modules() if qkv.is_target(key, chosen)]
    assert {int(lora_targets.BLOCK.fullmatch(key)["index"]) for key in names} == set(wanted)  # type: ignore[index]
    assert len(names) == 4 * len(wanted)


def test_blocks_of_a_model_that_has_none() -> None:
    model = backbones.load("test_resnet", 2, random_weights=True)
    with pytest.raises(HistoError, match="--lora_blocks is mid, expected all"):
        lora_targets.targets(model, None, 2, "mid")


def test_blocks_in_several_stages_are_not_numbered_as_one_sequence() -> None:
    model = backbones.load("convnext_atto", 2, random_weights=True)
    with pytest.raises(HistoError, match=r"--lora_blocks is top3, .* in 4 sequences of transformer blocks"):
        lora_targets.targets(model, "mlp", 2, "top3")


def test_a_layer_that_is_read_without_being_called_is_refused() -> None:
    """timm's EVA with a bias beside the weights computes with `qkv.weight` itself, past any adapter."""
    model = backbones.load("vit_tiny_patch16_dinov3_qkvb", 2, random_weights=True)
    with pytest.raises(HistoError, match="read with a bias kept elsewhere"):
        lora_targets.targets(model, "attention-qv", 2)


def test_names_are_looked_up_both_ways() -> None:
    assert backbones.locate("uni") == "MahmoodLab/UNI"
    assert registry.find("MahmoodLab/UNI") is registry.ENTRIES["uni"]
    assert registry.find("resnet50") is None
    assert len({entry.source for entry in registry.ENTRIES.values()}) == len(registry.ENTRIES)
    for name, entry in registry.ENTRIES.items():
        assert entry.license, name
        assert entry.source.count("/") == 1, name


@pytest.mark.parametrize("name", ["uni", "virchow2"])
def test_the_error_of_a_gated_model_names_the_steps(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HistoError) as caught:
        backbones.load(name, 2)
    message = str(caught.value)
    source = registry.ENTRIES[name].source
    for step in (f"https://huggingface.co/{source}", "hf auth login", "hf_histo backbones", "gated"):
        assert step in message


def test_what_a_registered_backbone_can_not_do() -> None:
    with pytest.raises(HistoError, match="--head_on logits: uni has no output layer"):
        backbones.load("uni", 2, random_weights=True, head=heads.HeadConfig(on="logits"))
    with pytest.raises(HistoError, match="--image_size is 160, expected 224"):
        backbones.load("clip-b16", 2, random_weights=True, image_size=160)
