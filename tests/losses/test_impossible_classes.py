"""Classes that a sample cannot have: logits of -inf, or of the numbers that masks write instead."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_names import ANY_SHAPE

from hf_adafocal.losses import LabelSmoothingLoss
from hf_adafocal.losses.aurc import SCORES
from hf_adafocal.losses.functional import label_smoothing_loss
from hf_adafocal.losses.registry import LOSSES

MASKS = [-math.inf, -1e9, torch.finfo(torch.float32).min, -65504.0, -1e4]
EACH = pytest.mark.parametrize("name", ANY_SHAPE)


def masked(mask, dtype=torch.float32):
    """Two, three or four possible classes of five; labels among them."""
    logits = torch.randn(9, 5, dtype=dtype)
    labels = torch.arange(9) % 2
    for row in range(9):
        logits[row, 2 + row % 3 :] = mask
    return logits.requires_grad_(), labels


@EACH
@pytest.mark.parametrize("mask", MASKS)
def test_value_and_gradient_are_finite_and_those_of_any_other_mask(name, mask):
    torch.manual_seed(1)
    logits, labels = masked(mask)
    torch.manual_seed(1)
    others, _ = masked(-math.inf)
    loss, expected = LOSSES[name]()(logits, labels), LOSSES[name]()(others, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient.isfinite().all() and loss < 100
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, others)[0])
    assert not gradient[logits <= -1e4].any()
    scaled = torch.autograd.grad(2.0**24 * LOSSES[name]()(logits, labels), logits)[0]  # as mixed precision does
    torch.testing.assert_close(scaled / 2.0**24, gradient)


@pytest.mark.parametrize("name", ["aurc", "aurc_regularised", "selective_au"])
@pytest.mark.parametrize("score", SCORES)
def test_so_they_are_for_every_score(name, score):
    logits, labels = masked(-math.inf)
    loss = LOSSES[name](score=score)(logits, labels)
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("mask", MASKS)
def test_without_smoothing_the_loss_is_cross_entropy(mask):
    logits, labels = torch.tensor([[1.0, 2.0, mask]] * 5), torch.tensor([0, 0, 1, 1, 0])
    for loss in (LOSSES["adaptive_label_smoothing"](), LabelSmoothingLoss(0.0)):
        assert loss(logits, labels).item() == pytest.approx(0.9133, abs=5e-5)
    assert loss(logits, labels) == F.cross_entropy(logits, labels)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 3.0])])
@pytest.mark.parametrize("mask", MASKS)
def test_label_smoothing_is_that_of_the_possible_classes_alone(mask, weight):
    logits, labels = torch.randn(6, 4), torch.arange(6) % 2
    shown = torch.cat([logits, torch.full((6, 3), mask)], dim=1)
    more = None if weight is None else torch.cat([weight, torch.ones(3)])
    found = label_smoothing_loss(shown, labels, 0.2, weight=more)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, weight=weight, label_smoothing=0.2))


def test_a_dense_target_may_have_impossible_classes_at_some_positions():
    logits, labels = torch.randn(2, 4, 3), torch.zeros(2, 3, dtype=torch.long)
    logits[:, 3, 1] = -math.inf
    found = label_smoothing_loss(logits, labels, 0.2, reduction="none")
    expected = F.cross_entropy(logits[:, :3, 1], labels[:, 1], label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(found[:, 1], expected)
    torch.testing.assert_close(
        found[:, 0], F.cross_entropy(logits[:, :, 0], labels[:, 0], label_smoothing=0.2, reduction="none")
    )


def test_a_very_unlikely_class_is_still_smoothed():
    logits = torch.tensor([[1000.0, 0.0]])
    assert label_smoothing_loss(logits, torch.tensor([0]), 0.1).item() == pytest.approx(0.05 * 1000)
