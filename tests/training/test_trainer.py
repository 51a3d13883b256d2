import gc
import warnings

import numpy as np
import pytest
import reference
import tiny
import torch
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_adafocal import (
    AdaFocalLoss,
    AdaFocalTrainer,
    ClasswiseAdaFocalLoss,
    FocalLoss,
)
from hf_adafocal.losses.batch_loss import CombinedLoss
from hf_adafocal.scaling.fit import Scaling, fit_temperature_scaling
from hf_adafocal.scaling.folding import fold_scaling, recorded_scaling


def updates(run) -> list[int]:
    """Steps after which gamma moved."""
    return [update["step"] for update in run.adaptive_callback.history[1:]]


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
        brier = np.square(p - np.eye(3)[labels]).sum(1).mean()
        assert metrics["eval_brier"] == pytest.approx(brier, rel=1e-5)

    def test_the_best_temperature_of_the_calibration_set_is_what_fit_temperature_finds(self, tmp_path):
        data, model = tiny.token_dataset(60, seed=1), tiny.bert()
        tiny.trainer(tmp_path, model, loss="cross_entropy", num_train_epochs=4).train()
        model.classifier.weight.data *= 4  # over-confident
        metrics = tiny.trainer(tmp_path, model, eval_dataset=data).evaluate()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(data["input_ids"][:])).logits
        fitted = fit_temperature_scaling(logits, torch.tensor(data["labels"][:]))
        assert 1.5 < metrics["eval_temperature"] < 20
        assert metrics["eval_temperature"] == pytest.approx(1 / fitted.scale, rel=0.01)
        assert metrics["eval_refinement"] == pytest.approx(fitted.nll_after, abs=1e-3)
        assert metrics["eval_refinement"] < metrics["eval_nll"] - 0.1
        assert "eval_temperature" not in tiny.trainer(tmp_path, model).evaluate(tiny.token_dataset(9, seed=4))

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
        names = ("accuracy", "nll", "brier", "ece", "ada_ece", "temperature", "refinement")
        for name in (f"eval_{name}" for name in names):
            assert sum(name in entry for entry in run.state.log_history) == 3

    def test_metrics_and_gammas_reach_tensorboard(self, tmp_path):
        pytest.importorskip("tensorboard", reason="tensorboard (extra `dev`) reads the event file back")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = tiny.trainer(tmp_path, report_to="tensorboard")
        run.train()
        events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent))
        events.Reload()
        scalars = set(events.Tags()["scalars"])
        assert {"eval/ece", "eval/ada_ece", "eval/nll", "eval/accuracy", "train/gamma_mean"} <= scalars
        assert events.Scalars("train/gamma_mean")[-1].value == pytest.approx(run.loss.gammas.mean().item())

    def test_no_gathered_tensor_has_a_value_for_each_class(self, tmp_path, monkeypatch):
        run = tiny.trainer(tmp_path, tiny.bert(num_labels=7))
        shapes = []
        gather = run.accelerator.gather_for_metrics
        monkeypatch.setattr(
            run.accelerator, "gather_for_metrics", lambda data: shapes.append(tuple(data.shape)) or gather(data)
        )
        run.evaluate()
        assert not any(shape[-1:] == (7,) for shape in shapes)
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

    def test_dropping_the_last_batch_of_training_drops_none_of_an_evaluation(self, tmp_path):
        sets = {"train_dataset": tiny.token_dataset(45), "eval_dataset": tiny.token_dataset(61, seed=1)}
        plain, dropping = (tiny.trainer(tmp_path, dataloader_drop_last=drop, **sets) for drop in (False, True))
        found, expected = dropping.evaluate(), plain.evaluate()
        names = [name for name in expected if not name.endswith(("time", "second"))]
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}
        assert dropping.predict(tiny.token_dataset(61, seed=3)).predictions.shape == (61, 3)
        assert dropping.args.dataloader_drop_last is True
        dropping.train()
        assert dropping.state.max_steps == 10 and dropping.calibration_statistics().count.sum() == 61

    def test_workers_that_persist_serve_each_set_its_own_samples(self, tmp_path):
        other, workers = tiny.token_dataset(21, seed=3), {"dataloader_num_workers": 1}
        calibration = tiny.token_dataset(30, seed=5)
        run = tiny.trainer(
            tmp_path,
            calibration_dataset=calibration,
            dataloader_persistent_workers=True,
            **workers,
            num_train_epochs=1,
        )
        expected = tiny.trainer(tmp_path)
        for _ in range(2):
            for data in (None, other, calibration):
                found = run.evaluate() if data is None else run.evaluate(data)
                assert found["eval_nll"] == expected.evaluate(data)["eval_nll"]
        run.train()
        assert updates(run) == [6] and run.calibration_statistics().count.sum() == 30
        for iterator in [found for found in gc.get_objects() if type(found) is _MultiProcessingDataLoaderIter]:
            iterator._shutdown_workers()  # as garbage of a cycle each would wait five seconds

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
        labels[:, 0] = 255  # what the model's own loss ignores
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
        expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255).item()
        correct = (logits.argmax(1) == labels)[labels != 255].float().mean().item()
        assert metrics["eval_nll"] == pytest.approx(expected, rel=1e-5)
        assert metrics["eval_accuracy"] == pytest.approx(correct)
        assert run.loss.gammas.ne(1).all() and run.loss.ignore_index == run.ignore_index == 255


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

    @pytest.mark.parametrize("eval_strategy", ["epoch", "no"])
    def test_gamma_moves_once_an_epoch_whether_or_not_the_trainer_evaluates(self, tmp_path, eval_strategy):
        run = tiny.trainer(tmp_path, num_train_epochs=3, eval_strategy=eval_strategy)
        run.train()
        history = run.adaptive_callback.history
        assert [update["step"] for update in history] == [0, 6, 12, 18]
        assert history[0]["gammas"] == [1.0] * 5 and history[-1]["gammas"] == run.loss.gammas.tolist()
        assert run.state.stateful_callbacks["adafocal"]["history"] == history
        assert [entry["step"] for entry in run.state.log_history if "eval_ece" in entry] == [6, 12, 18]

    def test_three_numbers_of_each_table_are_logged(self, tmp_path):
        run = tiny.trainer(tmp_path, num_train_epochs=3)
        run.train()
        logged = [entry for entry in run.state.log_history if "gamma_mean" in entry]
        assert [entry["step"] for entry in logged] == [6, 12, 18]
        for entry, update in zip(logged, run.adaptive_callback.history[1:], strict=True):
            gammas = update["gammas"]
            found = {name: entry[name] for name in entry if name.startswith("gamma")}
            assert found == pytest.approx(
                {"gamma_min": min(gammas), "gamma_mean": sum(gammas) / 5, "gamma_max": max(gammas)}
            )

    def test_without_evaluations_of_the_trainer_a_run_is_the_same(self, tmp_path):
        runs = [tiny.trainer(tmp_path, eval_strategy=strategy) for strategy in ("epoch", "no")]
        for run in runs:
            run.train()
        assert runs[0].loss.table() == runs[1].loss.table()
        assert all(map(torch.equal, *(run.model.state_dict().values() for run in runs)))

    def test_a_calibration_set_of_its_own_moves_gamma_without_evaluations_of_the_trainer(self, tmp_path):
        calibration = tiny.token_dataset(30, seed=5)
        run = tiny.trainer(tmp_path, eval_strategy="no", calibration_dataset=calibration)
        run.train()
        assert updates(run) == [6, 12]
        p, _ = tiny.probabilities(run.model, calibration)
        np.testing.assert_allclose(run.loss.edges[[0, -1]], [p.max(1).min(), p.max(1).max()], rtol=1e-5)

    def test_evaluating_at_the_end_of_an_epoch_takes_back_no_log_and_no_checkpoint(self, tmp_path):
        settings = {"logging_strategy": "epoch", "save_strategy": "epoch"}
        run = tiny.trainer(tmp_path, eval_strategy="no", **settings)
        run.train()
        assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == [6, 12]
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]

    def test_evaluating_outside_training_moves_nothing(self, tmp_path):
        run = tiny.trainer(tmp_path, num_train_epochs=1, eval_on_start=True)
        run.evaluate()
        assert run.loss.gammas.eq(1).all()
        run.train()
        assert updates(run) == [6]
        after = run.loss.gammas.clone()
        run.evaluate()
        run.predict(tiny.token_dataset(30, seed=7))
        assert torch.equal(run.loss.gammas, after)

    def test_the_calibration_set_is_read_once_when_it_is_the_evaluation_set(self, tmp_path):
        batches = []
        run = tiny.trainer(tmp_path, num_train_epochs=1)
        run.model.register_forward_hook(lambda module, args, output: batches.append(module.training))
        run.train()
        assert batches.count(False) == 4 + 1  # 60 samples in batches of 16, and the look at the model's own loss

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
        assert batches[:-1].count(False) == 2 + 2 + 1  # nothing is read twice; the last call is the line above

    def test_a_dict_with_a_separate_calibration_set_updates_once_an_evaluation(self, tmp_path):
        sets = {"a": tiny.token_dataset(20, seed=6), "b": tiny.token_dataset(20, seed=8)}
        run = tiny.trainer(tmp_path, eval_dataset=sets, calibration_dataset=tiny.token_dataset(30, seed=5))
        run.train()
        assert updates(run) == [6, 12]

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
        histories = [run.adaptive_callback.history for run in (plain, disturbed)]
        assert histories[0] == histories[1] and len(histories[0]) == 3
        assert torch.equal(plain.loss.edges, disturbed.loss.edges)

    def test_statistics_are_those_of_the_calibration_set_whatever_was_evaluated_since(self, tmp_path):
        run = tiny.trainer(tmp_path, num_train_epochs=1)
        run.train()
        expected = run.calibration_statistics()
        run.evaluate(tiny.token_dataset(40, seed=9))
        run.predict(tiny.token_dataset(40, seed=9), metric_key_prefix="eval")
        np.testing.assert_array_equal(run.calibration_statistics().edges, expected.edges)
        assert run.calibration_statistics().count.sum() == 60

    def test_calibrating_before_an_evaluation_is_an_error(self, tmp_path):
        run = tiny.trainer(tmp_path)
        run.evaluate(tiny.token_dataset(40, seed=9))
        with pytest.raises(RuntimeError, match="has not been evaluated yet"):
            run.calibration_statistics()

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
        assert run.calibration_statistics().count.sum() == 30

    def test_other_losses_have_no_gamma_callback(self, tmp_path):
        run = tiny.trainer(tmp_path, loss="cross_entropy", num_train_epochs=1)
        run.train()
        assert run.adaptive_callback is None
        assert not any(name.startswith("gamma") for entry in run.state.log_history for name in entry)
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
        assert updates(run) == [6, 12, 18] and len(run.adaptive_callback.history) == 4
        assert all(abs(np.log(abs(gamma))) <= 1 for gamma in run.adaptive_callback.history[1]["gammas"])  # one step


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
        assert run.calibration_statistics().class_gap is None

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
        assert saved[0] == saved[1]
        assert {name: saved[0][name] for name in whole.loss.table()} == whole.loss.table()
        for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("settings", [{"loss": NAME}, {"loss": "mmce", "auxiliary_base": NAME}])
    def test_a_histogram_for_them_is_refused(self, tmp_path, settings):
        with pytest.raises(ValueError, match="ClasswiseAdaFocalLoss needs .* Set streaming_calibration=False"):
            tiny.trainer(tmp_path, streaming_calibration=True, **settings)

    @pytest.mark.parametrize("combined", [False, True])
    def test_the_trainer_refuses_a_histogram_for_a_module_that_has_them(self, tmp_path, combined):
        loss = ClasswiseAdaFocalLoss(5)
        with pytest.raises(ValueError, match="Set streaming_calibration=False"):
            tiny.trainer(tmp_path, loss=CombinedLoss("mmce", loss) if combined else loss, streaming_calibration=True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"eval_dataset": tiny.token_dataset(6).select([])}, "calibration set is empty"),
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


class TestFoldedModel:
    def test_training_it_forgets_the_scaling_that_no_longer_holds(self, tmp_path):
        model = tiny.bert()
        fold_scaling(model, Scaling(0.5))
        assert recorded_scaling(model.config) == Scaling(0.5)
        tiny.trainer(tmp_path, model=model).train()
        assert recorded_scaling(model.config) is None
