import pytest
import torch
import torch.nn.functional as F
from loss_cases import batch

from hf_adafocal.losses import AdaptiveLabelSmoothingLoss, LabelSmoothingLoss


class TestLabelSmoothingLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.5])
    def test_it_is_that_of_pytorch(self, smoothing):
        logits, labels = batch()
        weight = torch.rand(6)
        ours = LabelSmoothingLoss(smoothing, weight=weight)(logits, labels)
        torch.testing.assert_close(ours, F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing))

    def test_below_zero_it_goes_on_in_a_straight_line(self):
        logits, labels = batch()
        low, zero, high = (LabelSmoothingLoss(eps)(logits, labels) for eps in (-0.1, 0.0, 0.1))
        torch.testing.assert_close(zero - low, high - zero)

    def test_a_compiled_loss_sees_a_change_of_the_smoothing(self):
        torch.compiler.reset()
        loss_fn = LabelSmoothingLoss()
        compiled = torch.compile(loss_fn, fullgraph=True, backend="eager")
        logits, labels = batch()
        before = compiled(logits, labels)
        loss_fn.set_smoothing(-0.1)
        assert compiled(logits, labels) != before
        torch.testing.assert_close(compiled(logits, labels), loss_fn(logits, labels))

    def test_a_smoothing_out_of_range_is_an_error_and_changes_nothing(self):
        loss_fn = LabelSmoothingLoss(0.2)
        with pytest.raises(ValueError, match=r"smoothing must lie in \[-0.1, 0.5\], found 0.6"):
            loss_fn.set_smoothing(0.6)
        assert repr(loss_fn) == "LabelSmoothingLoss(smoothing=0.2)"
        with pytest.raises(ValueError, match="found -0.2"):
            LabelSmoothingLoss(-0.2)

    def test_the_smoothing_round_trips_through_state_dict(self):
        fresh = LabelSmoothingLoss()
        fresh.load_state_dict(LabelSmoothingLoss(0.3).state_dict())
        assert fresh.smoothing.item() == pytest.approx(0.3)


class TestAdaptiveLabelSmoothingLoss:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [([0.25], 0.35), ([0.3, -0.2], 0.2), ([9.0], 0.5), ([9.0, -0.1], 0.4), ([-9.0], -0.1), ([-9.0, 0.1], 0.0)],
    )
    def test_steering_adds_to_the_smoothing_within_its_range_and_a_reset_undoes_it(self, changes, expected):
        loss_fn = AdaptiveLabelSmoothingLoss(0.1)
        for change in changes:
            loss_fn.steer(change)
        assert loss_fn.smoothing.item() == pytest.approx(expected, abs=1e-7)
        loss_fn.reset()
        assert loss_fn.readings() == {"smoothing": pytest.approx(0.1)}

    def test_its_table_takes_the_ends_of_the_range_and_nothing_beyond(self):
        loss_fn = AdaptiveLabelSmoothingLoss()
        assert loss_fn.steering_gain == 2
        for smoothing in (0.3, 0.5, -0.1):
            loss_fn.set_table(smoothing)
            assert loss_fn.table() == {"smoothing": pytest.approx(smoothing)}
        for smoothing in (-0.11, 0.51, float("nan"), [0.1], "much"):
            with pytest.raises(ValueError, match="smoothing must"):
                loss_fn.set_table(smoothing)
        assert loss_fn.table() == {"smoothing": pytest.approx(-0.1)}
