"""Heat maps of the evidence for a class in an image (Grad-CAM), and figures of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_histo.errors import HistoError
from hf_histo.evaluation.figures.style import drawing


class _Classes(nn.Module):
    """Wraps a model so that it returns one logit per class, (B, K); one logit x becomes (-x, x)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
        return torch.cat([-logits, logits], dim=1) if logits.shape[1] == 1 else logits


def heat_map(model: nn.Module, pixels: torch.Tensor, chosen: int) -> torch.Tensor:
    """Evidence for class `chosen` in one view: float32 (S, S) in [0, 1], with a maximum of 1.

    The product of gradient and activation of the last layer with spatial positions, summed over channels and clipped at
    zero (HiResCAM: Draelos & Carin 2020, "Use HiResCAM instead of Grad-CAM", eq. 3). For a network that ends in average
    pooling and a linear layer, this is Grad-CAM (Selvaraju et al. 2017, eq. 1-2). In a vision transformer, positions
    are the patch tokens after the last normalization layer at which they still affect the logit.

    Args:
        model: takes `pixel_values` and returns an object with `logits`.
        pixels: a normalized evaluation view (1, 3, S, S).
        chosen: index of the class; a single logit is evidence for class 1 and against class 0.

    Raises `HistoError` if captum is not installed, and for a model without a layer with spatial positions.
    """
    try:
        from captum.attr import LayerGradientXActivation
    except ImportError:
        raise HistoError("explanations need captum: pip install 'hf_histo[explain]'") from None
    classes = _Classes(model.eval())
    layer, (height, width) = _last_places(classes, pixels, chosen)
    with torch.enable_grad():
        found = LayerGradientXActivation(classes, layer).attribute(pixels.requires_grad_(), target=chosen).detach()
    tokens = found.ndim == 3
    strength = found.sum(2)[:, -height * width :].reshape(1, height, width) if tokens else found.sum(1)
    strength = strength.clamp(min=0)
    peak = strength.max()
    resized = nn.functional.interpolate(strength[None] / (peak or 1), pixels.shape[-2:], mode="bilinear")
    return resized[0, 0].clamp(0, 1)


def _last_places(classes: nn.Module, pixels: torch.Tensor, chosen: int) -> tuple[nn.Module, tuple[int, int]]:
    """The last layer whose output has spatial positions that affect the logit, and their rows and columns."""
    seen: list[tuple[nn.Module, torch.Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad and output.ndim in (3, 4):
            output.retain_grad()
            seen.append((module, output))

    hooks = [module.register_forward_hook(note) for module in classes.modules()]
    try:
        with torch.enable_grad():
            classes(pixels.detach().requires_grad_())[0, chosen].backward()
    finally:
        for hook in hooks:
            hook.remove()
        classes.zero_grad()
    places: list[tuple[nn.Module, torch.Tensor]]
    maps = [(module, out) for module, out in seen if out.ndim == 4 and min(out.shape[2:]) > 1]
    tokens = [(module, out) for module, out in seen if out.ndim == 3 and isinstance(module, nn.LayerNorm)]
    if tokens:
        # Patches come from a convolution; the class and register tokens are before the patch tokens.
        grid = next(out.shape[2:] for module, out in maps if isinstance(module, nn.Conv2d))
        places = [(module, out.grad[:, -grid.numel() :]) for module, out in tokens if out.grad is not None]
    else:
        places = [(module, out.grad) for module, out in maps if out.grad is not None]
    for module, gradient in reversed(places):
        once = sum(module is other for other, _ in seen) == 1
        if once and gradient.any():
            height, width = grid if tokens else gradient.shape[2:]
            return module, (int(height), int(width))
    raise HistoError("the model has no spatial layer with a gradient that is not zero; no explanation can be drawn")


def blend(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Overlay a heat map (H, W) in [0, 1] on an image (H, W, 3), more opaque where hotter: uint8 (H, W, 3)."""
    weight = 0.45 * heat[..., None]
    color = heat_colors(heat) * 255
    blended: NDArray[np.uint8] = np.rint(image * (1 - weight) + color * weight).astype(np.uint8)
    return blended


def heat_colors(heat: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Colors (..., 3) in [0, 1] of values (...) in [0, 1], as `blend` lays them over an image."""
    from matplotlib import colormaps

    colors: NDArray[np.float64] = colormaps["inferno"](0.25 + 0.7 * heat)[..., :3]
    return colors


def explanations(
    images: Sequence[NDArray[np.uint8]], heats: Sequence[NDArray[np.float32]], titles: Sequence[str], path: str | Path
) -> None:
    """Draw each image, and below it the image with its heat map, as a PNG.

    Args:
        images: uint8 (H, W, 3) each; sizes may differ.
        heats: heat map of each image, (H, W) in [0, 1].
        titles: title of each image.
        path: path of the PNG.
    """
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    with drawing(path, 2.2 * columns, 4.8 * rows) as figure:
        panels = figure.subplots(2 * rows, columns, squeeze=False)
        for axes in panels.ravel():
            axes.set_axis_off()
        for place, (image, heat, title) in enumerate(zip(images, heats, titles, strict=True)):
            row, column = divmod(place, columns)
            panels[2 * row, column].imshow(image)
            panels[2 * row, column].set_title(title, fontsize=8)
            panels[2 * row + 1, column].imshow(blend(image, heat))
