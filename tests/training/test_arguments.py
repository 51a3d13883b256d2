import pytest
from transformers import HfArgumentParser

from hf_adafocal import LOSSES, AdaFocalLoss, AdaFocalTrainingArguments, FocalLoss


class TestAdaFocalTrainingArguments:
    def test_by_the_papers_rule_the_defaults_are_the_papers(self, tmp_path):
        loss = AdaFocalTrainingArguments(str(tmp_path), update_rule="paper").build_loss()
        assert isinstance(loss, AdaFocalLoss) and loss.num_bins == 15 and loss.gamma_initial == 1.0
        assert loss.update_settings == {"lambda_": 1.0, "switch": 0.2, "gamma_min": -2.0, "gamma_max": 20.0}

    def test_settings_reach_the_loss(self, tmp_path):
        settings = {"update_rule": "paper", "num_bins": 7, "gamma_lambda": 2.0, "gamma_initial": 0.5, "gamma_max": 9.0}
        loss = AdaFocalTrainingArguments(str(tmp_path), **settings).build_loss()
        assert (
            loss.num_bins,
            loss.update_settings["lambda_"],
            loss.gammas[0].item(),
            loss.update_settings["gamma_max"],
        ) == (7, 2, 0.5, 9)
        focal = AdaFocalTrainingArguments(str(tmp_path), loss="focal", focal_gamma=2.0).build_loss()
        assert isinstance(focal, FocalLoss) and focal.gamma == 2.0

    @pytest.mark.parametrize("name", LOSSES)
    def test_every_loss_can_be_chosen_by_name(self, tmp_path, name):
        rule = "paper" if name in ("adafocal", "ada_dual_focal") else None
        args = AdaFocalTrainingArguments(str(tmp_path), loss=name, update_rule=rule)
        found, expected = args.build_loss(), LOSSES[name]()
        assert type(found) is type(expected) and repr(found) == repr(expected)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, "temperature"),
            ({"update_rule": "paper"}, "paper"),
            ({"loss": "adafocal"}, "paper"),
            ({"loss": "ada_dual_focal"}, "paper"),
            ({"loss": "classwise_adafocal"}, "paper"),
            ({"loss": "adaptive_label_smoothing"}, "temperature"),
            ({"loss": "mmce", "auxiliary_base": "adafocal"}, "paper"),
            ({"loss": "mmce", "auxiliary_base": "adaptive_label_smoothing"}, "temperature"),
            ({"loss": "mmce", "auxiliary_base": "classwise_adafocal"}, "paper"),
            ({"loss": "mmce"}, None),
            ({"loss": "focal", "update_rule": "paper"}, None),
        ],
    )
    def test_the_rule_is_that_of_the_loss_unless_it_is_named(self, tmp_path, settings, expected):
        assert AdaFocalTrainingArguments(str(tmp_path), **settings).rule == expected

    @pytest.mark.parametrize(
        ("settings", "loss"),
        [({}, "adaptive_label_smoothing"), ({"update_rule": "paper"}, "adafocal"), ({"loss": "focal"}, "focal")],
    )
    def test_a_loss_left_out_is_the_studys_choice_or_adafocal_by_the_rule_that_is_named(
        self, tmp_path, settings, loss
    ):
        args = AdaFocalTrainingArguments(str(tmp_path), **settings)
        assert args.loss == loss and args.loss_by_default == (not settings)

    def test_it_evaluates_every_epoch_unless_told_otherwise(self, tmp_path):
        assert AdaFocalTrainingArguments(str(tmp_path)).eval_strategy == "epoch"
        assert AdaFocalTrainingArguments(str(tmp_path), eval_strategy="no").eval_strategy == "no"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss": "hinge"}, "loss must be one of cross_entropy, focal, .*mmce.*; found 'hinge'"),
            ({"calibration_fraction": 1.0}, r"calibration_fraction must lie in \[0, 1\), found 1.0"),
            ({"calibration_fraction": -0.1}, "found -0.1"),
            ({"update_rule": "ours"}, "update_rule must be one of paper, temperature; found 'ours'"),
            ({"loss": "adafocal", "update_rule": "temperature"}, "adafocal moves by the paper rule alone"),
            (
                {"loss": "mmce", "auxiliary_base": "classwise_adafocal", "update_rule": "temperature"},
                "classwise_adafocal moves by the paper rule alone",
            ),
            ({"calibration_steps": 0}, "calibration_steps must be at least 1, found 0"),
            ({"calibration_samples": -5}, "calibration_samples must be at least 1, found -5"),
            ({"steering_gain": -1.0}, "steering_gain must be a finite number from 0, found -1.0"),
            ({"steering_gain": float("nan")}, "steering_gain must be a finite number from 0, found nan"),
            ({"auxiliary_base": "mmce"}, "auxiliary_base must be one of cross_entropy, .*found 'mmce'"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            AdaFocalTrainingArguments(str(tmp_path), **settings)

    def test_it_parses_from_a_command_line_and_survives_json(self, tmp_path):
        line = ["--output_dir", str(tmp_path), "--loss", "focal", "--focal_gamma", "-1.5", "--steering_gain", "30"]
        line += ["--update_rule", "paper", "--calibration_steps", "4"]
        (args,) = HfArgumentParser(AdaFocalTrainingArguments).parse_args_into_dataclasses(line)
        assert (args.loss, args.focal_gamma, args.steering_gain) == ("focal", -1.5, 30.0)
        assert (args.update_rule, args.calibration_steps, args.calibration_samples) == ("paper", 4, None)
        assert '"loss": "focal"' in args.to_json_string()
