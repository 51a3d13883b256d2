"""How often the host waits for the device: in training as often as with the stock Trainer, in evaluation once."""

import collections

import numpy as np
import pytest
import tiny
import torch
from loss_names import ADAPTIVE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

# Operators whose result is a number for Python, or whose shape depends on the data, so that the host must wait.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "item", "unique_dim", "_unique2", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Count the operators that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        masks = name in ("index", "index_put_", "index_put") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or masks:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


class CountSteps(TrainerCallback):
    """Count what happens from the end of one step to the end of the next."""

    def __init__(self):
        self.waits, self.of_steps = Waits(), []

    def on_step_end(self, args, state, control, **kwargs):
        """Note and start anew."""
        self.of_steps.append(dict(self.waits.count))
        self.waits.count.clear()


def of_training(trainer):
    """Waits of each step but the first, which checks more."""
    counter = CountSteps()
    trainer.add_callback(counter)
    with counter.waits:
        trainer.train()
    return counter.of_steps[1:]


SETTINGS = {
    **{"eval_strategy": "no", "logging_strategy": "no", "save_strategy": "no"},
    **{"max_steps": 5, "num_train_epochs": 1},
}


class TestTraining:
    @pytest.fixture(scope="class")
    def stock(self, tmp_path_factory):
        ours = tiny.arguments(tmp_path_factory.mktemp("stock"), **SETTINGS)
        names = ("max_steps", "per_device_train_batch_size", "use_cpu", "disable_tqdm", "lr_scheduler_type")
        args = TrainingArguments(
            ours.output_dir, save_strategy="no", logging_strategy="no", **{n: getattr(ours, n) for n in names}
        )
        return of_training(Trainer(tiny.bert(), args, train_dataset=tiny.token_dataset()))

    @pytest.mark.parametrize("loss", ["cross_entropy", *ADAPTIVE, "brier", "mmce", "soft_ece", "aurc"])
    def test_a_step_waits_no_more_than_one_of_the_stock_trainer(self, tmp_path, stock, loss):
        ours = of_training(tiny.trainer(tmp_path, loss=loss, **SETTINGS))
        assert len(ours) == len(stock) == 4
        for mine, theirs in zip(ours, stock, strict=True):
            assert sum(mine.values()) <= sum(theirs.values()), (mine, theirs)


class TestCalibrationSlices:
    def test_a_slice_of_many_batches_waits_once(self, tmp_path):
        """For its sums, which the controller needs; no batch of it does."""
        found = []
        for batch_size in (60, 6):
            run = tiny.trainer(
                tmp_path, loss="adaptive_label_smoothing", per_device_eval_batch_size=batch_size, calibration_steps=2
            )
            copies, to_host = [], torch.Tensor.cpu
            with pytest.MonkeyPatch.context() as patch, Waits() as waits:
                patch.setattr(torch.Tensor, "cpu", lambda values: copies.append(1) or to_host(values))  # noqa: B023
                run.adaptive_callback.measure(np.arange(60))
            found.append((dict(waits.count), len(copies)))
        seed_of_the_loader = {"_local_scalar_dense": 1}  # a number that never was on a device
        assert found == [(seed_of_the_loader, 1)] * 2


def of_evaluation(run, dataset):
    """Waits, and calls of `Tensor.cpu`, of one evaluation."""
    run.check_labels = lambda *args, **kwargs: None  # which looks at every batch only where the device is the CPU
    copies, to_host = [], torch.Tensor.cpu
    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        patch.setattr(torch.Tensor, "cpu", lambda values: copies.append(1) or to_host(values))
        run.evaluate(dataset)
    return sum(waits.count.values()), len(copies)


class TestEvaluation:
    @pytest.mark.parametrize("calibrates", [False, True])
    @pytest.mark.parametrize("histogram", [False, True])
    def test_more_batches_wait_no_more_often(self, tmp_path, calibrates, histogram):
        """The stock evaluation copies losses to the host once, at its end, and so must ours."""
        found = []
        for batch_size in (60, 6):
            run = tiny.trainer(tmp_path, per_device_eval_batch_size=batch_size, streaming_calibration=histogram)
            found.append(of_evaluation(run, run.eval_dataset if calibrates else tiny.token_dataset(60, seed=1)))
        assert found[0] == found[1]
