import logging
import warnings

import numpy as np
import pytest
import reference
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Sequence, Value
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_adafocal import (
    AdaFocalCallback,
    AdaFocalLoss,
    AdaFocalTrainer,
    CalibrationMetrics,
    ClasswiseAdaFocalLoss,
    FocalLoss,
)
from hf_adafocal.losses.batch_loss import CombinedLoss
from hf_adafocal.scaling.fit import Scaling
from hf_adafocal.scaling.folding import fold_scaling, recorded_scaling


def updated_parameters(folder, model, train_dataset, **settings):
    """Parameters after one optimizer step of plain SGD over the whole data set."""
    run = tiny.trainer(
        folder, model, train_dataset=train_dataset, max_steps=1, optim="sgd", learning_rate=10.0, **settings
    )
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    run.train()
    return torch.cat([p.detach().flatten() for p in run.model.parameters()]) - before


class TestLossScale:
    @pytest.mark.parametrize("loss", ["cross_entropy", "focal", "flsd_53", "adafocal"])
    def test_unequal_micro_batches_give_the_update_of_one_batch(self, tmp_path, loss):
        data = tiny.token_dataset(13)
        whole = updated_parameters(tmp_path, tiny.bert(), data, per_device_train_batch_size=13, loss=loss)
        parts = updated_parameters(
            tmp_path, tiny.bert(), data, per_device_train_batch_size=4, gradient_accumulation_steps=4, loss=loss
        )
        assert whole.norm() > 1e-3
        assert (whole - parts).norm() / whole.norm() < 1e-5

    def test_the_update_is_that_of_the_mean_loss(self, tmp_path):
        data = tiny.token_dataset(13)
        model = tiny.bert()
        loss = FocalLoss(2.0)(
            model(input_ids=torch.tensor(data["input_ids"][:])).logits, torch.tensor(data["labels"][:])
        )
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        update = updated_parameters(
            tmp_path,
            tiny.bert(),
            data,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            loss=FocalLoss(2.0),
            max_grad_norm=0,
        )
        assert (update + 10 * gradient).norm() / update.norm() < 1e-5

    def test_the_logged_loss_is_the_mean_over_samples(self, tmp_path):
        run = tiny.trainer(
            tmp_path,
            train_dataset=tiny.token_dataset(13),
            max_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            loss=FocalLoss(2.0),
        )
        data = tiny.token_dataset(13)
        logits = tiny.bert()(input_ids=torch.tensor(data["input_ids"][:])).logits
        expected = FocalLoss(2.0)(logits, torch.tensor(data["labels"][:])).item()
        run.train()
        assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)

    def test_data_parallel_repeats_of_the_count_are_read_as_one_count(self, tmp_path):
        run = tiny.trainer(tmp_path)
        run.model.train()
        batch = {"input_ids": torch.tensor(tiny.token_dataset(6)["input_ids"][:]), "labels": torch.arange(6) % 3}
        one = run.compute_loss(run.model, batch, num_items_in_batch=torch.tensor(6))
        repeated = run.compute_loss(run.model, batch, num_items_in_batch=torch.tensor([[6], [6]]))
        assert torch.equal(one, repeated)

    def test_the_callers_batch_is_left_as_it_was(self, tmp_path):
        run = tiny.trainer(tmp_path)
        batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}
        run.compute_loss(run.model, batch)
        assert set(batch) == {"input_ids", "labels"}

    def test_a_batch_without_labels_is_an_error_that_names_its_columns(self, tmp_path):
        run = tiny.trainer(tmp_path)
        with pytest.raises(ValueError, match=r"must hold `labels`, found \['input_ids'\]"):
            run.compute_loss(run.model, {"input_ids": torch.ones(2, 4, dtype=torch.long)})


