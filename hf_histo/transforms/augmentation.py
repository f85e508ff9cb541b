"""Training augmentation of a uint8 batch on the training device, with random parameters for each sample.

The geometric changes of a sample are combined into one affine map, and its color changes into another, as in Karras et
al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix B: a batch costs one resampling and one
3x3 product per pixel. The parameters depend only on (seed, epoch, sample), so a sample looks the same whatever the
number of workers and processes, and in a resumed run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field

from hf_histo.config import Config
from hf_histo.errors import HistoError
from hf_histo.files import STRICT
from hf_histo.transforms.preprocessing import Preprocessing

MAX_VIEWS = 64  # test-time views of a prediction; with more, the mean hardly changes
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights of torchvision's and PIL's gray conversion
RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))  # NTSC 1953
# Optical density in red, green and blue of hematoxylin, eosin and DAB: Ruifrok & Johnston 2001, table 1, unit rows
HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


@dataclass(frozen=True)
class Augmentation:
    """Ranges from which each sample's parameters are drawn.

    Attributes:
        scale: area of the random crop as a share of the image's, (low, high) in (0, 1].
        ratio: width / height of the crop, (low, high), drawn log-uniformly.
        horizontal_flip, vertical_flip: probability in [0, 1].
        quarter_turns: whether to rotate by 0, 90, 180 or 270 degrees with equal chance.
        rotation: further rotation drawn from [-value, value], in degrees.
        shear: horizontal shear drawn from [-value, value], in degrees.
        translation: shift drawn from [-value, value], as a share of the image's side; the image is continued by
            reflection.
        brightness, contrast, saturation: factor drawn from [1 - value, 1 + value].
        hue: rotation of the hue drawn from [-value, value], in turns (0.5 is half the circle).
        hed: jitter of each stain's density: a factor from [1 - value, 1 + value] and an offset from [-value, value]
            in units of optical density (Tellez et al. 2018, "Whole-slide mitosis detection ... using PHH3 as a
            reference", section III-E, where it is 0.05).
        blur: standard deviation of a Gaussian blur drawn from [0, value], in pixels of the stored image.
        noise: standard deviation of Gaussian noise drawn from [0, value], for pixel values in [0, 1].
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    quarter_turns: bool = False
    rotation: float = 0.0
    shear: float = 0.0
    translation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    hed: float = 0.0
    blur: float = 0.0
    noise: float = 0.0

    def side(self, size: int) -> int:
        """Side in pixels of a square image whose smallest crop has as many pixels as a view of `size` x `size`."""
        return math.ceil(size / math.sqrt(self.scale[0]))


PRESETS = {
    "none": Augmentation(),
    "flips": Augmentation(horizontal_flip=0.5, vertical_flip=0.5),
    # Random resized crop, flips and color jitter, as in an unpublished report that gives no strengths. These were
    # chosen to keep half of the tissue in view, and to change color about as much as scanners differ.
    "crop-jitter": Augmentation(
        scale=(0.5, 1.0),
        ratio=(3 / 4, 4 / 3),
        horizontal_flip=0.5,
        vertical_flip=0.5,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        hue=0.05,
    ),
    # Used to adapt CLIP, e.g. by Zanella & Ben Ayed 2024 (arXiv 2405.18541) and Dausort et al. 2024 (arXiv 2411.14975,
    # their main.py).
    "resized-crop": Augmentation(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), horizontal_flip=0.5),
    # Flips, rotation, shear and translation; the strengths are our choice.
    "affine": Augmentation(
        scale=(0.8, 1.0), horizontal_flip=0.5, vertical_flip=0.5, rotation=180.0, shear=10.0, translation=0.1
    ),
    # For domain shift: all orientations of the tissue, and variations of stain, scanner and sensor.
    "strong": Augmentation(
        scale=(0.4, 1.0),
        ratio=(3 / 4, 4 / 3),
        horizontal_flip=0.5,
        vertical_flip=0.5,
        quarter_turns=True,
        brightness=0.25,
        contrast=0.3,
        saturation=0.3,
        hue=0.08,
        hed=0.1,
        blur=1.0,
        noise=0.03,
    ),
    # For slices of a head, which are nearly upright; left and right are interchangeable.
    "mri": Augmentation(
        scale=(0.7, 1.0), horizontal_flip=0.5, rotation=20.0, translation=0.05, brightness=0.2, contrast=0.3
    ),
}


