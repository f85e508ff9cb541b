"""Losses over centers: against their definitions, and in a training run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import config, write_backbone, write_data
from safetensors.torch import load_file

from hf_histo.data.load import load
from hf_histo.finetune import fine_tune
from hf_histo.training.domains import DomainClassifier, GroupDRO, coral


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
        told = classifier(features, centers, progress)
        assert told.item() == pytest.approx(expected.item())
        reversed_, *learned = torch.autograd.grad(told, [features, *classifier.parameters()])
        torch.testing.assert_close(reversed_, -strength * straight[0])
        torch.testing.assert_close(learned, list(straight[1:]))


@pytest.mark.parametrize(
    "option",
    [
        "--balance_centers",
        "--class_balance=sampling",
        "--domain_loss=group_dro",
        "--domain_loss=coral",
        "--domain_loss=dann",
        "--normalization=rgb",
    ],
)
def test_each_changes_training_and_repeats(tmp_path: Path, option: str) -> None:
    backbone, data = write_backbone(tmp_path / "backbone"), write_data(tmp_path / "data")
    table = load(data, cache_dir=tmp_path / "cache")
    weights = []
    for name, more in (("plain", []), ("one", [option]), ("two", [option])):
        result = fine_tune(config(tmp_path / name, backbone, data, *more, "--augmentation=strong"), table)
        weights.append(load_file(result.adapter / "adapter_model.safetensors"))
    plain, one, two = weights
    assert any(not torch.equal(plain[key], one[key]) for key in plain)
    assert all(torch.equal(one[key], two[key]) for key in one)
