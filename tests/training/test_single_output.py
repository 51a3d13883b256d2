"""Heads with a single output for two classes, as rerankers have: loss, metrics, Platt scaling, report, serving."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from loss_names import ANY_SHAPE
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    pipeline,
)

from hf_adafocal import AdaFocalLoss, calibrate
from hf_adafocal.losses import LOSSES
from hf_adafocal.losses.layout import two_classes
from hf_adafocal.models import train_word_level_tokenizer
from hf_adafocal.report.files import read_report
from hf_adafocal.runs.evaluate import evaluate_checkpoint, scale_checkpoint
from hf_adafocal.runs.tasks import TextTask
from hf_adafocal.scaling import recorded_scaling


def pairs(size=48, seed=0, floats=False, error=0.2):
    """Rows whose first token tells whether they are relevant, but for a share of errors; a third of them is."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(size) % 3 == 0).astype(int)
    tokens = generator.integers(10, tiny.VOCABULARY, (size, tiny.LENGTH))
    tokens[:, 0] = 1 + np.where(generator.random(size) < error, 1 - labels, labels)
    values = labels.astype(float) if floats else labels
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": values.tolist()})


def build(folder, model=None, **settings):
    data = {"train_dataset": pairs(96, 0), "eval_dataset": pairs(300, 1)}
    return tiny.trainer(folder, model or tiny.bert(num_labels=1), **{**data, **settings})


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def probability(model, data):
    """Probability of the positive class by a plain forward pass, and labels."""
    model.eval()
    with torch.no_grad():
        z = model(input_ids=torch.tensor(data["input_ids"][:])).logits
    return z.double().sigmoid()[:, 0].numpy(), np.asarray(data["labels"][:])


def binned_error(p, y, edges):
    """Mean gap between probability and frequency, bin by bin, `(lower, upper]`."""
    total = 0.0
    for lower, upper in zip(edges[:-1], edges[1:], strict=True):
        inside = (p > lower) & (p <= upper)
        total += abs((p[inside] - y[inside]).sum())
    return total / len(p)


class TestLoss:
    def test_cross_entropy_has_the_gradient_of_the_models_own_binary_cross_entropy(self, tmp_path):
        model = tiny.bert(num_labels=1, problem_type="multi_label_classification")
        run = build(tmp_path, model, loss="cross_entropy")
        batch = next(iter(run.get_train_dataloader()))
        model.train()
        mine = torch.autograd.grad(run.compute_loss(model, dict(batch)), list(model.parameters()))
        own = model(input_ids=batch["input_ids"], labels=batch["labels"][:, None].float()).loss
        for found, expected in zip(mine, torch.autograd.grad(own, list(model.parameters())), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("name", ANY_SHAPE)
    def test_every_loss_is_that_of_the_two_classes(self, name):
        z = torch.randn(40, 1, requires_grad=True)
        labels = torch.arange(40) % 2
        torch.manual_seed(0)
        found = LOSSES[name]()({"logits": z}, labels)
        torch.manual_seed(0)
        expected = LOSSES[name]()(torch.cat([torch.zeros(40, 1), z], dim=1), labels)
        assert torch.equal(found, expected) and torch.autograd.grad(found, z)[0].abs().sum() > 0

    def test_focal_loss_is_that_of_the_sigmoid(self):
        z, labels = torch.randn(30, 1, dtype=torch.float64), torch.arange(30) % 2
        p = torch.where(labels == 1, z[:, 0].sigmoid(), 1 - z[:, 0].sigmoid())
        expected = ((1 - p) ** 3 * -p.log()).mean()
        torch.testing.assert_close(LOSSES["focal"](3.0)({"logits": z}, labels), expected)

    def test_a_map_of_single_logits_is_one_of_two_classes(self):
        z, labels = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 8, 8))
        resized = F.interpolate(z, size=(8, 8), mode="bilinear", align_corners=False)
        expected = F.binary_cross_entropy_with_logits(resized[:, 0], labels.float())
        torch.testing.assert_close(LOSSES["cross_entropy"]()({"logits": z}, labels), expected)
        assert two_classes(z, 1).shape == (2, 2, 4, 4)


