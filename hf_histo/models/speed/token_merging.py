"""Token merging (ToMe): a vision transformer that averages similar patches from block to block, for faster prediction.

D. Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, https://arxiv.org/abs/2210.09461.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from hf_histo.errors import HistoError
from hf_histo.models.speed.activation_cut import replaced
from hf_histo.models.speed.attention import Replaced


@contextmanager
def merged_tokens(model: nn.Module, count: int) -> Iterator[None]:
    """Within the block, each transformer block of `model` merges `count` pairs of patches, at most half of the patches.

    This changes the logits; the weights stay what they are. `count` 0 changes nothing.

    Raises HistoError for a backbone that is no vision transformer of timm with plain blocks and at most one token
    beside its patches.
    """
    if not count:
        yield
        return
    found = [module for module in model.modules() if isinstance(module, VisionTransformer)]
    blocks = [module for module in model.modules() if type(module) is Block]
    if len(found) != 1 or not blocks or len(blocks) != len(found[0].blocks) or found[0].num_prefix_tokens > 1:
        raise HistoError(
            f"--token_merging is {count}, expected it for a vision transformer of timm with plain blocks and at most a "
            "class token beside its patches; leave it out"
        )
    (transformer,) = found
    # Patches that each token stands for: (B, N, 1), of the blocks so far.
    sizes: list[torch.Tensor] = []
    with ExitStack() as stack:
        stack.callback(transformer.register_forward_pre_hook(lambda module, inputs: sizes.clear()).remove)
        for block in blocks:
            stack.enter_context(replaced(block, _forward(block, count, transformer.num_prefix_tokens, sizes)))
        yield


def _forward(block: Any, count: int, prefix: int, sizes: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function of a block that merges tokens between attention and MLP, and updates `sizes`."""

    def forward(x: torch.Tensor, attn_mask: None = None, is_causal: bool = False) -> torch.Tensor:
        size = sizes.pop() if sizes else torch.ones_like(x[..., :1])
        keys: list[torch.Tensor] = []

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            """With the weight of a token that of the patches that it stands for."""
            keys.append(key)
            weights = size.log().to(query.dtype)[:, None, None, :, 0]
            return F.scaled_dot_product_attention(query, key, value, **(kwargs | {"attn_mask": weights}))

        with Replaced(attend):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        x, size = merge(x, size, keys[0].mean(1), count, prefix)
        sizes.append(size)
        output: torch.Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return output

    return forward


def merge(
    x: torch.Tensor, size: torch.Tensor, keys: torch.Tensor, count: int, prefix: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the `count` most similar pairs of tokens, one of each pair at an even and one at an odd place.

    Bipartite soft matching, appendix D of the paper: each token at an even place is matched with the most similar one
    at an odd place, by the cosine of their keys, and the best matches are merged, with `size` as weights.

    Args:
        x: tokens (B, N, width).
        size: patches that each stands for, (B, N, 1).
        keys: (B, N, k).
        count: pairs to merge, at most half of the tokens that may be.
        prefix: 1 if the first token is a class token, which is merged with none and stays the first; else 0.

    Returns the tokens (B, N - count, width) and their sizes (B, N - count, 1).
    """
    count = min(count, (x.shape[1] - prefix) // 2)
    if not count:
        return x, size
    keys = F.normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(-1, -2)
    if prefix:
        similarity[:, 0] = -torch.inf
    best, partner = similarity.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    given, kept = order[:, :count, None], order[:, count:].sort(-1).values[..., None]
    taker = partner[..., None].gather(1, given)

    def merged(tokens: torch.Tensor) -> torch.Tensor:
        even, odd = tokens[:, ::2], tokens[:, 1::2]
        width = tokens.shape[-1]
        summed = odd.scatter_add(1, taker.expand(-1, -1, width), even.gather(1, given.expand(-1, -1, width)))
        return torch.cat([even.gather(1, kept.expand(-1, -1, width)), summed], dim=1)

    sizes = merged(size)
    return merged(x * size) / sizes, sizes
