"""Logits of volumes in every way to train: the trainer, a stock Trainer, a loop, a histogram, a resumed run."""

import json
from unittest.mock import Mock

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DefaultDataCollator, Trainer, TrainingArguments

from hf_adafocal import (
    AdaFocalCallback,
    AdaFocalLoss,
    AdaFocalTrainer,
    AdaFocalTrainingArguments,
    CalibrationMetrics,
    CombinedLoss,
    TermStart,
    calibrate,
)
from hf_adafocal.data.dense import volume_splits
from hf_adafocal.models import UNet3DConfig, UNet3DForSemanticSegmentation

SILENT = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "epoch"}
SILENT |= {"per_device_train_batch_size": 2, "num_train_epochs": 2, "lr_scheduler_type": "constant"}
IGNORED = 255


class HalfSize(UNet3DForSemanticSegmentation):
    """Logits of half the size of the labels."""

    def forward(self, pixel_values, labels=None, return_dict=None):
        output = super().forward(pixel_values)
        output.logits = torch.nn.functional.avg_pool3d(output.logits, 2)
        return output


def network(kind=UNet3DForSemanticSegmentation):
    torch.manual_seed(0)
    return kind(UNet3DConfig(widths=[2, 4], num_labels=2))


def volumes(size=8, seed=0):
    """Rows of volumes; the first slice of each is not labelled."""
    rows = volume_splits(12, seed=seed, max_train_samples=size).train
    for row in rows:
        row["labels"][0] = IGNORED
    return rows


def trained(folder, kind=UNet3DForSemanticSegmentation, **settings):
    run = AdaFocalTrainer(
        network(kind),
        AdaFocalTrainingArguments(str(folder), **{**SILENT, **settings}),
        train_dataset=volumes(),
        eval_dataset=volumes(6, seed=1),
    )
    run.train()
    return run


def measured(model, rows):
    """NLL, accuracy and number of labelled voxels by a plain forward pass, with logits resized trilinearly."""
    images, labels = (torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("pixel_values", "labels"))
    with torch.no_grad():
        logits = model.eval()(images).logits
    if logits.shape[2:] != labels.shape[1:]:
        logits = torch.nn.functional.interpolate(logits, labels.shape[1:], mode="trilinear", align_corners=False)
    counted = labels != IGNORED
    nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED).item()
    return nll, (logits.argmax(1) == labels)[counted].float().mean().item(), int(counted.sum())


