"""The floor of a training step: the gradient that LoRA needs, and none below."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from miniature import SIZE, write_backbone, write_hf_vit

from hf_histo.config import AdapterOptions, Config, ModelOptions
from hf_histo.config.experiments import BenchmarkOptions
from hf_histo.experiments.benchmark import steps
from hf_histo.experiments.benchmark.bench import Bench
from hf_histo.models import batchnorm
from hf_histo.models.speed import folding


def bench_of(backbone: Path, **adapter: str) -> Bench:
    model = ModelOptions(backbone=str(backbone), image_size=SIZE, resize_size=SIZE)
    return Bench(Config(model=model, adapter=AdapterOptions(**adapter)), BenchmarkOptions(steps=1), Path("unused"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "target_modules", "reached", "spared"),
    [
        # Its activations are computed in place on what the first convolution gives.
        ("test_resnet.r160_in1k", "all-conv", ["timm_model.conv1.0"], []),
        ("test_resnet.r160_in1k", "last-conv", ["layer4.0.conv1"], ["layer3", "timm_model.conv1.0"]),
        # What a fused layer is split into for LoRA is not there in the frozen backbone.
        ("test_vit.r160_in1k", "attention-qv", ["blocks.0.attn.qkv"], ["patch_embed"]),
        # Layers side by side: each needs the gradient to its own output.
        ("transformers", "attention-qkvo", ["q_proj", "k_proj", "v_proj"], ["embeddings"]),
    ],
)
def test_the_floor_computes_gradients_down_to_the_first_adapted_layers(
    name: str, target_modules: str, reached: list[str], spared: list[str], tmp_path: Path
) -> None:
    backbone = write_hf_vit(tmp_path) if name == "transformers" else write_backbone(tmp_path, name)
    bench = bench_of(backbone, target_modules=target_modules)
    model = bench.backbone(1)
    batchnorm.freeze(model)
    model.requires_grad_(False)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    every = [path for path, _ in model.named_modules()]
    first = [next(path for path in every if path.endswith(end)) for end in reached]
    below = [next(path for path in every if path.endswith(end)) for end in spared]
    with folding.folded(model, pixels):
        every_gradient = gradients(model, pixels.clone().requires_grad_(), first)
    with folding.folded(model, pixels), steps.gradient_from(model, steps.trained_layers(bench)):
        found = gradients(model, pixels, [*first, *below])
    assert found.keys() == {*first}
    for path, gradient in found.items():
        torch.testing.assert_close(gradient, every_gradient[path], rtol=1e-3, atol=1e-5)


def gradients(model: torch.nn.Module, pixels: torch.Tensor, layers: list[str]) -> dict[str, torch.Tensor]:
    """Gradients of the sum of the logits to the outputs of some layers, where they are computed."""
    found: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for path in layers:

            def watch(module: torch.nn.Module, given: object, output: torch.Tensor, path: str = path) -> None:
                if output.requires_grad:
                    output.register_hook(lambda gradient: found.update({path: gradient}))

            stack.callback(model.get_submodule(path).register_forward_hook(watch).remove)
        model(pixel_values=pixels).logits.sum().backward()
    return found


def test_a_linear_probe_has_its_floor_at_the_head(tmp_path: Path) -> None:
    backbone = write_hf_vit(tmp_path)
    assert steps.trained_layers(bench_of(backbone, method="linear")) == ["classifier"]
    assert len(steps.trained_layers(bench_of(backbone, method="full"))) > 10