def preset(name: str) -> Augmentation:
    """The augmentation preset `name`. Raises `HistoError`, listing the presets, for an unknown name."""
    if name not in PRESETS:
        raise HistoError(f"--augmentation is {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


# The parameters drawn for a sample, in this order: new ones are appended, so that the others keep their values.
PARAMETERS = (
    *("area", "aspect", "crop_x", "crop_y", "flip_x", "flip_y", "quarter", "angle", "shear", "shift_x", "shift_y"),
    *("brightness", "contrast", "saturation", "hue", "blur", "noise"),
    *("hematoxylin", "eosin", "residual", "hematoxylin_offset", "eosin_offset", "residual_offset"),
)
Draws = dict[str, np.ndarray]


def augment(
    images: torch.Tensor,
    augmentation: Augmentation,
    size: int,
    *,
    seed: int,
    epoch: int,
    index: NDArray[np.int64],
    normalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Augment images (B, 3, H, W), uint8 or float in [0, 1]: float32 (B, 3, size, size) in [0, 1] on the same device.

    The result is in the memory format channels last. Color, blur and noise are applied to the stored image, as a
    scanner would; then it is resampled by the geometric map.

    Args:
        images: the batch.
        augmentation: ranges of the parameters.
        size: height and width of the result in pixels.
        seed, epoch: determine the parameters together with `index`.
        index: index of each sample in the data set, (B,) int64.
        normalize: an affine map of each channel, such as `Preprocessing.normalize`. It is applied before resampling,
            which commutes with it: there are usually fewer pixels before than after.
    """
    draws = dict(zip(PARAMETERS, uniform(seed, epoch, index, len(PARAMETERS)).T, strict=True))
    floats = images.float() / 255 if images.dtype == torch.uint8 else images
    for change in (_restain, _recolor, _scan):
        floats = change(floats, draws, augmentation)
    if normalize is not None:
        floats = normalize(floats)
    return _resample(floats, draws, augmentation, size).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class TestTimeViews:
    """Test-time views: the views of an image whose mean logit is its prediction.

    Attributes:
        count: number of views, at most `MAX_VIEWS`.
        augmentation: "square" for the image itself (`count` 1) or all its quarter turns and their mirror images
            (`count` 8); or the augmentation preset that each view is drawn from.
        seed: seed of drawn views; 0 for "square", where nothing is drawn, so that such views are equal.

    Raises `HistoError` for another number of "square" views, or an unknown preset.
    """

    __pydantic_config__ = STRICT

    count: int = 1
    augmentation: str = "square"
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        square = self.augmentation == "square"
        if not square and self.augmentation not in PRESETS:
            raise HistoError(
                f"--test_time_augmentation is {self.augmentation!r}, expected one of square, {', '.join(PRESETS)}"
            )
        if not 1 <= self.count <= MAX_VIEWS or (square and self.count not in (1, 8)):
            expected = "1 or 8; other numbers need --test_time_augmentation" if square else f"1 to {MAX_VIEWS}"
            raise HistoError(f"--test_time_views is {self.count!r}, expected {expected}")
        if square:
            object.__setattr__(self, "seed", 0)

    @classmethod
    def of(cls, config: Config) -> TestTimeViews:
        """The test-time views set by `--test_time_views` and `--test_time_augmentation`."""
        return cls(config.prediction.test_time_views, config.prediction.test_time_augmentation, config.training.seed)

    def __call__(
        self, images: torch.Tensor, preprocessing: Preprocessing, index: NDArray[np.int64]
    ) -> Iterator[torch.Tensor]:
        """Yield each view of images (B, 3, H, W), uint8 or float in [0, 1]: normalized float32 (B, 3, S, S).

        S is `preprocessing.image_size`. `index` is as in `augment`; the number of the view takes the place of the
        epoch, so that views do not depend on batches and processes.
        """
        if self.augmentation != "square":
            augmentation, size = PRESETS[self.augmentation], preprocessing.image_size
            for view in range(self.count):
                yield augment(
                    images,
                    augmentation,
                    size,
                    seed=self.seed,
                    epoch=view,
                    index=index,
                    normalize=preprocessing.normalize,
                )
            return
        pixels = preprocessing(images)
        yield pixels
        for turns, mirrored in list(itertools.product(range(4), (False, True)))[1 : self.count]:
            turned = torch.rot90(pixels.flip(-1) if mirrored else pixels, turns, (-2, -1))
            yield turned.contiguous(memory_format=torch.channels_last)


SINGLE_VIEW = TestTimeViews()


def uniform(seed: int, epoch: int, index: NDArray[np.int64], count: int) -> np.ndarray:
    """Uniform random numbers in [0, 1), float64 (B, count), a pure function of (seed, epoch, index, column).

    A counter-based generator: SplitMix64's mixing function (Steele, Lea & Flood 2014, "Fast splittable pseudorandom
    number generators", figure 17) is applied to each of these numbers in turn.
    """
    state = _mix(np.array(seed, dtype=np.uint64))
    state = _mix(state ^ np.uint64(epoch))
    state = _mix(state ^ np.asarray(index).astype(np.uint64))
    state = _mix(state[:, None] ^ np.arange(1, count + 1, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _restain(images: torch.Tensor, draws: Draws, augmentation: Augmentation) -> torch.Tensor:
    """Jitter the densities of the stains, by an affine map in optical-density space."""
    if not augmentation.hed:
        return images
    stains = ("hematoxylin", "eosin", "residual")
    factor = np.stack([_between(draws[s], 1 - augmentation.hed, 1 + augmentation.hed) for s in stains], axis=1)
    offset = np.stack([_between(draws[f"{s}_offset"], -augmentation.hed, augmentation.hed) for s in stains], axis=1)
    rows = np.array(HED) / np.linalg.norm(HED, axis=1, keepdims=True)
    matrix = np.einsum("ik,bk,kj->bij", rows.T, factor, np.linalg.inv(rows.T))
    density = -torch.log(images.clamp(min=1 / 255))
    return torch.exp(-_affine(density, matrix, offset @ rows)).clamp_(0, 1)


def _recolor(images: torch.Tensor, draws: Draws, augmentation: Augmentation) -> torch.Tensor:
    """Change brightness b, contrast c, saturation and hue: x -> b c M x + b (1 - c) m, with the image's mean luma m.

    The matrix M mixes each pixel with its gray value (saturation) and rotates it in the IQ plane (hue), keeping luma.
    """
    strengths = {name: getattr(augmentation, name) for name in ("brightness", "contrast", "saturation")}
    if not any((*strengths.values(), augmentation.hue)):
        return images
    bright, contrast, saturation = (_between(draws[name], 1 - s, 1 + s) for name, s in strengths.items())
    angle = 2 * math.pi * _between(draws["hue"], -augmentation.hue, augmentation.hue)
    rotation = np.zeros((len(angle), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = saturation * np.cos(angle)
    rotation[:, 2, 1] = saturation * np.sin(angle)
    rotation[:, 1, 2] = -rotation[:, 2, 1]
    to_yiq = np.array(RGB_TO_YIQ)
    matrix = (bright * contrast)[:, None, None] * (np.linalg.inv(to_yiq) @ rotation @ to_yiq)
    luma = torch.einsum("bchw,c->b", images, torch.tensor(LUMA, device=images.device)) / images[0, 0].numel()
    shift = torch.from_numpy(bright * (1 - contrast)).to(luma.device) * luma.double()
    return _affine(images, matrix, shift[:, None].expand(-1, 3)).clamp_(0, 1)


def _scan(images: torch.Tensor, draws: Draws, augmentation: Augmentation) -> torch.Tensor:
    """Add blur (point spread) and sensor noise."""
    if augmentation.blur:
        radius = math.ceil(2 * augmentation.blur)
        deviation = torch.from_numpy(np.maximum(draws["blur"] * augmentation.blur, 0.1)).to(images)
        offsets = torch.arange(-radius, radius + 1, device=images.device)
        kernel = torch.exp(-0.5 * (offsets / deviation[:, None]) ** 2)
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None, None]
        flat = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]
        flat = F.conv2d(F.conv2d(flat, kernel, groups=len(kernel)), kernel.transpose(2, 3), groups=len(kernel))
        images = flat[0].view_as(images)
    if augmentation.noise:
        fields = [  # drawn on the CPU, so that they are the same on every device
            torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(int(draw * 2**53)))
            for draw in draws["noise"]
        ]
        deviation = torch.from_numpy((draws["noise"] * augmentation.noise)[:, None, None, None]).to(images)
        images = (images + torch.stack(fields).to(images.device) * deviation).clamp_(0, 1)
    return images


def _resample(images: torch.Tensor, draws: Draws, augmentation: Augmentation, size: int) -> torch.Tensor:
    placed, levels = _geometry(draws, augmentation, images.shape[-2:], size)
    # If no map reaches outside its image, the cheaper padding gives the same result.
    padding = "border" if np.abs(placed).sum(-1).max() <= 1 + 1e-6 else "reflection"
    maps = torch.tensor(placed, device=images.device)
    if not levels.any():
        return _sample(images, maps, size, padding)
    views = torch.empty(len(images), 3, size, size, device=images.device)
    for level in np.unique(levels):  # average a large crop down first, against aliasing
        chosen = torch.from_numpy(np.flatnonzero(levels == level)).to(images.device)
        source = F.avg_pool2d(images[chosen], 2 ** int(level)) if level else images[chosen]
        views[chosen] = _sample(source, maps[chosen], size, padding)
    return views


def _sample(images: torch.Tensor, maps: torch.Tensor, size: int, padding: str) -> torch.Tensor:
    """Resample images (B, 3, H, W) to (B, 3, size, size) by maps (B, 2, 3) from view to image, both in [-1, 1]."""
    steps = torch.arange(1, 2 * size, 2, device=maps.device) / size - 1  # centers of pixels
    across, down, shift = maps[..., None, None].unbind(2)
    # The same as `affine_grid` in a third of the time: x and y are separate planes, which `grid_sample` accepts.
    grid = (across * steps + (down * steps[:, None] + shift)).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _geometry(draws: Draws, augmentation: Augmentation, shape: torch.Size, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Affine maps from view to image, both in [-1, 1], float32 (B, 2, 3), and how often to halve images, (B,)."""
    height, width = shape
    area = _between(draws["area"], *augmentation.scale)
    aspect = np.exp(_between(draws["aspect"], *np.log(augmentation.ratio)))
    # As in torchvision's RandomResizedCrop, the ratio is in pixels; a box larger than the image is cut to it.
    box_width = np.minimum(np.sqrt(area * aspect * height / width), 1.0)
    box_height = np.minimum(np.sqrt(area / aspect * width / height), 1.0)
    shift = augmentation.translation
    center_x = (2 * draws["crop_x"] - 1) * (1 - box_width) + 2 * _between(draws["shift_x"], -shift, shift)
    center_y = (2 * draws["crop_y"] - 1) * (1 - box_height) + 2 * _between(draws["shift_y"], -shift, shift)
    # In pixels from the center: flip and scale to the box, shear, turn.
    to_x = box_width * width * np.where(draws["flip_x"] < augmentation.horizontal_flip, -1.0, 1.0)
    to_y = box_height * height * np.where(draws["flip_y"] < augmentation.vertical_flip, -1.0, 1.0)
    shear = np.tan(np.radians(_between(draws["shear"], -augmentation.shear, augmentation.shear)))
    quarters = np.floor(draws["quarter"] * 4) * augmentation.quarter_turns
    free = np.radians(_between(draws["angle"], -augmentation.rotation, augmentation.rotation))
    cos, sin = np.cos(free), np.sin(free)
    for turn in range(1, 4):  # exact, so that a quarter turn permutes pixels
        cos, sin = np.where(quarters >= turn, -sin, cos), np.where(quarters >= turn, cos, sin)
    rows = [
        [to_x * cos / width, to_y * (shear * cos - sin) / width, center_x],
        [to_x * sin / height, to_y * (shear * sin + cos) / height, center_y],
    ]
    maps = np.ascontiguousarray(np.array(rows, dtype=np.float32).transpose(2, 0, 1))
    shrink = np.sqrt(np.abs(to_x * to_y)) / size
    return maps, np.maximum(np.floor(np.log2(shrink) + 1e-6), 0).astype(int)


def _affine(images: torch.Tensor, matrix: np.ndarray, shift: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Apply matrix (B, 3, 3) @ color + shift (B, 3) to each pixel."""
    mixed = torch.einsum("bij,bjhw->bihw", torch.from_numpy(matrix).to(images), images)
    return mixed.add_(torch.as_tensor(shift).to(images)[:, :, None, None])


def _between(draw: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * draw


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
        return mixed