class TestTraining:
    def test_gamma_moves_and_the_model_learns(self, tmp_path):
        run = build(tmp_path, num_train_epochs=6)
        run.train()
        found = run.evaluate()
        assert run.adaptive_callback.updates == 6 and run.loss.gammas.ne(1).any() and found["eval_accuracy"] > 0.7
        assert run.model.config.problem_type is None  # so that a pipeline applies the sigmoid
        assert run.predict(pairs(30, 2)).predictions.shape == (30, 1)

    @pytest.mark.parametrize("loss", ["adaptive_label_smoothing", "classwise_adafocal", "brier"])
    def test_other_ways_to_adapt_have_two_classes_too(self, tmp_path, loss):
        run = build(tmp_path, loss=loss, num_train_epochs=2)
        run.train()
        assert run.evaluate()["eval_nll"] < 0.8

    def test_labels_that_are_zero_and_one_as_floats_train_the_same_weights(self, tmp_path):
        runs = []
        for floats in (False, True):
            run = build(
                tmp_path,
                train_dataset=pairs(48, 0, floats),
                eval_dataset=pairs(60, 1, floats),
                class_weights="balanced",
            )
            run.train()
            runs.append(run)
        assert torch.equal(weights(runs[0].model), weights(runs[1].model))
        torch.testing.assert_close(runs[0].loss.weight, torch.tensor([48 / 64, 48 / 32]))

    def test_a_held_out_part_is_stratified_by_labels_that_are_floats(self, tmp_path):
        run = build(tmp_path, train_dataset=pairs(90, 0, floats=True), eval_dataset=None, calibration_fraction=0.2)
        assert sum(run.calibration_dataset["labels"][:]) == 6

    def test_four_micro_batches_are_the_step_of_one_batch(self, tmp_path):
        steps = []
        for size, accumulation in ((32, 1), (8, 4)):
            run = build(
                tmp_path, train_dataset=pairs(32, 0), max_steps=1, per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
            )  # fmt: skip
            run.train()
            steps.append(weights(run.model) - weights(tiny.bert(num_labels=1)))
        assert (steps[0] - steps[1]).norm() / steps[0].norm() < 1e-5

    @pytest.mark.parametrize(
        ("labels", "settings", "message"),
        [
            ([0, 1, 2], {}, r"labels that are no classes of the model \(0 to 1\): 2 "),
            ([0.0, 1.0, 0.5], {}, "0.5 .*for regression use the stock Trainer"),
            ([0.0, 3.25, 7.0], {}, "for regression use the stock Trainer"),
            ([0.0, 1.0, 1.0], {"problem_type": "regression"}, "found problem_type='regression'"),
        ],
    )
    def test_labels_that_are_not_binary_are_refused_before_training(self, tmp_path, labels, settings, message):
        data = pairs(48, 0)
        data = Dataset.from_dict({"input_ids": data["input_ids"][:], "labels": labels * 16})
        with pytest.raises(ValueError, match=message):
            build(tmp_path, tiny.bert(num_labels=1, **settings), train_dataset=data)

    def test_those_of_a_stream_are_refused_at_its_first_batch(self, tmp_path):
        rows = [{"input_ids": row["input_ids"], "labels": row["labels"] + 0.5} for row in pairs(16, 0, floats=True)]

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from rows

        run = build(tmp_path, train_dataset=Stream(), max_steps=1)
        with pytest.raises(ValueError, match="for regression use the stock Trainer"):
            run.train()


