"""`calibrate_at_end`: a temperature is fitted and folded into the trained model, on evidence only."""

import json
import logging

import numpy as np
import pytest
import tiny
import torch
from accelerate import debug_launcher
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from hf_adafocal import AdaFocalTrainer
from hf_adafocal.scaling.fit import fit_temperature_scaling
from hf_adafocal.scaling.folding import recorded_scaling
from hf_adafocal.training import calibration_at_end as module
from hf_adafocal.training import recorder

pytestmark = pytest.mark.usefixtures("blank_pictures")

HELD_OUT = tiny.token_dataset(300, seed=1)


def clean_data(size=48, seed=0) -> Dataset:
    """The first token always tells the class, and mostly in held-out sets: who learns this is over-confident."""
    data = tiny.token_dataset(size, seed=seed)
    rows = [[1 + label, *row[1:]] for row, label in zip(data["input_ids"], data["labels"], strict=True)]
    return Dataset.from_dict({"input_ids": rows, "labels": data["labels"][:]})


def build(folder, model=None, **settings):
    settings = {"loss": "cross_entropy", "calibrate_at_end": True, "eval_dataset": HELD_OUT, **settings}
    settings = {"train_dataset": clean_data(), "num_train_epochs": 6, "learning_rate": 1e-2, **settings}
    settings.setdefault("per_device_eval_batch_size", 100)
    return tiny.trainer(folder, model, **settings)


def logits_of(model, data=HELD_OUT):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(data["input_ids"][:])).logits, torch.tensor(data["labels"][:])