class TestEvaluation:
    def test_metrics_are_those_of_a_plain_forward_pass(self, tmp_path):
        data = tiny.token_dataset(21, seed=3)
        metrics = tiny.trainer(tmp_path, eval_dataset=data, per_device_eval_batch_size=4).evaluate()
        p, labels = tiny.probabilities(tiny.bert(), data)
        confidence, correct = p.max(1), p.argmax(1) == labels
        assert metrics["eval_accuracy"] == pytest.approx(correct.mean())
        assert metrics["eval_nll"] == pytest.approx(reference.negative_log_likelihood(p, labels), rel=1e-6)
        assert metrics["eval_ece"] == pytest.approx(reference.expected_calibration_error(p, labels, 5), rel=1e-5)
        edges = reference.equal_mass_edges(confidence, 5)
        expected = reference.calibration_error(confidence, correct, edges)
        assert metrics["eval_ada_ece"] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("loss", ["adafocal", "focal"])
    def test_the_evaluation_loss_is_the_nll_whatever_the_training_loss(self, tmp_path, loss):
        metrics = tiny.trainer(tmp_path, loss=loss).evaluate()
        p, labels = tiny.probabilities(tiny.bert(), tiny.token_dataset(60, seed=1))
        assert metrics["eval_loss"] == pytest.approx(-np.log(p[np.arange(60), labels]).mean(), rel=1e-6)

    def test_metrics_reach_the_log_and_choose_the_best_checkpoint(self, tmp_path):
        run = tiny.trainer(
            tmp_path,
            num_train_epochs=3,
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_ada_ece",
            greater_is_better=False,
        )
        run.train()
        logged = [entry["eval_ada_ece"] for entry in run.state.log_history if "eval_ada_ece" in entry]
        assert len(logged) == 3
        assert run.state.best_metric == min(logged)
        for name in ("eval_ece", "eval_nll", "eval_accuracy"):
            assert sum(name in entry for entry in run.state.log_history) == 3

    def test_metrics_and_gammas_reach_tensorboard(self, tmp_path):
        pytest.importorskip("tensorboard", reason="tensorboard (extra `dev`) reads the event file back")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = tiny.trainer(tmp_path, report_to="tensorboard")
        run.train()
        events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent))
        events.Reload()
        assert {"eval/ece", "eval/ada_ece", "eval/nll", "eval/accuracy", "train/gamma_04"} <= set(
            events.Tags()["scalars"]
        )
        assert events.Scalars("train/gamma_04")[-1].value == pytest.approx(run.loss.gammas[4].item())

    def test_no_gathered_tensor_has_a_value_for_each_class(self, tmp_path, monkeypatch):
        run = tiny.trainer(tmp_path, tiny.bert(num_labels=7))
        shapes = []
        gather = run.accelerator.gather_for_metrics
        monkeypatch.setattr(
            run.accelerator, "gather_for_metrics", lambda data: shapes.append(tuple(data.shape)) or gather(data)
        )
        run.evaluate()
        assert (16, 4) in shapes and not any(shape[-1:] == (7,) for shape in shapes)
        run.predict(tiny.token_dataset(16))  # here the user asks for them
        assert any(shape[-1:] == (7,) for shape in shapes)

    def test_the_users_compute_metrics_sees_logits_and_keeps_its_names(self, tmp_path):
        seen = {}

        def compute_metrics(prediction):
            seen["shape"] = prediction.predictions.shape
            return {"accuracy": -1.0}

        metrics = tiny.trainer(tmp_path, compute_metrics=compute_metrics).evaluate()
        assert seen["shape"] == (60, 3)
        assert metrics["eval_accuracy"] == -1.0
        assert 0 < metrics["eval_ece"] < 1

    def test_predict_reports_under_its_own_prefix(self, tmp_path):
        output = tiny.trainer(tmp_path).predict(tiny.token_dataset(20, seed=4), metric_key_prefix="test")
        assert output.predictions.shape == (20, 3)
        assert {"test_ece", "test_ada_ece", "test_nll", "test_accuracy"} <= output.metrics.keys()

    def test_unlabelled_data_can_be_predicted(self, tmp_path):
        data = tiny.token_dataset(10).remove_columns("labels")
        output = tiny.trainer(tmp_path).predict(data)
        assert output.predictions.shape == (10, 3) and "test_ece" not in output.metrics

    def test_a_set_whose_labels_are_all_ignored_is_an_error(self, tmp_path):
        features = Features({"input_ids": Sequence(Value("int64")), "labels": Value("int64")})
        data = Dataset.from_dict({"input_ids": [[1, 2]] * 4, "labels": [-100] * 4}, features=features)
        with pytest.raises(ValueError, match="Every label of the 'eval' set is ignored"):
            tiny.trainer(tmp_path).evaluate(data)

    def test_a_streamed_set_is_evaluated(self, tmp_path):
        data = tiny.token_dataset(21, seed=3)
        streamed = IterableDataset.from_generator(lambda: iter(data))
        whole = tiny.trainer(tmp_path).evaluate(data)
        assert tiny.trainer(tmp_path).evaluate(streamed)["eval_ece"] == pytest.approx(whole["eval_ece"])

    def test_a_module_that_returns_a_tensor_loses_no_row(self, tmp_path):
        class Plain(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = torch.nn.Embedding(tiny.VOCABULARY, 3)

            def forward(self, input_ids):
                return self.embedding(input_ids).mean(1)

        settings = {"label_names": ["labels"], "remove_unused_columns": False}
        output = tiny.trainer(tmp_path, Plain(), **settings).predict(tiny.token_dataset(21))
        assert output.predictions.shape == (21, 3) and len(output.label_ids) == 21

    def test_a_module_without_a_labels_argument_needs_label_names(self, tmp_path):
        class Plain(torch.nn.Module):
            def forward(self, input_ids):
                return input_ids

        with pytest.raises(ValueError, match=r"Plain.forward has no `labels` argument.*label_names=\['labels'\]"):
            tiny.trainer(tmp_path, Plain())


class TestTokenClassification:
    def data(self, size):
        generator = np.random.default_rng(0)
        lengths = generator.integers(3, 9, size)
        tokens = [generator.integers(1, tiny.VOCABULARY, length).tolist() for length in lengths]
        labels = [[token % 3 if place else -100 for place, token in enumerate(row)] for row in tokens]
        return Dataset.from_dict({"input_ids": tokens, "labels": labels})

    def test_tokens_are_the_samples_and_ignored_ones_do_not_count(self, tmp_path):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0}, unk_token="[PAD]")), pad_token="[PAD]"
        )
        set_seed(0)
        config = BertConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3
        )
        data = self.data(30)
        run = AdaFocalTrainer(
            BertForTokenClassification(config),
            tiny.arguments(tmp_path, num_train_epochs=6, split_overlap="skip"),
            train_dataset=data,
            eval_dataset=data,
            data_collator=DataCollatorForTokenClassification(tokenizer),
        )
        run.train()
        output = run.predict(data)
        counted = output.label_ids != -100
        correct = (output.predictions.argmax(-1) == output.label_ids)[counted]
        assert counted.sum() == sum(len(row) - 1 for row in data["input_ids"])
        assert output.metrics["test_accuracy"] == pytest.approx(correct.mean())
        assert correct.mean() > 0.5
        assert run.loss.gammas.ne(1).all()