class TestMetrics:
    def test_they_are_those_of_scikit_learn_and_of_bins_by_hand(self, tmp_path):
        run = build(tmp_path)
        run.train()
        found = run.evaluate()
        p, y = probability(run.model, run.eval_dataset)
        confidence, right = np.maximum(p, 1 - p), (p > 0.5) == y
        edges = np.linspace(0, 1, 6)  # num_bins=5 of the tiny trainer
        quantiles = np.quantile(p, edges)
        quantiles[0] = -1
        expected = {
            "nll": log_loss(y, p),
            "accuracy": accuracy_score(y, p > 0.5),
            "brier": 2 * brier_score_loss(y, p),  # summed over both classes, as everywhere
            "ece": binned_error(confidence, right, edges),
            "binary_ece": binned_error(p, y, edges),
        }
        for name, value in expected.items():
            assert found[f"eval_{name}"] == pytest.approx(value, abs=1e-6), name
        assert 0 <= found["eval_binary_ada_ece"] < 0.5

    def test_two_outputs_have_no_binary_ones(self, tmp_path):
        assert not any("binary" in name for name in build(tmp_path, tiny.bert(num_labels=2)).evaluate())

    def test_a_metric_of_the_positive_class_can_choose_the_checkpoint(self, tmp_path):
        run = build(
            tmp_path, save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="binary_ece",
        )  # fmt: skip
        assert run.args.greater_is_better is False


OVERCONFIDENT = {
    "loss": "cross_entropy",
    "train_dataset": pairs(96, 0, error=0.0),  # which it learns as certain
    "num_train_epochs": 8,
    "learning_rate": 1e-2,
}
TEXTS = [" ".join(map(str, range(start, start + 8))) for start in range(20)]


def words():
    return train_word_level_tokenizer(TEXTS, tiny.VOCABULARY)


