"""A training step of this package, with and without its pieces, of others, and the least that it must take."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

from hf_histo.config import Config
from hf_histo.experiments.benchmark import peers
from hf_histo.experiments.benchmark.bench import Bench
from hf_histo.experiments.benchmark.timing import OURS, STOCK, STOCK_FLOAT32, TUNED, median_step, synchronize
from hf_histo.models import batchnorm, heads, lora_targets
from hf_histo.models.speed import folding
from hf_histo.training import feature_cache

FLOOR = "floor: forward, gradient to the first adapted layer's output"
FULL = "full fine-tuning"


def sides(bench: Bench) -> dict[str, Callable[[], float]]:
    """Seconds for a step: of the peers, of this package, and of the floor."""
    return {
        TUNED: partial(peers.training_step, bench, bench.precision, tuned=True),
        OURS: partial(ours, bench),
        STOCK: partial(peers.training_step, bench, bench.precision),
        STOCK_FLOAT32: partial(peers.training_step, bench, "no"),
        FLOOR: partial(floor, bench, True),
        "forward": partial(floor, bench, False),
    }


def pieces(bench: Bench) -> dict[str, Callable[[], float]]:
    """Seconds for a step of this package, and with each of its pieces turned off."""
    config = bench.config
    track = replace(config, model=replace(config.model, batch_norm="track"))
    single = replace(config, speed=replace(config.speed, mixed_precision="no"))
    full = replace(config, adapter=replace(config.adapter, method="full"))
    return {
        OURS: partial(ours, bench),
        "data on the device": partial(ours, bench, resident=True),
        "without mixed precision": partial(ours, bench, config=single),
        "without channels-last": partial(ours, bench, channels_last=False),
        "without freezing batch norm": partial(ours, bench, config=track, fold=False),
        "without folding batch norm and LoRA": partial(ours, bench, fold=False),
        "without batched augmentation": partial(ours, bench, pil=True),
        FULL: partial(ours, bench, config=full),
    }


def ours(
    bench: Bench,
    *,
    config: Config | None = None,
    fold: bool = True,
    channels_last: bool = True,
    pil: bool = False,
    resident: bool = False,
) -> float:
    """Seconds for a step of this package, with or without each of its pieces."""
    session = bench.session(config or bench.config)
    assert session.model is not None
    pixel_values: Callable[..., torch.Tensor] = session.pixel_values
    if resident:
        batch = bench.pixels(session.model)
        pixel_values = lambda inputs, view: batch  # noqa: E731
    elif pil:
        change = peers.pil_transforms(bench, session.model)

        def pixel_values(inputs: dict[str, Any], view: int | None) -> torch.Tensor:
            images = torch.stack([change(to_pil_image(image)) for image in inputs["image"].cpu()])
            return images.to(inputs["image"].device).contiguous(memory_format=torch.channels_last)

    if not channels_last:
        session.model.to(memory_format=torch.contiguous_format)
        before = pixel_values
        pixel_values = lambda inputs, view: before(inputs, view).contiguous()  # noqa: E731
    session.pixel_values = pixel_values  # type: ignore[method-assign]
    with feature_cache.folded_layers(session) if fold else nullcontext():
        return median_step(session, bench.options.steps)


def floor(bench: Bench, gradient: bool) -> float:
    """Seconds for a forward pass of the frozen backbone, and for the gradient that no step can do without.

    That is the gradient down to the output of the first layer that is trained: its own weights need no more, and the
    pixels and all layers below need none. Weights get no gradient here, and nothing is updated.
    """
    model: Any = bench.backbone(1)
    batchnorm.freeze(model)
    model.requires_grad_(False).to(bench.device, memory_format=torch.channels_last)
    pixels = bench.pixels(model)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(bench.precision)
    trained = trained_layers(bench) if gradient else []
    times = []
    with folding.folded(model, pixels[:2]), gradient_from(model, trained), torch.set_grad_enabled(gradient):
        for _ in range(bench.options.steps + 1):
            started = time.perf_counter()
            with torch.autocast(bench.device.type, half, enabled=half is not None):
                logits = model(pixel_values=pixels).logits
            if gradient:
                logits.float().sum().backward()
            synchronize()
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def trained_layers(bench: Bench) -> list[str]:
    """Names of the layers of the backbone that the options train: under LoRA, the head alone, or all."""
    o, model = bench.config.adapter, bench.backbone(1)
    whole = {name for name, _ in model.named_modules()}
    if o.method == "full":
        return list(lora_targets.adaptable_layers(model))
    if o.method == "linear":
        return [heads.name_of(model)]
    found = lora_targets.targets(model, o.target_modules, o.lora_rank, o.lora_blocks)
    if isinstance(found, str):
        found = [name for name, _ in model.named_modules() if re.fullmatch(found, name)]
    # The parts of a fused layer that `targets` split are not there in a model that nothing was done to.
    return list(dict.fromkeys(name if name in whole else name.rpartition(".")[0] for name in found))


@contextmanager
def gradient_from(model: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Within the block, outputs of `layers` of a frozen model require a gradient, and nothing before them does."""
    start = torch.zeros((), requires_grad=True)

    def require(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor | None:
        if output.requires_grad or not torch.is_grad_enabled():
            return None
        required: torch.Tensor = _Required.apply(output, start)
        return required

    with ExitStack() as stack:
        for name in layers:
            stack.callback(model.get_submodule(name).register_forward_hook(require).remove)
        yield


class _Required(torch.autograd.Function):
    """Its input as it is, with a gradient from here on; unlike a leaf, it may be changed in place."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[None, None]:
        return None, None
