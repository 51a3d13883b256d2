"""The callback of adaptive label smoothing, called by hand in place of a Trainer."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from hf_adafocal.losses import AdaptiveLabelSmoothingLoss
from hf_adafocal.training.callbacks import STATE_KEY
from hf_adafocal.training.smoothing_callback import SmoothingCallback

# 5 % of the compute of 1,000 steps of 24 samples is that of 1,200 samples, or 3,600 forward passes: 20 updates of 180.
# They are 920 / 21 steps apart, from step 80 on.
STEPS, SAMPLES = 1000, 180
UPDATES = [124, 168, 211, 255, 299, 343, 387, 430, 474, 518, 562, 606, 650, 693, 737, 781, 825, 869, 912, 956]


class Alone:
    """A `SmoothingCallback` whose calibration set fits 1 / T = 1 + 4 / (24 + 16) = 1.1 at each measurement."""

    def __init__(self, arguments=None, **settings):
        self.seen, self.logged = [], []
        defaults = {"world_size": 2, "train_batch_size": 4, "gradient_accumulation_steps": 3}
        self.args = SimpleNamespace(
            **{**defaults, "seed": 5, "data_seed": None, "device": torch.device("cpu"), **(arguments or {})}
        )
        self.state, self.control = TrainerState(max_steps=STEPS), TrainerControl()
        self.loss = AdaptiveLabelSmoothingLoss(0.3)
        self.callback = SmoothingCallback(self.loss, self.measure, 1000, log=self.log, **settings)

    def measure(self, indices):
        self.seen.append(indices)
        return torch.tensor([4.0, 24.0, len(indices)])

    def log(self, readings):
        self.logged.append((self.state.global_step, readings))
        self.control.should_log = False

    def run(self, last=STEPS):
        self.callback.on_train_begin(self.args, self.state, self.control)
        for self.state.global_step in range(1, last + 1):
            self.callback.on_step_end(self.args, self.state, self.control)
        return self


class TestPlan:
    @pytest.mark.parametrize(
        ("arguments", "settings"),
        [
            ({}, {}),
            ({"world_size": 4, "train_batch_size": 2}, {}),
            ({"world_size": 8}, {"processes": 2}),  # of eight, four at a time share a batch
        ],
        ids=str,
    )
    def test_it_follows_from_the_samples_of_a_step_over_accumulation_and_processes(self, arguments, settings):
        alone = Alone(arguments, **settings).run()
        assert [step for step, _ in alone.logged] == UPDATES and {len(found) for found in alone.seen} == {SAMPLES}

    def test_slices_are_shared_out_evenly(self):
        alone = Alone({"world_size": 7}, samples=100, every=400).run()
        assert [step for step, _ in alone.logged] == [480, 880] and {len(found) for found in alone.seen} == {98}

    @pytest.mark.parametrize(("data_seed", "used"), [(None, 5), (0, 0), (9, 9)])
    def test_slices_go_through_one_permutation_by_the_seed_of_the_data(self, data_seed, used):
        alone = Alone({"data_seed": data_seed}).run(last=UPDATES[6])
        order = np.random.default_rng(used).permutation(1000).tolist() * 2
        assert np.concatenate(alone.seen).tolist() == order[: 7 * SAMPLES]

    def test_it_takes_no_step_before_training(self):
        alone = Alone()
        alone.callback.on_step_end(alone.args, alone.state, alone.control)
        assert alone.seen == []


class TestUpdate:
    @pytest.mark.parametrize(("gain", "used"), [(None, 2.0), (0.0, 0.0), (0.5, 0.5)])
    def test_shares_of_the_gain_rise_linearly_and_each_moves_by_log_t(self, gain, used):
        alone = Alone(gain=gain).run()
        assert alone.loss.smoothing.item() == pytest.approx(0.3 - used * math.log(1.1), abs=1e-6)
        first, second = (readings["smoothing"] for _, readings in alone.logged[:2])
        assert 0.3 - first == pytest.approx(used * math.log(1.1) / 210, abs=1e-6)  # 1 + 2 + ... + 20 shares
        assert first - second == pytest.approx(2 * used * math.log(1.1) / 210, abs=1e-6)

    def test_it_is_counted_noted_exported_and_logged(self):
        alone = Alone().run(last=UPDATES[0])
        eps = alone.loss.smoothing.item()
        ((step, readings),) = alone.logged
        assert step == 124 and readings == {"smoothing": eps, "slice_temperature": pytest.approx(1 / 1.1)}
        history = [{"step": 0, "smoothing": pytest.approx(0.3)}, {"step": 124, "smoothing": eps}]
        assert alone.state.stateful_callbacks[STATE_KEY] == {"smoothing": eps, "updates": 1, "history": history}

    @pytest.mark.parametrize("asked", [False, True])
    def test_the_steps_own_request_to_log_stays(self, asked):
        alone = Alone().run(last=UPDATES[0] - 1)
        alone.control.should_log, alone.state.global_step = asked, UPDATES[0]
        alone.callback.on_step_end(alone.args, alone.state, alone.control)
        assert len(alone.logged) == 1 and alone.control.should_log == asked

    def test_the_checkpoint_of_an_epochs_last_step_waits_for_its_end(self):
        alone = Alone().run(last=3)
        alone.state.epoch, alone.control.should_save = 1.0, True
        alone.callback.on_step_end(alone.args, alone.state, alone.control)
        assert not alone.control.should_save

    def test_a_checkpoint_brings_eps_back(self):
        alone = Alone()
        saved = {"smoothing": 0.25, "updates": 1, "history": [{"step": 124, "smoothing": 0.25}]}
        alone.state.stateful_callbacks[STATE_KEY] = saved
        alone.callback.on_train_begin(alone.args, alone.state, alone.control)
        assert alone.loss.smoothing.item() == 0.25 and alone.callback.updates == 1


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (9, "A run of 9 steps is too short to steer the loss: it stays at {'smoothing': "),
        (STEPS, "AdaptiveLabelSmoothingLoss: smoothing will move 20 times, each on 180 calibration samples."),
    ],
)
def test_it_says_how_often_the_smoothing_will_move(caplog, steps, text):
    caplog.set_level("INFO", logger="hf_adafocal")
    alone = Alone()
    alone.state.max_steps = steps
    alone.run(last=0)
    assert text in caplog.text and ("too short" in caplog.text) == (steps == 9)
