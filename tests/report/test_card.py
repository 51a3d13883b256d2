"""Cards: what they say, what they keep."""

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard

from hf_adafocal.metrics.scores import softmax
from hf_adafocal.report.card import END, START, model_card, task_of, write_card
from hf_adafocal.report.facts import ModelFacts
from hf_adafocal.report.measurement import Collected
from hf_adafocal.report.schema import Report, build_report
from hf_adafocal.scaling.fit import Scaling


def report(folded: bool = False, **changes) -> Report:
    """A report of an over-confident model on 300 samples."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(600, 4))
    labels = (softmax(logits).cumsum(1) < generator.random((600, 1))).sum(1)
    scaled = Scaling(0.4, 0.0, 1.5, 1.2, 300)
    settings = {
        "model": ModelFacts("BertForSequenceClassification", "text-classification"),
        "loss": {"name": "adafocal", "num_bins": 15, "gamma_max": 20.0},
        "adaptation": [{"step": 10, "gammas": [1.0, 1.0]}, {"step": 20, "gammas": [-0.25, 2.5]}],
        "splits": {"train": 1000, "calibration": 300, "test": 300},
        "seed": 3,
        "trained_on": "me/news",
        "evaluated_on": "me/news",
        "training": {"epochs": 3.0, "batch_size": 16, "learning_rate": 5e-5},
        "num_resamples": 50,
        **changes,
    }
    if folded:
        return build_report((scaled.apply(3 * logits[:300]), labels[:300]), folded=scaled, **settings)
    return build_report((3 * logits[:300], labels[:300]), (3 * logits[300:], labels[300:]), **settings)


class TestMetadata:
    @pytest.mark.parametrize(("folded", "row"), [(False, "raw"), (True, "temperature_scaled")])
    def test_the_model_index_holds_every_metric_of_the_scores_that_ship(self, folded, row):
        facts = report(folded)
        data = ModelCard(model_card(facts, name="news")).data
        found = {result.metric_type: result.metric_value for result in data.eval_results}
        keys = {"nll": "nll", "ece": "ece", "ada_ece": "ada_ece", "brier_score": "brier", "accuracy": "accuracy"}
        for metric, key in keys.items():
            assert found[metric] == pytest.approx(facts.test.rows()[row][key])
        assert {result.dataset_split for result in data.eval_results} == {"test"}
        assert {result.dataset_type for result in data.eval_results} == {"me/news"}

    def test_it_says_what_finds_it_on_the_hub(self):
        data = ModelCard(model_card(report(), name="news", license="mit")).data
        assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-classification", "mit")
        assert data.model_name == "news" and {"calibration", "adafocal"} <= set(data.tags)

    @pytest.mark.parametrize(
        ("model", "task"),
        [
            ("ViTForImageClassification", "image-classification"),
            ("TimmWrapperForImageClassification", "image-classification"),
            ("BertForTokenClassification", "token-classification"),
            ("GlobalPoolingCNNForSequenceClassification", "text-classification"),
        ],
    )
    def test_the_task_is_that_of_the_model(self, model, task):
        assert task_of({"training": {"model": model}}) == task

    def test_keys_and_results_of_the_user_stay_and_ours_are_renewed(self):
        card = ModelCard(model_card(report(), name="news"))
        card.data.language = "de"
        card.data.tags.append("mine")
        card.data.eval_results.append(
            EvalResult(
                task_type="text-classification",
                dataset_type="other",
                dataset_name="Other",
                metric_type="f1",
                metric_value=0.5,
            )
        )
        again = ModelCard(model_card(report(folded=True), name="news", existing=str(card)))
        assert again.data.language == "de" and "mine" in again.data.tags
        assert len(again.data.tags) == len(set(again.data.tags))
        by_metric = [(result.dataset_type, result.metric_type) for result in again.data.eval_results]
        assert ("other", "f1") in by_metric and len(by_metric) == len(set(by_metric))
        ece = next(result for result in again.data.eval_results if result.metric_type == "ece")
        assert ece.metric_value == pytest.approx(report(folded=True).metrics["ece"])


class TestText:
    def test_the_summary_is_two_sentences_with_the_numbers_of_the_report(self):
        facts = report()
        text = ModelCard(model_card(facts, name="news")).text
        summary = " ".join(text.split(START)[1].split("## Calibration")[0].split())
        values, (low, high) = facts.test.raw, facts.test.intervals["raw"]["ece"]
        assert f"right in {100 * values['accuracy']:.1f} % of cases" in summary
        assert f"off by {100 * values['ece']:.1f} percentage points on average" in summary
        assert f"(95 % interval {100 * low:.1f} to {100 * high:.1f})." in summary

    def test_the_table_has_each_metric_with_its_interval_before_and_after(self):
        facts = report()
        lines = model_card(facts, name="news").splitlines()
        header = next(index for index, line in enumerate(lines) if line.startswith("| scores"))
        titles = [cell.strip() for cell in lines[header].strip("|").split("|")]
        assert titles[1:] == [
            *("accuracy %", "NLL", "Brier", "ECE %", "AdaECE %", "classwise ECE %", "MCE %"),
        ]
        for line, name in ((lines[header + 2], "raw"), (lines[header + 3], "temperature_scaled")):
            low, high = (100 * end for end in facts.test.intervals[name]["ece"])
            cell = [cell.strip() for cell in line.strip("|").split("|")][4]
            assert cell == f"{100 * facts.test.rows()[name]['ece']:.2f} ({low:.2f} to {high:.2f})"

    def test_the_row_of_this_checkpoint_is_marked(self):
        marked = {
            folded: [line for line in model_card(report(folded), name="x").splitlines() if "(this checkpoint)" in line]
            for folded in (False, True)
        }
        assert [line.startswith("| **as trained**") for line in marked[False]] == [True]
        assert [line.startswith("| **T = 2.50**") for line in marked[True]] == [True]

    def test_baselines_stand_beside_it_and_a_better_one_is_named(self):
        better = {**report().test.raw, "ece": 0.001}
        text = model_card(report(baselines={"cross_entropy, temperature scaled": better}), name="x")
        assert "| baseline: cross_entropy, temperature scaled |" in text
        assert "cross_entropy, temperature scaled had a lower ECE" in text
        worse = {**better, "ece": 0.9}
        assert "had a lower ECE" not in model_card(report(baselines={"cross_entropy": worse}), name="x")

    def test_it_says_how_gamma_ended_and_which_split_did_what(self):
        text = model_card(report(), name="x")
        assert "Gamma moved 2 times" in text and "-0.25 and 2.50" in text
        assert "1,000 train, 300 calibration, 300 test" in text

    def test_overlap_that_was_asked_for_is_admitted(self):
        none = {"policy": "error", "rows": {"test in calibration": 0}}
        assert "Splits overlap" not in model_card(report(overlap=none), name="x")
        allowed = {"policy": "warn", "rows": {"test in calibration": 5}}
        assert "Splits overlap, by request: 5 rows of test in calibration." in model_card(
            report(overlap=allowed), name="x"
        )

    def test_splits_that_were_not_compared_are_admitted(self):
        unchecked = {"policy": "skip", "rows": {}}
        assert "was not checked" in model_card(report(overlap=unchecked), name="x")

    def test_the_example_loads_the_repository(self):
        text = model_card(report(), name="x", repo_id="me/calibrated")
        assert 'pipeline("text-classification", model="me/calibrated")' in text

    def test_nothing_of_the_template_is_left_unfilled(self):
        minimal = build_report(Collected(report().test.raw, 300, 15), model=ModelFacts("Net"))
        for facts in (report(), report(True), minimal):
            text = model_card(facts, name="x")
            assert "{{" not in text and "{%" not in text and "None" not in text


class TestRenewal:
    def test_the_users_sections_stay_word_for_word_and_the_block_is_replaced(self):
        first = model_card(report(), name="news")
        mine = first.replace("# news", "# News of the day\n\nOur words.").rstrip() + "\n\n## Ethics\n\nAlso ours.\n"
        text = model_card(report(folded=True), name="news", existing=mine)
        assert "# News of the day\n\nOur words." in text and text.endswith("## Ethics\n\nAlso ours.\n")
        assert text.count(START) == text.count(END) == 1
        assert "is folded into the classifier head" in text and "# news\n" not in text

    def test_renewing_twice_changes_nothing(self):
        once = model_card(report(), name="news")
        assert model_card(report(), name="news", existing=once) == once

    def test_a_card_without_the_block_gets_it_at_the_end(self):
        text = model_card(report(), name="x", existing="---\nlicense: mit\n---\n# Mine\n\nWords.\n")
        assert text.index("# Mine\n\nWords.") < text.index(START) and ModelCard(text).data.license == "mit"

    def test_a_card_without_metadata_is_kept_too(self):
        text = model_card(report(), name="x", existing="# Mine\n")
        assert "# Mine" in text and ModelCard(text).data.pipeline_tag == "text-classification"


class TestWriteCard:
    def test_it_shows_the_pictures_that_lie_in_the_folder(self, tmp_path):
        (tmp_path / "reliability.png").write_bytes(b"")
        card = ModelCard.load(write_card(tmp_path, report()))
        assert "](reliability.png)" in card.text and "](gamma.png)" not in card.text

    def test_it_renews_the_readme_there_is(self, tmp_path):
        (tmp_path / "README.md").write_text("# Mine\n")
        write_card(tmp_path, report())
        write_card(tmp_path, report(folded=True))
        text = (tmp_path / "README.md").read_text()
        assert text.count(START) == 1 and "# Mine" in text and "folded into" in text
