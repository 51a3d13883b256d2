"""The report and the card of a run describe the weights in hand."""

import json

import pytest
import tiny
from huggingface_hub import ModelCard

from hf_adafocal.report.card import START
from hf_adafocal.report.files import read_report
from hf_adafocal.report.weights import weights_hash

TEST = tiny.token_dataset(30, seed=4)
METRICS = ("accuracy", "nll", "brier", "ece", "ada_ece")


def on_card(folder) -> dict[str, float]:
    return {
        result.metric_type: result.metric_value for result in ModelCard.load(folder / "README.md").data.eval_results
    }


class TestWriteReport:
    def test_it_measures_the_model_as_it_is_on_the_test_set_and_says_how_it_was_trained(self, tmp_path):
        run = tiny.trainer(tmp_path)
        run.train()
        report = run.write_report(TEST, num_resamples=10)
        expected = run.evaluate(TEST)
        for name in METRICS:
            assert report.metrics[name] == pytest.approx(expected[f"eval_{name}"], rel=1e-5)
        assert report.test.split == "test" and report.metrics["num_samples"] == 30
        assert report.loss["name"] == "adafocal" and report.loss["num_bins"] == 5 and report.seed == run.args.seed
        assert [update["step"] for update in report.adaptation] == [0, 6, 12]
        assert report.adaptation[-1]["gammas"] == pytest.approx(run.loss.gammas.tolist())
        sizes = {name: part["size"] for name, part in report.splits.items()}
        assert sizes == {"train": 48, "calibration": 60, "test": 30}
        assert report.held_out == {"adaptation": "calibration", "scaling": "calibration"}
        assert report.training["batch_size"] == 8 and report.training["epochs"] == 2
        assert report.overlap["dropped"] == 0
        assert report.weights == weights_hash(run.model.state_dict())

    def test_the_file_holds_it_and_pictures_lie_beside_it(self, tmp_path):
        pytest.importorskip("matplotlib")
        run = tiny.trainer(tmp_path)
        run.train()
        report = run.write_report(TEST, num_resamples=10)
        assert read_report(tmp_path).to_dict() == report.to_dict()
        assert json.loads((tmp_path / "report.json").read_text())["schema_version"] == 1
        for name in ("reliability.png", "gamma.png"):
            assert (tmp_path / name).stat().st_size > 1000

    def test_it_moves_neither_gamma_nor_the_log(self, tmp_path):
        run = tiny.trainer(tmp_path)
        run.train()
        before = json.dumps([run.loss.table(), run.state.log_history, run.state.stateful_callbacks])
        run.write_report(TEST, num_resamples=10)
        assert json.dumps([run.loss.table(), run.state.log_history, run.state.stateful_callbacks]) == before

    def test_without_a_test_set_it_says_what_the_measured_set_was_used_for(self, tmp_path):
        report = tiny.trainer(tmp_path).write_report(num_resamples=10)
        assert report.test.split == "evaluation" and report.held_out["adaptation"] == "evaluation"
        sets = {"calibration": tiny.token_dataset(60, seed=1), "test": TEST}
        report = tiny.trainer(tmp_path, eval_dataset=sets).write_report(num_resamples=10)
        assert report.test.split == "test" and report.held_out["adaptation"] == "calibration"

    def test_where_checkpoints_were_chosen_by_the_measured_set_it_says_so(self, tmp_path):
        run = tiny.trainer(
            tmp_path, load_best_model_at_end=True, metric_for_best_model="nll", save_strategy="epoch", loss="focal"
        )
        assert run.write_report(num_resamples=10).held_out["selection"] == "evaluation"

    def test_without_any_set_it_is_an_error(self, tmp_path):
        run = tiny.trainer(tmp_path, loss="focal", eval_dataset=None, eval_strategy="no")
        with pytest.raises(ValueError, match="no set to report on: pass test_dataset"):
            run.write_report()

    def test_more_logits_than_can_be_kept_leave_metrics_without_intervals(self, tmp_path, monkeypatch):
        from hf_adafocal.training import recorder

        expected = tiny.trainer(tmp_path).evaluate(TEST)
        monkeypatch.setattr(recorder, "MOST_LOGITS", 5)
        report = tiny.trainer(tmp_path).write_report(TEST)
        for name in METRICS:
            assert report.metrics[name] == pytest.approx(expected[f"eval_{name}"], rel=1e-5)
        assert not report.test.intervals


@pytest.mark.usefixtures("blank_pictures")
class TestCard:
    def test_after_the_best_checkpoint_is_back_it_shows_that_one(self, tmp_path):
        run = tiny.trainer(
            tmp_path,
            num_train_epochs=4,
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_nll",
            greater_is_better=True,  # so that the best is not the last
        )
        run.train()
        assert run.state.best_global_step < 24
        run.create_model_card()
        found, expected = on_card(tmp_path), run.evaluate()
        assert found["nll"] == pytest.approx(expected["eval_nll"], rel=1e-5)
        assert found["nll"] != pytest.approx(run.state.log_history[-2].get("eval_nll", 0.0), rel=1e-3)
        assert found["ece"] == pytest.approx(expected["eval_ece"], rel=1e-5)
        assert "chosen on the samples measured here" in (tmp_path / "README.md").read_text()

    def test_a_report_of_these_weights_is_shown_and_one_of_others_is_not(self, tmp_path):
        run = tiny.trainer(tmp_path)
        run.train()
        run.write_report(TEST, num_resamples=10)
        run.create_model_card()
        assert "30 test samples" in (tmp_path / "README.md").read_text()
        run.train()
        run.create_model_card()
        assert "60 evaluation samples" in (tmp_path / "README.md").read_text()
        assert on_card(tmp_path)["nll"] == pytest.approx(run.evaluate()["eval_nll"], rel=1e-5)

    def test_without_a_set_and_a_report_it_is_the_stock_card(self, tmp_path):
        tiny.trainer(tmp_path, loss="focal", eval_dataset=None, eval_strategy="no").create_model_card()
        assert START not in (tmp_path / "README.md").read_text()

    def test_without_a_set_a_report_of_other_weights_is_not_shown(self, tmp_path):
        tiny.trainer(tmp_path, tiny.bert(seed=5), loss="focal").write_report(TEST, num_resamples=10)
        tiny.trainer(tmp_path, loss="focal", eval_dataset=None, eval_strategy="no").create_model_card()
        readme = tmp_path / "README.md"
        assert not readme.exists() or START not in readme.read_text()

    def test_push_to_hub_pushes_it_and_keeps_the_users_sections(self, tmp_path, local_hub):
        run = tiny.trainer(tmp_path / "run", hub_model_id="me/news", push_to_hub=True)
        run.train()
        run.push_to_hub()
        readme = tmp_path / "run" / "README.md"
        readme.write_text(readme.read_text() + "\n## Intended use\n\nOurs alone.\n")
        run.push_to_hub()
        card = ModelCard(local_hub.model("me/news").files()["README.md"].decode())
        assert card.text.count(START) == 1 and card.text.rstrip().endswith("## Intended use\n\nOurs alone.")
        assert {"ece", "ada_ece", "nll", "accuracy"} <= {result.metric_type for result in card.data.eval_results}
        assert 'model="me/news"' in card.text
