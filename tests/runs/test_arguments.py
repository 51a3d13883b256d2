"""Command lines of training runs: what `--help` shows, and which settings go to which loss."""

import pytest

from hf_adafocal.runs.arguments import settings_by_loss, training_parser
from hf_adafocal.runs.tasks import TASKS


class TestHelp:
    @pytest.mark.parametrize("kind", TASKS)
    def test_it_shows_this_packages_arguments_and_one_line_for_the_others(self, kind):
        text = training_parser(TASKS[kind], prog="train.py").format_help()
        data, loss = text.index("data and model:"), text.index("loss and calibration:")
        assert data < text.index("--dataset VALUE") < loss < text.index("--gamma_lambda VALUE")
        assert "--per_device_train_batch_size" not in text and "--fsdp" not in text
        assert text.count("transformers.TrainingArguments") == 2  # in the sentence and in the address
        assert len(text.splitlines()) < 130

    def test_a_default_is_named_once(self):
        text = training_parser(TASKS["text"], prog="train.py").format_help()
        assert "(default: None)" not in text and "(default: 256)" in text


class TestSettingsByLoss:
    def test_each_loss_gets_what_it_uses(self):
        line = ["--epochs", "1", "--focal_gamma", "2", "--gamma-max", "9", "--steering_gain", "3"]
        found = settings_by_loss(line, ["cross_entropy", "focal", "adafocal", "adaptive_label_smoothing"])
        assert found == {
            "cross_entropy": ["--epochs", "1"],
            "focal": ["--epochs", "1", "--focal_gamma", "2"],
            "adafocal": ["--epochs", "1", "--gamma_max", "9"],
            "adaptive_label_smoothing": ["--epochs", "1", "--steering_gain", "3"],
        }

    def test_the_base_of_a_batch_loss_gets_its_settings(self):
        line = ["--focal_gamma", "2", "--auxiliary_base", "focal"]
        assert settings_by_loss(line, ["mmce", "adafocal"]) == {"mmce": line, "adafocal": []}

    def test_a_setting_that_none_uses_is_an_error(self):
        with pytest.raises(ValueError, match="--smoothing is a setting of .*none of the losses focal"):
            settings_by_loss(["--smoothing", "0.1"], ["focal"])
