"""Domain losses against their definitions; their use in training is tested in test_trainer.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_histo.training.domain_loss import DomainClassifier, GroupDRO, coral


def test_group_dro_follows_the_algorithm_and_survives_a_checkpoint() -> None:
    weights = GroupDRO([7, 2, 7, 5], step=0.5)
    losses = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)  # of the centers 2, 5 and 7
    objective = weights(losses, torch.ones(3, dtype=torch.bool))
    raised = np.exp(0.5 * np.array([1.0, 2.0, 0.5]))
    np.testing.assert_allclose(weights.weights, raised / raised.sum(), rtol=1e-5)
    np.testing.assert_allclose(objective.item(), np.dot(weights.weights.tolist(), [1.0, 2.0, 0.5]), rtol=1e-5)
    objective.backward()
    np.testing.assert_allclose(losses.grad, weights.weights, rtol=1e-5)
    again = GroupDRO.from_state(weights.state())
    assert (again.centers, again.step) == (weights.centers, weights.step)
    assert torch.equal(again.weights, weights.weights)


def test_a_center_that_is_not_in_the_batch_keeps_its_share() -> None:
    weights = GroupDRO([0, 1, 2], step=1.0)
    losses = torch.tensor([1.0, 7.0, 1.0], requires_grad=True)
    objective = weights(losses, torch.tensor([True, False, True]))
    assert weights.weights[0] == pytest.approx(weights.weights[2])
    assert weights.weights[0] / weights.weights[1] == pytest.approx(np.e, rel=1e-5)
    assert objective.item() == pytest.approx(2 * weights.weights[0].item() * 3 / 2)
    objective.backward()
    assert losses.grad is not None and losses.grad[1] == 0


def test_coral_is_zero_for_equal_centers_and_grows_with_a_shift() -> None:
    part = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    centers = torch.eye(3).bool().repeat_interleave(8, 1)[:, :16]  # the third one has no image
    assert coral(torch.cat([part, part]), centers).item() == pytest.approx(0, abs=1e-10)
    assert coral(torch.cat([part, part + 2]), centers).item() == pytest.approx(4, rel=1e-5)
    covariance = torch.cov(part.T)
    expected = (part.mean(0) ** 2).mean() + ((4 * covariance - covariance) ** 2).mean()
    assert coral(torch.cat([part, part * 2]), centers).item() == pytest.approx(expected.item(), rel=1e-4)
    assert coral(part, torch.eye(8).bool()).item() == 0  # one image each: no covariance
    features = torch.randn(16, 5, requires_grad=True)
    coral(features, centers).backward()
    assert features.grad is not None and torch.isfinite(features.grad).all() and features.grad.any()


def test_the_domain_classifier_learns_and_features_unlearn() -> None:
    torch.manual_seed(0)
    classifier = DomainClassifier(3, [5, 2, 5, 9])
    features = torch.randn(6, 3, requires_grad=True)
    centers = torch.tensor([9, 2, 5, 5, 9, 2])
    expected = torch.nn.functional.cross_entropy(classifier.layers(features), torch.tensor([2, 0, 1, 1, 2, 0]))
    straight = torch.autograd.grad(expected, [features, *classifier.parameters()])
    for progress, strength in ((0.0, 0.0), (0.5, 2 / (1 + np.exp(-5)) - 1)):
        loss = classifier(features, centers, progress)
        assert loss.item() == pytest.approx(expected.item())
        reversed_, *learned = torch.autograd.grad(loss, [features, *classifier.parameters()])
        torch.testing.assert_close(reversed_, -strength * straight[0])
        torch.testing.assert_close(learned, list(straight[1:]))
