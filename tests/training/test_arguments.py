import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser, TrainingArguments

from hf_adafocal import LOSSES, AdaFocalLoss, AdaFocalTrainingArguments, FocalLoss
from hf_adafocal.losses.registry import PER_SAMPLE_LOSSES

ADAFOCAL = {"adafocal", "ada_dual_focal", "classwise_adafocal"}
SMOOTHED = {"adaptive_label_smoothing"}
OF_BATCHES = set(LOSSES) - set(PER_SAMPLE_LOSSES)
# Each argument that only some losses use, a value that is not the default, and those losses.
SETTINGS = {
    "focal_gamma": (2.0, {"focal", "topological_focal"}),  # whose base is focal loss
    "inverse_focal_gamma": (1.5, {"inverse_focal"}),
    "dual_focal_gamma": (4.0, {"dual_focal"}),
    "smoothing": (0.1, {"label_smoothing"} | SMOOTHED),
    "entropy_penalty": (0.2, {"confidence_penalty"}),
    "class_prior": (100.0, {"classwise_adafocal"}),
    "gamma_initial": (0.5, ADAFOCAL),
    "gamma_lambda": (2.0, ADAFOCAL),
    "gamma_switch": (0.1, ADAFOCAL),
    "gamma_min": (-1.0, ADAFOCAL),
    "gamma_max": (9.0, ADAFOCAL),
    "steering_gain": (3.0, SMOOTHED),
    "calibration_steps": (4, SMOOTHED),
    "calibration_samples": (32, SMOOTHED),
    "auxiliary_weight": (0.4, OF_BATCHES),
    "auxiliary_base": ("flsd_53", OF_BATCHES),
    "topology_start": (0.2, {"topological_focal"}),
    "topology_construction": ("T", {"topological_focal"}),
}
PLAIN = {field.name for field in dataclasses.fields(TrainingArguments)}
OWN = {field.name: field for field in dataclasses.fields(AdaFocalTrainingArguments) if field.name not in PLAIN}


def build(**settings) -> AdaFocalTrainingArguments:
    return AdaFocalTrainingArguments("unused", use_cpu=True, **settings)


class TestDefaults:
    def test_with_nothing_said_it_is_adafocal_with_the_papers_settings(self):
        args = build()
        loss = args.build_loss()
        assert args.loss == "adafocal" and type(loss) is AdaFocalLoss and loss.num_bins == 15
        assert loss.gamma_initial == 1.0
        assert loss.update_settings == {"lambda_": 1.0, "switch": 0.2, "gamma_min": -2.0, "gamma_max": 20.0}

    def test_what_the_trainer_does_by_itself_stays_as_it_is(self):
        ours, plain = build(), TrainingArguments("unused", use_cpu=True)
        differ = {name for name in PLAIN if getattr(ours, name) != getattr(plain, name)}
        assert differ <= {"logging_dir"} and ours.eval_strategy == "no" and not ours.calibrate_at_end

    @pytest.mark.parametrize("name", LOSSES)
    def test_every_loss_can_be_chosen_by_name_and_has_the_settings_of_its_class(self, name):
        found, expected = build(loss=name).build_loss(), LOSSES[name]()
        assert type(found) is type(expected) and repr(found) == repr(expected)

    def test_every_argument_of_a_single_loss_is_listed_here_and_left_out_by_default(self):
        shared = {
            *("loss", "loss_reduction", "num_bins", "class_weights", "calibration_fraction", "calibrate_at_end"),
            *("split_overlap", "streaming_calibration"),
        }
        assert OWN.keys() == SETTINGS.keys() | shared
        assert all(OWN[name].default is None for name in SETTINGS)


