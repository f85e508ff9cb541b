"""The loss against torch's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_histo.errors import HistoError
from hf_histo.training.losses import balancing_weights, classification, only, shares


def outputs(count: int, number: int) -> SimpleNamespace:
    return SimpleNamespace(logits=3 * torch.randn(count, number, generator=torch.Generator().manual_seed(count)))


def test_binary_is_torchs_with_pos_weight() -> None:
    out, labels = outputs(9, 1), torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1])
    expected = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.5))(out.logits[:, 0], labels.float())
    torch.testing.assert_close(classification(1, [1.0, 2.5])(out, labels), expected)
    plain = nn.BCEWithLogitsLoss()(out.logits[:, 0], labels.float())
    torch.testing.assert_close(classification(1)(out, labels), plain)


def test_several_classes_are_torchs_weighted_sum_over_the_images() -> None:
    out, labels, weights = outputs(7, 4), torch.tensor([0, 1, 2, 3, 3, 2, 1]), [0.5, 1.0, 2.0, 4.0]
    torch.testing.assert_close(classification(4)(out, labels), nn.CrossEntropyLoss()(out.logits, labels))
    summed = nn.CrossEntropyLoss(weight=torch.tensor(weights), reduction="sum")(out.logits, labels)
    torch.testing.assert_close(classification(4, weights)(out, labels), summed / 7)


@pytest.mark.parametrize("number", [1, 3])
def test_smoothed_labels_are_torchs_whatever_the_weights(number: int) -> None:
    labels, weights = torch.tensor([0, 1, 1, 0, 1, 0]), [0.5, 2.0, 1.5][: max(number, 2)]
    out = outputs(6, number)
    logits = out.logits if number > 1 else torch.cat([-out.logits / 2, out.logits / 2], dim=1)
    summed = nn.CrossEntropyLoss(weight=torch.tensor(weights), reduction="sum", label_smoothing=0.2)(logits, labels)
    smoothed = shares(labels, max(number, 2), 0.2)
    torch.testing.assert_close(classification(number, weights)(out, smoothed), summed / 6)


@pytest.mark.parametrize("number", [1, 3])
def test_shares_of_one_class_are_its_label(number: int) -> None:
    out, labels = outputs(6, number), torch.tensor([0, 1, -1, 0, 1, -1])
    for weights in (None, [1.0, 2.0, 3.0][: max(number, 2)]):
        loss = classification(number, weights)
        torch.testing.assert_close(loss(out, shares(labels, max(number, 2))), loss(out, labels))
    chosen = torch.tensor([True, True, True, False, False, False])
    torch.testing.assert_close(loss(out, only(shares(labels, max(number, 2)), chosen)), loss(out, only(labels, chosen)))


@pytest.mark.parametrize("number", [1, 3])
def test_hidden_labels_count_for_nothing(number: int) -> None:
    out, labels = outputs(6, number), torch.tensor([0, -1, 1, -1, 0, 1])
    known = SimpleNamespace(logits=out.logits[labels >= 0])
    loss = classification(number, [1.0, 2.0, 3.0][: max(number, 2)])
    torch.testing.assert_close(loss(out, labels), loss(known, labels[labels >= 0]))
    assert loss(out, torch.full((6,), -1)) == 0


def test_the_number_of_items_divides() -> None:
    out, labels = outputs(8, 1), torch.tensor([0, 1] * 4)
    loss = classification(1, [1.0, 3.0])
    parts = [
        loss(SimpleNamespace(logits=out.logits[at]), labels[at], num_items_in_batch=torch.tensor(8))
        for at in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(sum(parts), loss(out, labels))


def test_the_loss_is_computed_in_float32() -> None:
    out = SimpleNamespace(logits=torch.tensor([[300.0], [-300.0]], dtype=torch.bfloat16))
    loss = classification(1)(out, torch.tensor([0, 0]))
    assert loss.dtype == torch.float32
    assert loss == 150


def test_weights_balance_the_classes() -> None:
    assert balancing_weights([0, 0, 0, 1, -1], ["normal", "tumor"]) == [1.0, 3.0]
    weights = balancing_weights([0, 0, 0, 1, 2, 2], ["a", "b", "c"])
    assert weights == pytest.approx([6 / 9, 6 / 3, 6 / 6])


def test_a_class_without_images_is_named() -> None:
    with pytest.raises(HistoError, match=r"class 'b' .*\[2, 0, 1\]"):
        balancing_weights([0, 0, 2], ["a", "b", "c"])
