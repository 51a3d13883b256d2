import copy
import json
import logging
import math
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from hf_adafocal import AdaFocalCallback, AdaFocalLoss, CalibrationMetrics
from hf_adafocal.training import callbacks
from hf_adafocal.training.callbacks import (
    STATE_KEY,
    FirstStepCheck,
    SaveAfterEvaluation,
    expected_evaluations,
)


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

    def __init__(self, folder, step=0, epochs=2, **settings):
        self.found = SimpleNamespace(edges=[0.0, 1.0], gap=[0.5])
        self.args = TrainingArguments(str(folder), use_cpu=True, **{"eval_strategy": "epoch", **settings})
        self.state = TrainerState(num_train_epochs=epochs, max_steps=2 * epochs, global_step=step)
        self.control = TrainerControl()
        self.evaluated, self.logged = [], []
        self.callback = AdaFocalCallback(
            AdaFocalLoss(num_bins=1), lambda: self.found, log=self.logged.append, evaluate=self.evaluate
        )

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

    def test_an_evaluation_without_metrics_moves_nothing(self, tmp_path):
        alone = Alone(tmp_path)
        alone.call("on_train_begin")
        alone.state.global_step = 1
        alone.call("on_evaluate")
        alone.call("on_epoch_begin")
        assert alone.callback.updates == 0

    def test_the_checkpoint_of_an_epochs_last_step_waits_for_its_evaluation(self, tmp_path):
        alone = Alone(tmp_path)
        alone.call("on_train_begin")
        alone.state.epoch, alone.control.should_save = 1.0, True
        alone.call("on_step_end")
        assert not alone.control.should_save
        alone.call("on_epoch_end")
        assert alone.control.should_save

    @pytest.mark.parametrize(("strategy", "evaluated"), [("no", [3]), ("epoch", [])])
    def test_it_evaluates_after_an_epoch_if_nobody_else_does_and_leaves_the_requests(
        self, tmp_path, strategy, evaluated
    ):
        alone = Alone(tmp_path, 3, eval_strategy=strategy)
        alone.call("on_train_begin")
        alone.control.should_save = alone.control.should_log = True
        alone.call("on_epoch_end")
        assert alone.evaluated == evaluated and alone.control.should_save and alone.control.should_log


class TestWhatItKeeps:
    """The table, the number of updates and the history, through a run, a checkpoint and the next run."""

    SAVED = {
        **{"edges": [0.0, 1.0], "gammas": [4.0], "updates": 3},
        "history": [{"step": step, "gammas": [gamma]} for step, gamma in ((0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0))],
    }

    def test_each_update_is_counted_noted_exported_and_logged(self, tmp_path):
        alone = Alone(tmp_path)
        assert alone.callback.updates == 0 and alone.callback.history == []
        alone.call("on_train_begin")
        noted = [{"step": 0, "gammas": [1.0]}]
        table = {"edges": [0.0, 1.0], "gammas": [1.0]}
        assert alone.state.stateful_callbacks[STATE_KEY] == {**table, "updates": 0, "history": noted}
        alone.updates_after("eval", 1)
        gamma = pytest.approx(math.exp(0.5))
        noted.append({"step": 1, "gammas": [gamma]})
        assert alone.state.stateful_callbacks[STATE_KEY] == {
            **{**table, "gammas": [gamma]},
            **{"updates": 1, "history": noted},
        }
        assert alone.logged == [{"gamma_min": gamma, "gamma_mean": gamma, "gamma_max": gamma}]
        alone.callback.log = None
        assert alone.updates_after("eval", 2) == 2 and len(alone.logged) == 1

    def test_a_run_after_another_starts_afresh(self, tmp_path, warnings):
        alone = Alone(tmp_path)
        for _ in range(2):
            alone.state = TrainerState(num_train_epochs=2, max_steps=4)
            alone.call("on_train_begin")
            assert alone.callback.loss.gammas.item() == 1
            assert (alone.callback.updates, alone.callback.history) == (0, [{"step": 0, "gammas": [1.0]}])
            assert alone.updates_after("eval", 1) == 1
        assert "was not saved by a run with AdaFocalCallback" not in warnings.text

    def test_a_checkpoint_without_them_starts_afresh_from_its_step_and_says_so(self, tmp_path, warnings):
        alone = Alone(tmp_path, 1)
        alone.call("on_train_begin")
        assert alone.callback.history == [{"step": 1, "gammas": [1.0]}]
        assert "checkpoint of step 1 was not saved by a run with AdaFocalCallback" in warnings.text

    def test_a_checkpoint_brings_them_back_and_the_next_update_follows(self, tmp_path):
        alone = Alone(tmp_path, 4)
        alone.state.stateful_callbacks[STATE_KEY] = saved = copy.deepcopy(self.SAVED)
        alone.call("on_train_begin")
        assert alone.callback.loss.gammas.item() == 4
        assert alone.state.stateful_callbacks[STATE_KEY] == self.SAVED
        assert alone.updates_after("eval", 5) == 4 and saved == self.SAVED
        moved = [pytest.approx(4 * math.exp(0.5))]
        assert alone.callback.history == [*self.SAVED["history"], {"step": 5, "gammas": moved}]

    @pytest.mark.parametrize("change", [{"updates": 0}, {"history": []}], ids=str)
    def test_a_checkpoint_before_the_first_update_is_one_too(self, tmp_path, change):
        alone = Alone(tmp_path, 1)
        alone.state.stateful_callbacks[STATE_KEY] = saved = {**self.SAVED, **change}
        alone.call("on_train_begin")
        assert alone.state.stateful_callbacks[STATE_KEY] == saved

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"updates": -1}, r"updates in .* must be a whole number from 0, found -1"),
            ({"updates": 2.0}, r"updates in .* must be a whole number from 0, found 2.0"),
            ({"gammas": [1.0, 1.0]}, "does not fit this run's loss: gammas must be"),
            ({"history": {"step": 0}}, "history in .* must be a list of updates"),
            ({"history": [{"step": 0}, {"gammas": [1.0]}]}, "history in .* must be a list of updates"),
            ({"history": [["step"]]}, "history in .* must be a list of updates"),
            (None, "must be an object, found 7"),
        ],
        ids=str,
    )
    def test_a_checkpoint_that_no_run_writes_is_refused_and_the_table_stays(self, tmp_path, change, message):
        alone = Alone(tmp_path, 4)
        alone.state.stateful_callbacks[STATE_KEY] = 7 if change is None else {**self.SAVED, **change}
        with pytest.raises(ValueError, match=message):
            alone.call("on_train_begin")
        assert alone.callback.loss.gammas.item() == 1

    def test_the_loss_moves_to_the_device_of_the_run(self, tmp_path):
        class Elsewhere(torch.nn.Linear):  # on a device that every machine has, though it holds no values
            num_bins = 1

            def reset(self):
                self.found = self.weight.device.type

            def table(self):
                return {}

            readings = table

        alone = Alone(tmp_path)
        alone.callback.loss = loss = Elsewhere(1, 1)
        alone.args = SimpleNamespace(device=torch.device("meta"), eval_strategy="epoch", eval_delay=0)
        alone.call("on_train_begin")
        assert loss.found == "meta"


