import json
import logging
from types import SimpleNamespace

import pytest
import tiny
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_adafocal import AdaFocalCallback, AdaFocalLoss
from hf_adafocal.training.callbacks import STATE_KEY, FirstStepCheck, SaveAfterEvaluation


def saved_state(checkpoint) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())


@pytest.fixture
def warnings(caplog):
    """What transformers logs, as text."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level("INFO")
    return caplog


class TestCheckpoint:
    def test_the_table_is_plain_numbers_in_trainer_state(self, tmp_path):
        run = tiny.trainer(tmp_path, save_strategy="epoch")
        run.train()
        saved = saved_state(tmp_path / "checkpoint-12")["stateful_callbacks"][STATE_KEY]
        gammas = run.loss.gammas.tolist()
        assert {name: saved[name] for name in saved if name != "history"} == {
            **{"edges": run.loss.edges.tolist(), "gammas": gammas, "updates": 2}
        }
        assert [update["step"] for update in saved["history"]] == [0, 6, 12]
        assert saved["history"][0]["gammas"] == [1.0] * 5 and saved["history"][-1]["gammas"] == gammas

    def test_the_table_saved_with_an_epoch_is_the_one_the_next_epoch_uses(self, tmp_path):
        run = tiny.trainer(tmp_path, save_strategy="epoch")
        run.train()
        saved = saved_state(tmp_path / "checkpoint-6")["stateful_callbacks"][STATE_KEY]
        assert saved["gammas"] == run.adaptive_callback.history[1]["gammas"]

    def test_resuming_says_how_many_updates_were_restored(self, tmp_path, warnings):
        from transformers.utils import logging as hf_logging

        tiny.trainer(tmp_path, save_strategy="epoch").train()
        hf_logging.set_verbosity_info()
        try:
            again = tiny.trainer(tmp_path, num_train_epochs=3)
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
        finally:
            hf_logging.set_verbosity_warning()
        assert "Restored the loss's table after 2 updates" in warnings.text

    def test_a_checkpoint_of_another_trainer_starts_a_fresh_table_and_says_so(self, tmp_path, warnings):
        args = TrainingArguments(str(tmp_path), num_train_epochs=1, use_cpu=True, save_strategy="epoch")
        Trainer(tiny.bert(), args, train_dataset=tiny.token_dataset(48)).train()
        run = tiny.trainer(tmp_path, save_strategy="epoch")
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert "step 6 was not saved by a run with AdaFocalCallback" in warnings.text
        assert saved_state(tmp_path / "checkpoint-12")["stateful_callbacks"][STATE_KEY]["updates"] == 1


class TestWhen:
    def test_evaluations_under_other_prefixes_move_nothing_and_are_an_error_after_an_epoch(self, tmp_path):
        run = tiny.trainer(tmp_path, loss=AdaFocalLoss(num_bins=5), eval_dataset=tiny.token_dataset(60, seed=1))
        run.adaptive_callback.prefixes = ("eval_other",)
        with pytest.raises(ValueError, match=r"Gamma has not moved: .* \['eval'\], none of 'eval_other'"):
            run.train()
        assert run.loss.gammas.eq(1).all() and run.adaptive_callback.updates == 0

    def test_every_evaluation_by_steps_moves_gamma(self, tmp_path):
        run = tiny.trainer(tmp_path, eval_strategy="steps", eval_steps=3)
        run.train()
        assert [update["step"] for update in run.adaptive_callback.history] == [0, 3, 6, 9, 12]

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"eval_strategy": "no"},
            {"eval_strategy": "steps", "eval_steps": 4},
            {"eval_strategy": "steps", "eval_steps": 0.25},
            {"eval_strategy": "steps", "eval_steps": 5},  # 12 steps: newer releases evaluate the last one too
            {"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 5},
            {"num_train_epochs": 4, "eval_delay": 3},
            {"max_steps": 7},
            {"eval_strategy": "no", "max_steps": 7},
        ],
        ids=str,
    )
    def test_it_moves_as_often_as_one_line_says_at_the_start(self, tmp_path, settings, warnings):
        run = tiny.trainer(tmp_path, **settings)
        run.train()
        moves = run.adaptive_callback.updates
        assert moves >= 2 and warnings.text.count(f"gamma will move {moves} times") == 1

    def test_the_line_also_tells_the_size_of_the_calibration_set(self, tmp_path, warnings):
        tiny.trainer(tmp_path, num_train_epochs=1).train()
        line = next(text for text in warnings.messages if "gamma will move" in text)
        assert "5 bins" in line and "60 calibration samples" in line


class Alone:
    """An `AdaFocalCallback` that is called by hand in place of a Trainer; its calibration set is over-confident."""

    def __init__(self, folder, step=0, **settings):
        self.found = SimpleNamespace(edges=[0.0, 1.0], gap=[0.5])
        self.args = TrainingArguments(str(folder), use_cpu=True, **{"eval_strategy": "epoch", **settings})
        self.state = TrainerState(num_train_epochs=2, max_steps=4, global_step=step)
        self.control = TrainerControl()
        self.evaluated = []
        self.callback = AdaFocalCallback(AdaFocalLoss(num_bins=1), lambda: self.found, evaluate=self.evaluate)

    def evaluate(self):
        self.evaluated.append(self.state.global_step)
        self.control.should_save = self.control.should_log = False

    def call(self, event, **options):
        getattr(self.callback, event)(self.args, self.state, self.control, **options)

    def updates_after(self, prefix, step=None):
        self.state.global_step = self.state.global_step if step is None else step
        self.call("on_evaluate", metrics={f"{prefix}_loss": 1.0, f"{prefix}_runtime": 1.0})
        return self.callback.updates


class TestWithoutATrainer:
    @pytest.mark.parametrize("start", [0, 3])
    def test_evaluations_between_the_first_step_and_the_end_of_training_move_gamma(self, tmp_path, start):
        alone = Alone(tmp_path, start)
        assert alone.updates_after("eval", start + 1) == 0
        alone.state.global_step = start
        alone.call("on_train_begin")
        assert [alone.updates_after("eval", step) for step in (start, start + 1, start + 2)] == [0, 1, 2]
        assert alone.callback.loss.gammas.item() == pytest.approx(2.718281828)  # twice by exp(0.5)
        alone.call("on_train_end")
        assert alone.updates_after("eval", start + 3) == 2

    @pytest.mark.parametrize("event", ["on_epoch_begin", "on_train_end"])
    def test_evaluations_of_other_sets_alone_are_an_error(self, tmp_path, event):
        alone = Alone(tmp_path)
        alone.call("on_train_begin")
        alone.call(event)  # nothing was evaluated yet
        alone.call("on_train_begin")
        assert alone.updates_after("eval_other", 1) == 0
        with pytest.raises(ValueError, match=r"of \['eval_other'\], none of 'eval' or 'eval_calibration'"):
            alone.call(event)
        alone.call("on_train_begin")
        alone.state.global_step = 2
        assert [alone.updates_after(prefix) for prefix in ("eval_other", "eval_calibration")] == [0, 1]
        alone.call(event)

    def test_without_statistics_gamma_stays(self, tmp_path):
        alone = Alone(tmp_path)
        alone.call("on_train_begin")
        alone.found = None
        assert alone.updates_after("eval", 1) == 0

    @pytest.mark.parametrize(("strategy", "evaluated"), [("no", [3]), ("epoch", [])])
    def test_it_evaluates_after_an_epoch_if_nobody_else_does_and_leaves_the_requests(
        self, tmp_path, strategy, evaluated
    ):
        alone = Alone(tmp_path, 3, eval_strategy=strategy)
        alone.call("on_train_begin")
        alone.control.should_save = alone.control.should_log = True
        alone.call("on_epoch_end")
        assert alone.evaluated == evaluated and alone.control.should_save and alone.control.should_log


class TestSaveAfterEvaluation:
    @pytest.mark.parametrize(
        ("epoch", "stops", "saves", "postponed"),
        [(1.0, False, True, True), (1.5, True, True, True), (1.5, False, True, False), (2.0, True, False, False)],
    )
    def test_a_checkpoint_on_the_last_step_of_an_epoch_or_run_waits_for_its_end(self, epoch, stops, saves, postponed):
        callback, control = SaveAfterEvaluation(), TrainerControl(should_save=saves, should_training_stop=stops)
        callback.on_step_end(None, TrainerState(epoch=epoch), control)
        assert control.should_save == (saves and not postponed)
        for asked, expected in ((False, postponed), (False, False), (True, True)):
            control.should_save = asked
            callback.on_epoch_end(None, None, control)
            assert control.should_save == expected


def test_the_first_step_of_each_run_is_checked_once():
    steps = []
    check = FirstStepCheck(lambda: steps.append(step))
    for step in range(6):
        if step in (0, 4):
            check.on_train_begin(None, None, None)
        check.on_step_end(None, None, None)
    assert steps == [0, 4]
