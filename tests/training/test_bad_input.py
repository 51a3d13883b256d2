"""What a run does with data and models that calibration cannot use: a clear error, or a result that is known."""

import logging

import numpy as np
import pytest
import reference
import tiny
import torch
from accelerate import debug_launcher
from datasets import ClassLabel, Dataset, Features, Sequence, Value, concatenate_datasets
from transformers import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    DataCollatorForMultipleChoice,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_adafocal import AdaFocalCallback, AdaFocalLoss, AdaFocalTrainer, CalibrationMetrics
from hf_adafocal.models import train_word_level_tokenizer


@pytest.fixture
def warnings(caplog):
    """What transformers and this package log from warnings up, as text."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level("WARNING")
    return caplog


class FirstToken(torch.nn.Module):
    """Logit 3 for the class that the first token names, `special` for the class of a row with the token 999."""

    def __init__(self, special: float = 3.0):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.special = special

    def forward(self, input_ids, labels=None):
        named = torch.nn.functional.one_hot(input_ids[:, 0] % 3, 3).float()
        scale = torch.where((input_ids == 999).any(1), self.special, 3.0)
        return SequenceClassifierOutput(logits=torch.where(named > 0, scale[:, None], 0.0) + self.bias)


def rows(first: list[int], labels: list, special: int = 0, feature=None) -> Dataset:
    """Rows of three tokens, all different, of which the last `special` hold the token 999."""
    tokens = [[token, 100 + index, 999 if index >= len(first) - special else 1] for index, token in enumerate(first)]
    features = Features({"input_ids": Sequence(Value("int64")), "labels": feature or Value("int64")})
    return Dataset.from_dict({"input_ids": tokens, "labels": labels}, features=features)


TRAIN = rows([0, 1, 2] * 4, [0, 1, 2] * 4)


def still(folder, calibration, model=None, **settings):
    """A run that learns nothing, so that the calibration set alone decides what gamma does."""
    settings = {"num_train_epochs": 1, "learning_rate": 0.0, "per_device_eval_batch_size": 4, **settings}
    return tiny.trainer(folder, model or FirstToken(), train_dataset=TRAIN, eval_dataset=calibration, **settings)


def expected_gammas(confidence: list[float], correct: list[float]) -> list[float]:
    edges = reference.equal_mass_edges(np.array(confidence), 5)
    bins = reference.bins(np.array(confidence), np.array(correct), edges)
    return [1.0 if not count else reference.updated_gamma(1.0, mean - share) for count, mean, share in bins]


SURE = float(np.exp(3) / (np.exp(3) + 2))  # confidence of a logit of 3 against two of 0


class TestLogitsThatAreNotFinite:
    @pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_it_is_an_error_that_counts_the_samples_and_names_the_set(self, tmp_path, special, streaming):
        calibration = rows([30, 31, 32] * 4, [0, 1, 2] * 4, special=5)
        run = still(tmp_path, calibration, FirstToken(special), streaming_calibration=streaming)
        with pytest.raises(ValueError, match="5 of 12 samples of the 'eval' set .* NaN or infinite. Check the learn"):
            run.train()
        assert run.loss.gammas.eq(1).all() and run.loss.edges.isfinite().all()

    def test_a_calibration_set_of_its_own_is_named(self, tmp_path):
        calibration = rows([30, 31, 32] * 4, [0, 1, 2] * 4, special=12)
        fine = rows([60, 61, 62] * 4, [0, 1, 2] * 4)
        run = still(tmp_path, fine, FirstToken(float("nan")), calibration_dataset=calibration)
        with pytest.raises(ValueError, match="12 of 12 samples of the 'eval_calibration' set"):
            run.train()

    def test_a_masked_class_is_no_error_while_nobody_needs_it(self, tmp_path):
        class Masked(FirstToken):
            def forward(self, input_ids, labels=None):
                hidden = torch.tensor([0.0, 0.0, -torch.inf])
                return {"logits": super().forward(input_ids)["logits"] + hidden}

        run = still(tmp_path, rows([30, 31] * 6, [0, 1] * 6), Masked())
        confidence = np.exp(3) / (np.exp(3) + 1)
        assert run.evaluate()["eval_nll"] == pytest.approx(-np.log(confidence), rel=1e-5)

    def test_a_stock_trainer_stops_too(self, tmp_path):
        loss = AdaFocalLoss(num_bins=5)
        calibration = CalibrationMetrics(5)
        args = TrainingArguments(
            str(tmp_path), num_train_epochs=1, learning_rate=0.0, eval_strategy="epoch", use_cpu=True,
            disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        run = Trainer(
            FirstToken(float("nan")),
            args,
            train_dataset=TRAIN,
            eval_dataset=rows([30, 31, 32] * 4, [0, 1, 2] * 4, special=5),
            compute_loss_func=loss,
            compute_metrics=calibration,
            preprocess_logits_for_metrics=calibration.reduce,
            callbacks=[AdaFocalCallback(loss, calibration.calibrate)],
        )
        with pytest.raises(ValueError, match="5 of 12 samples of the evaluation set .* NaN or infinite"):
            run.train()
        assert loss.gammas.eq(1).all()


class TestOneSidedCalibrationSets:
    @pytest.mark.parametrize(
        ("labels", "correct"), [([0, 1, 2] * 4, 1.0), ([1, 2, 0] * 4, 0.0)], ids=["all-correct", "all-wrong"]
    )
    def test_gamma_makes_one_step_of_the_rule_and_stays_finite(self, tmp_path, labels, correct):
        run = still(tmp_path, rows([30, 31, 32] * 4, labels))
        run.train()
        expected = expected_gammas([SURE] * 12, [correct] * 12)
        np.testing.assert_allclose(run.loss.gammas, expected, rtol=1e-5)
        moved = [gamma for gamma in expected if gamma != 1]
        assert moved and all((gamma < 1) == (correct == 1) for gamma in moved)

    def test_training_goes_on_with_a_model_that_is_always_right(self, tmp_path):
        run = still(tmp_path, rows([30, 31, 32] * 4, [0, 1, 2] * 4), learning_rate=1e-2, num_train_epochs=30)
        run.train()
        assert run.model.bias.isfinite().all() and run.loss.gammas.isfinite().all()
        assert run.loss.gammas.min() >= -2

    def test_one_sample_moves_the_one_bin_it_falls_in(self, tmp_path, warnings):
        run = still(tmp_path, rows([30], [0]))
        run.train()
        np.testing.assert_allclose(run.loss.gammas, expected_gammas([SURE], [1.0]), rtol=1e-5)
        assert run.loss.gammas.ne(1).sum() == 1
        np.testing.assert_allclose(run.loss.edges, SURE, rtol=1e-5)
        assert "has 1 samples for 5 bins" in warnings.text


def evaluate_and_keep_warnings(folder):
    torch.set_num_threads(1)
    run = still(folder, rows([30, 31, 32] * 2 + [33, 34], [0] * 4 + [1] * 4))
    log = logging.FileHandler(folder / f"rank-{run.args.process_index}.txt")
    logging.getLogger("hf_adafocal.training.recorder").addHandler(log)
    assert run.args.world_size == 2
    run.evaluate()


class TestMissingClasses:
    def test_the_run_works_and_names_them_once(self, tmp_path, warnings):
        named = tiny.bert(id2label={0: "cat", 1: "dog", 2: "eel"})
        calibration = tiny.token_dataset(60, seed=1).filter(lambda row: row["labels"] == 1)
        run = tiny.trainer(tmp_path, named, eval_dataset=calibration)
        run.train()
        assert warnings.text.count("No sample of the calibration set has the label 0 (cat), 2 (eel) (2 of 3") == 1
        assert run.loss.gammas.ne(1).any()

    def test_a_model_without_names_gives_numbers(self, tmp_path, warnings):
        still(tmp_path, rows([30, 31] * 6, [0, 1] * 6)).train()
        assert "has the label 2 (1 of 3 classes)" in warnings.text

    def test_classes_in_different_batches_are_all_seen(self, tmp_path, warnings):
        still(tmp_path, rows([30, 31, 32] * 4, [0] * 4 + [1] * 4 + [2] * 4)).train()
        assert "No sample of the calibration set" not in warnings.text

    def test_classes_on_different_processes_are_all_seen(self, tmp_path):
        debug_launcher(evaluate_and_keep_warnings, args=(tmp_path,), num_processes=2)
        for rank in (0, 1):  # one reads the samples of class 0, the other those of class 1
            warned = (tmp_path / f"rank-{rank}.txt").read_text()
            assert "has the label 2 (1 of 3 classes)" in warned

    def test_other_sets_may_lack_classes(self, tmp_path, warnings):
        run = still(tmp_path, rows([30, 31, 32] * 4, [0, 1, 2] * 4))
        run.evaluate(rows([60] * 4, [0] * 4))
        assert "No sample of the calibration set" not in warnings.text

    def test_other_sets_do_not_lend_their_classes(self, tmp_path, warnings):
        run = still(tmp_path, rows([30, 31] * 6, [0, 1] * 6))
        run.evaluate(rows([60, 61, 62] * 4, [0, 1, 2] * 4))
        run.evaluate()
        assert "has the label 2 (1 of 3 classes)" in warnings.text


class TestLabels:
    @pytest.mark.parametrize("name", ["evaluation", "training"])
    def test_strings_are_refused_before_training_with_the_way_to_encode_them(self, tmp_path, name):
        bad = rows([30, 31, 32] * 4, ["a", "b", "c"] * 4, feature=Value("string"))
        sets = {"train_dataset": TRAIN, "eval_dataset": rows([60, 61, 62] * 4, [0, 1, 2] * 4)}
        sets["eval_dataset" if name == "evaluation" else "train_dataset"] = bad
        with pytest.raises(ValueError, match=rf"strings in the column 'labels' of the {name} set.*class_encode_colu"):
            tiny.trainer(tmp_path, FirstToken(), **sets)
        encoded = bad.class_encode_column("labels")
        assert isinstance(encoded.features["labels"], ClassLabel)  # what the error recommends
        still(tmp_path, encoded).train()

    def test_strings_in_rows_of_ones_own_are_refused_at_the_first_batch(self, tmp_path):
        data = [{"input_ids": [index, 1], "labels": "abc"[index % 3]} for index in range(12)]
        run = tiny.trainer(tmp_path, FirstToken(), train_dataset=data, eval_dataset=TRAIN)
        with pytest.raises(ValueError, match="must hold `labels`.*strings are dropped.*encode them as integers"):
            run.train()

    def test_string_labels_that_a_transform_encodes_are_fine(self, tmp_path):
        data = rows([30, 31, 32] * 4, ["a", "b", "c"] * 4, feature=Value("string"))

        def encode(batch):
            return {"input_ids": batch["input_ids"], "labels": [ord(label) - 97 for label in batch["labels"]]}

        run = still(tmp_path, data.with_transform(encode), remove_unused_columns=False)
        assert run.evaluate()["eval_accuracy"] == 1

    @pytest.mark.parametrize(
        ("labels", "feature", "message"),
        [
            ([[1.0, 0.0, 1.0]] * 12, Sequence(Value("float32")), r"a vector of floats per sample \(multi-label\?\)"),
            ([0.5] * 12, Value("float32"), r"floats \(regression\?\)"),
        ],
    )
    def test_multi_label_and_regression_targets_are_refused_before_training(self, tmp_path, labels, feature, message):
        with pytest.raises(ValueError, match=f"found {message} in the column 'labels' of the evaluation set"):
            still(tmp_path, rows([30, 31, 32] * 4, labels, feature=feature))

    @pytest.mark.parametrize("label", [[1.0, 0.0, 1.0], 0.5])
    def test_the_same_in_rows_of_ones_own_is_refused_at_the_first_batch(self, tmp_path, label):
        data = [{"input_ids": [index, 1], "labels": torch.tensor(label)} for index in range(12)]
        run = tiny.trainer(tmp_path, FirstToken(), train_dataset=data, eval_dataset=TRAIN)
        with pytest.raises(ValueError, match=r"integer class indices, found torch.float32 of shape \(8"):
            run.train()

    def test_vectors_of_integers_are_refused_where_the_model_takes_one_label_per_sample(self, tmp_path):
        bad = rows([30, 31, 32] * 4, [[1, 0, 1]] * 12, feature=Sequence(Value("int64")))
        with pytest.raises(
            ValueError, match=r"vectors of integers in the column 'labels' of the evaluation set \(multi"
        ):
            tiny.trainer(tmp_path, eval_dataset=bad)

    def test_the_targets_of_question_answering_are_named(self, tmp_path):
        model = BertForQuestionAnswering(tiny.bert().config)
        with pytest.raises(ValueError, match=r"targets of BertForQuestionAnswering are \['start_positions', 'end_pos"):
            tiny.trainer(tmp_path, model)


class TestLossModules:
    def test_a_loss_of_torch_is_taken_or_refused_before_training(self, tmp_path):
        weight = torch.tensor([0.2, 1.0, 4.0])
        try:
            run = tiny.trainer(tmp_path, loss=torch.nn.CrossEntropyLoss(weight=weight))
        except (TypeError, ValueError) as error:
            assert "CrossEntropyLoss" in str(error)
            return
        run.train()
        named = tiny.trainer(tmp_path, loss="cross_entropy", class_weights="0.2,1,4")
        named.train()
        for mine, theirs in zip(run.model.parameters(), named.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class TestMultipleChoice:
    def test_options_of_unequal_length_are_trained_and_compared_between_splits(self, tmp_path):
        generator = np.random.default_rng(0)

        def questions(size):
            lengths = generator.integers(2, 7, (size, 4))
            options = [[generator.integers(5, 40, n).tolist() for n in row] for row in lengths]
            return Dataset.from_dict({"input_ids": options, "labels": generator.integers(0, 4, size).tolist()})

        train, held_out = questions(24), questions(12)
        train = concatenate_datasets([train, held_out.select(range(3))])
        tokenizer = train_word_level_tokenizer(["a b c"])
        run = AdaFocalTrainer(
            BertForMultipleChoice(tiny.bert().config),
            tiny.arguments(tmp_path, num_train_epochs=1),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=DataCollatorForMultipleChoice(tokenizer),
        )
        assert len(run.train_dataset) == 24
        run.train()
        assert run.adaptive_callback.updates == 1 and run.predict(held_out).predictions.shape == (12, 4)


class TestModels:
    def test_an_output_without_logits_is_an_error_that_lists_what_it_holds(self, tmp_path):
        class Scores(FirstToken):
            def forward(self, input_ids, labels=None):
                return {"scores": super().forward(input_ids)["logits"]}

        with pytest.raises(ValueError, match=r"output of Scores must hold `logits`, found \['scores'\]"):
            still(tmp_path, rows([30], [0]), Scores()).train()

    @pytest.mark.parametrize("loss", ["adafocal", "cross_entropy"])
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_labels": 1}, r"labels that are no classes of the model \(0 to 1\): 2 \(16 rows\)"),
            ({"num_labels": 1, "problem_type": "regression"}, "found problem_type='regression'"),
            ({"problem_type": "regression"}, "found problem_type='regression'"),
            ({"problem_type": "multi_label_classification"}, "found problem_type='multi_label_classification'"),
        ],
    )
    def test_a_head_for_another_task_is_refused_before_training(self, tmp_path, settings, message, loss):
        with pytest.raises(ValueError, match=message):
            tiny.trainer(tmp_path, tiny.bert(**settings), loss=loss)

    def test_a_single_label_head_may_say_so(self, tmp_path):
        tiny.trainer(tmp_path, tiny.bert(problem_type="single_label_classification"))

    @pytest.mark.parametrize(
        ("shape", "message"),
        [((-1, 1), r"of a model with one logit for two classes.*: 2\."), ((-1,), r"a dimension of classes.*\(N, 1\)")],
    )
    def test_a_single_logit_without_a_config_is_for_two_classes(self, tmp_path, shape, message):
        class Single(FirstToken):
            def forward(self, input_ids, labels=None):
                return {"logits": super().forward(input_ids)["logits"][:, 0].reshape(shape)}

        with pytest.raises(ValueError, match=message):
            still(tmp_path, rows([30, 31, 32, 33], [0, 1, 2, 3]), Single()).train()