class TestSegmentation:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_pixels_are_the_samples_and_small_logits_are_resized_to_the_labels(self, tmp_path, streaming):
        set_seed(0)
        config = SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
            strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
            classifier_dropout_prob=0.0,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 3, (12, 4, 4), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
        pixels = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2) + torch.randn(
            12, 3, 16, 16, generator=generator
        )
        labels[:, 0] = -100
        data = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]
        model = SegformerForSemanticSegmentation(config)
        run = AdaFocalTrainer(
            model,
            tiny.arguments(tmp_path, num_train_epochs=4, streaming_calibration=streaming, split_overlap="skip"),
            train_dataset=data,
            eval_dataset=data,
        )
        run.train()
        metrics = run.evaluate()
        with torch.no_grad():
            logits = model.eval()(pixel_values=pixels).logits
        assert logits.shape[2:] == (8, 8)
        logits = torch.nn.functional.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)
        expected = torch.nn.functional.cross_entropy(logits, labels).item()
        correct = (logits.argmax(1) == labels)[labels != -100].float().mean().item()
        assert metrics["eval_nll"] == pytest.approx(expected, rel=1e-5)
        assert metrics["eval_accuracy"] == pytest.approx(correct)
        assert run.loss.gammas.ne(1).all()


class TestStreaming:
    def test_a_histogram_of_fixed_size_gives_the_metrics_and_gammas_of_all_samples(self, tmp_path):
        exact, streamed = (
            tiny.trainer(tmp_path, eval_dataset=tiny.token_dataset(600, seed=1), streaming_calibration=streaming)
            for streaming in (False, True)
        )
        for run in (exact, streamed):
            run.train()
        names = ("eval_accuracy", "eval_nll", "eval_loss", "eval_ece", "eval_ada_ece")
        logs = [[e for e in run.state.log_history if "eval_ece" in e] for run in (exact, streamed)]
        for here, there in zip(*logs, strict=True):
            assert {n: here[n] for n in names} == pytest.approx({n: there[n] for n in names}, abs=2e-3)
            assert [here[n] for n in names[:4]] == pytest.approx([there[n] for n in names[:4]], rel=1e-4)
        np.testing.assert_allclose(streamed.loss.gammas, exact.loss.gammas, atol=0.02)
        np.testing.assert_allclose(streamed.loss.edges, exact.loss.edges, atol=2e-3)

    def test_a_number_of_bins_that_does_not_nest_is_an_error(self, tmp_path):
        run = tiny.trainer(tmp_path, streaming_calibration=True, num_bins=7)
        with pytest.raises(ValueError, match="num_bins must divide 72,000, found 7"):
            run.evaluate()


