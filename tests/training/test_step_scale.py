"""Class weights and the sum over samples, whatever the micro-batches and processes of an optimizer step."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from accelerate import debug_launcher
from datasets import Dataset, IterableDataset

from hf_adafocal import FocalLoss
from hf_adafocal.losses.registry import PER_SAMPLE_LOSSES

pytestmark = pytest.mark.usefixtures("blank_pictures")

# SGD without clipping: the update shows the scale of the gradient.
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "split_overlap": "skip", "calibration_fraction": None}
WEIGHTS = [0.2, 1.0, 4.0]


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def update(folder, *, size=13, learning_rate=1.0, **settings) -> torch.Tensor:
    """What one epoch adds to the parameters."""
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": size, **SGD, **settings}
    run = tiny.trainer(folder, train_dataset=tiny.token_dataset(size), learning_rate=learning_rate, **settings)
    before = weights(run.model)
    run.train()
    return weights(run.model) - before


def gradient(size, weight=None, reduction="mean") -> torch.Tensor:
    """Of PyTorch's own cross-entropy over the whole set."""
    data, model = tiny.token_dataset(size), tiny.bert()
    logits, labels = model(input_ids=torch.tensor(data["input_ids"][:])).logits, torch.tensor(data["labels"][:])
    loss = torch.nn.functional.cross_entropy(logits, labels, weight=weight, reduction=reduction)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found])


def relative(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def on_two(folder, settings) -> None:
    """One step of 16 samples, in four micro-batches of 2 on each rank, with other labels on each."""
    torch.set_num_threads(1)
    found = update(folder, ddp_find_unused_parameters=False, size=16, per_device_train_batch_size=2,
                   gradient_accumulation_steps=4, **settings)  # fmt: skip
    torch.save(found, folder / f"rank-{torch.distributed.get_rank()}.pt")


class TestClassWeights:
    GIVEN = ",".join(map(str, WEIGHTS))

    @pytest.mark.parametrize("cut", [(13, 1), (4, 4), (1, 13)])
    def test_the_mean_is_over_the_weights_of_the_whole_step(self, tmp_path, cut):
        settings = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), cut, strict=True))
        found = update(tmp_path, loss="cross_entropy", class_weights=self.GIVEN, **settings)
        assert relative(found, -gradient(13, torch.tensor(WEIGHTS))) < 1e-4
        assert relative(found, -gradient(13)) > 0.1

    def test_on_two_processes_too(self, tmp_path):
        settings = {"loss": "cross_entropy", "class_weights": self.GIVEN}
        debug_launcher(on_two, args=(tmp_path, settings), num_processes=2)
        first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
        assert torch.equal(first, second)
        assert relative(first, -gradient(16, torch.tensor(WEIGHTS))) < 1e-4

    @pytest.mark.parametrize("loss", PER_SAMPLE_LOSSES)
    def test_every_loss_takes_them_and_the_cut_does_not_matter(self, tmp_path, loss):
        whole = update(tmp_path, loss=loss, class_weights=self.GIVEN)
        parts = update(tmp_path, loss=loss, class_weights=self.GIVEN, per_device_train_batch_size=4,
                       gradient_accumulation_steps=4)  # fmt: skip
        assert relative(parts, whole) < 1e-4 < relative(update(tmp_path, loss=loss), whole)

    def test_balanced_means_that_every_class_weighs_the_same_in_all(self, tmp_path):
        labels = [0] * 30 + [1] * 15 + [2] * 3
        data = Dataset.from_dict({"input_ids": np.random.default_rng(0).integers(1, 40, (48, 5)), "labels": labels})
        run = tiny.trainer(tmp_path, train_dataset=data, class_weights="balanced")
        assert run.loss.weight.tolist() == pytest.approx([48 / 90, 48 / 45, 48 / 9])
        combined = tiny.trainer(tmp_path, train_dataset=data, class_weights="balanced", loss="mmce")
        assert torch.equal(combined.loss.base.weight, run.loss.weight)

    @pytest.mark.parametrize("held_out", [{"eval_dataset": None, "calibration_fraction": 0.25}, {}])
    def test_balanced_counts_the_rows_that_are_trained_on(self, tmp_path, held_out):
        labels = [0] * 30 + [1] * 15 + [2] * 3
        data = Dataset.from_dict({"input_ids": np.random.default_rng(0).integers(1, 40, (48, 5)), "labels": labels})
        if not held_out:  # rows that stand in the held-out set too are dropped
            held_out = {"eval_dataset": data.select(range(20, 40))}
        run = tiny.trainer(tmp_path, train_dataset=data, loss="focal", class_weights="balanced", **held_out)
        plain = tiny.trainer(tmp_path, train_dataset=data, class_weights="balanced", **held_out)
        assert len(plain.train_dataset) < 48
        for found in (run, plain):
            kept = np.bincount(found.train_dataset["labels"][:])
            assert found.loss.weight.tolist() == pytest.approx((kept.sum() / (3 * kept)).tolist())

    def test_of_tokens_the_labels_that_count_are_balanced(self, tmp_path):
        rows = [[1, 2, 3, 4]] * 6
        labels = [[0, 0, 1, -100]] * 3 + [[0, -100, -100, -100]] * 3  # 9 of class 0, 3 of class 1, none of class 2
        data = Dataset.from_dict({"input_ids": rows, "labels": labels})
        model = type("Tagger", (torch.nn.Module,), {"forward": lambda self, input_ids, labels=None: None})()
        model.config = SimpleNamespace(num_labels=3)
        run = tiny.trainer(
            tmp_path, model, train_dataset=data, eval_dataset=data, class_weights="balanced", split_overlap="skip"
        )
        assert run.loss.weight.tolist()[:2] == pytest.approx([12 / 18, 12 / 6])

    def test_what_cannot_be_weighted_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="class_weights must be 3 numbers, one per class, found 2"):
            tiny.trainer(tmp_path, class_weights="1,2")
        stream = IterableDataset.from_generator(lambda: iter(tiny.token_dataset(9)))
        with pytest.raises(ValueError, match="this one is a stream or has no label column. Pass one number per class"):
            tiny.trainer(tmp_path, train_dataset=stream, class_weights="balanced", max_steps=1)

    def test_beside_a_loss_module_of_ones_own_they_would_be_ignored_and_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="class_weights"):
            tiny.trainer(tmp_path, loss=FocalLoss(2.0), class_weights="balanced")

    def test_the_evaluation_stays_without_them(self, tmp_path):
        plain, weighted = tiny.trainer(tmp_path).evaluate(), tiny.trainer(tmp_path, class_weights="1,2,9").evaluate()
        for name in ("eval_loss", "eval_nll", "eval_ece", "eval_temperature"):
            assert plain[name] == weighted[name]


