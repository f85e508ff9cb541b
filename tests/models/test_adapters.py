"""The adapted layers, the content of a saved adapter, and that restoring it gives the same logits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from miniature import write_backbone
from peft import PeftModel
from recipe_mains import RECIPES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_histo.config import AdapterOptions, parse
from hf_histo.errors import HistoError
from hf_histo.models import adapters, backbones, batchnorm, heads, lora_targets

WEIGHTS = "adapter_model.safetensors"
TIMM = {
    "resnet18": "resnet",
    "resnext50_32x4d": "resnet",
    "seresnet50": "resnet",
    "test_resnet": "resnet-d",
    "resnet26d": "resnet-d",
    "test_efficientnet": "mobilenet",
    "mobilenetv3_small_050": "mobilenet",
    "vgg11": "vgg",
    "densenet121": "densenet",
    "test_vit": "timm-vit",
    "test_vit2": "timm-vit",
    "test_convnext": "convnext",
    "test_convnext2": "convnext",
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def hugging_face(kind: str) -> PreTrainedModel:
    if kind == "vit":
        return ViTForImageClassification(ViTConfig(**TINY, intermediate_size=48, num_labels=3))
    if kind == "dinov2":
        return Dinov2ForImageClassification(Dinov2Config(**TINY, num_labels=3))
    if kind == "clip":
        return CLIPForImageClassification(
            CLIPConfig(vision_config={**TINY, "intermediate_size": 48}, projection_dim=16, num_labels=3)
        )
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=3)
    )


HUGGING_FACE = {"vit": "hf-vit", "dinov2": "hf-vit", "clip": "hf-clip", "resnet": "hf-resnet"}


def build(name: str) -> PreTrainedModel:
    """A model on the meta device: only names and shapes of weights."""
    with torch.device("meta"):
        return hugging_face(name) if name in HUGGING_FACE else backbones.load(name, 3, random_weights=True)


def adapted_layers(model: PreTrainedModel, preset: str | None) -> set[str]:
    """Names that peft will adapt, by its own rule."""
    found = lora_targets.targets(model, preset, 8)
    return {n for n, _ in model.named_modules() if (re.fullmatch(found, n) if isinstance(found, str) else n in found)}


@pytest.mark.parametrize(
    ("name", "outputs", "options", "expected"),
    [
        ("resnet50.a1_in1k", 1, AdapterOptions(target_modules="all-conv", lora_rank=8), 637_593),
        ("resnet50.a1_in1k", 1, AdapterOptions(method="linear"), 2_049),
        ("vgg16.tv_in1k", 4, AdapterOptions(target_modules="fc", lora_rank=8), 315_396),
    ],
)
def test_published_parameter_counts(name: str, outputs: int, options: AdapterOptions, expected: int) -> None:
    with torch.device("meta"):
        model = backbones.load(name, outputs, random_weights=True)
        total = sum(parameter.numel() for parameter in model.parameters())
        counts = adapters.parameter_counts(adapters.add(model, options))
    assert counts["trainable"] == expected
    head = model.get_submodule(heads.name_of(model))
    lora = expected - sum(p.numel() for p in head.parameters()) if options.method == "lora" else 0
    assert counts["total"] == total + lora


@pytest.mark.parametrize(("name", "family"), (TIMM | HUGGING_FACE).items())
def test_presets_of_a_family_fit_its_members(name: str, family: str) -> None:
    model = build(name)
    found, declared = lora_targets.family_of(model), lora_targets.FAMILIES[family]
    assert found.known_by == declared.known_by
    assert found.default in found.presets
    for preset in {*declared.presets, None}:
        model = build(name)  # a new one: slices take its fused layers apart
        layers = adapted_layers(model, preset)
        assert layers, preset
        assert heads.name_of(model) not in layers
        for layer in layers:
            module = model.get_submodule(layer)
            assert isinstance(module, nn.Conv2d | nn.Linear), layer
            assert getattr(module, "groups", 1) == 1, layer
    for preset in declared.presets:
        adapters.add(build(name), AdapterOptions(target_modules=preset))


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "seresnet50", "resnetrs50", "test_efficientnet",
                                  "tf_efficientnetv2_s", "mobilenetv3_small_050", "vgg11", "densenet121", "test_vit",
                                  "test_convnext", "regnetx_002", "resnet"])  # fmt: skip
def test_all_conv_is_every_convolution_without_groups(name: str) -> None:
    model = build(name)
    every = {n for n, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1}
    assert adapted_layers(model, "all-conv") == every - {heads.name_of(model)}


def test_every_family_is_tested() -> None:
    in_test_registry = {"open-clip"}  # which needs the extra
    assert {*TIMM.values(), *HUGGING_FACE.values()} | in_test_registry == set(lora_targets.FAMILIES)


def test_an_architecture_of_no_family_has_the_presets_of_every_one() -> None:
    model = build("regnetx_002")
    assert set(lora_targets.family_of(model).presets) == {"all-conv", "all-linear"}
    assert adapted_layers(model, None)


def test_the_fused_projection_of_a_patch_is_not_attention() -> None:
    assert not any("patch_embed" in layer for layer in adapted_layers(build("test_vit"), "attention-qkvo"))


def refusal(model: PreTrainedModel, options: AdapterOptions) -> str:
    with pytest.raises(HistoError) as caught:
        adapters.add(model, options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_match_lists_presets_and_layers() -> None:
    message = refusal(build("test_vit"), AdapterOptions(target_modules="query"))
    assert message.startswith("--target_modules 'query' matches no layer")
    assert "attention-qkvo" in message
    assert "timm_model.blocks.N.attn.qkv" in message
    assert "timm_model.head" not in message


def test_a_match_on_the_head_lists_the_rest() -> None:
    message = refusal(build("test_vit"), AdapterOptions(target_modules=r".*(qkv|head)"))
    assert "matches the head, timm_model.head" in message
    assert "timm_model.blocks.N.attn.qkv" in message


def test_a_rank_that_groups_do_not_take_lists_what_fits() -> None:
    message = refusal(build("resnext50_32x4d"), AdapterOptions(target_modules=r".*layer4.*conv\d", lora_rank=8))
    assert "32 groups" in message
    assert "--lora_rank 8" in message
    assert "timm_model.layerN.N.convN" in message
    adapters.add(build("resnext50_32x4d"), AdapterOptions(target_modules=r".*layer4.*conv\d", lora_rank=32))


def test_a_module_that_lora_does_not_fit_lists_what_is_below() -> None:
    message = refusal(build("test_vit"), AdapterOptions(target_modules=r".*\.blocks\.0\.attn"))
    assert "neither Conv2d nor Linear" in message
    assert "timm_model.blocks.N.attn.qkv" in message


def test_a_broken_regex() -> None:
    assert "is not a regex" in refusal(build("test_vit"), AdapterOptions(target_modules="(qkv"))


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_initializers_for_linear_layers_on_a_convolution(name: str) -> None:
    message = refusal(build("test_resnet"), AdapterOptions(init_lora_weights=name))
    assert name in message
    assert "expected default or gaussian" in message
    on_linear = AdapterOptions(init_lora_weights=name, target_modules=r".*\.blocks\.0\.attn\.proj")
    adapters.add(backbones.load("test_vit", 1, random_weights=True), on_linear)


def test_an_unknown_initializer_is_refused() -> None:
    assert "magic" in refusal(build("test_resnet"), AdapterOptions(init_lora_weights="magic"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "resnet")


PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(backbone: Path, options: AdapterOptions, batch_norm: str) -> PeftModel:
    """A model after three steps, the B of the LoRA no longer zero."""
    torch.manual_seed(0)
    model = backbones.load(str(backbone), 1)
    if batch_norm == "frozen":
        batchnorm.freeze(model)
    adapted = adapters.add(model, options).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.03)
    for _ in range(3):
        loss = nn.functional.binary_cross_entropy_with_logits(
            adapted(pixel_values=PIXELS).logits[:, 0], torch.tensor([0.0, 1.0, 0.0, 1.0])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return adapted.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=PIXELS).logits


VARIANTS = {
    "lora": AdapterOptions(),
    "linear": AdapterOptions(method="linear"),
    "dora": AdapterOptions(adapter="dora", lora_rank=4, target_modules="last-conv"),
    "rslora": AdapterOptions(use_rslora=True, target_modules="last-conv", init_lora_weights="gaussian"),
}


@pytest.mark.parametrize("batch_norm", ["frozen", "track"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_restored_gives_the_same_logits(resnet: Path, tmp_path: Path, variant: str, batch_norm: str) -> None:
    model = trained(resnet, VARIANTS[variant], batch_norm)
    expected = logits(model)
    adapters.save(model, tmp_path, batch_norm=batch_norm)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", WEIGHTS]

    fresh = backbones.load(str(resnet), 1)
    assert (logits(fresh) - expected).abs().max() > 1e-3
    restored = adapters.restore(fresh, tmp_path, batch_norm=batch_norm).eval()
    torch.testing.assert_close(logits(restored), expected, rtol=0, atol=1e-6)

    plain = AutoModelForImageClassification.from_pretrained(resnet, num_labels=1, ignore_mismatched_sizes=True)
    bare = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    torch.testing.assert_close(logits(bare), expected, rtol=0, atol=1e-6)

    moved = {key for key in load_file(tmp_path / WEIGHTS) if key.endswith(("running_mean", "running_var"))}
    assert bool(moved) is (batch_norm == "track")


@pytest.mark.parametrize("method", ["lora", "linear"])
def test_adapter_and_head_move_and_nothing_else(resnet: Path, method: str) -> None:
    original = backbones.load(str(resnet), 1).state_dict()
    model = trained(resnet, AdapterOptions(method=method), "frozen")
    changed, unchanged = set(), set()
    for key, tensor in model.state_dict().items():
        name = key.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")
        if "lora_" in key:
            changed.add(key)
            assert "lora_A" in key or tensor.abs().max() > 0, key
        elif ".original_module." not in key:
            (unchanged if torch.equal(tensor, original[name]) else changed).add(key)
    moving = {key.removesuffix(".weight").removesuffix(".bias") for key in changed if "lora_" not in key}
    assert moving == {"base_model.model.timm_model.fc.modules_to_save.default"}
    assert len(unchanged) == len(original) - 2
    assert any("lora_" in key for key in changed) is (method == "lora")


def test_only_adapter_and_head_can_train(resnet: Path) -> None:
    model = trained(resnet, AdapterOptions(), "track")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or ".modules_to_save." in name for name in trainable)


@pytest.fixture
def saved(resnet: Path, tmp_path: Path) -> Path:
    adapters.save(trained(resnet, AdapterOptions(), "track"), tmp_path, batch_norm="track")
    return tmp_path


def refused(resnet: Path, folder: Path, batch_norm: str = "track") -> str:
    with pytest.raises(HistoError) as caught:
        adapters.restore(backbones.load(str(resnet), 1), folder, batch_norm=batch_norm)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_weights_that_are_not_finite_are_refused(resnet: Path, saved: Path) -> None:
    state = load_file(saved / WEIGHTS)
    key = next(key for key in state if "lora_B" in key)
    state[key][0] = float("nan")
    save_file(state, saved / WEIGHTS, metadata={"format": "pt"})
    message = refused(resnet, saved)
    assert key in message
    assert "diverged" in message


@pytest.mark.parametrize("part", ["lora_A", "fc.weight", "running_var"])
def test_a_missing_weight_is_refused(resnet: Path, saved: Path, part: str) -> None:
    state = load_file(saved / WEIGHTS)
    gone = next(key for key in state if part in key)
    del state[gone]
    save_file(state, saved / WEIGHTS, metadata={"format": "pt"})
    message = refused(resnet, saved)
    assert gone in message


def test_an_unknown_weight_is_refused(resnet: Path, saved: Path) -> None:
    save_file({**load_file(saved / WEIGHTS), "extra": torch.zeros(1)}, saved / WEIGHTS, metadata={"format": "pt"})
    assert "first extra" in refused(resnet, saved)


@pytest.mark.parametrize("part", ["lora_A", "fc.weight", "running_var"])
def test_a_weight_of_another_shape_is_refused(resnet: Path, saved: Path, part: str) -> None:
    state = load_file(saved / WEIGHTS)
    key = next(key for key in state if part in key)
    state[key] = torch.cat([state[key], state[key]]).contiguous()
    save_file(state, saved / WEIGHTS, metadata={"format": "pt"})
    message = refused(resnet, saved)
    if part == "lora_A":  # its rows are the rank, which adapter_config.json holds as well
        assert "adapter_config.json: r is 8" in message
    else:
        assert "size mismatch" in message
        assert part.split(".")[0] in message


def test_tracked_statistics_are_expected_where_they_were_tracked(resnet: Path, saved: Path) -> None:
    assert "running_" in refused(resnet, saved, "frozen")


def test_truncated_weights_are_refused(resnet: Path, saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: len(content) // 2])
    refused(resnet, saved)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_config_is_refused(resnet: Path, saved: Path, content: str) -> None:
    (saved / "adapter_config.json").write_text(content, encoding="utf-8")
    refused(resnet, saved)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.file,))


def test_a_pickle_is_never_read(resnet: Path, saved: Path) -> None:
    torch.save({"weight": Trap(saved / "sprung")}, saved / "adapter_model.bin")
    adapters.restore(backbones.load(str(resnet), 1), saved, batch_norm="track")  # beside the weights it is ignored
    (saved / WEIGHTS).unlink()
    assert WEIGHTS in refused(resnet, saved)
    assert not (saved / "sprung").exists()


def test_vgg16_of_the_brain_mri_report_has_its_number_of_trained_parameters() -> None:
    options = parse(None, ["--config", str(RECIPES / "configs" / "mri_vgg16_lora.yaml")])
    with torch.device("meta"):
        model = backbones.load(options.model.backbone, 4, random_weights=True)
        counts = adapters.parameter_counts(adapters.add(model, options.adapter))
    assert counts["trainable"] == 315_396


def test_a_convolution_in_groups_has_no_exact_mean() -> None:
    model = backbones.load("test_efficientnet", 1, random_weights=True)
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
    adapted = adapters.add(model, AdapterOptions(target_modules=re.escape(name), lora_rank=layer.groups))
    adapted.add_adapter("other", adapted.peft_config["default"])
    with pytest.raises(HistoError, match="on a convolution in groups"):
        adapters.average(adapted, ["default", "other"], "mean")