class TestGammaUpdate:
    def test_gamma_follows_the_papers_rule_on_the_calibration_set(self, tmp_path):
        run = tiny.trainer(tmp_path, num_train_epochs=1)
        run.train()
        p, labels = tiny.probabilities(run.model, tiny.token_dataset(60, seed=1))
        confidence, correct = p.max(1), p.argmax(1) == labels
        edges = reference.equal_mass_edges(confidence, 5)
        bins = reference.bins(confidence, correct, edges)
        expected = [reference.updated_gamma(1.0, mean - share) for _, mean, share in bins]
        np.testing.assert_allclose(run.loss.edges.numpy(), edges, rtol=1e-5)
        np.testing.assert_allclose(run.loss.gammas.numpy(), expected, rtol=1e-4)

    def test_gamma_moves_once_an_epoch_and_each_table_is_logged(self, tmp_path):
        run = tiny.trainer(tmp_path, num_train_epochs=3)
        run.train()
        logged = [entry for entry in run.state.log_history if "gamma_00" in entry]
        assert [entry["step"] for entry in logged] == [6, 12, 18]
        assert [logged[-1][f"gamma_{index:02d}"] for index in range(5)] == run.loss.gammas.tolist()

    def test_evaluating_outside_training_moves_nothing(self, tmp_path):
        run = tiny.trainer(tmp_path, num_train_epochs=1, eval_on_start=True)
        run.evaluate()
        assert run.loss.gammas.eq(1).all()
        run.train()
        assert sum("gamma_00" in entry for entry in run.state.log_history) == 1
        after = run.loss.gammas.clone()
        run.evaluate()
        run.predict(tiny.token_dataset(30, seed=7))
        assert torch.equal(run.loss.gammas, after)

    def test_the_calibration_set_is_read_once_when_it_is_the_evaluation_set(self, tmp_path):
        batches = []
        run = tiny.trainer(tmp_path, num_train_epochs=1)
        run.model.register_forward_hook(lambda module, args, output: batches.append(module.training))
        run.train()
        assert batches.count(False) == 4  # 60 samples in batches of 16

    def test_a_separate_calibration_set_drives_gamma(self, tmp_path):
        calibration = tiny.token_dataset(30, seed=5)
        run = tiny.trainer(tmp_path, num_train_epochs=1, calibration_dataset=calibration)
        run.train()
        p, _ = tiny.probabilities(run.model, calibration)
        np.testing.assert_allclose(run.loss.edges[[0, -1]], [p.max(1).min(), p.max(1).max()], rtol=1e-5)
        evaluated = [name for entry in run.state.log_history for name in entry if name.endswith("_ece")]
        assert {"eval_ece", "eval_calibration_ece"} <= set(evaluated)

    def test_of_a_dict_the_entry_named_calibration_drives_gamma(self, tmp_path):
        calibration = tiny.token_dataset(30, seed=5)
        batches = []
        run = tiny.trainer(
            tmp_path,
            num_train_epochs=1,
            eval_dataset={"other": tiny.token_dataset(20, seed=6), "calibration": calibration},
        )
        run.model.register_forward_hook(lambda module, args, output: batches.append(module.training))
        run.train()
        p, _ = tiny.probabilities(run.model, calibration)
        np.testing.assert_allclose(run.loss.edges[[0, -1]], [p.max(1).min(), p.max(1).max()], rtol=1e-5)
        assert batches[:-1].count(False) == 2 + 2  # nothing is read twice; the last call is the line above

    def test_a_dict_with_a_separate_calibration_set_updates_once_an_evaluation(self, tmp_path):
        sets = {"a": tiny.token_dataset(20, seed=6), "b": tiny.token_dataset(20, seed=8)}
        run = tiny.trainer(tmp_path, eval_dataset=sets, calibration_dataset=tiny.token_dataset(30, seed=5))
        run.train()
        assert sum("gamma_00" in entry for entry in run.state.log_history) == 2

    @pytest.mark.parametrize("own", [False, True], ids=["shared-with-evaluation", "of-its-own"])
    def test_evaluating_another_set_while_training_moves_nothing(self, tmp_path, own):
        class Curious(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                self.trainer.evaluate(tiny.token_dataset(40, seed=9))
                self.trainer.evaluate({"other": tiny.token_dataset(40, seed=9)})
                self.trainer.predict(tiny.token_dataset(40, seed=9), metric_key_prefix="eval")

        calibration = {"calibration_dataset": tiny.token_dataset(30, seed=5)} if own else {}
        plain = tiny.trainer(tmp_path, **calibration)
        curious = Curious()
        disturbed = tiny.trainer(tmp_path, callbacks=[curious], **calibration)
        curious.trainer = disturbed
        for run in (plain, disturbed):
            run.train()
        tables = [
            [(entry["step"], entry["gamma_00"], entry["gamma_04"]) for entry in run.state.log_history
             if "gamma_00" in entry] for run in (plain, disturbed)
        ]  # fmt: skip
        assert tables[0] == tables[1] and len(tables[0]) == 2
        assert torch.equal(plain.loss.edges, disturbed.loss.edges)

    def test_statistics_are_those_of_the_calibration_set_whatever_was_evaluated_since(self, tmp_path):
        run = tiny.trainer(tmp_path, num_train_epochs=1)
        run.train()
        expected = run.calibrate()
        run.evaluate(tiny.token_dataset(40, seed=9))
        run.predict(tiny.token_dataset(40, seed=9), metric_key_prefix="eval")
        np.testing.assert_array_equal(run.calibrate().edges, expected.edges)
        assert run.calibrate().count.sum() == 60

    def test_calibrating_before_an_evaluation_is_an_error(self, tmp_path):
        run = tiny.trainer(tmp_path)
        run.evaluate(tiny.token_dataset(40, seed=9))
        with pytest.raises(RuntimeError, match="has not been evaluated yet"):
            run.calibrate()

    def test_an_evaluation_set_put_in_later_does_not_become_the_calibration_set(self, tmp_path):
        run = tiny.trainer(tmp_path, num_train_epochs=1)
        calibration, run.eval_dataset = run.eval_dataset, tiny.token_dataset(40, seed=9)
        run.train()
        p, _ = tiny.probabilities(run.model, calibration)
        np.testing.assert_allclose(run.loss.edges[[0, -1]], [p.max(1).min(), p.max(1).max()], rtol=1e-5)

    def test_an_entry_of_a_dict_can_be_evaluated_by_its_name(self, tmp_path):
        sets = {"a": tiny.token_dataset(20, seed=6), "calibration": tiny.token_dataset(30, seed=5)}
        run = tiny.trainer(tmp_path, eval_dataset=sets)
        run.evaluate("calibration")
        assert run.calibrate().count.sum() == 30

    def test_other_losses_have_no_gamma_callback(self, tmp_path):
        run = tiny.trainer(tmp_path, loss="cross_entropy", num_train_epochs=1)
        run.train()
        assert not any("gamma_00" in entry for entry in run.state.log_history)
        assert "eval_ece" in run.state.log_history[-2]

    def test_plain_training_arguments_mean_adafocal_with_the_papers_settings(self, tmp_path):
        args = TrainingArguments(str(tmp_path), num_train_epochs=1, eval_strategy="epoch", use_cpu=True, report_to=[])
        run = tiny.trainer(tmp_path, args=args)
        run.train()
        assert isinstance(run.loss, AdaFocalLoss) and run.loss.num_bins == 15
        assert run.loss.gammas.ne(1).any()

    def test_training_again_starts_from_a_fresh_table(self, tmp_path):
        run = tiny.trainer(tmp_path, num_train_epochs=3)
        run.train()
        run.train()
        assert sum("gamma_00" in entry for entry in run.state.log_history) == 3
        first = next(entry for entry in run.state.log_history if "gamma_00" in entry)
        assert all(abs(np.log(abs(first[f"gamma_{index:02d}"]))) <= 1 for index in range(5))  # one step from 1


class TestTablesOfClasses:
    NAME = "classwise_adafocal"

    def test_they_follow_the_rule_on_the_samples_predicted_as_each_class(self, tmp_path):
        model = tiny.bert(num_labels=4)
        model.classifier.bias.data[3] = -50.0  # never predicted, but a class
        run = tiny.trainer(tmp_path, model, num_train_epochs=1, loss=self.NAME)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="ClasswiseAdaFocalLoss got no statistics")
            run.train()
        p, labels = tiny.probabilities(run.model, tiny.token_dataset(60, seed=1))
        confidence, predicted = p.max(1), p.argmax(1)
        edges, counts = reference.equal_mass_edges(confidence, 5), np.bincount(predicted, minlength=4)
        expected = np.ones((4, 5))
        for k in np.flatnonzero(counts):
            of_class = predicted == k
            bins = reference.bins(confidence[of_class], labels[of_class] == k, edges)
            expected[k] = [reference.updated_gamma(1.0, mean - share) for _, mean, share in bins]
        assert np.count_nonzero(counts) >= 2 and counts[3] == 0
        assert run.loss.class_counts.tolist() == counts.tolist()
        np.testing.assert_allclose(run.loss.class_gammas.numpy(), expected, rtol=1e-4)
        assert np.abs(expected - run.loss.gammas.numpy())[counts > 0].max() > 0.05

    def test_a_base_of_a_combined_loss_has_them_too(self, tmp_path):
        run = tiny.trainer(tmp_path, loss="mmce", auxiliary_base=self.NAME)
        run.train()
        assert run.loss.base.class_counts.sum() == 60

    def test_plain_adafocal_computes_no_statistics_of_classes(self, tmp_path):
        run = tiny.trainer(tmp_path)
        run.evaluate()
        assert run.calibrate().class_gap is None

    @pytest.mark.parametrize("restore", [False, True])
    def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(self, tmp_path, restore):
        settings = {
            **{"loss": self.NAME, "num_train_epochs": 3, "save_strategy": "epoch"},
            "restore_callback_states_from_checkpoint": restore,
        }
        whole = tiny.trainer(tmp_path, **settings)
        whole.train()
        resumed = tiny.trainer(tmp_path, tiny.bert(seed=9), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert resumed.loss.table() == whole.loss.table() and len(whole.loss.table()["class_gammas"]) == 3
        saved = [run.state.stateful_callbacks["adafocal"] for run in (whole, resumed)]
        assert saved[0] == saved[1] == {**whole.loss.table(), "updates": 3}
        for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("settings", [{"loss": NAME}, {"loss": "mmce", "auxiliary_base": NAME}])
    def test_the_arguments_refuse_a_histogram_for_them(self, tmp_path, settings):
        with pytest.raises(ValueError, match="classwise_adafocal needs .* Set streaming_calibration=False"):
            tiny.arguments(tmp_path, streaming_calibration=True, **settings)
        tiny.arguments(tmp_path, streaming_calibration=True, auxiliary_base=self.NAME)  # not the base of anything

    @pytest.mark.parametrize("combined", [False, True])
    def test_the_trainer_refuses_a_histogram_for_a_module_that_has_them(self, tmp_path, combined):
        loss = ClasswiseAdaFocalLoss(5)
        with pytest.raises(ValueError, match="Set streaming_calibration=False"):
            tiny.trainer(tmp_path, loss=CombinedLoss("mmce", loss) if combined else loss, streaming_calibration=True)


class TestCalibrationSplit:
    def test_it_is_stratified_seeded_disjoint_and_complete(self, tmp_path):
        data = tiny.token_dataset(60).add_column("row", list(range(60)))
        runs = [
            tiny.trainer(tmp_path, train_dataset=data, eval_dataset=None, calibration_fraction=0.25, seed=seed)
            for seed in (1, 1, 2)
        ]
        rows = [set(run.calibration_dataset["row"]) for run in runs]
        assert rows[0] == rows[1] != rows[2]
        assert rows[0] | set(runs[0].train_dataset["row"]) == set(range(60))
        assert not rows[0] & set(runs[0].train_dataset["row"])
        assert np.bincount(runs[0].calibration_dataset["labels"]).tolist() == [5, 5, 5]
        assert runs[0].eval_dataset is runs[0].calibration_dataset

    def test_it_is_carved_from_any_indexed_data(self, tmp_path):
        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 30

            def __getitem__(self, index):
                return {"input_ids": torch.tensor([1, index]), "labels": index % 3}

        run = tiny.trainer(tmp_path, train_dataset=Rows(), eval_dataset=None, calibration_fraction=0.2)
        assert (len(run.train_dataset), len(run.calibration_dataset)) == (24, 6)

    def test_a_transform_on_the_data_does_not_hide_the_labels(self, tmp_path):
        data = tiny.token_dataset(30).with_transform(lambda batch: {"input_ids": batch["input_ids"]})
        run = tiny.trainer(tmp_path, train_dataset=data, eval_dataset=None, calibration_fraction=0.2)
        assert len(run.calibration_dataset) == 6

    def test_streamed_data_cannot_be_carved(self, tmp_path):
        streamed = IterableDataset.from_generator(lambda: iter(tiny.token_dataset(30)))
        with pytest.raises(ValueError, match="needs a training set with a length.*pass `calibration_dataset`"):
            tiny.trainer(tmp_path, train_dataset=streamed, eval_dataset=None, calibration_fraction=0.2, max_steps=1)

    def test_a_class_with_one_sample_cannot_be_stratified(self, tmp_path):
        features = Features({"input_ids": Sequence(Value("int64")), "labels": ClassLabel(num_classes=2)})
        data = Dataset.from_dict({"input_ids": [[1]] * 10, "labels": [0] * 9 + [1]}, features=features)
        with pytest.raises(ValueError, match="cannot hold out a stratified part of 10 samples"):
            tiny.trainer(tmp_path, train_dataset=data, eval_dataset=None, calibration_fraction=0.2)

    def test_a_small_one_warns_with_its_numbers(self, tmp_path, caplog):
        logger = logging.getLogger("transformers")
        logger.propagate = True
        with caplog.at_level("WARNING"):
            tiny.trainer(tmp_path, eval_dataset=tiny.token_dataset(48, seed=1), num_bins=5)
        assert "has 48 samples for 5 bins" in caplog.text
        caplog.clear()
        with caplog.at_level("WARNING"):
            tiny.trainer(tmp_path, eval_dataset=tiny.token_dataset(51, seed=1), num_bins=5)
        assert "samples for 5 bins" not in caplog.text


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"eval_dataset": None}, "there is none. Pass `calibration_dataset`"),
            ({"eval_dataset": tiny.token_dataset(6).select([])}, "calibration set is empty"),
            ({"eval_strategy": "no"}, "eval_strategy is 'no', so it would never move"),
            ({"eval_dataset": {"a": tiny.token_dataset(6)}}, r"which of the evaluation sets \['a'\] drives gamma"),
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 would be ignored"),
        ],
    )
    def test_what_would_be_ignored_is_refused(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            tiny.trainer(tmp_path, **settings)

    def test_a_loss_by_name_belongs_to_the_arguments(self, tmp_path):
        with pytest.raises(TypeError, match=r"found 'focal': name it in AdaFocalTrainingArguments\(loss=...\)"):
            AdaFocalTrainer(tiny.bert(), tiny.arguments(tmp_path), eval_dataset=tiny.token_dataset(), loss="focal")

    def test_a_loss_function_of_the_stock_trainer_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="compute_loss_func would be ignored"):
            AdaFocalTrainer(
                tiny.bert(), tiny.arguments(tmp_path), eval_dataset=tiny.token_dataset(), compute_loss_func=FocalLoss()
            )