class TestSum:
    @pytest.mark.parametrize("cut", [(13, 1), (4, 4)])
    def test_a_step_follows_the_sum_over_its_samples(self, tmp_path, cut):
        settings = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), cut, strict=True))
        found = update(tmp_path, loss="cross_entropy", loss_reduction="sum", **settings)
        assert relative(found, -gradient(13, reduction="sum")) < 1e-4

    def test_on_two_processes_too(self, tmp_path):
        debug_launcher(on_two, args=(tmp_path, {"loss": "cross_entropy", "loss_reduction": "sum"}), num_processes=2)
        first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
        assert torch.equal(first, second)
        assert relative(first, -gradient(16, reduction="sum")) < 1e-4

    @pytest.mark.parametrize("loss", ["adafocal", "brier", "mmce"])
    @pytest.mark.parametrize("clip", [0.0, 2.0])
    def test_a_run_is_that_of_the_mean_at_a_learning_rate_times_the_batch(self, tmp_path, loss, clip):
        settings = {"loss": loss, "size": 48, "per_device_train_batch_size": 8, "num_train_epochs": 3}
        summed = update(tmp_path, loss_reduction="sum", learning_rate=0.02, max_grad_norm=clip, **settings)
        mean = update(tmp_path, learning_rate=0.16, max_grad_norm=clip / 8, **settings)
        assert relative(summed, mean) < 1e-3

    def test_without_a_count_of_the_step_it_is_the_sum_too(self, tmp_path):
        run = tiny.trainer(tmp_path, loss="cross_entropy", loss_reduction="sum")
        batch = run.data_collator([run.train_dataset[index] for index in range(5)])
        run.model.train()
        expected = torch.nn.functional.cross_entropy(run.model(batch["input_ids"]).logits, batch["labels"])
        assert run.compute_loss(run.model, batch).item() == pytest.approx(5 * expected.item(), rel=1e-5)

    def test_the_logged_loss_is_the_sum_and_the_evaluation_the_mean(self, tmp_path):
        runs = [
            tiny.trainer(tmp_path, loss="cross_entropy", loss_reduction=reduction, learning_rate=0.0)
            for reduction in ("mean", "sum")
        ]
        for run in runs:
            run.train()
        mean, summed = (run.state.log_history for run in runs)
        assert summed[0]["loss"] == pytest.approx(8 * mean[0]["loss"], rel=1e-4)
        losses = [[entry["eval_loss"] for entry in log if "eval_loss" in entry] for log in (mean, summed)]
        assert losses[0] == losses[1] and len(losses[0]) == 2

    def test_the_report_says_so(self, tmp_path):
        run = tiny.trainer(tmp_path, loss_reduction="sum")
        report = run.write_report(tiny.token_dataset(9, seed=3), num_resamples=10)
        assert report.loss["reduction"] == "sum"
        assert json.loads((tmp_path / "report.json").read_text())["loss"]["reduction"] == "sum"
