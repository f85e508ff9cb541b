"""Images are mixed with others of their center, by parameters of their own, and so are their labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_histo.transforms.mixing import Mixing, _partners

CENTERS = np.array([0, 1, 0, 1, 2, 0, -1, -1, 1, 0, 0, 1])
VIEWS = torch.rand(12, 3, 20, 16, generator=torch.Generator().manual_seed(0))
INDEX = np.arange(100, 112)


def mixed(mixing: Mixing, epoch: int = 0) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    return mixing(VIEWS, CENTERS, seed=0, epoch=epoch, index=INDEX)


@pytest.mark.parametrize("mixing", [Mixing(mixup_alpha=0.4), Mixing(cutmix_alpha=1.0), Mixing(0.4, 1.0)])
def test_a_partner_is_another_image_of_the_center(mixing: Mixing) -> None:
    pixels, partners, own = mixed(mixing)
    assert (CENTERS[partners] == CENTERS).all()
    assert [row for row in range(12) if partners[row] == row] == [4]  # alone of its center
    assert torch.equal(pixels[4], VIEWS[4])
    assert ((own >= 0) & (own <= 1)).all() and len(set(own)) > 6


def test_mixup_blends_by_the_share() -> None:
    pixels, partners, own = mixed(Mixing(mixup_alpha=0.4))
    share = torch.from_numpy(own)[:, None, None, None]
    torch.testing.assert_close(pixels, share * VIEWS + (1 - share) * VIEWS[partners])


def test_cutmix_puts_in_a_box_of_the_area() -> None:
    pixels, partners, own = mixed(Mixing(cutmix_alpha=1.0))
    for row in set(range(12)) - {4}:
        kept = (pixels[row] == VIEWS[row]).all(0)
        assert (kept | (pixels[row] == VIEWS[partners[row]]).all(0)).all()
        assert kept.float().mean().item() == pytest.approx(own[row], abs=1e-6)
        box = ~kept
        assert torch.equal(box, box.any(1)[:, None] & box.any(0))


def test_both_are_drawn_equally_often_and_shares_are_of_the_beta_distribution() -> None:
    views, index = torch.rand(4000, 3, 4, 4), np.arange(4000)
    pixels, partners, own = Mixing(0.3, 1.0)(views, np.zeros(4000, int), seed=1, epoch=2, index=index)
    cut = ((pixels == views) | (pixels == views[partners])).all(1).all(-1).all(-1).numpy()
    assert 0.45 < cut.mean() < 0.6  # a share near 0 or 1 looks like a cut
    _, _, own = Mixing(mixup_alpha=0.3)(views, np.zeros(4000, int), seed=1, epoch=2, index=index)
    assert own.mean() == pytest.approx(0.5, abs=0.03)
    assert own.var() == pytest.approx(1 / (4 * (2 * 0.3 + 1)), rel=0.05)


def test_parameters_are_of_the_sample_and_the_epoch() -> None:
    own = mixed(Mixing(mixup_alpha=0.4))[2]
    order = np.random.default_rng(0).permutation(12)
    again = Mixing(mixup_alpha=0.4)(VIEWS[order], CENTERS[order], seed=0, epoch=0, index=INDEX[order])[2]
    np.testing.assert_array_equal(again, own[order])
    assert (mixed(Mixing(mixup_alpha=0.4), epoch=1)[2] != own).all()


def test_every_other_image_of_the_center_is_a_possible_partner() -> None:
    found = {tuple(_partners(np.zeros(3, int), np.full(3, draw))) for draw in (0.1, 0.9)}
    assert found == {(1, 0, 0), (2, 2, 1)}