class TestSecondWayIn:
    def stock(self, folder, loss, model=None, **settings):
        calibration = CalibrationMetrics(loss.num_bins)
        args = TrainingArguments(
            str(folder),
            num_train_epochs=2,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            per_device_eval_batch_size=16,
            eval_strategy="epoch",
            use_cpu=True,
            disable_tqdm=True,
            **{"save_strategy": "no", **settings},
        )
        return Trainer(
            model or tiny.bert(),
            args,
            train_dataset=tiny.token_dataset(48, seed=0),
            eval_dataset=tiny.token_dataset(60, seed=1),
            compute_loss_func=loss,
            compute_metrics=calibration,
            preprocess_logits_for_metrics=calibration.reduce,
            callbacks=[AdaFocalCallback(loss, calibration.calibrate)],
        )

    def test_a_stock_trainer_gives_the_gammas_weights_and_metrics_of_ours(self, tmp_path):
        loss = AdaFocalLoss(num_bins=5)
        stock = self.stock(tmp_path / "stock", loss)
        stock.train()
        ours = tiny.trainer(tmp_path / "ours")
        ours.train()
        assert loss.gammas.ne(1).all()
        torch.testing.assert_close(loss.gammas, ours.loss.gammas)
        torch.testing.assert_close(loss.edges, ours.loss.edges)
        for mine, theirs in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
        ece = [[entry["eval_ece"] for entry in run.state.log_history if "eval_ece" in entry] for run in (stock, ours)]
        assert len(ece[0]) == 2
        np.testing.assert_allclose(*ece)  # 5 bins here and there

    def test_a_stock_trainer_moves_the_tables_of_classes_as_ours_does(self, tmp_path):
        loss = ClasswiseAdaFocalLoss(num_bins=5)
        self.stock(tmp_path / "stock", loss, tiny.bert(num_labels=4)).train()
        ours = tiny.trainer(tmp_path / "ours", tiny.bert(num_labels=4), loss="classwise_adafocal")
        ours.train()
        assert loss.class_gammas.shape == (4, 5) and loss.class_gammas.ne(loss.gammas).any()
        torch.testing.assert_close(loss.class_gammas, ours.loss.class_gammas)
        torch.testing.assert_close(loss.class_counts, ours.loss.class_counts)

    @pytest.mark.parametrize("restore", [False, True])
    def test_it_resumes_with_its_table(self, tmp_path, restore):
        whole = AdaFocalLoss(num_bins=5)
        self.stock(tmp_path, whole, save_strategy="epoch").train()
        resumed = AdaFocalLoss(num_bins=5)
        again = self.stock(tmp_path, resumed, save_strategy="epoch", restore_callback_states_from_checkpoint=restore)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert torch.equal(whole.gammas, resumed.gammas)

    def test_calibrating_before_an_evaluation_is_an_error(self):
        with pytest.raises(RuntimeError, match="No evaluation yet"):
            CalibrationMetrics().calibrate()


class TestFoldedModel:
    def test_training_it_forgets_the_scaling_that_no_longer_holds(self, tmp_path):
        model = tiny.bert()
        fold_scaling(model, Scaling(0.5))
        assert recorded_scaling(model.config) == Scaling(0.5)
        tiny.trainer(tmp_path, model=model).train()
        assert recorded_scaling(model.config) is None
