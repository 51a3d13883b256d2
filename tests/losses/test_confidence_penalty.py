import math

import pytest
import torch

from hf_adafocal.losses import (
    ConfidencePenaltyLoss,
    CrossEntropyLoss,
)


class TestConfidencePenaltyLoss:
    def test_the_penalty_is_one_tenth_unless_given(self):
        assert repr(ConfidencePenaltyLoss()) == "ConfidencePenaltyLoss(penalty=0.1)"

    def test_a_certain_prediction_costs_more_than_without(self):
        logits, labels = torch.tensor([[30.0, 0.0]]), torch.tensor([0])
        unsure = torch.tensor([[1.0, 0.0]])
        gains = [CrossEntropyLoss()(z, labels) - ConfidencePenaltyLoss(1.0)(z, labels) for z in (logits, unsure)]
        assert gains[0] == pytest.approx(0, abs=1e-6) and gains[1] > 0.5

    @pytest.mark.parametrize("penalty", [-1.0, math.nan])
    def test_a_penalty_that_makes_no_sense_is_an_error(self, penalty):
        with pytest.raises(ValueError, match="penalty must be a finite number from 0"):
            ConfidencePenaltyLoss(penalty)