class TestCalibratedCheckpoint:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        """An over-confident reranker with Platt scaling folded in, saved with a tokenizer."""
        folder = tmp_path_factory.mktemp("reranker")
        run = build(folder, calibrate_at_end=True, **OVERCONFIDENT)
        run.train()
        run.save_model()
        words().save_pretrained(folder)
        report = run.write_report(pairs(400, 5))
        run.create_model_card()
        return folder, run, report

    def test_platt_scaling_is_fitted_and_folded(self, run):
        folder, run, report = run
        outcome = run.calibration_outcome
        assert outcome.folded and outcome.scaling.method == "platt" and "Platt scaling" in outcome.reason
        assert recorded_scaling(AutoModelForSequenceClassification.from_pretrained(folder)) == outcome.scaling
        logged = next(entry for entry in run.state.log_history if "calibration_folded" in entry)
        assert logged["calibration_bias"] == outcome.scaling.bias
        rows = report.test.rows()
        assert rows["temperature_scaled"]["binary_ece"] < rows["raw"]["binary_ece"] - 0.02
        assert rows["temperature_scaled"]["nll"] < rows["raw"]["nll"]

    def test_the_report_is_of_the_checkpoint_and_the_card_says_what_it_is(self, run):
        folder, run, report = run
        data = pairs(400, 5)
        p, y = probability(AutoModelForSequenceClassification.from_pretrained(folder), data)
        assert report.metrics["nll"] == pytest.approx(log_loss(y, p), abs=1e-5)
        assert report.metrics["binary_ece"] == pytest.approx(binned_error(p, y, np.linspace(0, 1, 6)), abs=1e-5)
        low, high = report.test.intervals["temperature_scaled"]["binary_ece"]
        assert low <= report.metrics["binary_ece"] <= high
        assert read_report(folder) == report and report.pooler is None
        card = (folder / "README.md").read_text()
        assert "two classes and one output, the logit of the positive class" in card
        assert "ECE of class 1 %" in card and "Platt scaled" in card and "is folded into the last layer" in card

    def test_a_pipeline_gives_the_calibrated_probability(self, run):
        folder, run, _ = run
        classify = pipeline("text-classification", model=str(folder))
        ids = classify.tokenizer(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = run.network.eval()(**ids).logits.sigmoid()[:, 0].tolist()
        assert [found["score"] for found in classify(TEXTS)] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.slow
    def test_so_does_onnx_runtime(self, run):
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        folder, run, report = run
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        data = pairs(400, 5)
        ids = torch.tensor(data["input_ids"][:])
        file = str(folder / "model.onnx")
        torch.onnx.export(model, (ids,), file, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (z,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        p = 1 / (1 + np.exp(-z[:, 0].astype(float)))
        assert log_loss(np.asarray(data["labels"][:]), p) == pytest.approx(report.metrics["nll"], abs=1e-5)

    def test_the_command_line_measures_and_scales_such_checkpoints(self, tmp_path):
        model, tokenizer = tiny.bert(num_labels=1, initializer_range=1.0).eval(), words()
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "plain")
        generator = np.random.default_rng(0)
        for name, size in (("train", 600), ("test", 400)):
            texts = [" ".join(map(str, generator.integers(0, 27, 8))) for _ in range(size)]
            with torch.no_grad():
                z = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].numpy()
            labels = (generator.random(size) < 1 / (1 + np.exp(1 - z / z.std()))).astype(int)
            (tmp_path / "data").mkdir(exist_ok=True)
            rows = Dataset.from_dict({"text": texts, "label": labels.tolist()})
            rows.to_parquet(str(tmp_path / "data" / f"{name}.parquet"))
        task = TextTask(model_name_or_path=str(tmp_path / "plain"), dataset=str(tmp_path / "data"))
        scaling = scale_checkpoint(task, tmp_path / "scaled", method="platt")
        scaled = TextTask(model_name_or_path=str(tmp_path / "scaled"), dataset=str(tmp_path / "data"))
        before, after = evaluate_checkpoint(task), evaluate_checkpoint(scaled)
        assert scaling.method == "platt" and after.folded
        assert before.pooler == pytest.approx(scaling.pooler(), rel=1e-4)
        assert after.metrics["nll"] == pytest.approx(before.test.temperature_scaled["nll"], abs=1e-5)
        assert "binary_ece" in before.metrics and after.metrics["nll"] < before.metrics["nll"]

    def test_where_it_is_not_folded_report_and_card_tell_a_server_what_to_set(self, tmp_path):
        run = build(tmp_path, **OVERCONFIDENT)
        run.train()
        report = run.write_report(pairs(400, 5))
        scaling, told = report.test.scaling, report.to_dict()["test"]["pooler"]
        assert scaling.method == "platt" and told == scaling.pooler() and not report.folded
        p, y = probability(run.model, pairs(400, 5))
        z = np.log(p / (1 - p))
        served = 1 / (1 + np.exp(-(z - told["logit_mean"]) / told["logit_sigma"]))
        assert report.test.temperature_scaled["nll"] == pytest.approx(log_loss(y, served), abs=1e-4)
        run.create_model_card()
        assert "`sigmoid((logits - logit_mean) / logit_sigma)`" in (tmp_path / "README.md").read_text()

    def test_a_head_without_bias_gets_a_temperature(self, tmp_path):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = LlamaForSequenceClassification(
            LlamaConfig(vocab_size=tiny.VOCABULARY, num_labels=1, pad_token_id=0, **sizes)
        )
        run = build(tmp_path, model, calibrate_at_end=True, **OVERCONFIDENT)
        run.train()
        outcome = run.calibration_outcome
        assert outcome.scaling.method == "temperature" and outcome.folded


def test_a_loop_without_a_trainer_takes_it_too():
    loss = AdaFocalLoss(num_bins=5)
    model = tiny.bert(num_labels=1)
    data = pairs(60, 1)
    loader = torch.utils.data.DataLoader(data.with_format("torch"), batch_size=16)
    measured = calibrate(model, loader, loss)
    assert loss.gammas.ne(1).any()
    p, y = probability(model, data)
    assert measured.metrics["nll"] == pytest.approx(log_loss(y, p), abs=1e-6)