class TestSettings:
    def test_they_reach_the_loss(self):
        loss = build(num_bins=7, gamma_lambda=2.0, gamma_initial=0.5, gamma_max=9.0).build_loss()
        assert (loss.num_bins, loss.gammas[0].item()) == (7, 0.5)
        assert (loss.update_settings["lambda_"], loss.update_settings["gamma_max"]) == (2.0, 9.0)
        focal = build(loss="focal", focal_gamma=2.0).build_loss()
        assert isinstance(focal, FocalLoss) and focal.gamma == 2.0
        combined = build(loss="mmce", auxiliary_base="focal", focal_gamma=-1.5, auxiliary_weight=3.0).build_loss()
        assert (combined.base.gamma, combined.auxiliary_weight) == (-1.5, 3.0)

    @given(loss=st.sampled_from(sorted(LOSSES)), name=st.sampled_from(sorted(SETTINGS)))
    def test_one_that_the_loss_uses_changes_it_and_one_that_it_does_not_is_an_error_that_names_it(self, loss, name):
        value, users = SETTINGS[name]
        if loss not in users:
            with pytest.raises(ValueError, match=rf"{name}={value!r} would be ignored.*the loss is '{loss}'"):
                build(loss=loss, **{name: value})
            return
        rest = {"auxiliary_weight": 0.3} if name == "auxiliary_base" else {}  # some terms replace their base at 1
        with_it, without = build(loss=loss, **rest, **{name: value}), build(loss=loss, **rest)
        by_trainer = name in ("steering_gain", "calibration_steps", "calibration_samples")
        assert by_trainer or repr(with_it.build_loss()) != repr(without.build_loss())

    @given(
        loss=st.sampled_from(sorted(OF_BATCHES)),
        base=st.sampled_from(sorted(PER_SAMPLE_LOSSES)),
        name=st.sampled_from(sorted(SETTINGS.keys() - {"auxiliary_weight", "auxiliary_base"})),
    )
    def test_a_base_uses_its_own_settings_and_no_others(self, loss, base, name):
        value, users = SETTINGS[name]
        settings = {"loss": loss, "auxiliary_base": base, "auxiliary_weight": 0.5, name: value}
        if base in users or (loss in users and name.startswith("topology")):
            build(**settings).build_loss()
        else:
            with pytest.raises(ValueError, match=f"{name}={value!r} would be ignored"):
                build(**settings)

    @pytest.mark.parametrize("name", [name for name, field in OWN.items() if "float" in str(field.type)])
    def test_nan_is_an_error_that_names_the_argument_whatever_the_loss(self, name):
        for loss in {"adafocal", *SETTINGS.get(name, (0, set()))[1]}:
            with pytest.raises(ValueError, match=f"{name} must be a number, found NaN"):
                build(loss=loss, **{name: float("nan")})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss": "hinge"}, "loss must be one of cross_entropy, focal, .*mmce.*; found 'hinge'"),
            ({"loss_reduction": "none"}, "loss_reduction must be one of mean, sum; found 'none'"),
            ({"split_overlap": "ignore"}, "split_overlap must be one of drop, error, warn, skip; found 'ignore'"),
            ({"calibration_fraction": 1.0}, r"calibration_fraction must lie in \[0, 1\), found 1.0"),
            ({"calibration_fraction": -0.1}, "found -0.1"),
            ({"num_bins": 0}, "num_bins must be at least 1, found 0"),
            ({"loss": "adaptive_label_smoothing", "calibration_steps": 0}, "calibration_steps must be at least 1"),
            ({"loss": "adaptive_label_smoothing", "calibration_samples": -5}, "at least 1, found -5"),
            ({"loss": "adaptive_label_smoothing", "steering_gain": -1.0}, "finite number from 0, found -1.0"),
            ({"loss": "adaptive_label_smoothing", "steering_gain": float("inf")}, "finite number from 0, found inf"),
            ({"loss": "mmce", "auxiliary_base": "mmce"}, "auxiliary_base must be one of cross_entropy, .*found 'mmce"),
            ({"class_weights": "heavy"}, "class_weights must be 'balanced' or one number per class, found 'heavy'"),
            ({"class_weights": {0: 1.0, 1: 5.0}}, "class_weights must be a list of one number per class"),
            ({"class_weights": "1,nan"}, "class_weights must be finite numbers from 0"),
            ({"class_weights": "1,-1"}, "class_weights must be finite numbers from 0"),
            ({"class_weights": "0,0"}, "not all of them 0"),
            ({"class_weights": ""}, "class_weights must be"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            build(**settings)


class TestDirectionOfTheBestMetric:
    @pytest.mark.parametrize("metric", ["ece", "ada_ece", "nll", "brier", "refinement", "loss"])
    @pytest.mark.parametrize("prefix", ["", "eval_", "calibration_", "eval_my_set_"])
    def test_lower_is_better_for_those_that_fall(self, metric, prefix):
        assert build(metric_for_best_model=prefix + metric).greater_is_better is False

    def test_what_the_user_says_and_other_metrics_stay(self):
        assert build(metric_for_best_model="ece", greater_is_better=True).greater_is_better is True
        assert build(metric_for_best_model="accuracy").greater_is_better is True
        assert build(metric_for_best_model="niece").greater_is_better is True
        assert build().greater_is_better is None


class TestCommandLine:
    def test_it_parses_and_survives_json(self, tmp_path):
        line = ["--output_dir", str(tmp_path), "--loss", "focal", "--focal_gamma", "-1.5", "--class_weights", "1,2.5"]
        (args,) = HfArgumentParser(AdaFocalTrainingArguments).parse_args_into_dataclasses(line)
        assert (args.loss, args.focal_gamma, args.smoothing) == ("focal", -1.5, None)
        assert args.parsed_class_weights() == [1.0, 2.5]
        saved = json.loads(args.to_json_string())
        assert (saved["loss"], saved["focal_gamma"], saved["steering_gain"]) == ("focal", -1.5, None)

    def test_booleans_are_flags(self, tmp_path):
        line = ["--output_dir", str(tmp_path), "--calibrate_at_end", "--streaming_calibration", "false"]
        (args,) = HfArgumentParser(AdaFocalTrainingArguments).parse_args_into_dataclasses(line)
        assert args.calibrate_at_end is True and args.streaming_calibration is False
