"""Models whose labels are shifted, made into decoder inputs or ignored by another index, or with more loss terms."""

import logging

import pytest
import tiny
import torch
from datasets import Dataset
from language import MODELS, SETTINGS, SIZES, built, gpt2, llama, mixtral, ours, sentences, weights
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_adafocal import AdaFocalTrainer
from hf_adafocal.training.collectors import HistogramCollector
from hf_adafocal.training.model_conventions import ModelConventions


@pytest.mark.parametrize("name", MODELS)
class TestLanguageModels:
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_cross_entropy_ends_in_the_weights_of_the_stock_trainer(self, tmp_path, name, accumulation):
        make, labels = MODELS[name]
        if accumulation > 1 and labels:
            pytest.skip("the stock Trainer takes the mean of the micro-batches' means for these models")
        data, held_out = sentences(32, 0, labels), sentences(16, 1, labels)
        settings = {**SETTINGS, "gradient_accumulation_steps": accumulation}
        stock = Trainer(built(make), TrainingArguments(str(tmp_path), **settings), train_dataset=data)
        run = ours(tmp_path, built(make), data, held_out, gradient_accumulation_steps=accumulation)
        stock.train(), run.train()
        start, expected, found = weights(built(make)), weights(stock.model), weights(run.model)
        assert (expected - start).norm() > 0.1
        assert (found - expected).abs().max() <= 1e-6

    def test_metrics_are_those_of_the_words_that_are_predicted(self, tmp_path, name):
        make, labels = MODELS[name]
        held_out, model = sentences(16, 1, labels), built(make).eval()
        metrics = ours(tmp_path, model, sentences(8, 0, labels), held_out).evaluate()
        inputs, targets = torch.tensor(held_out["input_ids"][:]), torch.tensor(held_out["labels"][:])
        with torch.no_grad():
            logits = model(input_ids=inputs, labels=targets).logits
        if labels is None:
            logits, targets = logits[:, :-1], targets[:, 1:]
        counted = targets != -100
        expected = torch.nn.functional.cross_entropy(logits[counted], targets[counted]).item()
        assert metrics["eval_nll"] == metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
        accuracy = (logits.argmax(-1) == targets)[counted].float().mean().item()
        assert metrics["eval_accuracy"] == pytest.approx(accuracy)

    def test_adafocal_learns_to_predict_and_gamma_moves(self, tmp_path, name):
        make, labels = MODELS[name]
        data, held_out = sentences(128, 0, labels), sentences(32, 1, labels)
        run = ours(tmp_path, built(make), data, held_out, loss="adafocal", num_train_epochs=6)
        before = run.evaluate()["eval_nll"]
        run.train()
        assert run.loss.gammas.ne(1).all()
        assert run.evaluate()["eval_nll"] < before - 0.3
        assert run.evaluate()["eval_accuracy"] < 0.95  # a model that sees what it predicts would copy it

    def test_adaptive_label_smoothing_is_steered(self, tmp_path, name):
        make, labels = MODELS[name]
        settings = {"loss": "adaptive_label_smoothing", "calibration_steps": 2, "calibration_samples": 16}
        run = ours(tmp_path, built(make), sentences(64, 0, labels), sentences(16, 1, labels), **settings)
        run.train()
        assert run.adaptive_callback.updates > 0 and run.loss.smoothing.item() != 0


def step(folder, name, loss, batch_size, accumulation):
    """What one step of SGD over 16 rows, with unequal numbers of counted labels, adds to the weights."""
    make, labels = MODELS[name]
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0}
    run = ours(
        folder,
        built(make),
        sentences(16, 0, labels),
        sentences(8, 1, labels),
        loss=loss,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **settings,
    )
    run.add_callback(OwnGammas(run.loss))
    run.train()
    return weights(run.model) - weights(built(make))


class OwnGammas(TrainerCallback):
    """Gives AdaFocal a gamma of its own for each bin."""

    def __init__(self, loss):
        self.loss = loss

    def on_step_begin(self, args, state, control, **kwargs):
        if hasattr(self.loss, "gammas"):
            self.loss.set_table([0.0, 0.02, 0.03, 0.04, 0.05, 1.0], [5.0, -1.0, 0.7, 2.0, -0.3])


