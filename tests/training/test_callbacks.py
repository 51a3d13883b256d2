import json
import logging

import pytest
import tiny
from transformers import Trainer, TrainingArguments

from hf_adafocal import AdaFocalLoss
from hf_adafocal.training.callbacks import STATE_KEY


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