def same_bits(one, other) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.fixture
def log(caplog):
    logging.getLogger("transformers").propagate = True
    caplog.set_level("INFO", logger="hf_adafocal")
    return caplog


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run twice, without and with a temperature at its end."""
    found = [build(tmp_path_factory.mktemp("run"), calibrate_at_end=folds) for folds in (False, True)]
    for run in found:
        run.train()
    return found


class TestFolding:
    def test_the_best_temperature_is_folded_and_recorded_where_the_evidence_supports_it(self, tmp_path, log):
        plain, run = build(tmp_path, calibrate_at_end=False), build(tmp_path)
        plain.train(), run.train()
        logits, labels = logits_of(plain.model)
        expected = fit_temperature_scaling(logits, labels)
        temperature = 1 / expected.scale
        assert temperature > 1.3
        outcome = run.calibration_outcome
        assert outcome.folded and 1 / outcome.scaling.scale == pytest.approx(temperature, rel=1e-4)
        assert recorded_scaling(run.model.config) == outcome.scaling
        torch.testing.assert_close(logits_of(run.model)[0], logits / temperature, rtol=1e-3, atol=1e-4)
        assert f"A temperature of {temperature:.3g}, fitted on 300 calibration samples" in log.text
        entry = next(entry for entry in run.state.log_history if "calibration_folded" in entry)
        assert entry["calibration_folded"] == 1 and entry["calibration_temperature"] == pytest.approx(temperature)

    def test_what_is_saved_and_evaluated_afterwards_is_calibrated(self, runs, tmp_path):
        _, run = runs
        after = run.evaluate()
        assert after["eval_temperature"] == pytest.approx(1, rel=0.01)
        assert after["eval_nll"] == pytest.approx(after["eval_refinement"], abs=1e-3)
        run.save_model(str(tmp_path / "saved"))
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert recorded_scaling(loaded.config) == run.calibration_outcome.scaling
        assert torch.equal(logits_of(loaded)[0], logits_of(run.model)[0])

    def test_the_report_keeps_both_rows_and_the_card_the_shipped_one(self, runs):
        plain, run = runs
        test = tiny.token_dataset(90, seed=4)
        expected, report = (found.write_report(test, num_resamples=10) for found in (plain, run))
        assert report.folded and report.shipped == "temperature_scaled" and not expected.folded
        for row in ("raw", "temperature_scaled"):
            mine, theirs = report.test.rows()[row], expected.test.rows()[row]
            for name in ("accuracy", "nll", "ece"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4)
        assert report.metrics["nll"] == pytest.approx(run.evaluate(test)["eval_nll"], rel=1e-5)

    @pytest.mark.parametrize(("lost", "warns"), [(0.01, True), (0.2, False)])
    def test_a_temperature_that_spoils_the_confidences_is_a_warning(self, tmp_path, log, monkeypatch, lost, warns):
        """A confidence of 0.6 is right in 60 of 100; a class given next to nothing is the label of 20."""
        probabilities = torch.tensor([0.6, 0.4 - lost, lost]).expand(100, 3)
        labels = torch.tensor([0] * 60 + [1] * 20 + [2] * 20)
        run = build(tmp_path)
        monkeypatch.setattr(run, "measure", lambda *_: ({"ece": 0.0}, (probabilities.log(), labels)))
        outcome = module.calibrate_head(run)
        confidence = (probabilities[0].log() * float(outcome.scaling.scale)).softmax(0).max().item()
        said = f"It raises their ECE from 0.00% to {0.6 - confidence:.2%}"
        assert (said in outcome.reason) == warns
        assert [record.levelname for record in log.records if record.message == outcome.reason] == (
            ["WARNING"] if warns else ["INFO"]
        )

    def test_it_costs_no_training(self, runs):
        plain, run = runs
        logs = [[entry for entry in found.state.log_history if "loss" in entry] for found in (plain, run)]
        assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]]

    def test_with_adafocal_and_no_held_out_set_the_tenth_calibrates_both(self, tmp_path):
        run = build(tmp_path, loss="adafocal", train_dataset=clean_data(300), eval_dataset=None, eval_strategy="no")
        run.train()
        assert run.calibration_outcome.scaling.num_samples == 30 and run.adaptive_callback.updates == 6

    def test_more_logits_than_can_be_kept_give_nearly_the_same_temperature(self, runs, tmp_path, monkeypatch):
        exact, summed = runs[1], build(tmp_path)
        monkeypatch.setattr(recorder, "MOST_LOGITS", 5)
        summed.train()
        found, expected = (1 / run.calibration_outcome.scaling.scale for run in (summed, exact))
        assert found == pytest.approx(expected, rel=0.01) and summed.calibration_outcome.folded
        assert summed.calibration_outcome.scaling.nll_after == pytest.approx(
            exact.calibration_outcome.scaling.nll_after, abs=1e-3
        )


class TestSeveralRuns:
    @pytest.mark.slow
    def test_each_trial_of_a_search_is_judged_by_the_calibrated_model_and_disturbs_no_other(self, tmp_path):
        optuna = pytest.importorskip("optuna", reason="optuna (extra `dev`) proposes the trials")
        optuna.logging.set_verbosity(optuna.logging.CRITICAL)
        rates, outcomes = [1e-2, 5e-3], []

        class Watched(AdaFocalTrainer):
            def train(self, *args, **kwargs):
                outcome = super().train(*args, **kwargs)
                outcomes.append((self.args.learning_rate, self.calibration_outcome, self.evaluate()["eval_loss"]))
                return outcome

        settings = {"loss": "cross_entropy", "calibrate_at_end": True, "num_train_epochs": 6}
        sets = {"train_dataset": clean_data(), "eval_dataset": HELD_OUT}
        grid = {"learning_rate": rates}
        search = Watched(args=tiny.arguments(tmp_path, **settings), model_init=lambda: tiny.bert(), **sets)
        best = search.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
            n_trials=2,
            backend="optuna",
            sampler=optuna.samplers.GridSampler(grid, seed=0),
        )
        assert sorted(rate for rate, _, _ in outcomes) == sorted(rates)
        for rate, outcome, nll in outcomes:
            args = tiny.arguments(tmp_path, **settings, learning_rate=rate)
            alone = AdaFocalTrainer(args=args, model_init=lambda: tiny.bert(), **sets)
            alone.train()
            assert outcome.folded and outcome.scaling == alone.calibration_outcome.scaling  # to the bit
            assert nll == pytest.approx(outcome.scaling.nll_after, abs=1e-4)
        assert best.objective == min(nll for _, _, nll in outcomes)

    def test_training_again_moves_on_from_the_calibrated_model(self, tmp_path, log):
        run = build(tmp_path)
        run.train()
        first = run.calibration_outcome
        run.train()
        assert "has a scaling folded into its head; training moves on from there" in log.text
        assert run.calibration_outcome != first and recorded_scaling(run.model) == run.calibration_outcome.scaling


class TestEvidence:
    """Where T cannot be told from 1 on these samples, the model stays as it is, and log, report and card say so."""

    def calibrated(self, folder, size):
        """A run that learns nothing, of a model at chance level."""
        model = tiny.bert()
        run = build(
            folder, model, learning_rate=0.0, num_train_epochs=1, eval_dataset=tiny.token_dataset(size, seed=1)
        )
        return run, model

    def test_at_chance_level_nothing_is_folded(self, tmp_path, log):
        run, model = self.calibrated(tmp_path, 12)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        run.train()
        outcome = run.calibration_outcome
        assert outcome.scaling.nll_before - outcome.scaling.nll_after < 1.92 / 12  # half the 95 % quantile, by sample
        assert not outcome.folded and recorded_scaling(model.config) is None
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert "cannot tell a temperature of" in outcome.reason and "so none was folded" in outcome.reason
        assert outcome.reason in log.text
        assert [entry["calibration_folded"] for entry in run.state.log_history if "calibration_folded" in entry] == [0]

    def test_the_report_and_the_card_say_so(self, tmp_path):
        run, _ = self.calibrated(tmp_path, 12)
        run.train()
        report = run.write_report(tiny.token_dataset(30, seed=4), num_resamples=10)
        run.create_model_card()
        assert not report.folded
        assert "cannot tell" in (tmp_path / "report.json").read_text()
        assert "cannot tell" in (tmp_path / "README.md").read_text()

    def test_a_set_that_is_all_right_folds_nothing(self, tmp_path):
        labels = np.arange(30) % 3
        data = Dataset.from_dict({"input_ids": [[label + 1] * 4 for label in labels], "labels": labels.tolist()})
        easy = Dataset.from_dict({"input_ids": [[label + 1] * 5 for label in labels], "labels": labels.tolist()})
        run = build(tmp_path, tiny.bert(), train_dataset=data, eval_dataset=easy, num_train_epochs=10)
        with pytest.warns(UserWarning, match="All 30 held-out samples are classified correctly"):
            run.train()
        assert run.calibration_outcome.scaling.scale == 1.0 and not run.calibration_outcome.folded


class TestBeforeTraining:
    def test_a_head_that_cannot_hold_a_temperature_is_refused_before_the_first_step(self, tmp_path):
        class Clipped(type(tiny.bert())):
            def forward(self, input_ids, labels=None):
                output = super().forward(input_ids)
                output.logits = output.logits.clamp(-1, 1).square()
                return output

        run = build(tmp_path, Clipped(tiny.bert().config), split_overlap="skip")
        with pytest.raises(ValueError, match="this model's cannot hold one: .* Or set calibrate_at_end=False"):
            run.train()
        assert run.state.global_step == 0

    def test_a_module_of_ones_own_is_refused_too(self, tmp_path):
        class Plain(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = torch.nn.Embedding(tiny.VOCABULARY, 3)

            def forward(self, input_ids, labels=None):
                return {"logits": self.embedding(input_ids).mean(1)}

        with pytest.raises(ValueError, match="Expected a transformers or PEFT model, found Plain"):
            build(tmp_path, Plain()).train()

    def test_looking_changes_neither_the_run_nor_the_model(self, tmp_path):
        plain, run = build(tmp_path, calibrate_at_end=False), build(tmp_path)
        module.check_before_training(run)
        assert same_bits(plain.model, run.model)
        run.plan = plain.plan
        plain.train(), run.train()
        assert same_bits(plain.model, run.model)


class TestResume:
    def test_checkpoints_hold_the_weights_as_trained_and_a_resumed_run_ends_with_the_same_bits(self, tmp_path):
        whole, resumed = (build(tmp_path, save_strategy="epoch") for _ in range(2))
        whole.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-18"))
        assert same_bits(whole.model, resumed.model) and resumed.calibration_outcome.folded
        assert resumed.calibration_outcome.scaling == whole.calibration_outcome.scaling
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-36")
        assert recorded_scaling(saved.config) is None

    def test_a_finished_run_that_is_resumed_does_not_fold_twice(self, tmp_path):
        whole = build(tmp_path, save_strategy="epoch")
        whole.train()
        again = build(tmp_path, save_strategy="epoch")
        again.train(resume_from_checkpoint=True)
        assert same_bits(whole.model, again.model)
        whole.train(resume_from_checkpoint=True)  # the very trainer that has folded
        assert same_bits(whole.model, again.model)
        assert recorded_scaling(whole.model.config) == again.calibration_outcome.scaling

    def test_the_best_checkpoint_is_the_one_that_is_calibrated(self, tmp_path):
        best = {"load_best_model_at_end": True, "metric_for_best_model": "refinement", "save_strategy": "epoch"}
        plain = build(tmp_path / "plain", calibrate_at_end=False, **best)
        run = build(tmp_path / "run", **best)
        plain.train(), run.train()
        assert run.state.best_global_step == plain.state.best_global_step
        expected = fit_temperature_scaling(*logits_of(plain.model))
        assert run.calibration_outcome.scaling.scale == pytest.approx(expected.scale, rel=1e-4)
        torch.testing.assert_close(
            logits_of(run.model)[0], logits_of(plain.model)[0] * expected.scale, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_the_head_of_an_adapted_model_is_calibrated(tmp_path, task):
    peft = pytest.importorskip("peft", reason="peft (extra `dev`) adapts the model")

    def lora():
        kind = {"task_type": task} if task else {"modules_to_save": ["classifier"]}
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.0, **kind)
        return peft.get_peft_model(tiny.bert(), config)

    plain, run = build(tmp_path, lora(), calibrate_at_end=False), build(tmp_path, lora())
    plain.train(), run.train()
    logits, labels = logits_of(plain.model)
    expected = fit_temperature_scaling(logits, labels)
    assert run.calibration_outcome.folded
    torch.testing.assert_close(logits_of(run.model)[0], logits * expected.scale, rtol=1e-3, atol=1e-4)
    run.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded)[0], logits_of(run.model)[0])


def calibrated_on_two(folder) -> None:
    torch.set_num_threads(1)
    run = build(folder, eval_dataset=tiny.token_dataset(301, seed=1), ddp_find_unused_parameters=False)
    run.train()
    result = {
        "temperature": 1 / run.calibration_outcome.scaling.scale,
        "samples": run.calibration_outcome.scaling.num_samples,
        "folded": run.calibration_outcome.folded,
        "weights": [parameter.flatten().tolist() for parameter in run.model.parameters()],
    }
    (folder / f"rank-{run.args.process_index}.json").write_text(json.dumps(result))


def test_two_processes_fold_the_same_bits(tmp_path):
    debug_launcher(calibrated_on_two, args=(tmp_path,), num_processes=2)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["folded"] and first["samples"] == 301
