import math

import pytest
import reference
import torch
import torch.nn.functional as F
from loss_cases import assert_golden, batch, gradient

from hf_adafocal.losses import (
    CrossEntropyLoss,
    DualFocalLoss,
    FLSD53Loss,
    FocalLoss,
    InverseFocalLoss,
)


class TestCrossEntropyLoss:
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden):
        for case in golden("losses")["cases"]:
            assert_golden(case, "cross_entropy", CrossEntropyLoss(reduction="sum"))

    def test_value_and_gradient_are_those_of_pytorch(self):
        logits, labels = batch()
        ours, theirs = CrossEntropyLoss()(logits, labels), F.cross_entropy(logits, labels)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))


class TestFocalLoss:
    @pytest.mark.parametrize("gamma", [1, 3])
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden, gamma):
        for case in golden("losses")["cases"]:
            assert_golden(case, f"focal_gamma_{gamma}", FocalLoss(gamma, reduction="sum"))

    def test_gamma_is_3_unless_given(self):
        assert FocalLoss().gamma == 3

    @pytest.mark.parametrize("gamma", [-2.0, 0.0, 0.5, 3.0])
    def test_it_equals_the_slow_formula(self, gamma):
        logits, labels = batch(dtype=torch.float64)
        losses = [reference.focal_loss(z.tolist(), int(y), gamma) for z, y in zip(logits, labels, strict=True)]
        assert FocalLoss(gamma)(logits, labels).item() == pytest.approx(sum(losses) / 32)

    def test_it_prints_its_gamma(self):
        assert repr(FocalLoss(-1.5)) == "FocalLoss(gamma=-1.5)"


class TestFLSD53Loss:
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden):
        for case in golden("losses")["cases"]:
            assert_golden(case, "flsd53", FLSD53Loss(reduction="sum"))

    def test_it_equals_the_slow_formula(self):
        logits, labels = batch(dtype=torch.float64)
        expected = []
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
            expected.append(reference.focal_loss(z, y, 5 if reference.softmax(z)[y] < 0.2 else 3))
        torch.testing.assert_close(FLSD53Loss(reduction="none")(logits, labels).tolist(), expected)

    def test_it_has_no_state(self):
        assert not FLSD53Loss().state_dict()


class TestInverseFocalLoss:
    def test_it_is_focal_loss_with_the_other_sign(self):
        logits, labels = batch()
        assert InverseFocalLoss(1.5)(logits, labels) == FocalLoss(-1.5)(logits, labels)
        assert InverseFocalLoss()(logits, labels) == FocalLoss(-2.0)(logits, labels)

    def test_by_hand_at_one_half(self):
        loss = InverseFocalLoss(3.0)(torch.zeros(1, 2), torch.tensor([0]))
        assert loss.item() == pytest.approx(1.5**3 * math.log(2))

    @pytest.mark.parametrize("gamma", [-2.0, math.nan, math.inf])
    def test_a_gamma_with_the_focal_sign_is_an_error(self, gamma):
        with pytest.raises(ValueError, match="gamma must be a finite number from 0"):
            InverseFocalLoss(gamma)

    def test_it_prints_its_gamma(self):
        assert repr(InverseFocalLoss(3.5)) == "InverseFocalLoss(gamma=3.5)"


class TestDualFocalLoss:
    @pytest.mark.parametrize("gamma", [1, 5])
    def test_value_and_gradient_are_those_of_the_authors_code(self, golden, gamma):
        for case in golden("losses")["cases"]:
            assert_golden(case, f"dual_focal_gamma_{gamma}", DualFocalLoss(gamma, reduction="sum"))

    def test_gamma_is_5_unless_given(self):
        assert repr(DualFocalLoss()) == "DualFocalLoss(gamma=5.0)"
