import pytest
import reference
import torch
from loss_cases import batch

from hf_adafocal.losses import (
    BrierLoss,
)


class TestBrierLoss:
    def test_it_equals_the_slow_formula(self):
        logits, labels = batch(dtype=torch.float64)
        probabilities = [reference.softmax(z) for z in logits.tolist()]
        expected = reference.brier_score(probabilities, labels.tolist())
        assert BrierLoss()(logits, labels).item() == pytest.approx(expected)
