"""Training views: exact if possible, dependent on the sample only, and distributed as declared."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_histo.errors import HistoError
from hf_histo.transforms import augmentation as module
from hf_histo.transforms.augmentation import LUMA, PRESETS, SINGLE_VIEW, Augmentation, TestTimeViews, augment, preset
from hf_histo.transforms.preprocessing import Preprocessing

EXACT = {"rtol": 0, "atol": 1e-4}


def batch(count: int, height: int = 24, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8))


def view(
    images: torch.Tensor, augmentation: Augmentation, size: int = 24, *, seed: int = 0, epoch: int = 0, first: int = 0
) -> torch.Tensor:
    index = torch.arange(first, first + len(images))
    return augment(images, augmentation, size, seed=seed, epoch=epoch, index=index)


def luma(views: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bchw,c->bhw", views, torch.tensor(LUMA))


def drawn(count: int, *, seed: int = 0, epoch: int = 0) -> dict[str, np.ndarray]:
    values = module.uniform(seed, epoch, torch.arange(count), len(module.PARAMETERS))
    return dict(zip(module.PARAMETERS, values.T, strict=True))


def test_none_changes_nothing() -> None:
    images = batch(5)
    torch.testing.assert_close(view(images, preset("none")), images / 255, **EXACT)


def test_flips_are_exact_and_all_four_occur() -> None:
    images = batch(64)
    views = view(images, preset("flips"))
    kinds = []
    for image, found in zip(images / 255, views, strict=True):
        flipped = [image, image.flip(-1), image.flip(-2), image.flip(-1, -2)]
        kinds.append([i for i, other in enumerate(flipped) if torch.allclose(found, other, **EXACT)])
    assert all(len(kind) == 1 for kind in kinds)
    assert {kind[0] for kind in kinds} == {0, 1, 2, 3}


@pytest.mark.parametrize("dimension", [-1, -2])
def test_a_certain_flip(dimension: int) -> None:
    images = batch(3)
    certain = Augmentation(horizontal_flip=float(dimension == -1), vertical_flip=float(dimension == -2))
    torch.testing.assert_close(view(images, certain), (images / 255).flip(dimension), **EXACT)


def test_quarter_turns_are_exact_and_all_four_occur() -> None:
    images = batch(64)
    turns = []
    for image, found in zip(images / 255, view(images, Augmentation(quarter_turns=True)), strict=True):
        turns.append([k for k in range(4) if torch.allclose(found, torch.rot90(image, k, (-2, -1)), **EXACT)])
    assert all(len(turn) == 1 for turn in turns)
    assert {turn[0] for turn in turns} == {0, 1, 2, 3}


def test_flips_and_turns_compose_to_the_eight_symmetries() -> None:
    images = batch(128)
    views = view(images, Augmentation(horizontal_flip=0.5, vertical_flip=0.5, quarter_turns=True))
    found = set()
    for image, one in zip(images / 255, views, strict=True):
        eight = [torch.rot90(side, k, (-2, -1)) for side in (image, image.flip(-1)) for k in range(4)]
        kinds = [i for i, other in enumerate(eight) if torch.allclose(one, other, **EXACT)]
        assert len(kinds) == 1
        found.add(kinds[0])
    assert found == set(range(8))


def test_a_turned_crop_is_the_crop_turned() -> None:
    crop = Augmentation(scale=(0.3, 0.3))
    images = batch(32)
    plain, turned = view(images, crop), view(images, dataclasses.replace(crop, quarter_turns=True))
    for image, found in zip(plain, turned, strict=True):
        assert any(torch.allclose(found, torch.rot90(image, k, (-2, -1)), **EXACT) for k in range(4))


def test_a_view_depends_only_on_seed_epoch_and_sample() -> None:
    images, jitter = batch(8), preset("crop-jitter")
    together = view(images, jitter, seed=3, epoch=2)
    order = torch.tensor([5, 0, 7])
    some = augment(images[order], jitter, 24, seed=3, epoch=2, index=order)
    torch.testing.assert_close(some, together[order], rtol=0, atol=1e-6)
    alone = augment(images[4:5], jitter, 24, seed=3, epoch=2, index=torch.tensor([4]))
    torch.testing.assert_close(alone, together[4:5], rtol=0, atol=1e-6)
    torch.manual_seed(123)
    assert torch.equal(view(images, jitter, seed=3, epoch=2), together)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"first": 1}])
def test_another_seed_epoch_or_sample_is_another_view(change: dict[str, int]) -> None:
    images = batch(1).expand(8, -1, -1, -1)
    changed = view(images, preset("crop-jitter"), **change)
    assert ((view(images, preset("crop-jitter")) - changed).abs().amax(dim=(1, 2, 3)) > 0.01).all()


def test_samples_differ() -> None:
    views = view(batch(1).expand(8, -1, -1, -1), preset("crop-jitter"))
    assert torch.pdist(views.flatten(1)).min() > 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_views_are_in_range_and_of_the_size_asked_for(name: str) -> None:
    for value in (0, 255):
        views = view(torch.full((16, 3, 20, 30), value, dtype=torch.uint8), preset(name), 24)
        assert views.shape == (16, 3, 24, 24)
        assert views.dtype == torch.float32
    strong = Augmentation(brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    views = view(batch(32), strong)
    assert views.min() >= 0
    assert views.max() <= 1


def test_normalization_commutes_with_resampling() -> None:
    images, index = batch(16, 40, 30), torch.arange(16)
    views = Preprocessing(24, 24, "bilinear", (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    for name, augmentation in PRESETS.items():
        first = augment(images, augmentation, 24, seed=0, epoch=0, index=index, normalize=views.normalize)
        last = views.normalize(augment(images, augmentation, 24, seed=0, epoch=0, index=index))
        torch.testing.assert_close(first, last, msg=lambda text, name=name: f"{name}: {text}", **EXACT)


@pytest.mark.parametrize("shape", [(40, 40), (30, 50)])
def test_crops_stay_within_the_image(shape: tuple[int, int]) -> None:
    """Pixel values are coordinates, so that a view shows where it is from: never mirrored at the border."""
    height, width = shape
    images = torch.zeros(64, 3, height, width, dtype=torch.uint8)
    images[:, 0] = torch.arange(width) * 5
    images[:, 1] = torch.arange(height)[:, None] * 5
    views = view(images, Augmentation(scale=(0.2, 0.9), ratio=(1 / 3, 3)), 24) * 255 / 5
    steps_x, steps_y = views[:, 0].diff(dim=-1), views[:, 1].diff(dim=-2)
    # At most half a pixel may be repeated at a border.
    assert (steps_x[..., 1:-1] > 0).all()
    assert (steps_y[:, 1:-1] > 0).all()
    assert torch.allclose(views[:, 0].std(dim=-2), torch.zeros(()), atol=1e-3)  # no shear


def test_the_declared_shares_and_ratios_are_drawn() -> None:
    augmentation = Augmentation(scale=(0.2, 0.8), ratio=(0.5, 2.0))
    maps, _ = module._geometry(drawn(4000), augmentation, torch.Size((60, 60)), 24)
    width, height = maps[:, 0, 0], maps[:, 1, 1]
    fits = (width < 1) & (height < 1)
    area, ratio = (width * height)[fits], (width / height)[fits]
    assert 0.2 <= area.min() < 0.21
    assert area.max() <= 0.8 + 1e-6
    assert 0.5 - 1e-6 <= ratio.min() < 0.55
    assert 1.9 < ratio.max() <= 2 + 1e-6
    # Where the crop lies is as wide as there is room, on both sides.
    room = (1 - width)[fits]
    place = maps[:, 0, 2][fits] / room
    assert (np.abs(place) <= 1 + 1e-5).all()
    assert abs(place.mean()) < 0.05
    assert abs(place.std() - 3**-0.5) < 0.03


def test_draws_are_uniform_and_independent() -> None:
    draws = module.uniform(0, 0, torch.arange(20000), 11)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert np.abs(np.histogram(column, 10, (0, 1))[0] - 2000).max() < 220  # five deviations
    along = [draws, np.roll(draws, 1, axis=0), module.uniform(0, 1, torch.arange(20000), 11)]
    correlation = np.corrcoef(np.concatenate(along, axis=1), rowvar=False) - np.eye(33)
    assert np.abs(correlation).max() < 0.04


def test_a_flip_has_the_probability_declared() -> None:
    draws = drawn(10000, seed=5, epoch=3)
    maps, _ = module._geometry(draws, Augmentation(horizontal_flip=0.2), torch.Size((8, 8)), 8)
    assert abs((maps[:, 0, 0] < 0).mean() - 0.2) < 0.02
    assert (maps[:, 1, 1] > 0).all()


def test_shrinking_does_not_alias() -> None:
    """One-pixel stripes shrink to their mean; picking every n-th pixel would show stripes."""
    stripes = torch.zeros(4, 3, 96, 96, dtype=torch.uint8)
    stripes[..., ::2] = 255
    for size in (24, 48):
        assert (view(stripes, preset("none"), size) - 0.5).abs().max() < 0.01


def test_shrinking_is_close_to_an_average_over_area() -> None:
    images = batch(4, 96, 96)
    expected = F.interpolate(images / 255, size=(24, 24), mode="area")
    torch.testing.assert_close(view(images, preset("none"), 24), expected, **EXACT)


def test_hue_and_saturation_keep_the_luma() -> None:
    images = (batch(32) // 4) + 96  # far enough from both ends that nothing is cut off
    plain = images / 255
    views = view(images, Augmentation(saturation=0.5, hue=0.1))
    torch.testing.assert_close(luma(views), luma(plain), rtol=0, atol=2e-3)
    assert (views - plain).abs().amax(dim=(1, 2, 3)).min() > 0.005


def test_saturation_draws_between_its_ends() -> None:
    images = (batch(256, 8, 8) // 4) + 96
    gray = luma(images / 255)[:, None]
    factor = (view(images, Augmentation(saturation=0.5), 8) - gray).std(dim=(1, 2, 3)) / (images / 255 - gray).std(
        dim=(1, 2, 3)
    )
    assert 0.49 <= factor.min() < 0.56
    assert 1.44 < factor.max() <= 1.51


def test_hue_leaves_gray_alone() -> None:
    images = batch(8)[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(view(images, Augmentation(hue=0.5)), images / 255, rtol=0, atol=2e-3)


def test_brightness_is_one_factor_per_sample() -> None:
    images = batch(200, 8, 8) // 2
    views = view(images, Augmentation(brightness=0.4), 8)
    factors = views.mean(dim=(1, 2, 3)) / (images / 255).mean(dim=(1, 2, 3))
    torch.testing.assert_close(views, images / 255 * factors.view(-1, 1, 1, 1), rtol=0, atol=1e-3)
    assert 0.59 < factors.min() < 0.65
    assert 1.35 < factors.max() < 1.41
    assert abs(factors.mean() - 1) < 0.06


def test_contrast_keeps_the_mean_luma() -> None:
    images = (batch(64) // 4) + 96
    plain = images / 255
    views = view(images, Augmentation(contrast=0.4))
    torch.testing.assert_close(luma(views).mean(dim=(1, 2)), luma(plain).mean(dim=(1, 2)), rtol=0, atol=1e-3)
    spread = luma(views).std(dim=(1, 2)) / luma(plain).std(dim=(1, 2))
    assert 0.59 < spread.min() < 0.7
    assert 1.3 < spread.max() < 1.41


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(HistoError, match=r"'stain'.*none, flips, crop-jitter"):
        preset("stain")


def test_rotation_turns_the_picture_about_its_center() -> None:
    """A dot off the center goes to every angle, at its distance."""
    images = torch.zeros(200, 3, 65, 65, dtype=torch.uint8)
    images[:, :, 30:35, 44:49] = 255  # its middle lies 14 pixels to the right of the center, (32, 32)
    inner = view(images, Augmentation(rotation=180), 65)[:, 0, 12:53, 12:53]  # corners show reflections
    grid = torch.arange(41) - 20.0
    weight = inner.sum(dim=(1, 2))
    x, y = (inner * grid).sum(dim=(1, 2)) / weight, (inner * grid[:, None]).sum(dim=(1, 2)) / weight
    assert (torch.hypot(x, y) - 14).abs().max() < 0.5
    quadrants = torch.stack([x > 0, y > 0]).int()
    assert all((torch.tensor(corner) == quadrants.T).all(1).sum() > 25 for corner in ((0, 0), (0, 1), (1, 0), (1, 1)))


def test_translation_and_shear_move_as_declared() -> None:
    maps, _ = module._geometry(drawn(2000), Augmentation(translation=0.1), torch.Size((40, 40)), 40)
    assert 0.19 < np.abs(maps[:, :, 2]).max() <= 0.2  # in a frame that is 2 wide
    assert (maps[:, :, :2] == np.eye(2)).all()
    maps, _ = module._geometry(drawn(2000), Augmentation(shear=30), torch.Size((40, 40)), 40)
    assert 0.5 < np.abs(maps[:, 0, 1]).max() <= 3**-0.5 + 1e-6
    assert (maps[:, 1, 0] == 0).all()


def test_stain_jitter_leaves_white_nearly_white_and_moves_stain() -> None:
    """White is changed by the offset only, by at most its density; a strong stain also by its factor."""
    white, stained = torch.full((64, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    stained[:] = torch.tensor([110, 60, 150], dtype=torch.uint8)[:, None, None]
    jitter = Augmentation(hed=0.05)
    assert view(white, jitter, 8).min() > np.exp(-3 * 0.05)
    moved = view(stained, jitter, 8)
    assert (moved - stained / 255).abs().amax(dim=(1, 2, 3)).min() > 0.001
    assert moved.std(dim=0).min() > 0.01


def test_blur_smooths_and_keeps_the_mean() -> None:
    images = batch(64)
    views = view(images, Augmentation(blur=2.0))
    spread = views.std(dim=(1, 2, 3)) / (images / 255).std(dim=(1, 2, 3))
    assert spread.max() <= 1.001
    assert spread.min() < 0.4
    torch.testing.assert_close(views.mean(dim=(1, 2, 3)), (images / 255).mean(dim=(1, 2, 3)), rtol=0, atol=0.03)


def test_noise_has_the_declared_deviation_and_belongs_to_the_sample() -> None:
    gray = torch.full((400, 3, 16, 16), 128, dtype=torch.uint8)
    noisy = view(gray, Augmentation(noise=0.1), 16) - 128 / 255
    deviations = noisy.std(dim=(1, 2, 3))
    assert 0.09 < deviations.max() < 0.11
    assert abs(deviations.mean() - 0.05) < 0.005
    alone = augment(gray[:1], Augmentation(noise=0.1), 16, seed=0, epoch=0, index=torch.tensor([7]))
    torch.testing.assert_close(alone[0], noisy[7] + 128 / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "augmentation", "message"),
    [
        (3, "square", "--test_time_views is 3, expected 1 or 8"),
        (0, "strong", "--test_time_views is 0, expected 1 to 64"),
        (65, "strong", "--test_time_views is 65, expected 1 to 64"),
        (8, "stronk", "--test_time_augmentation is 'stronk', expected one of square, none, flips"),
    ],
)
def test_views_that_there_are_not(count: int, augmentation: str, message: str) -> None:
    with pytest.raises(HistoError, match=message):
        TestTimeViews(count, augmentation)


def test_views_in_which_nothing_is_drawn_have_no_seed() -> None:
    """Otherwise adapters of two seeds would seem to see images differently."""
    assert TestTimeViews(1, "square", seed=1) == SINGLE_VIEW
    assert TestTimeViews(8, "square", seed=1) == TestTimeViews(8)
    assert TestTimeViews(2, "strong", seed=1) != TestTimeViews(2, "strong")
