"""Domain losses against their definitions; their use in training is tested in test_trainer.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_histo.training.domain_loss import DomainClassifier, GroupDRO, coral


def test_group_dro_follows_the_algorithm_and_survives_a_checkpoint() -> None:
    weights = GroupDRO([7, 2, 7, 5], step=0.5)
    losses = {2: torch.tensor(1.0, requires_grad=True), 5: torch.tensor(2.0), 7: torch.tensor(0.5)}
    objective = weights(losses)
    raised = np.exp(0.5 * np.array([1.0, 2.0, 0.5]))
    np.testing.assert_allclose(weights.weights, raised / raised.sum(), rtol=1e-5)
    np.testing.assert_allclose(objective.item(), np.dot(weights.weights, [1.0, 2.0, 0.5]), rtol=1e-5)
    objective.backward()
    np.testing.assert_allclose(losses[2].grad, weights.weights[0], rtol=1e-5)
    again = GroupDRO.from_state(weights.state())
    assert (again.centers, again.step, again.weights) == (weights.centers, weights.step, weights.weights)


def test_a_center_that_is_not_in_the_batch_keeps_its_share() -> None:
    weights = GroupDRO([0, 1, 2], step=1.0)
    weights({0: torch.tensor(1.0), 2: torch.tensor(1.0)})
    assert weights.weights[0] == pytest.approx(weights.weights[2])
    assert weights.weights[0] / weights.weights[1] == pytest.approx(np.e, rel=1e-5)


def test_coral_is_zero_for_equal_centers_and_grows_with_a_shift() -> None:
    part = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    centers = torch.tensor([0] * 8 + [1] * 8)
    assert coral(torch.cat([part, part]), centers).item() == pytest.approx(0, abs=1e-10)
    assert coral(torch.cat([part, part + 2]), centers).item() == pytest.approx(4, rel=1e-5)
    covariance = torch.cov(part.T)
    expected = (part.mean(0) ** 2).mean() + ((4 * covariance - covariance) ** 2).mean()
    assert coral(torch.cat([part, part * 2]), centers).item() == pytest.approx(expected.item(), rel=1e-4)
    assert coral(part, torch.arange(8)).item() == 0


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
