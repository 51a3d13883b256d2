"""What a run trains with: loss, data sets and settings, resolved once without touching what the caller passed."""

import copy
import dataclasses
import logging

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Sequence, Value
from transformers import EarlyStoppingCallback, TrainingArguments

from hf_adafocal import AdaFocalLoss, AdaFocalTrainer, AdaFocalTrainingArguments
from hf_adafocal.training.plan import resolve_plan

TRAIN, HELD_OUT, OTHER = (tiny.token_dataset(size, seed=seed) for size, seed in ((60, 0), (30, 1), (20, 2)))


@pytest.fixture
def warnings(caplog):
    """What transformers and this package log from warnings up, as text."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level("WARNING")
    return caplog


def resolved(folder, args=None, model=None, **sets):
    return resolve_plan(args or tiny.arguments(folder), model or tiny.bert(), **sets)


def stream(data=HELD_OUT):
    return IterableDataset.from_generator(lambda: iter(data), features=data.features)


class TestCalibrationSet:
    def test_it_is_the_one_given_and_evaluated_apart(self, tmp_path):
        plan = resolved(tmp_path, train_dataset=TRAIN, eval_dataset=OTHER, calibration_dataset=HELD_OUT)
        assert plan.calibration_dataset is HELD_OUT and plan.eval_dataset is OTHER
        assert (plan.calibration_prefix, plan.first_prefix, plan.held_out) == (None, "eval", 0)

    def test_alone_it_is_evaluated_too(self, tmp_path):
        plan = resolved(tmp_path, train_dataset=TRAIN, calibration_dataset=HELD_OUT)
        assert plan.eval_dataset is HELD_OUT and plan.calibration_prefix == "eval"

    def test_left_out_it_is_the_evaluation_set(self, tmp_path):
        plan = resolved(tmp_path, train_dataset=TRAIN, eval_dataset=HELD_OUT)
        assert plan.calibration_dataset is HELD_OUT and plan.calibration_prefix == "eval"
        assert plan.train_dataset is TRAIN

    def test_of_several_it_is_the_entry_of_that_name(self, tmp_path):
        sets = {"other": OTHER, "calibration": HELD_OUT}
        plan = resolved(tmp_path, train_dataset=TRAIN, eval_dataset=sets)
        assert plan.calibration_dataset is HELD_OUT
        assert (plan.calibration_prefix, plan.first_prefix) == ("eval_calibration", "eval_other")

    def test_without_that_name_a_loss_that_follows_one_is_an_error_and_another_loss_is_not(self, tmp_path):
        sets = {"a": HELD_OUT, "b": OTHER}
        with pytest.raises(ValueError, match=r"which of the evaluation sets \['a', 'b'\] it follows: name one"):
            resolved(tmp_path, train_dataset=TRAIN, eval_dataset=sets)
        args = tiny.arguments(tmp_path, loss="focal")
        assert resolved(tmp_path, args, train_dataset=TRAIN, eval_dataset=sets).calibration_dataset is None
        with pytest.raises(ValueError, match="name one 'calibration'"):
            resolved(
                tmp_path, tiny.arguments(tmp_path, loss="focal", calibrate_at_end=True),
                train_dataset=TRAIN, eval_dataset=sets,
            )  # fmt: skip

    @pytest.mark.parametrize("plain", [False, True])
    def test_with_no_held_out_data_it_is_a_tenth_of_train_stratified_and_one_line_says_so(
        self, tmp_path, plain, warnings
    ):
        args = TrainingArguments(str(tmp_path), use_cpu=True) if plain else None
        plan = resolved(tmp_path, args, train_dataset=TRAIN)
        assert (len(plan.train_dataset), len(plan.calibration_dataset), plan.held_out) == (54, 6, 6)
        assert np.bincount(plan.calibration_dataset["labels"]).tolist() == [2, 2, 2]
        assert plan.eval_dataset is plan.calibration_dataset
        assert warnings.text.count("No set is held out, so 6 training rows (10%, stratified by label)") == 1

    def test_the_tenth_is_the_same_for_a_seed_and_another_for_another(self, tmp_path):
        found = [
            resolved(tmp_path, tiny.arguments(tmp_path, **seeds), train_dataset=TRAIN).calibration_dataset[:]
            for seeds in ({}, {}, {"seed": 7}, {"seed": 7, "data_seed": 42})
        ]
        assert found[0] == found[1] == found[3] != found[2]

    def test_a_fraction_of_0_refuses_and_needs_no_set_where_nothing_is_followed(self, tmp_path, warnings):
        with pytest.raises(ValueError, match="there is none and calibration_fraction is 0. Pass `calibration_"):
            resolved(tmp_path, tiny.arguments(tmp_path, calibration_fraction=0.0), train_dataset=TRAIN)
        with pytest.raises(ValueError, match="calibration_fraction is 0"):
            resolved(
                tmp_path,
                tiny.arguments(tmp_path, loss="focal", calibrate_at_end=True, calibration_fraction=0.0),
                train_dataset=TRAIN,
            )
        plan = resolved(tmp_path, tiny.arguments(tmp_path, loss="focal"), train_dataset=TRAIN)
        assert plan.calibration_dataset is None and plan.train_dataset is TRAIN
        assert "held out" not in warnings.text

    def test_a_fraction_splits_train_beside_an_evaluation_set(self, tmp_path, warnings):
        args = tiny.arguments(tmp_path, calibration_fraction=0.2)
        plan = resolved(tmp_path, args, train_dataset=TRAIN, eval_dataset=OTHER)
        assert (len(plan.train_dataset), len(plan.calibration_dataset)) == (48, 12)
        assert plan.eval_dataset is OTHER and plan.calibration_prefix is None
        assert "held out" not in warnings.text

    def test_it_is_stratified_seeded_disjoint_and_complete(self, tmp_path):
        data = TRAIN.add_column("row", list(range(60)))
        plan = resolved(tmp_path, tiny.arguments(tmp_path, calibration_fraction=0.25), train_dataset=data)
        held_out, rest = set(plan.calibration_dataset["row"]), set(plan.train_dataset["row"])
        assert held_out | rest == set(range(60)) and not held_out & rest
        assert np.bincount(plan.calibration_dataset["labels"]).tolist() == [5, 5, 5]

    def test_it_is_split_off_any_indexed_data(self, tmp_path):
        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 30

            def __getitem__(self, index):
                return {"input_ids": torch.tensor([1, index]), "labels": index % 3}

        plan = resolved(tmp_path, tiny.arguments(tmp_path, calibration_fraction=0.2), train_dataset=Rows())
        assert (len(plan.train_dataset), len(plan.calibration_dataset)) == (24, 6)
        assert sorted(row["labels"] for row in plan.calibration_dataset) == [0, 0, 1, 1, 2, 2]

    @pytest.mark.parametrize("fraction", [None, 0.2])
    def test_a_stream_cannot_be_split(self, tmp_path, fraction):
        with pytest.raises(ValueError, match="needs a length and an index.*`calibration_dataset`"):
            resolved(tmp_path, tiny.arguments(tmp_path, calibration_fraction=fraction), train_dataset=stream())

    def test_a_class_of_one_row_stays_in_train(self, tmp_path):
        features = Features({"input_ids": Sequence(Value("int64")), "labels": ClassLabel(num_classes=2)})
        data = Dataset.from_dict({"input_ids": [[1]] * 10, "labels": [0] * 9 + [1]}, features=features)
        plan = resolved(tmp_path, tiny.arguments(tmp_path, calibration_fraction=0.2), train_dataset=data)
        assert 1 in plan.train_dataset["labels"] and len(plan.calibration_dataset) == 2

    def test_an_empty_one_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="calibration set is empty"):
            resolved(tmp_path, train_dataset=TRAIN, eval_dataset=HELD_OUT.select([]))

    def test_a_small_one_warns_with_its_numbers_when_it_is_used(self, tmp_path, warnings):
        for size, warned in ((48, 1), (51, 0)):
            warnings.clear()
            tiny.trainer(tmp_path, eval_dataset=tiny.token_dataset(size, seed=1), num_bins=5).train()
            assert warnings.text.count(f"has {size} samples for 5 bins") == warned


class TestWithoutTraining:
    """Who only evaluates or predicts needs no calibration set."""

    @pytest.mark.parametrize("loss", ["adafocal", "adaptive_label_smoothing", "focal"])
    @pytest.mark.parametrize(
        "eval_dataset",
        [None, HELD_OUT, {"a": HELD_OUT, "b": OTHER}, stream(), {"a": stream()}],
        ids=["none", "set", "sets", "stream", "streams"],
    )
    def test_a_trainer_can_be_built_evaluates_and_predicts(self, tmp_path, loss, eval_dataset, warnings):
        run = AdaFocalTrainer(tiny.bert(), tiny.arguments(tmp_path, loss=loss, eval_strategy="no"),
                              eval_dataset=eval_dataset)  # fmt: skip
        metrics = run.evaluate() if eval_dataset is not None else run.evaluate(HELD_OUT)
        assert any(name.endswith("_ece") for name in metrics)
        assert run.predict(HELD_OUT).predictions.shape == (30, 3)
        assert "held out" not in warnings.text

    @pytest.mark.parametrize("settings", [{"calibration_fraction": 0.2}, {"calibrate_at_end": True}])
    def test_settings_of_training_are_no_hindrance(self, tmp_path, settings):
        run = AdaFocalTrainer(tiny.bert(), tiny.arguments(tmp_path, **settings), eval_dataset=HELD_OUT)
        assert "eval_ece" in run.evaluate()


class TestOverlap:
    def shared(self):
        """60 training rows, 7 of them in the held-out set too."""
        return Dataset.from_dict({name: [*TRAIN[name][:53], *HELD_OUT[name][:7]] for name in ("input_ids", "labels")})

    def test_training_rows_that_are_held_out_too_are_dropped_with_one_line_that_counts_them(self, tmp_path, warnings):
        run = tiny.trainer(tmp_path, train_dataset=self.shared(), eval_dataset=HELD_OUT)
        assert len(run.train_dataset) == 53 and run.plan.split_check.dropped == 7
        assert run.train_dataset["input_ids"][:] == TRAIN["input_ids"][:53]
        assert warnings.text.count("Dropped 7 of 60 training rows") == 1
        run.train()
        assert run.state.max_steps == 14

    def test_they_are_refused_or_kept_on_wish(self, tmp_path):
        sets = {"train_dataset": self.shared(), "eval_dataset": HELD_OUT}
        with pytest.raises(ValueError, match="7 of 30 calibration rows"):
            tiny.trainer(tmp_path, split_overlap="error", **sets)
        for policy in ("warn", "skip"):
            assert len(tiny.trainer(tmp_path, split_overlap=policy, **sets).train_dataset) == 60

    def test_calibration_and_test_rows_that_are_the_same_are_an_error(self, tmp_path):
        sets = {"calibration": HELD_OUT, "test": HELD_OUT.select(range(5))}
        with pytest.raises(ValueError, match="5 of 5 test rows have the same inputs as a calibration row"):
            tiny.trainer(tmp_path, eval_dataset=sets)

    def test_columns_that_the_model_does_not_take_do_not_tell_rows_apart(self, tmp_path):
        train = self.shared().add_column("text", [str(index) for index in range(60)])
        held_out = HELD_OUT.add_column("text", [f"other {index}" for index in range(30)])
        assert len(tiny.trainer(tmp_path, train_dataset=train, eval_dataset=held_out).train_dataset) == 53


class TestTheCallersObjects:
    def test_arguments_are_those_they_were_after_two_trainers_and_training(self, tmp_path):
        args = tiny.arguments(tmp_path, metric_for_best_model="eval_ece", calibration_fraction=0.2)
        plain = TrainingArguments(str(tmp_path), num_train_epochs=1, use_cpu=True, disable_tqdm=True, report_to=[],
                                  metric_for_best_model="eval_ece", dataloader_drop_last=True)  # fmt: skip
        for given in (args, plain):
            before = copy.deepcopy(vars(given))
            runs = [
                AdaFocalTrainer(tiny.bert(), given, train_dataset=TRAIN, eval_dataset=HELD_OUT, **more)
                for more in ({}, {"loss": AdaFocalLoss(num_bins=3)})
            ]
            assert [run.loss.num_bins for run in runs] == [5 if given is args else 15, 3]
            runs[0].train(), runs[0].evaluate(), runs[0].predict(OTHER)
            changed = {name for name in before if vars(given)[name] != before[name]}
            assert changed <= {"distributed_state"} and vars(given).keys() == before.keys()  # accelerate's own

    def test_data_sets_and_the_random_state_are_as_they_were(self, tmp_path):
        sets = {"calibration": HELD_OUT, "other": OTHER}
        before = dict(sets), TRAIN[:], HELD_OUT[:]
        args, model = tiny.arguments(tmp_path), tiny.bert()
        state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        resolve_plan(args, model, train_dataset=TRAIN, eval_dataset=sets)
        resolve_plan(args, model, train_dataset=TRAIN)
        assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]
        assert (dict(sets), TRAIN[:], HELD_OUT[:]) == before

    def test_a_plan_cannot_be_changed(self, tmp_path):
        plan = resolved(tmp_path, train_dataset=TRAIN, eval_dataset=HELD_OUT)
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.loss = None


class TestDirectionOfTheBestMetric:
    """By ECE, NLL and the like the lowest checkpoint is kept, whatever kind of arguments there is."""

    def run(self, folder, kind, metric, sets=HELD_OUT, callbacks=None, **settings):
        shared = {
            **{"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch", "use_cpu": True},
            **{"load_best_model_at_end": True, "metric_for_best_model": metric, "learning_rate": 5e-3},
            **{"disable_tqdm": True, "report_to": []},
        }
        args = kind(str(folder), **{**shared, **settings})
        run = AdaFocalTrainer(tiny.bert(), args, train_dataset=TRAIN, eval_dataset=sets, callbacks=callbacks)
        run.train()
        name = metric if metric.startswith("eval_") else f"eval_{metric}"
        return run, [entry[name] for entry in run.state.log_history if name in entry]

    @pytest.mark.parametrize("kind", [TrainingArguments, AdaFocalTrainingArguments])
    @pytest.mark.parametrize("metric", ["eval_ece", "ada_ece", "nll", "brier", "refinement"])
    def test_the_lowest_is_the_best(self, tmp_path, kind, metric):
        run, seen = self.run(tmp_path, kind, metric)
        assert len(seen) == 3 and run.state.best_metric == min(seen) < max(seen)

    @pytest.mark.parametrize("kind", [TrainingArguments, AdaFocalTrainingArguments])
    def test_under_the_prefix_of_a_set_too(self, tmp_path, kind):
        run, seen = self.run(tmp_path, kind, "eval_calibration_nll", {"other": OTHER, "calibration": HELD_OUT})
        assert len(seen) == 3 and run.state.best_metric == min(seen) < max(seen)

    @pytest.mark.parametrize("kind", [TrainingArguments, AdaFocalTrainingArguments])
    def test_accuracy_is_better_when_it_is_higher(self, tmp_path, kind):
        run, seen = self.run(tmp_path, kind, "accuracy")
        assert run.args.greater_is_better is True and run.state.best_metric == max(seen)

    @pytest.mark.parametrize("kind", [TrainingArguments, AdaFocalTrainingArguments])
    def test_early_stopping_waits_for_a_lower_one(self, tmp_path, kind):
        # Of a model that does not learn no evaluation is lower than the first.
        stopping = EarlyStoppingCallback(early_stopping_patience=2)
        run, seen = self.run(tmp_path / "still", kind, "nll", callbacks=[stopping], learning_rate=0.0,
                             num_train_epochs=6)  # fmt: skip
        assert len(seen) == 3
        stopping = EarlyStoppingCallback(early_stopping_patience=1)
        run, seen = self.run(tmp_path / "learning", kind, "nll", callbacks=[stopping], learning_rate=1e-3,
                             num_train_epochs=4)  # fmt: skip
        assert len(seen) == 4 and seen == sorted(seen, reverse=True)