@pytest.mark.parametrize("loss", ["cross_entropy", "adafocal"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_cut_into_four_micro_batches_is_the_step_of_one_batch(tmp_path, name, loss):
    whole, parts = step(tmp_path, name, loss, 16, 1), step(tmp_path, name, loss, 4, 4)
    assert whole.norm() > 0.1 and (whole - parts).norm() / whole.norm() < 1e-5


def test_a_gpt2_is_divided_by_the_words_that_are_predicted(tmp_path):
    """The stock Trainer does not know that this class shifts: told so, its own count gives these weights."""
    data = sentences(32, 0)
    data = data.remove_columns("labels").add_column("labels", data["input_ids"][:])  # the first label too
    settings = {**SETTINGS, "optim": "sgd", "learning_rate": 0.5}
    stock = Trainer(built(gpt2), TrainingArguments(str(tmp_path), **settings), train_dataset=data)
    if not hasattr(stock, "_loss_shifts_labels"):
        pytest.skip("this Trainer counts the labels in another way")
    stock._loss_shifts_labels = True
    run = ours(tmp_path, built(gpt2), data, sentences(16, 1), optim="sgd", learning_rate=0.5)
    stock.train(), run.train()
    assert (weights(stock.model) - weights(built(gpt2))).norm() > 0.1
    assert (weights(run.model) - weights(stock.model)).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_beyond_millions_of_tokens_a_histogram_counts_them(tmp_path, name, monkeypatch):
    make, labels = MODELS[name]
    held_out = sentences(24, 1, labels)
    exact = ours(tmp_path, built(make), sentences(8, 0, labels), held_out).evaluate()
    monkeypatch.setattr("hf_adafocal.training.recorder.MOST_SAMPLES", 100)
    run = ours(tmp_path, built(make), sentences(8, 0, labels), held_out)
    counted = run.evaluate()
    assert isinstance(run.recorder.samples["eval"], HistogramCollector)
    for metric in ("accuracy", "nll", "ece", "refinement", "temperature"):
        assert counted[f"eval_{metric}"] == pytest.approx(exact[f"eval_{metric}"], rel=1e-5), metric
    assert counted["eval_ada_ece"] == pytest.approx(exact["eval_ada_ece"], abs=2e-3)


class TestConventions:
    def test_they_are_read_beneath_an_adapter_too(self):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        assert ModelConventions.of(model).shifts_labels and ModelConventions.of(llama()).shifts_labels

    def test_a_plain_module_and_a_classifier_have_none(self):
        plain = ModelConventions()
        assert ModelConventions.of(torch.nn.Linear(2, 2)) == ModelConventions.of(tiny.bert()) == plain

    def test_labels_that_a_collator_has_shifted_are_taken_as_they_are(self):
        batch = {"labels": torch.tensor([[1, 2, 3]]), "shift_labels": torch.tensor([[2, 3, 9]])}
        assert ModelConventions(shifts_labels=True).targets(batch, -100).tolist() == [[2, 3, 9]]
        assert ModelConventions(shifts_labels=True).targets({"labels": batch["labels"]}, 7).tolist() == [[2, 3, 7]]


def pictures(size, seed, ignore_index=255):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (size, 4, 4), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    pixels = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    labels[:, :5] = ignore_index
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


def beit(**settings):
    return BeitForSemanticSegmentation(
        BeitConfig(
            image_size=32,
            patch_size=8,
            out_indices=[1, 2, 3, 4],
            auxiliary_channels=8,
            num_labels=3,
            pool_scales=[1, 2],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            drop_path_rate=0.0,
            **{**SIZES, "num_hidden_layers": 4, **settings},
        )
    )


class TestSegmentation:
    def test_the_ignored_label_of_the_model_is_that_of_loss_count_evaluation_and_steering(self, tmp_path):
        for loss in ("adafocal", "adaptive_label_smoothing"):
            run = ours(tmp_path, built(beit), pictures(16, 0), pictures(8, 1), loss=loss, num_train_epochs=5)
            assert run.ignore_index == run.loss.ignore_index == 255
            run.train()
            assert run.adaptive_callback.updates > 0
            assert len(run.recorder.samples["eval"]) == 8 * 27 * 32
        batch = [{"labels": torch.stack([row["labels"] for row in pictures(4, 0)])}]
        assert run._get_num_items_in_batch(batch, torch.device("cpu")) == 4 * 27 * 32

    def test_another_ignored_label_of_the_config_is_heeded(self, tmp_path):
        run = ours(tmp_path, built(beit, semantic_loss_ignore_index=7), pictures(8, 0, 7), pictures(8, 1, 7))
        run.train()
        assert run.ignore_index == 7 and len(run.recorder.samples["eval"]) == 8 * 27 * 32


class TestFurtherTerms:
    def test_an_auxiliary_head_is_trained_as_the_stock_trainer_trains_it(self, tmp_path, caplog):
        logging.getLogger("transformers").propagate = True
        data, settings = pictures(8, 0), {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        args = TrainingArguments(str(tmp_path), **{**SETTINGS, **settings})
        stock = Trainer(built(beit), args, train_dataset=data)
        run = ours(tmp_path, built(beit), data, pictures(8, 1), **settings)
        stock.train(), run.train()
        start = built(beit)
        moved = {
            name
            for name, parameter in run.model.named_parameters()
            if not torch.equal(parameter, start.get_parameter(name))
        }
        auxiliary = {name for name, _ in start.named_parameters() if name.startswith("auxiliary_head")}
        assert len(auxiliary) == 5 and auxiliary <= moved
        update = weights(run.model) - weights(start)
        expected = weights(stock.model) - weights(start)
        assert (update - expected).norm() / expected.norm() < 1e-4
        assert "has terms beside the cross-entropy of its logits" in caplog.text

    @pytest.mark.parametrize("coefficient", [0.001, 0.5])  # 0.001 is Mixtral's own
    def test_the_balance_of_a_router_is_kept(self, tmp_path, coefficient):
        data = sentences(16, 0)
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        args = TrainingArguments(str(tmp_path), **{**SETTINGS, **settings})
        stock = Trainer(built(mixtral, router_aux_loss_coef=coefficient), args, train_dataset=data)
        run = ours(tmp_path, built(mixtral, router_aux_loss_coef=coefficient), data, sentences(8, 1), **settings)
        stock.train(), run.train()
        start = built(mixtral)
        router = [name for name, _ in start.named_parameters() if "gate.weight" in name]
        assert router
        for name in router:
            expected = stock.model.get_parameter(name) - start.get_parameter(name)
            found = run.model.get_parameter(name) - start.get_parameter(name)
            assert (found - expected).norm() / expected.norm() < 1e-3

    def test_accumulated_they_weigh_as_in_one_batch(self, tmp_path):
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        updates = []
        for size, accumulation in ((16, 1), (4, 4)):
            run = ours(
                tmp_path,
                built(WithPenalty),
                tiny.token_dataset(16),
                tiny.token_dataset(9, seed=1),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                **settings,
            )
            run.train()
            updates.append(weights(run.model) - weights(built(WithPenalty)))
        assert updates[0].norm() > 0.1 and (updates[0] - updates[1]).norm() / updates[0].norm() < 1e-5

    def test_a_loss_computed_in_a_narrow_type_has_none(self, tmp_path):
        run = tiny.trainer(tmp_path, model=WithRoundedLoss(), bf16=True)
        run.train()
        assert run._further_terms.looked and not run._further_terms.found

    def test_a_model_without_any_is_run_without_labels(self, tmp_path):
        run, seen = tiny.trainer(tmp_path), []
        run.model.register_forward_pre_hook(lambda _, __, inputs: seen.append("labels" in inputs), with_kwargs=True)
        run.train()
        assert seen.count(True) == 1  # the comparison


class WithPenalty(torch.nn.Module):
    """A classifier of the mean embedding whose own loss pulls the weights to 1 beside the cross-entropy."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(tiny.VOCABULARY, 3)

    def forward(self, input_ids, labels=None):
        logits = self.embedding(input_ids).mean(1)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits, labels) + (self.embedding.weight - 1).square().sum() / 50
        return SequenceClassifierOutput(loss=loss, logits=logits)


class WithRoundedLoss(WithPenalty):
    """A classifier without a penalty whose cross-entropy is rounded as autocast on CUDA rounds it."""

    def forward(self, input_ids, labels=None):
        logits = self.embedding(input_ids).mean(1)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.nll_loss(logits.bfloat16().log_softmax(-1).float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits.bfloat16().float())


class TestSubclasses:
    def test_one_that_takes_the_labels_out_of_the_batch_trains_and_moves_gamma(self, tmp_path):
        class Popping(AdaFocalTrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                labels = inputs.pop("labels")
                return super().compute_loss(model, {**inputs, "labels": labels}, *args, **kwargs)

        run = Popping(
            tiny.bert(),
            tiny.arguments(tmp_path),
            train_dataset=tiny.token_dataset(48),
            eval_dataset=tiny.token_dataset(60, seed=1),
        )
        plain = tiny.trainer(tmp_path)
        run.train(), plain.train()
        assert run.loss.table() == plain.loss.table() and torch.equal(weights(run.model), weights(plain.model))
        assert run.predict(tiny.token_dataset(9, seed=3)).predictions.shape == (9, 3)

    class Replacing(AdaFocalTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    def replacing(self, folder, **settings):
        sets = {"train_dataset": tiny.token_dataset(48), "eval_dataset": tiny.token_dataset(60, seed=1)}
        return self.Replacing(tiny.bert(), tiny.arguments(folder, **settings), **sets)

    def test_one_that_replaces_the_loss_is_told_so_at_the_first_step(self, tmp_path):
        run = self.replacing(tmp_path)
        with pytest.raises(ValueError, match=r"Replacing.compute_loss replaces .* AdaFocalLoss is not trained\. Call"):
            run.train()
        assert run.state.global_step == 1

    def test_of_a_loss_that_does_not_adapt_the_metrics_stay_and_a_warning_says_so(self, tmp_path, caplog):
        logging.getLogger("transformers").propagate = True
        run, plain = self.replacing(tmp_path, loss="cross_entropy"), tiny.trainer(tmp_path, loss="cross_entropy")
        run.train(), plain.train()
        assert caplog.text.count("so CrossEntropyLoss is not trained") == 1
        found, expected = run.evaluate(), plain.evaluate()
        names = [name for name in expected if name.startswith("eval_") and not name.endswith(("time", "second"))]
        assert len(names) >= 8
        assert {name: found[name] for name in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-4)


class Forms(torch.nn.Module):
    """Logits and features, as a tuple, a dict or a tensor of logits alone."""

    def __init__(self, form):
        super().__init__()
        set_seed(0)
        self.embedding, self.form = torch.nn.Embedding(tiny.VOCABULARY, 3), form

    def forward(self, input_ids, labels=None):
        features = self.embedding(input_ids)
        logits = features.mean(1)
        return {"tuple": (logits, features), "tensor": logits, "dict": {"logits": logits, "features": features}}[
            self.form
        ]


class TestOutputs:
    @pytest.mark.parametrize(("form", "kept"), [("tuple", True), ("dict", True), ("tensor", False)])
    def test_all_that_a_model_returns_beside_the_logits_is_predicted(self, tmp_path, form, kept):
        run = tiny.trainer(tmp_path, Forms(form))
        run.train()
        predictions = run.predict(tiny.token_dataset(21, seed=3)).predictions
        logits, *rest = predictions if kept else (predictions,)
        assert logits.shape == (21, 3) and [part.shape for part in rest] == [(21, tiny.LENGTH, 3)] * kept
        assert "eval_ece" in run.evaluate() and run.loss.gammas.ne(1).all()


class Masked(torch.nn.Module):
    """Two classes and, if asked for, a third one that is impossible."""

    def __init__(self, third):
        super().__init__()
        set_seed(0)
        self.embedding, self.third = torch.nn.Embedding(tiny.VOCABULARY, 2), third

    def forward(self, input_ids, labels=None):
        logits = self.embedding(input_ids).mean(1)
        if self.third:
            logits = torch.cat([logits, torch.full((len(logits), 1), -torch.inf)], dim=1)
        return {"logits": logits}


@pytest.mark.parametrize("loss", ["adafocal", "cross_entropy", "label_smoothing", "adaptive_label_smoothing", "brier"])
def test_an_impossible_class_leaves_the_run_as_it_is_without_it(tmp_path, loss):
    def two_classes(size, seed):
        data = tiny.token_dataset(size, seed=seed)
        return Dataset.from_dict(
            {"input_ids": data["input_ids"][:], "labels": [label % 2 for label in data["labels"]]}
        )

    runs = []
    for third in (False, True):
        run = tiny.trainer(
            tmp_path,
            Masked(third),
            loss=loss,
            train_dataset=two_classes(48, 0),
            eval_dataset=two_classes(60, 1),
            num_train_epochs=4,
        )
        run.train()
        runs.append(run)
    plain, masked = runs
    torch.testing.assert_close(weights(masked.model), weights(plain.model), rtol=1e-5, atol=1e-6)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and min(losses[1]) > 0
