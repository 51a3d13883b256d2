"""AdaFocal in a stock `Trainer`, with `AdaFocalCallback` and `CalibrationMetrics`."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from transformers import (
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adafocal import AdaFocalCallback, AdaFocalLoss, CalibrationMetrics, ClasswiseAdaFocalLoss
from hf_adafocal.models import train_word_level_tokenizer
from hf_adafocal.training.sample_rows import (
    IGNORED,
    counted_rows,
    equal_mass_statistics,
    sample_metrics,
    sample_rows,
)


def batch(*shape):
    return 2 * torch.randn(shape), torch.randint(shape[-1], shape[:-1])


class TestCalibrationMetrics:
    def test_logits_are_refused_with_the_argument_that_is_missing(self):
        with pytest.raises(ValueError, match="preprocess_logits_for_metrics=calibration.reduce"):
            CalibrationMetrics()(EvalPrediction(np.zeros((4, 3)), np.zeros(4, int)))

    def test_the_callback_refuses_another_number_of_bins_than_that_of_the_loss(self):
        with pytest.raises(ValueError, match="The loss has 10 bins and its statistics 15"):
            AdaFocalCallback(AdaFocalLoss(num_bins=10), CalibrationMetrics().calibrate)

    def test_reduce_gives_the_rows_also_from_a_tuple_of_outputs(self):
        logits, labels = batch(8, 3)
        assert torch.equal(CalibrationMetrics().reduce(logits, labels), sample_rows(logits, labels))
        assert torch.equal(CalibrationMetrics().reduce((logits, None), labels), sample_rows(logits, labels))

    def test_a_call_gives_the_metrics_and_calibrate_the_bins_of_the_same_samples(self):
        metrics = CalibrationMetrics(num_bins=5)
        rows = sample_rows(*batch(40, 3))
        rows[::4] = IGNORED
        found = metrics(SimpleNamespace(predictions=rows.numpy(), label_ids=None))
        assert found == sample_metrics(counted_rows(rows), 5)
        stats, expected = metrics.calibrate(), equal_mass_statistics(counted_rows(rows), 5)
        assert stats.count.sum() == 30
        np.testing.assert_array_equal(stats.gap, expected.gap)

    def test_calibrate_has_a_row_for_each_class_of_the_reduced_logits(self):
        metrics, (logits, labels) = CalibrationMetrics(num_bins=5), batch(40, 3)
        logits = torch.cat([logits, torch.full((40, 2), -50.0)], dim=1)
        metrics(SimpleNamespace(predictions=metrics.reduce(logits, labels).numpy()))
        found = metrics.calibrate()
        assert found.class_gap.shape == (5, 5)
        assert found.class_counts.tolist() == torch.bincount(logits.argmax(1), minlength=5).tolist()

    def test_calibrate_uses_the_last_evaluation(self):
        metrics = CalibrationMetrics(num_bins=2)
        for size in (10, 6):
            metrics(SimpleNamespace(predictions=sample_rows(*batch(size, 3)).numpy()))
        assert metrics.calibrate().count.sum() == 6

    def test_calibrate_before_any_evaluation_is_an_error(self):
        with pytest.raises(RuntimeError, match="compute_metrics"):
            CalibrationMetrics().calibrate()

    def test_batches_that_the_trainer_pads_to_one_length_count_no_padding(self):
        metrics = CalibrationMetrics()
        short, long = sample_rows(*batch(2, 3, 4)), sample_rows(*batch(2, 5, 4))
        padded = torch.nn.functional.pad(short, (0, 0, 0, 2), value=-100)  # as a stock Trainer pads predictions
        found = metrics(SimpleNamespace(predictions=torch.cat([padded, long]).numpy()))
        expected = np.concatenate([counted_rows(short), counted_rows(long)])
        assert found == {name: pytest.approx(value) for name, value in sample_metrics(expected).items()}


def stock(folder, loss, model=None, sets=None, prefix=None, **settings) -> Trainer:
    """Two epochs of a stock Trainer with the recipe of `CalibrationMetrics`."""
    calibration = CalibrationMetrics(loss.num_bins, loss.ignore_index)
    args = TrainingArguments(
        str(folder),
        lr_scheduler_type="constant",
        per_device_eval_batch_size=16,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **{
            **{"num_train_epochs": 2, "learning_rate": 5e-3, "eval_strategy": "epoch", "save_strategy": "no"},
            **settings,
        },
    )
    return Trainer(
        model or tiny.bert(),
        args,
        train_dataset=tiny.token_dataset(48, seed=0),
        eval_dataset=tiny.token_dataset(60, seed=1) if sets is None else sets,
        compute_loss_func=loss,
        compute_metrics=calibration,
        preprocess_logits_for_metrics=calibration.reduce,
        callbacks=[AdaFocalCallback(loss, calibration.calibrate, prefix)],
    )


class TestTraining:
    def test_it_gives_the_gammas_weights_and_metrics_of_ours(self, tmp_path):
        loss = AdaFocalLoss(num_bins=5)
        run = stock(tmp_path / "stock", loss)
        run.train()
        ours = tiny.trainer(tmp_path / "ours")
        ours.train()
        assert loss.gammas.ne(1).all()
        torch.testing.assert_close(loss.gammas, ours.loss.gammas)
        torch.testing.assert_close(loss.edges, ours.loss.edges)
        for mine, theirs in zip(ours.model.parameters(), run.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
        logs = [[entry for entry in found.state.log_history if "eval_ece" in entry] for found in (run, ours)]
        assert len(logs[0]) == 2
        for name in ("eval_ece", "eval_nll", "eval_brier"):
            np.testing.assert_allclose(*([entry[name] for entry in log] for log in logs), rtol=1e-5)

    def test_it_moves_the_tables_of_classes_as_ours_does(self, tmp_path):
        loss = ClasswiseAdaFocalLoss(num_bins=5)
        stock(tmp_path / "stock", loss, tiny.bert(num_labels=4)).train()
        ours = tiny.trainer(tmp_path / "ours", tiny.bert(num_labels=4), loss="classwise_adafocal")
        ours.train()
        assert loss.class_gammas.shape == (4, 5) and loss.class_gammas.ne(loss.gammas).any()
        torch.testing.assert_close(loss.class_gammas, ours.loss.class_gammas)
        torch.testing.assert_close(loss.class_counts, ours.loss.class_counts)

    @pytest.mark.parametrize("restore", [False, True])
    def test_it_resumes_with_its_table(self, tmp_path, restore):
        whole = AdaFocalLoss(num_bins=5)
        stock(tmp_path, whole, save_strategy="epoch").train()
        resumed = AdaFocalLoss(num_bins=5)
        again = stock(tmp_path, resumed, save_strategy="epoch", restore_callback_states_from_checkpoint=restore)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert torch.equal(whole.gammas, resumed.gammas)
        history = again.state.stateful_callbacks["adafocal"]["history"]
        assert [update["step"] for update in history] == [0, 6, 12] and history[-1]["gammas"] == whole.gammas.tolist()


class TestSets:
    SETS = {"other": tiny.token_dataset(20, seed=6), "calibration": tiny.token_dataset(60, seed=1)}

    def test_of_several_the_entry_named_calibration_moves_gamma(self, tmp_path):
        several, alone = AdaFocalLoss(num_bins=5), AdaFocalLoss(num_bins=5)
        run = stock(tmp_path, several, sets=self.SETS)
        run.train()
        stock(tmp_path, alone).train()
        assert torch.equal(several.gammas, alone.gammas) and torch.equal(several.edges, alone.edges)
        assert [update["step"] for update in run.state.stateful_callbacks["adafocal"]["history"]] == [0, 6, 12]

    def test_another_entry_moves_it_where_the_callback_is_told(self, tmp_path):
        loss = AdaFocalLoss(num_bins=5)
        stock(tmp_path, loss, sets={"a": self.SETS["calibration"], "b": self.SETS["other"]}, prefix="eval_a").train()
        assert loss.gammas.ne(1).all()

    @pytest.mark.parametrize("epochs", [1, 2])
    def test_sets_none_of_which_is_the_calibration_set_are_an_error_that_names_them(self, tmp_path, epochs):
        loss = AdaFocalLoss(num_bins=5)
        sets = {"a": self.SETS["calibration"], "b": self.SETS["other"]}
        with pytest.raises(ValueError, match=r"Gamma has not moved: .*\['eval_a', 'eval_b'\].*'eval_calibration'"):
            stock(tmp_path, loss, sets=sets, num_train_epochs=epochs).train()

    def test_without_evaluations_it_is_an_error_before_the_first_step(self, tmp_path):
        run = stock(tmp_path, AdaFocalLoss(num_bins=5), eval_strategy="no")
        with pytest.raises(ValueError, match="eval_strategy is 'no', so it would never move. Set"):
            run.train()
        assert run.state.global_step == 0

    def test_it_says_how_often_gamma_will_move_and_what_few_updates_mean(self, tmp_path, caplog):
        logging.getLogger("transformers").propagate = True
        caplog.set_level("INFO", logger="hf_adafocal")
        stock(tmp_path, AdaFocalLoss(num_bins=5)).train()
        assert "AdaFocalLoss with 5 bins: gamma will move 2 times, too few" in caplog.text
        assert "focal loss with gamma 1" in caplog.text and "or a temperature at the end." in caplog.text
        caplog.clear()
        often = {"num_train_epochs": 4, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
        stock(tmp_path, AdaFocalLoss(num_bins=5), **often).train()
        assert "gamma will move 24 times." in caplog.text and "too few" not in caplog.text


class TestTokenClassification:
    def test_tokens_are_samples_also_where_there_are_as_many_tokens_as_classes(self, tmp_path):
        # Sequences of 3 tokens of 3 classes: logits (N, 3, 3), and a loss that took dimension 1 for the classes
        # would be silently wrong.
        tokens = np.random.default_rng(0).integers(1, tiny.VOCABULARY, (32, 3))
        labels = np.where(tokens % 7 == 0, -100, tokens % 3)
        data = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})
        config = tiny.bert().config
        settings = {"num_train_epochs": 1, "per_device_train_batch_size": 8}

        def tagger():
            set_seed(0)
            return BertForTokenClassification(config)

        collator = DataCollatorForTokenClassification(train_word_level_tokenizer(["a b c"]))
        loss = AdaFocalLoss(num_bins=5)
        run = stock(tmp_path, loss, tagger(), sets=data, **settings)
        run.train_dataset, run.data_collator = data, collator
        ours = tiny.trainer(
            tmp_path, tagger(), train_dataset=data, eval_dataset=data, split_overlap="skip", **settings
        )
        ours.data_collator = collator
        for found in (run, ours):
            found.train()
        torch.testing.assert_close(loss.gammas, ours.loss.gammas, rtol=1e-4, atol=0)
        for mine, theirs in zip(run.model.parameters(), ours.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
