"""Batches, tables and statistics for the tests of losses, and what is true of every loss per sample."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_adafocal.losses import (
    AdaDualFocalLoss,
    AdaFocalLoss,
    ClasswiseAdaFocalLoss,
)
from hf_adafocal.losses.functional import (
    brier_loss,
    confidence_penalty_loss,
    dual_focal_loss,
    focal_loss,
    label_smoothing_loss,
)
from hf_adafocal.losses.registry import PER_SAMPLE_LOSSES as LOSSES
from hf_adafocal.metrics.binning import bin_statistics, equal_mass_edges

FAMILY = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
ADAPTIVE = pytest.mark.parametrize("make", [AdaFocalLoss, AdaDualFocalLoss, ClasswiseAdaFocalLoss])
GAMMAS = [-2, -1, -0.5, 9, 0.2, 0.5, 1, 3, -0.2, 2, 1, -1, 0.3, 5, 20]
# What the module of a name computes, if it is not focal loss with the gamma of the module.
FORMULAS = {
    "label_smoothing": lambda *batch, **options: label_smoothing_loss(*batch, torch.tensor(0.05), **options),
    "adaptive_label_smoothing": lambda *batch, **options: label_smoothing_loss(*batch, torch.tensor(0.0), **options),
    "brier": brier_loss,
    "dual_focal": lambda *batch, **options: dual_focal_loss(*batch, 5.0, **options),
    "inverse_focal": lambda *batch, **options: focal_loss(*batch, -2.0, **options),
    "confidence_penalty": lambda *batch, **options: confidence_penalty_loss(*batch, 0.1, **options),
    "ada_dual_focal": lambda *batch, **options: dual_focal_loss(*batch, 1.0, **options),
}


def batch(size=32, classes=6, dtype=torch.float32):
    return (2 * torch.randn(size, classes, dtype=dtype)).requires_grad_(), torch.randint(classes, (size,))


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def assert_golden(case, name, loss_fn):
    """Compare in float64, so that only the file has the rounding of float32: up to 2.2e-7 in gradients."""
    logits = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
    loss = loss_fn(logits, torch.tensor(case["labels"]))
    assert loss.item() == pytest.approx(case[name]["value"], rel=1e-5)
    expected = torch.tensor(case[name]["grad"], dtype=torch.float64)
    torch.testing.assert_close(gradient(loss, logits), expected, rtol=1e-5, atol=3e-7)


def moved(loss_fn, classes=6):
    """A table as after some training: negative, small and large gammas, a repeated edge."""
    of_classes = {}
    if isinstance(loss_fn, ClasswiseAdaFocalLoss):
        turned = [GAMMAS[k:] + GAMMAS[:k] for k in range(classes)]
        of_classes = {"class_gammas": turned, "class_counts": [100 * k for k in range(classes)]}
    if isinstance(loss_fn, AdaFocalLoss):
        edges = torch.linspace(0.05, 0.99, 16)
        edges[4] = edges[3]
        loss_fn.set_table(edges, GAMMAS, **of_classes)
    return loss_fn


def calibration_samples(size=600, classes=3):
    """Confidence, correctness and predicted class of held-out samples; the last class is never predicted."""
    generator = np.random.default_rng(0)
    predicted, confidence = generator.integers(0, classes - 1, size), generator.uniform(0.3, 1, size)
    correct = generator.random(size) < np.where(predicted == 0, confidence - 0.2, confidence + 0.1)
    return confidence, correct, predicted


def class_statistics(num_bins, classes=3):
    """What a class-wise table is updated with."""
    confidence, correct, predicted = calibration_samples(classes=classes)
    shared = bin_statistics(confidence, correct, equal_mass_edges(confidence, num_bins))
    gaps, counts = np.zeros((classes, num_bins)), np.bincount(predicted, minlength=classes)
    for k in np.unique(predicted):
        gaps[k] = bin_statistics(confidence[predicted == k], correct[predicted == k], shared.edges).gap
    return SimpleNamespace(edges=shared.edges, gap=shared.gap, class_gap=gaps, class_counts=counts)
