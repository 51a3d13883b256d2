import pytest
import torch

from hf_adafocal import AdaFocalTrainingArguments
from hf_adafocal.losses.base import ClassificationLoss, FocalFamilyLoss, PerSampleLoss
from hf_adafocal.losses.registry import PER_SAMPLE_LOSSES as LOSSES

ADAFOCAL = "num_bins=15, gamma_initial=1.0, lambda_=1.0, switch=0.2, gamma_min=-2.0, gamma_max=20.0"


class TestLosses:
    def test_the_names_are_those_users_type(self):
        old = ["cross_entropy", "focal", "flsd_53", "adafocal"]
        rivals = ["label_smoothing", "brier", "dual_focal", "inverse_focal", "confidence_penalty"]
        assert set(old + rivals + ["ada_dual_focal", "classwise_adafocal"]) <= set(LOSSES)

    def test_each_builds_without_arguments(self):
        assert all(isinstance(make(), ClassificationLoss) for make in LOSSES.values())
        assert all(isinstance(LOSSES[name](), FocalFamilyLoss) for name in LOSSES if "focal" in name)

    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("focal", "FocalLoss(gamma=3.0)"),
            ("inverse_focal", "InverseFocalLoss(gamma=2.0)"),
            ("dual_focal", "DualFocalLoss(gamma=5.0)"),
            ("label_smoothing", "LabelSmoothingLoss(smoothing=0.05)"),
            ("adaptive_label_smoothing", "AdaptiveLabelSmoothingLoss(smoothing=0)"),
            ("confidence_penalty", "ConfidencePenaltyLoss(penalty=0.1)"),
            ("adafocal", f"AdaFocalLoss({ADAFOCAL})"),
            ("ada_dual_focal", f"AdaDualFocalLoss({ADAFOCAL})"),
            ("classwise_adafocal", f"ClasswiseAdaFocalLoss({ADAFOCAL}, prior=150.0)"),
        ],
    )
    def test_each_has_the_documented_settings_unless_told(self, name, shown):
        assert repr(LOSSES[name]()) == shown

    @pytest.mark.parametrize(
        ("settings", "shown"),
        [
            ({"loss": "inverse_focal", "inverse_focal_gamma": 3.5}, "InverseFocalLoss(gamma=3.5)"),
            ({"loss": "dual_focal", "dual_focal_gamma": 6.1}, "DualFocalLoss(gamma=6.1)"),
            ({"loss": "label_smoothing", "smoothing": -0.05}, "LabelSmoothingLoss(smoothing=-0.05)"),
            ({"loss": "confidence_penalty", "entropy_penalty": 0.3}, "ConfidencePenaltyLoss(penalty=0.3)"),
            (
                {"loss": "ada_dual_focal", "num_bins": 7, "gamma_lambda": 2.0},
                "num_bins=7, gamma_initial=1.0, lambda_=2.0",
            ),
            ({"loss": "classwise_adafocal", "class_prior": 20.0, "gamma_max": 9.0}, "gamma_max=9.0, prior=20.0"),
        ],
        ids=str,
    )
    def test_training_arguments_reach_the_loss(self, tmp_path, settings, shown):
        loss_fn = AdaFocalTrainingArguments(str(tmp_path), **settings).build_loss()
        assert type(loss_fn) is LOSSES[settings["loss"]] and shown in repr(loss_fn)

    def test_a_member_without_a_formula_is_an_error(self):
        with pytest.raises(NotImplementedError, match="PerSampleLoss must define `formula`"):
            PerSampleLoss()(torch.zeros(1, 2), torch.tensor([0]))
