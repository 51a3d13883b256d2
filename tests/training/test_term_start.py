"""The batch term of a loss starts in the course of a run, and dense runs say what they count."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_adafocal import AdaFocalTrainer, AdaFocalTrainingArguments
from hf_adafocal.data.dense import volume_splits
from hf_adafocal.models import UNet3DConfig, UNet3DForSemanticSegmentation
from hf_adafocal.training.term_start import TermStart

pytest.importorskip("gudhi")


def trainer(folder, **settings):
    torch.manual_seed(0)
    splits = volume_splits(12, max_train_samples=8)
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "eval_strategy": "epoch"}
    options |= {"per_device_train_batch_size": 2, "num_train_epochs": 2, "save_strategy": "no"}
    return AdaFocalTrainer(
        UNet3DForSemanticSegmentation(UNet3DConfig(widths=[2, 4], num_labels=2)),
        AdaFocalTrainingArguments(str(folder), **{**options, **settings}),
        train_dataset=splits.train,
        calibration_dataset=splits.calibration,
    )


class TestTermStart:
    def test_the_term_counts_from_its_share_of_the_steps_on(self, tmp_path, monkeypatch):
        run = trainer(tmp_path, loss="topological_focal", auxiliary_base="adafocal", topology_start=0.4)
        called, function = [], run.loss.function

        def spy(*args, **kwargs):
            called.append(run.state.global_step)
            return function(*args, **kwargs)

        run.loss.function = spy
        run.train()
        assert run.state.max_steps == 8 and called == [4, 5, 6, 7]  # 3 / 8 < 0.4 <= 4 / 8
        assert run.adaptive_callback.updates == 2

    def test_progress_is_that_of_the_run_and_other_losses_are_left_alone(self):
        loss, plain = SimpleNamespace(progress=1.0), torch.nn.Module()
        for owner in (loss, plain):
            TermStart(owner).on_step_begin(None, SimpleNamespace(global_step=3, max_steps=12), None)
        assert loss.progress == 0.25 and not hasattr(plain, "progress")


class TestDenseRuns:
    def test_the_line_that_describes_the_run_counts_voxels_and_images(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO):
            trainer(tmp_path, num_train_epochs=1).train()
        assert f"{16 * 12**3:,} calibration pixels of 16 images" in caplog.text

    def test_a_calibration_fraction_holds_out_images(self, tmp_path):
        rows = volume_splits(12, max_train_samples=10).train
        run = AdaFocalTrainer(
            UNet3DForSemanticSegmentation(UNet3DConfig(widths=[2, 4], num_labels=2)),
            AdaFocalTrainingArguments(str(tmp_path), use_cpu=True, calibration_fraction=0.3, report_to="none"),
            train_dataset=rows,
        )
        assert len(run.calibration_dataset) == 3 and len(run.train_dataset) == 7
        held = {row["labels"].tobytes() for row in run.calibration_dataset}
        assert not held & {row["labels"].tobytes() for row in run.train_dataset}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"topology_start": 0.5}, "topology_start=0.5 would be ignored"),
            ({"loss": "topological_focal", "topology_start": 1.5}, "topology_start is a share"),
            ({"loss": "topological_focal", "topology_construction": "X"}, "topology_construction must be one of V, T"),
        ],
        ids=str,
    )
    def test_arguments_that_make_no_sense_are_an_error(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            AdaFocalTrainingArguments(str(tmp_path), **settings)

    def test_arguments_reach_the_loss_and_are_reported(self, tmp_path):
        args = AdaFocalTrainingArguments(
            str(tmp_path), loss="topological_focal", topology_start=0.2, topology_construction="T", focal_gamma=2.0
        )
        loss = args.build_loss(ignore_index=255)
        assert (loss.start, loss.settings, loss.base.gamma, loss.ignore_index) == (
            0.2,
            {"construction": "T"},
            2.0,
            255,
        )
        assert args.loss_settings["start"] == 0.2 and args.loss_settings["base"] == {"name": "focal", "gamma": 2.0}
        assert np.isclose(args.loss_settings["auxiliary_weight"], 0.001)