class TestTrainer:
    @pytest.mark.parametrize("kind", [UNet3DForSemanticSegmentation, HalfSize])
    def test_labelled_voxels_are_the_samples_and_small_logits_are_resized_trilinearly(self, tmp_path, kind):
        run = trained(tmp_path, kind)
        metrics = run.evaluate()
        nll, accuracy, count = measured(run.model, volumes(6, seed=1))
        assert metrics["eval_nll"] == pytest.approx(nll, rel=1e-4)
        assert metrics["eval_accuracy"] == pytest.approx(accuracy)
        assert len(run.recorder.samples["eval"]) == count == 6 * 11 * 12 * 12
        assert run.ignore_index == run.loss.ignore_index == IGNORED and run.adaptive_callback.updates == 2

    def test_a_histogram_gives_the_metrics_and_the_table_of_all_voxels(self, tmp_path):
        exact, streamed = (trained(tmp_path, streaming_calibration=flag) for flag in (False, True))
        found = [run.evaluate() for run in (exact, streamed)]
        for name in ("nll", "accuracy", "ece", "brier"):
            assert found[1][f"eval_{name}"] == pytest.approx(found[0][f"eval_{name}"], rel=1e-4)
        torch.testing.assert_close(streamed.loss.gammas, exact.loss.gammas, rtol=0, atol=2e-3)

    def test_from_millions_of_voxels_on_the_histogram_takes_over_by_itself(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_adafocal.training.recorder.MOST_SAMPLES", 5000)  # 4 million
        run = trained(tmp_path, num_train_epochs=1)
        assert type(run.recorder.samples["eval"]).__name__ == "HistogramCollector"
        assert run.adaptive_callback.updates == 1


class TestCallbackRecipe:
    @pytest.mark.parametrize("kind", [UNet3DForSemanticSegmentation, HalfSize])
    def test_it_measures_voxels_and_moves_the_table_as_the_trainer_does(self, tmp_path, kind):
        def data(size, seed):  # all labelled: a stock Trainer counts the labels of a step by -100 alone
            rows = volumes(size, seed)
            return [{"pixel_values": row["pixel_values"][:, 2:], "labels": row["labels"][2:]} for row in rows]

        loss = AdaFocalLoss(ignore_index=IGNORED)
        calibration = CalibrationMetrics(loss.num_bins, loss.ignore_index)
        stock = Trainer(
            network(kind),
            TrainingArguments(str(tmp_path), **SILENT),
            train_dataset=data(8, 0),
            eval_dataset=data(6, 1),
            compute_loss_func=loss,
            compute_metrics=calibration,
            preprocess_logits_for_metrics=calibration.reduce,
            callbacks=[AdaFocalCallback(loss, calibration.calibrate)],
        )
        ours = AdaFocalTrainer(
            network(kind),
            AdaFocalTrainingArguments(str(tmp_path), **SILENT),
            train_dataset=data(8, 0),
            eval_dataset=data(6, 1),
        )
        for run in (stock, ours):
            run.train()
        torch.testing.assert_close(loss.gammas, ours.loss.gammas, rtol=1e-4, atol=1e-5)
        assert stock.evaluate()["eval_ece"] == pytest.approx(ours.evaluate()["eval_ece"], rel=1e-3)

    def test_ignored_voxels_count_nowhere(self, tmp_path):
        calibration = CalibrationMetrics(15, IGNORED)
        loss = AdaFocalLoss(ignore_index=IGNORED)
        run = Trainer(
            network(),
            TrainingArguments(str(tmp_path), **SILENT),
            train_dataset=volumes(),
            eval_dataset=volumes(6, seed=1),
            compute_loss_func=loss,
            compute_metrics=calibration,
            preprocess_logits_for_metrics=calibration.reduce,
        )
        nll, accuracy, _ = measured(run.model, volumes(6, seed=1))
        found = run.evaluate()
        assert found["eval_nll"] == pytest.approx(nll, rel=1e-4)
        assert found["eval_accuracy"] == pytest.approx(accuracy)

    def test_the_term_starts_where_it_is_told_to(self, tmp_path):
        pytest.importorskip("gudhi")
        base = AdaFocalLoss(ignore_index=IGNORED)
        loss = CombinedLoss("topological_focal", base, start=0.5)
        called, function = [], loss.function
        calibration = CalibrationMetrics(base.num_bins, IGNORED)
        run = Trainer(
            network(),
            TrainingArguments(str(tmp_path), **SILENT),
            train_dataset=volumes(),
            eval_dataset=volumes(4, seed=1),
            compute_loss_func=loss,
            compute_metrics=calibration,
            preprocess_logits_for_metrics=calibration.reduce,
            callbacks=[AdaFocalCallback(base, calibration.calibrate), TermStart(loss)],
        )
        loss.function = lambda *args, **kwargs: (called.append(run.state.global_step), function(*args, **kwargs))[1]
        loss.progress = 0.0
        run.train()
        assert run.state.max_steps == 8 and [step for step in called if step < 8] == [4, 5, 6, 7]


class TestLoop:
    @pytest.mark.parametrize("kind", [UNet3DForSemanticSegmentation, HalfSize])
    def test_calibrate_counts_labelled_voxels_of_logits_of_any_size(self, kind):
        model, loss, rows = network(kind), AdaFocalLoss(ignore_index=IGNORED), volumes(6, seed=1)
        found = calibrate(model, DataLoader(rows, 4, collate_fn=DefaultDataCollator()), loss)
        nll, accuracy, count = measured(model, rows)
        assert found.metrics["nll"] == pytest.approx(nll, rel=1e-5)
        assert found.metrics["accuracy"] == pytest.approx(accuracy) and found.statistics.count.sum() == count
        assert loss.gammas.ne(1).any()


class TestResume:
    def test_a_run_stopped_before_or_after_the_term_starts_goes_on_as_if_it_had_not(self, tmp_path):
        pytest.importorskip("gudhi")

        def build(folder):
            settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
            settings |= {"loss": "topological_focal", "auxiliary_base": "adafocal", "auxiliary_weight": 0.1}
            args = AdaFocalTrainingArguments(str(folder), **{**SILENT, **settings, "topology_start": 0.5})
            return AdaFocalTrainer(network(), args, train_dataset=volumes(), eval_dataset=volumes(4, seed=1))

        whole = build(tmp_path / "whole")
        whole.train()
        for step in (2, 4, 6):  # before, at and after the start, of 8
            run = build(tmp_path / "again")
            run.loss.function = term = Mock(side_effect=run.loss.function)
            run.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
            assert term.call_count == min(4, 8 - step)
            for mine, theirs in zip(run.model.parameters(), whole.model.parameters(), strict=True):
                assert torch.equal(mine, theirs)
            assert run.loss.base.gammas.tolist() == whole.loss.base.gammas.tolist()
            assert (
                json.loads((tmp_path / "again" / "checkpoint-8" / "trainer_state.json").read_text())["global_step"]
                == 8
            )
