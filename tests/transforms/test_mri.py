"""The preparation of MRI slices, on synthetic heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures import stored

from hf_histo.transforms.mri import CONTRASTS, Preparation
from hf_histo.transforms.preprocessing import Preprocessing

STEPS = [
    Preparation(gray=True),
    Preparation(crop_to_brain=True),
    Preparation(even_field=True),
    *(Preparation(contrast=contrast) for contrast in CONTRASTS[1:]),
    Preparation(True, True, True, "clahe"),
]


def head(height: int = 160, width: int = 200, center: tuple[int, int] = (70, 90)) -> np.ndarray:
    """An elliptic head of half axes 50 and 40 with a bright scalp and a brain, on black, gray (height, width)."""
    y, x = np.mgrid[:height, :width]
    radius = np.hypot((y - center[0]) / 50, (x - center[1]) / 40)
    return np.where(radius < 0.9, 90.0, 0) + np.where((radius >= 0.9) & (radius < 1), 200.0, 0)


def rgb(gray: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([gray.clip(0, 255).astype(np.uint8)] * 3))


def test_by_default_nothing_happens() -> None:
    image = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    assert Preparation()(image) is image


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 16), (90, 61)])
def test_every_step_takes_any_image(step: Preparation, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for image in (
        torch.zeros(3, *size, dtype=torch.uint8),
        torch.full((3, *size), 255, dtype=torch.uint8),
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator),
    ):
        found = step(image)
        assert found.dtype == torch.uint8 and found.is_contiguous()
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        assert torch.equal(found, step(image))
        if not step.crop_to_brain:
            assert found.shape == image.shape


def test_gray_is_the_luma() -> None:
    image = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    assert (Preparation(gray=True)(image) == 76).all()
    gray = rgb(head())
    assert torch.equal(Preparation(gray=True)(gray), gray)


def test_the_crop_holds_the_head_and_little_else() -> None:
    image = head()
    image[5:12, 150:190] = 255  # a label that was burnt in
    found = Preparation(crop_to_brain=True)(rgb(image))
    height, width = found.shape[1:]
    assert 98 <= height <= 110 and 78 <= width <= 90  # the head has 99 x 79 pixels
    assert found.long().sum() >= rgb(head()).long().sum()
    assert found.max() == 200  # the label is gone


def test_an_image_without_a_head_stays_whole() -> None:
    image = np.zeros((100, 100))
    image[40:50, 40:50] = 200
    assert Preparation(crop_to_brain=True)(rgb(image)).shape == (3, 100, 100)


def test_a_field_is_evened_out() -> None:
    image = head() * np.linspace(-0.5, 2.5, 200)[None].clip(0.4, 1.6)  # brighter to the right
    after = Preparation(even_field=True)(rgb(image))[0].numpy().astype(float)
    left, right = (slice(50, 90), slice(60, 80)), (slice(50, 90), slice(100, 120))  # of the brain
    assert image[right].mean() / image[left].mean() > 1.7
    assert after[right].mean() / after[left].mean() < 1.3
    assert not after[head() == 0].any()  # black stays black


def test_a_stretch_uses_all_levels() -> None:
    found = Preparation(contrast="stretch")(rgb(head() / 4 + 30))
    assert found.min() == 0 and found.max() == 255


def test_clahe_raises_faint_contrast() -> None:
    brain = head() == 90
    texture = head() + np.random.default_rng(0).normal(0, 3, (160, 200)) * brain
    before = rgb(texture)[0].numpy()[brain].astype(float)
    after = Preparation(contrast="clahe")(rgb(texture))[0].numpy()[brain].astype(float)
    assert after.std() > 1.5 * before.std()


def test_prepared_slices_make_a_batch() -> None:
    images = [rgb(head()), rgb(head(center=(80, 120))), rgb(head() * 0.5)]
    views = Preprocessing(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3, preparation=Preparation(crop_to_brain=True))
    read = [views.read(stored(*images))[place]["image"] for place in range(3)]
    assert {image.shape for image in read} == {(3, 32, 32)}
    for place, image in enumerate(images):
        assert torch.equal(read[place], views.square(views.preparation(image), 32))
        alone = views.read(stored(image))[0]["image"]
        assert torch.equal(alone, read[place])
    same = Preprocessing(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3, preparation=Preparation(contrast="clahe"))
    assert same.read(stored(*images))[0]["image"].shape == images[0].shape
