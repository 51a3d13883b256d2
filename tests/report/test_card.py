"""Cards: what they say, of which weights, and what they keep."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from sample_report import MODEL, SUPPORTED, predictions, report
from tiny import bert
from transformers.modelcard import TrainingSummary

from hf_adafocal.metrics.scores import calibration_report, softmax
from hf_adafocal.report.card import END, START, StaleReportError, is_stale, model_card, without_report, write_card
from hf_adafocal.report.facts import DataSource, ModelFacts
from hf_adafocal.report.measurement import Collected, PerSample
from hf_adafocal.report.schema import Report, build_report
from hf_adafocal.report.stock_card import is_stock, without_stock
from hf_adafocal.report.weights import weights_hash
from hf_adafocal.scaling.fit import Scaling


def card(*arguments, **options) -> ModelCard:
    options = {"name": "news", **options}
    return ModelCard(model_card(*arguments, **options))


def row(text: str, title: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {title}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


class TestMetadata:
    @pytest.mark.parametrize("folded", [False, True])
    def test_the_model_index_holds_the_metrics_of_the_scores_that_ship(self, folded):
        facts = report(folded)
        found = {result.metric_type: result for result in card(facts).data.eval_results}
        keys = {"nll": "nll", "ece": "ece", "ada_ece": "ada_ece", "brier_score": "brier", "accuracy": "accuracy"}
        for metric, key in keys.items():
            assert found[metric].metric_value == pytest.approx(facts.metrics[key])
            assert (found[metric].dataset_split, found[metric].dataset_type) == ("test", "me/news")
            assert found[metric].source_name == "hf-adafocal"

    def test_it_says_what_finds_it_on_the_hub(self):
        data = card(report(examples=[{"input": "Hi."}]), license="mit", tags="mine").data
        assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-classification", "mit")
        assert (data.language, data.datasets, data.base_model) == ("en", ["me/news"], "google/bert")
        assert data.model_name == "news" and {"calibration", "adafocal", "mine"} <= set(data.tags)
        assert data["widget"] == [{"text": "Hi."}] and data["labels"] == ["a", "b", "c", "d"]

    def test_what_is_unknown_is_left_out(self):
        facts = build_report(predictions(), model=ModelFacts("Net"), num_resamples=10)
        found = card(facts)
        for name in ("datasets", "base_model", "language", "license", "pipeline_tag", "labels", "widget"):
            assert found.data.get(name) is None
        assert set(found.data.tags) == {"calibration", "hf-adafocal"}
        for word in ("unknown", "None", "rained on", "Loss:", "Evaluated on", "fixed settings"):
            assert word not in found.text

    def test_local_data_appear_by_the_folders_name_alone(self):
        found = card(report(trained_on="/home/alice/imgs", evaluated_on="../private/imgs"))
        assert found.data.datasets is None and "on imgs with AdaFocal" in found.text
        assert {result.dataset_name for result in found.data.eval_results} == {"imgs"}
        assert "alice" not in str(found) and "private" not in str(found)

    def test_keys_and_results_of_the_user_stay_and_ours_are_renewed(self):
        first = card(report())
        first.data.language = "de"
        first.data.tags.append("mine")
        other = {"task_type": "text-classification", "dataset_type": "other", "dataset_name": "Other"}
        first.data.eval_results.append(EvalResult(**other, metric_type="f1", metric_value=0.5))
        again = card(report(folded=True, evaluated_on="me/else"), existing=str(first))
        assert again.data.language == "de" and "mine" in again.data.tags
        assert len(again.data.tags) == len(set(again.data.tags))
        assert {result.dataset_type for result in again.data.eval_results} == {"other", "me/else"}  # no row of me/news
        assert [result.metric_value for result in again.data.eval_results if result.metric_type == "f1"] == [0.5]

    @pytest.mark.skipif(
        "https://" in inspect.getsource(ModelCard.validate), reason="this huggingface_hub asks the public Hub alone"
    )
    @pytest.mark.parametrize("folded", [False, True])
    def test_the_hub_accepts_it(self, local_hub, folded):
        card(report(folded, examples=[{"input": "Hi."}]), license="mit").validate()


class TestText:
    def test_it_says_what_the_model_does_before_any_number(self):
        text = card(report()).text.split(START)[1]
        first = text.strip().splitlines()[0]
        assert first == (
            "Text classifier with 4 classes: a, b, c, d. Fine-tuned from [google/bert](https://huggingface.co/google/bert)"
            " on [me/news](https://huggingface.co/datasets/me/news) with AdaFocal."
        )
        headings = ["## How to use", "## Calibration", "## How it was calibrated", "## Limits"]
        assert [line for line in text.splitlines() if line.startswith("#")] == headings

    def test_accuracy_stands_against_the_most_frequent_class_then_comes_the_calibration(self):
        facts = report()
        values, ends = facts.test.raw, facts.test.intervals["raw"]
        expected = (
            f"On 300 test texts it is right in {100 * values['accuracy']:.1f} % of cases (95 % interval "
            f"{100 * ends['accuracy'][0]:.1f} to {100 * ends['accuracy'][1]:.1f}); always naming the most frequent "
            f"class would be right in {100 * facts.test.majority:.1f} %. Its confidence is off by "
            f"{100 * values['ece']:.1f} percentage points on average (95 % interval {100 * ends['ece'][0]:.1f} to "
            f"{100 * ends['ece'][1]:.1f})."
        )
        assert expected in card(facts).text

    def test_a_model_at_chance_level_is_called_that(self):
        labels = np.arange(300) % 4
        text = card(report(test=(np.zeros((300, 4)), labels))).text
        assert "no better than always naming the most frequent class, which would be right in 25.0 %" in text
        assert "learned nothing" in text

    def test_a_checkpoint_of_others_is_evaluated_on_the_data_not_trained_on_them(self):
        facts = build_report(predictions(), model=MODEL, evaluated_on="me/news", num_resamples=10)
        first = card(facts).text.split(START)[1].strip().splitlines()[0]
        assert first.endswith("Evaluated on [me/news](https://huggingface.co/datasets/me/news).")
        assert "on [me/news](https://huggingface.co/datasets/me/news) with" not in first

    def test_the_table_has_four_metrics_with_intervals_on_accuracy_and_ece_and_the_rest_is_folded_away(self):
        facts = report()
        shown, hidden = card(facts).text.split("<details>")[:2]
        low, high = (100 * end for end in facts.test.intervals["raw"]["ece"])
        values = facts.test.raw
        assert row(shown, "scores")[1:] == ["accuracy %", "NLL", "ECE %", "AdaECE %"]
        found = row(shown, "**as trained**")
        assert found[3] == f"{100 * values['ece']:.2f} ({low:.2f} to {high:.2f})"
        assert (found[2], found[4]) == (f"{values['nll']:.3f}", f"{100 * values['ada_ece']:.2f}")
        assert row(hidden, "scores")[1:] == ["Brier", "classwise ECE %"]

    def test_the_largest_gap_is_shown_where_every_bin_holds_enough_samples(self):
        logits = np.log(np.repeat([[0.7, 0.3], [0.9, 0.1]], 100, axis=0))
        labels = (np.arange(200) % 5 == 0).astype(int)
        assert "MCE %" in card(report(test=(logits, labels), scaling=None)).text
        assert "MCE %" not in card(report()).text
        assert "mce" not in {result.metric_type for result in card(report()).data.eval_results}

    @pytest.mark.parametrize(
        ("folded", "title"), [(False, "**as trained** (this checkpoint)"), (True, "**T = 2.50** (this checkpoint)")]
    )
    def test_the_row_of_this_checkpoint_is_marked(self, folded, title):
        text = card(report(folded)).text
        assert text.count("(this checkpoint)") == 2 and row(text, title.split(" (")[0])[0] == title

    def test_a_vector_scaled_run_gets_a_card(self):
        vector = Scaling((0.3,) * 4, (0.1, 0.0, 0.0, 0.0), 1.5, 1.2, 300)
        assert "The vector scaling (one factor" not in card(report(scaling=vector)).text
        text = card(build_report(predictions(), model=MODEL, folded=vector, num_resamples=10)).text
        assert "The vector scaling (one factor and one bias per class), fitted on 300 calibration samples, is" in text

    @pytest.mark.parametrize(
        ("facts", "sentence"),
        [
            ({"folded": True}, "The temperature T = 2.5, fitted on 300 calibration samples, is folded into the last"),
            (
                {"scaling": Scaling(0.98, 0.0, 1.2, 1.1999, 300)},
                "300 calibration samples cannot tell a temperature T = 1.02 from leaving the scores",
            ),
            ({"scaling": SUPPORTED}, "`hf-adafocal scale` folds it into the checkpoint"),
            ({"scaling": None}, "Nothing is applied after training."),
            ({"scaling": Scaling(1.0, 0.0, 1.2, 1.2, 300)}, "Nothing is applied after training."),
        ],
    )
    def test_it_says_what_was_fitted_and_whether_it_is_part_of_the_checkpoint(self, facts, sentence):
        assert sentence in card(report(**facts)).text

    def test_of_a_temperature_that_is_not_folded_it_says_what_a_server_must_be_told(self):
        found = report()
        told = found.to_dict()["test"]["pooler"]
        assert told == {"logit_mean": 0.0, "logit_sigma": 2.5} and Report.from_dict(found.to_dict()).pooler == told
        logits, labels = predictions()
        served = softmax((logits - told["logit_mean"]) / told["logit_sigma"])
        assert calibration_report(served, labels)["nll"] == pytest.approx(found.test.temperature_scaled["nll"])
        assert """`--pooler-config '{"logit_mean": 0.0, "logit_sigma": 2.5}'`""" in card(found).text
        image = replace(found, model=replace(MODEL, task="image-classification"))
        vector = report(scaling=Scaling((0.3,) * 4, (0.1, 0.0, 0.0, 0.0), 1.5, 1.2, 300))
        for other in (report(folded=True), report(scaling=None), image, vector):
            assert other.pooler is None and "pooler" not in other.to_dict()["test"] and "vLLM" not in card(other).text

    def test_a_better_baseline_is_named_with_the_decision_it_asks_for(self):
        base = report().test.raw
        better = {**base, "ece": 0.001, "accuracy": base["accuracy"] + 0.01}
        text = card(report(baselines={"cross_entropy + temperature scaling": better})).text
        assert "**Which to take:** on the same split cross\\_entropy + temperature scaling has an ECE of 0.1 %" in text
        assert "better in both: take that" in text and row(text, "baseline: cross\\_entropy + temperature")[1]
        poorer = card(report(baselines={"x": {**better, "accuracy": 0.1}})).text
        assert "Take the other one where confidence matters more than accuracy." in poorer
        close = card(report(baselines={"x": {**better, "ece": base["ece"] - 0.0005}})).text
        assert "there is no evidence for either" in close
        assert "Which to take" not in card(report(baselines={"x": {**better, "ece": 0.9}})).text

    def test_a_baseline_that_is_more_accurate_beyond_the_interval_is_named_too(self):
        facts = report()
        base, (_, high) = facts.test.raw, facts.test.intervals["raw"]["accuracy"]
        highest_error = facts.test.intervals["raw"]["ece"][1]
        accurate = {**base, "accuracy": high + 0.01}
        rows = {"worse": {**accurate, "ece": highest_error + 0.1}, "even": {**accurate, "ece": base["ece"] + 0.001}}
        text = card(report(baselines=rows)).text
        assert "on the same split even has an ECE of" in text
        assert "more accurate, beyond the interval, and no worse calibrated as far as these samples tell: take" in text
        text = card(report(baselines={"worse": rows["worse"]})).text
        assert "Take the other one where accuracy matters more than confidence." in text

    def test_it_says_what_adapted_and_where_it_ended(self):
        assert "moved 2 times, by the calibration gap on the calibration split; it ended between -0.25 and 2.50." in (
            card(report()).text
        )
        smoothing = [{"step": 0, "smoothing": 0.0}, {"step": 5, "smoothing": 0.08}]
        text = card(report(adaptation=smoothing, loss={"name": "adaptive_label_smoothing"})).text
        assert "The smoothing of the labels moved 1 time, by the temperature of slices" in text and "0.080" in text
        assert "amma" not in text
        fixed = card(report(adaptation=[], loss={"name": "cross_entropy"}, held_out={})).text
        assert "nothing adapted during training" in fixed and "amma" not in fixed

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({}, "Gamma, the temperature and the choice of the checkpoint were chosen on the samples measured here"),
            ({"scaling": None}, "Gamma and the choice of the checkpoint were chosen"),
            ({"adaptation": [], "held_out": {"selection": "test"}}, "The choice of the checkpoint was chosen"),
            ({"adaptation": [{"step": 1, "smoothing": 0.1}], "held_out": {"adaptation": "test"}}, "The smoothing was"),
            ({"held_out": {"adaptation": "calibration"}}, None),
        ],
    )
    def test_what_was_chosen_on_the_reported_samples_is_admitted(self, changes, sentence):
        held_out = {"adaptation": "test", "scaling": "test", "selection": "test"}
        text = card(report(**{"held_out": held_out, **changes})).text
        assert (sentence in text) if sentence else ("chosen on the samples measured here" not in text)

    @pytest.mark.parametrize(
        ("overlap", "sentence"),
        [
            ({"policy": "error", "rows": {"test in calibration": 0}}, None),
            ({"policy": "warn", "rows": {"test in train": 5}}, "Splits overlap, by request: 5 rows of test in train."),
            (
                {"policy": "drop", "rows": {"test in train": 5}, "dropped": 5},
                "5 training rows whose inputs stand in a",
            ),
            ({"policy": "skip", "rows": {}}, "was not checked"),
        ],
    )
    def test_rows_that_splits_share_are_admitted(self, overlap, sentence):
        text = card(report(overlap=overlap)).text
        words = ("overlap", "were dropped", "not checked")
        assert (sentence in text) if sentence else not any(word in text for word in words)

    def test_the_example_runs_as_it_stands(self):
        example = {"input": 'Say "hi".\n', "scores": {"b": 0.751, "a": 0.2}}
        text = card(report(examples=[example]), repo_id="me/calibrated").text
        lines = text.split("```python")[1].split("```")[0].strip().splitlines()
        assert 'classify = pipeline("text-classification", model="me/calibrated")' in lines
        assert lines[-4:] == [
            'for found in classify("Say \\"hi\\"."):',
            """    print(f"{found['label']}: {found['score']:.3f}")""",
            "# b: 0.751",
            "# a: 0.200",
        ]
        compile("\n".join(lines), "card", "exec")
        assert "pip install transformers torch\n" in text

    def test_an_image_of_the_repository_is_shown_and_read_from_there(self, tmp_path):
        vision = ModelFacts("ViTForImageClassification", "image-classification", ("0", "1", "2", "3"))
        facts = report(model=vision, examples=[{"input": "example.png", "scores": {"3": 0.9}}])
        found = ModelCard(write_card(tmp_path, facts, repo_id="me/digits").read_text())
        assert "example.png" not in str(found)  # there is none
        (tmp_path / "example.png").write_bytes(b"")
        found = ModelCard(write_card(tmp_path, facts, repo_id="me/digits").read_text())
        assert 'classify("https://huggingface.co/me/digits/resolve/main/example.png")' in found.text
        assert '<img src="example.png"' in found.text and found.data["widget"] == [{"src": "example.png"}]

    def test_custom_code_needs_trust_and_the_example_says_so(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "models.Config"}}))
        text = write_card(tmp_path, report()).read_text()
        assert ", trust_remote_code=True)" in text and "trust_remote_code" not in card(report()).text

    def test_an_adapter_is_loaded_with_peft(self):
        adapter = ModelFacts(
            "BertForSequenceClassification", "text-classification", ("a", "b"), "google/bert", False, True
        )
        found = card(report(model=adapter), repo_id="me/lora")
        assert 'AutoPeftModelForSequenceClassification.from_pretrained("me/lora", num_labels=2)' in found.text
        assert "pip install transformers torch peft" in found.text
        assert found.data.library_name == "peft"

    def test_reports_without_logits_have_a_card_too(self):
        rows = PerSample(np.full(40, 0.75), np.arange(40) % 4 > 0, np.full(40, 0.5))
        metrics = {"accuracy": 0.5, "nll": 1.0, "ece": 0.1}
        for test in (rows, Collected(metrics, 300, 15)):
            text = card(build_report(test, model=MODEL, split="evaluation", num_resamples=10)).text
            assert "evaluation texts it is right in" in text and "None" not in text and "{{" not in text


MARKS = [START, END, "<b>x</b>", "a|b", "x\n\n# y", "```", "*x*", "---", "{{ x }}", "'\"", "<!--", "-->"]
NASTY = st.text(max_size=30) | st.sampled_from(MARKS)


BASE = report(num_resamples=2)


class TestNames:
    @settings(max_examples=40)
    @given(NASTY, NASTY, NASTY, NASTY)
    def test_no_name_breaks_the_card_or_makes_it_grow_on_renewal(self, name, label, dataset, text):
        facts = replace(
            BASE,
            model=replace(MODEL, labels=(label, "b", "c", "d")),
            trained_on=DataSource.of(dataset),
            evaluated_on=DataSource.of(dataset),
            examples=({"input": text, "scores": {label: 0.5}},),
            loss={"name": label or "x", "note": text},
            overlap={"policy": "warn", "rows": {name: 2}},
            baselines={name: BASE.metrics},
            ood={"dataset": dataset, "raw": {"max_softmax_auroc": 0.5}},
        )
        once = model_card(facts, name=name or "x")
        body = ModelCard(once).text
        assert body.count(START) == body.count(END) == 1
        assert model_card(facts, name=name or "x", existing=once) == once
        html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
        assert "<b>" not in html and html.count("<table>") == 2 and html.count("<h2>") == 4 and html.count("<h1>") <= 1

    def test_they_are_shown_as_they_are(self):
        model = ModelFacts("BertForSequenceClassification", "text-classification", ("<i>a</i>", "*b*", "c_d", "e"))
        html = MarkdownIt().render(card(report(model=model)).text)
        assert "&lt;i&gt;a&lt;/i&gt;, *b*, c_d, e" in html


class TestRenewal:
    def test_the_users_sections_stay_word_for_word_and_the_block_is_replaced(self):
        first = model_card(report(), name="news")
        mine = first.replace("# news", "# News of the day\n\nOur words.").rstrip() + "\n\n## Ethics\n\nAlso ours.\n"
        text = model_card(report(folded=True), name="news", existing=mine)
        assert "# News of the day\n\nOur words." in text and text.endswith("## Ethics\n\nAlso ours.\n")
        assert text.count(START) == text.count(END) == 1
        assert "is folded into the last layer" in text and "# news\n" not in text

    def test_renewing_twice_changes_nothing(self):
        once = model_card(report(), name="news")
        assert model_card(report(), name="news", existing=once) == once

    def test_a_card_without_the_block_gets_it_at_the_end(self):
        text = model_card(report(), name="x", existing="---\nlicense: mit\n---\n# Mine\n\nWords.\n")
        assert text.index("# Mine\n\nWords.") < text.index(START) and ModelCard(text).data.license == "mit"

    def test_a_card_without_metadata_is_kept_too(self):
        text = model_card(report(), name="x", existing="# Mine\n")
        assert "# Mine" in text and ModelCard(text).data.pipeline_tag == "text-classification"

    @pytest.mark.parametrize("metadata", ["a: [", "- a", "model-index: 3", "!!python/x: y"])
    def test_metadata_that_cannot_be_read_are_an_error_of_one_line(self, metadata):
        with pytest.raises(ValueError, match="metadata of README.md cannot be read") as error:
            model_card(report(), name="x", existing=f"---\n{metadata}\n---\n# Mine\n")
        assert "\n" not in str(error.value)


def stock_card(**changes) -> str:
    summary = {
        "model_name": "run",
        "finetuned_from": "google/bert",
        "tasks": ["text-classification"],
        "dataset": "news",
        "dataset_tags": ["news"],
        "dataset_metadata": [{"config": "default", "split": "test"}],
        "eval_results": {"Loss": 0.7, "Accuracy": 0.372},
        "eval_lines": [{"Epoch": 1, "Step": 5, "Validation Loss": 0.7}],
        "hyperparameters": {"num_epochs": 3, "seed": 0},
        "source": "trainer",
        **changes,
    }
    return TrainingSummary(**summary).to_model_card()


class TestStockCard:
    @pytest.mark.parametrize(
        "changes", [{}, {"finetuned_from": None}, {"hyperparameters": None}, {"eval_lines": None}]
    )
    def test_what_the_trainer_generated_goes_and_ours_is_first(self, changes):
        text = ModelCard(model_card(report(), name="run", existing=stock_card(**changes))).text
        outside = text.replace(text[text.index(START) : text.index(END) + len(END)], "")
        assert outside.split() == ["#", "run"] and text.index("# run") < text.index(START)

    def test_its_results_of_earlier_weights_go_too(self):
        data = ModelCard(model_card(report(), name="run", existing=stock_card())).data
        assert 0.372 not in [result.metric_value for result in data.eval_results]
        assert data.base_model == "google/bert"

    def test_what_a_person_wrote_into_it_stays(self):
        mine = stock_card().replace(
            "## Intended uses & limitations\n\nMore information needed", "## Intended uses & limitations\n\nFor news."
        )
        mine = mine.replace("## Training procedure", "## Ours\n\nWords.\n\n## Training procedure\n\nOn two cores.")
        text = ModelCard(model_card(report(), name="run", existing=mine)).text
        assert "## Intended uses & limitations\n\nFor news." in text and "## Ours\n\nWords." in text
        assert "## Training procedure\n\nOn two cores." in text
        assert "More information needed" not in text and "hyperparameters were used" not in text
        assert text.index(END) < text.index("For news.")

    def test_a_card_whose_comment_was_removed_is_a_persons(self):
        text = ModelCard(stock_card()).text
        person = text[text.index("# run") :]
        assert is_stock(text) and not is_stock(person) and without_stock(person) == person


class TestWithoutReport:
    def test_the_persons_words_and_results_stay_and_ours_go(self):
        mine = model_card(report(), name="news", license="mit").replace("# news\n", "# news\n\nOur words.\n")
        text = without_report(mine + "\n## Ethics\n\nAlso ours.\n")
        found = ModelCard(text)
        assert found.text.strip() == "# news\n\nOur words.\n\n## Ethics\n\nAlso ours."
        assert found.data.eval_results is None and found.data.license == "mit" and "model_name" not in text
        assert without_report(text) == text

    def test_what_the_trainer_generated_of_earlier_weights_goes_too(self):
        found = ModelCard(without_report(stock_card()))
        assert found.text.strip() == "# run" and found.data.eval_results is None

    def test_a_card_without_a_report_stays_as_it_is(self):
        assert ModelCard(without_report("# Mine\n\nWords.\n")).text.strip() == "# Mine\n\nWords."

    @settings(max_examples=25)
    @given(NASTY, NASTY)
    def test_a_renewed_card_is_the_one_before_whatever_the_names(self, name, label):
        facts = replace(BASE, model=replace(MODEL, labels=(label, "b", "c", "d")))
        first = model_card(facts, name=name)
        assert START not in without_report(first)
        assert model_card(facts, name=name, existing=without_report(first)).count(START) == 1


class TestWriteCard:
    def test_it_shows_the_pictures_that_lie_in_the_folder(self, tmp_path):
        (tmp_path / "reliability.png").write_bytes(b"")
        text = write_card(tmp_path, report()).read_text()
        assert '<img src="reliability.png"' in text and "gamma.png" not in text
        (tmp_path / "gamma.png").write_bytes(b"")
        assert '<img src="gamma.png" alt="Gamma of each confidence bin over training" width="60%">' in (
            write_card(tmp_path, report()).read_text()
        )

    def test_it_renews_the_readme_there_is(self, tmp_path):
        (tmp_path / "README.md").write_text("# Mine\n")
        write_card(tmp_path, report())
        write_card(tmp_path, report(folded=True))
        text = (tmp_path / "README.md").read_text()
        assert text.count(START) == 1 and "# Mine" in text and "folded into" in text

    def test_a_report_of_other_weights_is_not_shown(self, tmp_path):
        bert().save_pretrained(tmp_path)
        facts = report(weights=weights_hash(tmp_path))
        write_card(tmp_path, facts)
        before = (tmp_path / "README.md").read_text()
        bert(seed=1).save_pretrained(tmp_path)
        assert is_stale(tmp_path, facts)
        with pytest.raises(StaleReportError, match="other weights than those in .*hf-adafocal evaluate"):
            write_card(tmp_path, facts)
        assert (tmp_path / "README.md").read_text() == before

    def test_it_carries_the_hash_of_the_weights_it_describes(self, tmp_path):
        bert().save_pretrained(tmp_path)
        found = weights_hash(tmp_path)
        assert f"`{found}`" in write_card(tmp_path, report(weights=found)).read_text()

    def test_a_folder_without_weights_takes_any_report(self, tmp_path):
        assert write_card(tmp_path, report(weights="0" * 32)).exists()
