"""Frozen batch norm stays frozen whatever training does; tracked statistics are listed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_histo.errors import HistoError
from hf_histo.models import backbones, batchnorm


def train(model: nn.Module) -> None:
    """Two steps in training mode, of everything that can move."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()
        model(pixel_values=torch.randn(4, 3, 32, 32)).logits.square().sum().backward()
        optimizer.step()


def test_frozen_layers_keep_statistics_and_scale_through_training() -> None:
    model = backbones.load("test_resnet", 2, random_weights=True)
    batchnorm.freeze(model)
    layers = batchnorm.layers(model)
    assert len(layers) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) > 10
    before = {name: {k: v.clone() for k, v in layer.state_dict().items()} for name, layer in layers.items()}
    train(model)
    assert {*before[next(iter(before))]} == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    for name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name][key]), (name, key)
    assert model.state_dict().keys() == backbones.load("test_resnet", 2, random_weights=True).state_dict().keys()


def test_frozen_layers_normalize_with_their_statistics_in_training_mode() -> None:
    model = backbones.load("test_resnet", 2, random_weights=True)
    image = torch.randn(4, 3, 32, 32)
    expected = model.eval()(pixel_values=image).logits
    batchnorm.freeze(model)
    assert torch.equal(model.train()(pixel_values=image).logits, expected)


def test_layers_that_are_not_frozen_follow_the_data() -> None:
    model = backbones.load("test_resnet", 2, random_weights=True)
    before = batchnorm.statistics(model)
    assert before.keys() <= model.state_dict().keys()
    assert len(before) == 2 * len(batchnorm.layers(model))
    train(model)
    after = batchnorm.statistics(model)
    assert not any(torch.equal(before[key], after[key]) for key in before)


def test_batch_norm_of_the_efficientnet_kind_is_found() -> None:
    """timm fuses an activation into its subclass."""
    model = backbones.load("test_efficientnet", 2, random_weights=True)
    batchnorm.freeze(model)
    before = batchnorm.statistics(model)
    assert before
    train(model)
    assert all(torch.equal(before[key], tensor) for key, tensor in batchnorm.statistics(model).items())


@pytest.mark.parametrize("frozen", [False, True])
def test_adapted_statistics_are_those_of_the_batches_and_go_away(frozen: bool) -> None:
    torch.manual_seed(0)
    model = backbones.load("test_resnet", 2, random_weights=True).eval()
    if frozen:
        batchnorm.freeze(model)
    pixels = torch.randn(6, 3, 64, 64) * 3 + 1
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model(pixel_values=pixels).logits
    first = next(iter(batchnorm.layers(model).values()))
    seen: list[torch.Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with batchnorm.adapted(model, pixels.split(4)):  # 4 and 2, which count by their number
        expected = torch.cat(seen).mean(dim=(0, 2, 3))
        torch.testing.assert_close(first.running_mean, expected)
        assert not first.training
        assert not torch.allclose(model(pixel_values=pixels).logits, plain, atol=1e-3)
    hook.remove()
    torch.testing.assert_close(model(pixel_values=pixels).logits, plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "tracked" not in key)


def test_a_model_without_batch_norm_is_not_adapted() -> None:
    model = backbones.load("test_vit", 2, random_weights=True)
    with pytest.raises(HistoError, match="no batch norm"), batchnorm.adapted(model, []):
        pass