class TestBestCheckpoint:
    SAVED = {"edges": [0.0, 1.0], "gammas": [2.0], "updates": 1, "history": [{"step": 1, "gammas": [2.0]}]}

    def ended(self, folder, saved=None, best=True, load=True, main=True, made=2, calibrate_at_end=False):
        """A run of `made` updates whose best checkpoint holds `saved`, called at the end of training."""
        alone = Alone(folder, load_best_model_at_end=load, save_strategy="epoch")
        alone.args.calibrate_at_end = calibrate_at_end
        alone.call("on_train_begin")
        for step in range(1, made + 1):
            alone.updates_after("eval", step)
        alone.state.is_world_process_zero = main
        if best:
            alone.state.best_model_checkpoint = str(folder / "checkpoint-1")
            (folder / "checkpoint-1").mkdir()
            state = {"global_step": 1, "stateful_callbacks": {} if saved is None else {STATE_KEY: saved}}
            (folder / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
        alone.call("on_train_end")
        return alone

    def test_its_table_comes_back_and_is_exported(self, tmp_path, caplog):
        caplog.set_level("INFO", logger="hf_adafocal")
        alone = self.ended(tmp_path, self.SAVED)
        assert f"table after 1 updates from the best checkpoint, {tmp_path}/checkpoint-1." in caplog.text
        assert alone.callback.loss.gammas.item() == 2
        assert alone.state.stateful_callbacks[STATE_KEY] == self.SAVED

    @pytest.mark.parametrize(
        "settings", [{"load": False, "saved": SAVED}, {"best": False}, {}], ids=["not asked for", "none", "no table"]
    )
    def test_else_the_table_stays(self, tmp_path, settings, warnings):
        alone = self.ended(tmp_path, **settings)
        assert alone.callback.loss.gammas.item() == pytest.approx(math.e)
        assert alone.state.stateful_callbacks[STATE_KEY]["updates"] == alone.callback.updates == 2
        assert ("has no table of the loss, so it stays that of step 2" in warnings.text) == (settings == {})

    @pytest.mark.parametrize(
        ("made", "kept", "folded", "early"),
        [(20, 19, False, True), (20, 20, False, False), (19, 18, False, False), (20, 19, True, False)],
    )
    def test_one_of_few_updates_is_named_if_later_ones_had_more(self, tmp_path, warnings, made, kept, folded, early):
        self.ended(tmp_path, {**self.SAVED, "updates": kept}, made=made, calibrate_at_end=folded)
        assert (f"restored the weights after {kept} of {made} updates of gamma" in warnings.text) == early

    def test_what_no_run_writes_is_refused_and_the_file_named(self, tmp_path):
        with pytest.raises(ValueError, match=rf"updates in {tmp_path}/checkpoint-1/trainer_state.json must be"):
            self.ended(tmp_path, {**self.SAVED, "updates": -1})

    @pytest.mark.parametrize("knows", [False, True])
    def test_other_processes_take_the_table_that_the_main_process_read(self, tmp_path, monkeypatch, knows):
        def from_main(values):
            assert values == [None, None]
            values[:] = [str(tmp_path / "checkpoint-1"), self.SAVED]

        monkeypatch.setattr(callbacks, "broadcast_object_list", from_main)
        alone = self.ended(tmp_path, {**self.SAVED, "gammas": [9.0]}, best=knows, main=False)
        assert alone.callback.loss.gammas.item() == 2

    def test_an_error_of_the_main_process_is_theirs_too(self, tmp_path, monkeypatch):
        def from_main(values):
            values[:] = ["checkpoint-1", ValueError("cannot be read")]

        monkeypatch.setattr(callbacks, "broadcast_object_list", from_main)
        with pytest.raises(ValueError, match="cannot be read"):
            self.ended(tmp_path, best=False, main=False)


class TestDescription:
    @pytest.mark.parametrize(("epochs", "level"), [(19, "WARNING"), (20, "INFO")])
    def test_fewer_than_twenty_updates_are_a_warning(self, tmp_path, epochs, level, caplog):
        caplog.set_level("INFO", logger="hf_adafocal")
        Alone(tmp_path, epochs=epochs).call("on_train_begin")
        (record,) = (record for record in caplog.records if "gamma will move" in record.message)
        assert record.levelname == level
        assert f"AdaFocalLoss with 1 bins: gamma will move {epochs} times" in record.message

    @pytest.mark.parametrize("folded", [None, False, True])
    def test_the_advice_names_a_temperature_at_the_end_unless_there_is_one(self, tmp_path, folded, warnings):
        alone = Alone(tmp_path)
        if folded is not None:
            alone.args.calibrate_at_end = folded
        alone.call("on_train_begin")
        assert ("or a temperature at the end" in warnings.text) == (not folded)


class TestSettings:
    def test_statistics_with_another_number_of_bins_are_refused(self):
        with pytest.raises(ValueError, match="The loss has 5 bins and its statistics 7"):
            AdaFocalCallback(AdaFocalLoss(num_bins=5), CalibrationMetrics(7).calibrate)

    def test_a_prefix_replaces_the_two_usual_ones(self):
        loss = AdaFocalLoss(num_bins=5)
        calibrate = CalibrationMetrics(5).calibrate
        assert AdaFocalCallback(loss, calibrate, "test").prefixes == ("test",)
        assert AdaFocalCallback(loss, calibrate).prefixes == ("eval", "eval_calibration")

    def test_a_run_without_evaluations_is_refused(self, tmp_path):
        alone = Alone(tmp_path, eval_strategy="no")
        alone.callback.evaluate = None
        with pytest.raises(ValueError, match="eval_strategy is 'no'"):
            alone.call("on_train_begin")


def evaluations_of_the_flow(args, epochs, steps_of_epoch):
    """Evaluations that the Trainer's own flow of events asks for, step by step."""
    state, flow, count = TrainerState(max_steps=epochs * steps_of_epoch), DefaultFlowCallback(), 0
    state.compute_steps(args, state.max_steps)
    for step in range(1, state.max_steps + 1):
        state.global_step, state.epoch = step, step / steps_of_epoch
        events = [flow.on_step_end] if step % steps_of_epoch else [flow.on_step_end, flow.on_epoch_end]
        for event in events:
            control = TrainerControl()
            event(args, state, control)
            count += control.should_evaluate
    return count


class TestExpectedEvaluations:
    @pytest.mark.parametrize(
        "settings",
        [
            *({"eval_strategy": "epoch", "eval_delay": delay} for delay in (0, 1, 2, 2.5, 3, 3.5, 4)),
            *({"eval_strategy": "steps", "eval_steps": steps} for steps in (1, 4, 5, 6, 11, 12, 13, 0.25, 0.3)),
            *({"eval_strategy": "steps", "eval_steps": 4, "eval_delay": delay} for delay in (4, 5, 12, 13)),
        ],
        ids=str,
    )
    def test_they_are_those_that_the_flow_of_the_trainer_asks_for(self, tmp_path, settings):
        args = TrainingArguments(str(tmp_path), use_cpu=True, **settings)
        state = TrainerState(num_train_epochs=3, max_steps=12, global_step=7)
        state.compute_steps(args, 12)
        assert expected_evaluations(args, state) == evaluations_of_the_flow(args, 3, 4)
        assert state.global_step == 7

    @pytest.mark.parametrize(("strategy", "delay", "expected"), [("no", 0, 7), ("epoch", 0, 7), ("epoch", 3, 5)])
    def test_a_stream_ends_at_most_an_epoch_with_each_step(self, tmp_path, strategy, delay, expected):
        args = TrainingArguments(str(tmp_path), use_cpu=True, eval_strategy=strategy, eval_delay=delay)
        assert expected_evaluations(args, TrainerState(num_train_epochs=sys.maxsize, max_steps=7)) == expected


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
