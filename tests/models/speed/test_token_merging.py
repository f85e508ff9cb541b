"""Token merging in vision transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_histo.config import AdapterOptions
from hf_histo.errors import HistoError
from hf_histo.models import adapters, backbones
from hf_histo.models.speed import folding
from hf_histo.models.speed.token_merging import merge, merged_tokens


def test_the_most_similar_pairs_become_their_weighted_mean() -> None:
    # At even places 0, 2, 4, at odd places 1, 3; by their keys, 2 is most similar to 3, then 4 to 1.
    keys = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.01, 1.0], [1.0, 0.1]]])
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]])
    size = torch.tensor([[[1.0], [1.0], [3.0], [1.0], [1.0]]])
    one, sizes = merge(x, size, keys, 1)
    assert one[0, :, 0].tolist() == [1, 5, 2, (3 * 3 + 4) / 4]
    assert sizes[0, :, 0].tolist() == [1, 1, 1, 4]
    two, sizes = merge(x, size, keys, 2)
    assert two[0, :, 0].tolist() == [1, 3.5, 3.25]
    assert sizes[0, :, 0].tolist() == [1, 2, 4]


def test_a_class_token_is_merged_with_none_and_stays_the_first() -> None:
    torch.manual_seed(0)
    x, keys = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    keys[:, 1] = keys[:, 0]  # whatever it resembles
    fewer, sizes = merge(x, torch.ones(2, 9, 1), keys, 100, prefix=1)
    assert fewer.shape == (2, 5, 4)  # half of the eight others
    assert torch.equal(fewer[:, 0], x[:, 0]) and (sizes[:, 0] == 1).all()
    assert (sizes.sum(1) == 9).all()
    torch.testing.assert_close((fewer * sizes).sum(1), x.sum(1))


def model(name: str = "test_vit.r160_in1k", target_modules: str = "attention-qkv") -> Any:
    torch.manual_seed(0)
    backbone = backbones.load(name, 3, random_weights=True, image_size=64)
    adapted = adapters.add(backbone, AdapterOptions(target_modules=target_modules))
    for parameter in adapted.parameters():
        parameter.data = torch.randn_like(parameter) * 0.05
    return adapted.eval()


@torch.no_grad()
def test_equal_patches_are_merged_without_a_change() -> None:
    """Of an image in one color all patches are alike, up to their position, which is removed here."""
    adapted, pixels = model(), torch.full((2, 3, 64, 64), 0.3)
    adapted.base_model.model.timm_model.pos_embed.data.zero_()
    logits = adapted(pixel_values=pixels).logits
    with merged_tokens(adapted, 2):
        torch.testing.assert_close(adapted(pixel_values=pixels).logits, logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_see_fewer_tokens_and_the_model_is_what_it_was_afterwards() -> None:
    adapted, pixels = model(), torch.randn(3, 3, 64, 64)
    logits = adapted(pixel_values=pixels).logits
    seen: list[int] = []
    for block in adapted.base_model.model.timm_model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    with folding.merged(adapted, pixels), merged_tokens(adapted, 3):
        seen.clear()
        inside = adapted(pixel_values=pixels).logits
        assert torch.equal(adapted(pixel_values=pixels).logits, inside)
        alone = torch.cat([adapted(pixel_values=image[None]).logits for image in pixels])
    torch.testing.assert_close(alone, inside, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(inside, logits, atol=1e-4)
    assert seen[:2] == [seen[0], seen[0] - 3]
    assert torch.equal(adapted(pixel_values=pixels).logits, logits)


def test_other_backbones_are_refused() -> None:
    with (
        pytest.raises(HistoError, match="--token_merging is 8, expected it for a vision transformer of timm"),
        merged_tokens(model("test_resnet.r160_in1k", "all-conv"), 8),
    ):
        pass
