"""Each method of peft: only adapter and head train, a saved one gives the same logits, and so does a merged one."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from timm.layers import Conv2dSame
from torch import nn
from transformers import PreTrainedModel

from hf_histo.config import OPTIONS, AdapterOptions, parse
from hf_histo.config.options import AdapterName, Except
from hf_histo.errors import HistoError
from hf_histo.models import adapters, backbones, batchnorm, heads, peft_methods
from hf_histo.models.model_size import account
from hf_histo.models.peft_methods import METHODS

WITH_CONVOLUTIONS = [name for name, method in METHODS.items() if {"convolution", "norm"} & {*method.kinds}]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0.0, 1.0])


@cache
def backbone(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = backbones.load(name, 1, random_weights=name != "builtin", image_size=32)
    batchnorm.freeze(model)
    return model


def fresh(name: str) -> PreTrainedModel:
    return copy.deepcopy(backbone(name))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=PIXELS).logits


def options(adapter: str, name: str = "", **more: Any) -> AdapterOptions:
    if name == "builtin" and adapter != "ln_tuning":
        more = {"target_modules": r".*layer[12]\.0\.(conv\d|downsample\.1)"} | more
    if "lora_rank" in METHODS[adapter].settings:
        more = {"lora_rank": 4} | more
    if "num_frequencies" in METHODS[adapter].settings:
        more = {"num_frequencies": 50} | more
    return AdapterOptions(adapter=adapter, **more)  # type: ignore[arg-type]


def step(model: nn.Module, rate: float) -> float:
    """The loss before an update of what can train."""
    model.train()
    output = model(pixel_values=PIXELS).logits[:, 0]
    loss = nn.functional.binary_cross_entropy_with_logits(output, LABELS)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter -= rate * parameter.grad.sign()
                parameter.grad = None
    return loss.item()


CASES = [(name, "test_vit") for name in METHODS] + [(name, "builtin") for name in WITH_CONVOLUTIONS]


@pytest.mark.parametrize(("adapter", "name"), CASES)
def test_trained_saved_restored_and_merged(adapter: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    method, model = METHODS[adapter], adapters.add(fresh(name), options(adapter, name))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    losses = [step(model, 2e-3) for _ in range(3)]
    assert len(set(losses)) == 3
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    in_head, in_adapter = ".modules_to_save.default.", f".{method.prefix}"
    assert all(in_head in key or in_adapter in key for key in moved)
    assert any(in_head in key for key in moved) and any(in_adapter in key for key in moved)

    expected = logits(model)
    adapters.save(model, tmp_path, batch_norm="frozen")
    torch.manual_seed(7)  # what is drawn again must come from the file
    restored = adapters.restore(fresh(name), tmp_path, batch_norm="frozen")
    assert torch.equal(logits(restored), expected)
    bare = PeftModel.from_pretrained(fresh(name), str(tmp_path))
    assert torch.equal(logits(bare), expected)

    sizes = account(model, batch_norm="frozen")
    whole = adapters.merged(restored)
    assert not [key for key in whole.state_dict() if in_adapter in key]
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-4)
    assert sizes["bytes"]["model"] == sum(t.numel() * t.element_size() for t in fresh(name).state_dict().values())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sizes["bytes"]["adapter"] == sum(t.numel() * t.element_size() for t in saved.values())


def test_options_of_a_method_are_those_that_its_rules_list() -> None:
    assert get_args(AdapterName) == tuple(METHODS)
    ours = {name for method in METHODS.values() for name in method.settings}
    for option in ours:
        needed = OPTIONS[option].metadata["rule"].needs["adapter"]
        having = set(METHODS) - set(needed.values) if isinstance(needed, Except) else set(needed)
        assert having == {name for name, method in METHODS.items() if option in method.settings}, option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter=ia3", "--lora_rank=4"], "--lora_rank is 4, which acts only with --adapter other than boft, "),
        (["--adapter=loha", "--use_rslora"], "with --adapter lora or dora"),
        (["--block_size=8"], "with --adapter boft, oft, c3a or road"),
        (["--method=linear", "--adapter=loha"], "acts only with --method lora"),
        (["--adapter=ln_tuning", "--target_modules=all-conv"], "other than ln_tuning"),
        (["--adapter=ln_tuning", "--batch_norm=track"], "--batch_norm is track with --adapter ln_tuning"),
        (["--adapter=adalora"], "adalora"),
    ],
)
def test_options_that_a_method_does_not_have(arguments: list[str], message: str) -> None:
    with pytest.raises(HistoError, match=message):
        parse(None, arguments)


@pytest.mark.parametrize(
    ("adapter", "name", "more", "message"),
    [
        ("vera", "builtin", {}, "fits none of its 15 layers"),
        ("oft", "builtin", {"target_modules": r".*layer1\.0\.conv1"}, "conv1, a convolution, expected a linear or"),
        ("boft", "builtin", {"target_modules": r".*layer1\.0\.conv1", "block_size": 7}, "inputs, which 7 does not"),
        ("c3a", "test_vit", {"block_size": 5}, "fits none"),
    ],
)
def test_layers_that_a_method_does_not_fit(adapter: str, name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(HistoError, match=message):
        adapters.add(fresh(name), options(adapter, **more))


def test_a_preset_leaves_out_layers_that_do_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    model = adapters.add(fresh("builtin"), options("boft"))
    found = peft_methods.adapted_layers(adapters.weights(model, batch_norm="frozen"), METHODS["boft"])
    assert len(found) == 14 and "1 of 15 layers are not adapted" in caplog.text


@pytest.mark.parametrize("adapter", WITH_CONVOLUTIONS)
def test_padding_that_depends_on_the_image_is_kept(adapter: str) -> None:
    model = fresh("builtin")
    layers = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    layer = next(layer for layer in layers if layer.kernel_size == (3, 3) and layer.stride == (2, 2))
    layer.__class__, layer.padding = Conv2dSame, (0, 0)  # as in MobileNetV2 of TensorFlow
    before = logits(model)
    torch.testing.assert_close(logits(adapters.add(model, options(adapter))), before)


def test_dora_leaves_out_layers_with_a_channel_of_zeros(caplog: pytest.LogCaptureFixture) -> None:
    model = fresh("builtin")
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    torch.nn.init.zeros_(layer.weight[1])
    adapted = adapters.add(model, options("dora"))
    assert "1 of 15 layers are not adapted" in caplog.text and "all 0" in caplog.text
    assert adapted(pixel_values=torch.ones(2, 3, 32, 32)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("adapter", "change", "message"),
    [
        ("loha", {"r": 10**6}, "r is 1000000"),
        ("hra", {"r": "8"}, "expected a number"),
        ("boft", {"boft_block_size": 16}, "boft_block_size is 16"),
        ("lokr", {"rank_pattern": {".*": 10**9}}, "rank_pattern"),
        ("vera", {"projection_prng_key": 5}, "projection_prng_key is 5"),
        ("ia3", {"feedforward_modules": ["(.*)*"]}, "peft_type"),
        ("dora", {"lora_bias": True}, "lora_bias"),
        ("lokr", {"peft_type": "XLORA"}, "peft_type is XLORA"),
        ("lokr", {"peft_type": "LOHA"}, "30 weights are missing or unknown"),
    ],
)
def test_nothing_in_the_configuration_of_an_adapter_decides_over_sizes(
    adapter: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapters.save(adapters.add(fresh("test_vit"), options(adapter)), tmp_path, batch_norm="frozen")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change), encoding="utf-8")
    with pytest.raises(HistoError, match=message):
        adapters.restore(fresh("test_vit"), tmp_path, batch_norm="frozen")


@pytest.mark.parametrize("adapter", ["loha", "vera", "ln_tuning"])
def test_training_can_start_from_an_adapter(adapter: str, tmp_path: Path) -> None:
    model = adapters.add(fresh("test_vit"), options(adapter))
    step(model, 1e-2)
    adapters.save(model, tmp_path, batch_norm="frozen")
    start = adapters.add(fresh("test_vit"), options(adapter))
    head = heads.module_of(start).state_dict()
    head = {key: tensor.clone() for key, tensor in head.items()}
    adapters.start_from(start, tmp_path)
    ours, theirs = (adapters.weights(each, batch_norm="frozen") for each in (start, model))
    update = [key for key in ours if f".{METHODS[adapter].prefix}" in key]
    assert update and all(torch.equal(ours[key], theirs[key]) for key in update)
    assert all(torch.equal(tensor, head[key]) for key, tensor in heads.module_of(start).state_dict().items())
    other = adapters.add(fresh("test_vit"), options("hira"))
    with pytest.raises(HistoError, match="expected its own --adapter"):
        adapters.start_from(other, tmp_path)


SCALABLE = [name for name, method in METHODS.items() if method.factor]


@pytest.mark.parametrize("adapter", SCALABLE)
def test_a_scaled_update_is_merged_exactly(adapter: str, tmp_path: Path) -> None:
    model = adapters.add(fresh("test_vit"), options(adapter))
    for _ in range(2):
        step(model, 1e-2)
    trained = adapters.update_factors(model)
    merged = {}
    for scale in (1.0, 0.3, 0.0):
        adapters.scale_update(model, scale, trained)
        adapters.save(model, tmp_path / str(scale), batch_norm="frozen")
        restored = adapters.restore(fresh("test_vit"), tmp_path / str(scale), batch_norm="frozen")
        assert torch.equal(logits(restored), logits(model))
        bare = PeftModel.from_pretrained(fresh("test_vit"), str(tmp_path / str(scale)))
        assert torch.equal(logits(bare), logits(model))
        merged[scale] = adapters.merged(restored).state_dict()
    changed = False
    for name, weight in fresh("test_vit").state_dict().items():
        if not name.startswith("timm_model.head."):
            update = merged[1.0][name] - weight
            changed |= bool(update.abs().max() > 1e-4)
            torch.testing.assert_close(merged[0.3][name], weight + 0.3 * update, rtol=0, atol=2e-6)
            torch.testing.assert_close(merged[0.0][name], weight, rtol=0, atol=1e-7)
    assert changed


def test_the_scale_acts_with_the_methods_that_have_a_factor() -> None:
    assert set(OPTIONS["update_scale"].metadata["rule"].needs["adapter"]) == set(SCALABLE)
    for text in ("2", "-0.1", "best", "nan"):
        with pytest.raises(HistoError, match="--update_scale is"):
            parse(None, [f"--update_scale={text}"])
    with pytest.raises(HistoError, match=r"--update_scale is '0\.5', which acts only with --adapter lora, "):
        parse(None, ["--update_scale=0.5", "--adapter=dora"])
