"""The report: built from logits, per-sample statistics or metrics; written, read back, refused by field."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import bert

from hf_adafocal.metrics.binning import binned
from hf_adafocal.metrics.scores import calibration_report, expected_calibration_error, softmax
from hf_adafocal.report.facts import DataSource, ModelFacts, describe_model
from hf_adafocal.report.measurement import Collected, PerSample
from hf_adafocal.report.schema import RAW, SCALED, Report, build_report
from hf_adafocal.scaling.fit import Scaling, fit_temperature_scaling

FACTS = ModelFacts("BertForSequenceClassification", "text-classification", ("a", "b", "c", "d"))


def predictions(size=300, classes=4, sharpness=3.0, seed=0):
    """Logits of an over-confident model, and labels."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(size, classes))
    labels = (softmax(logits).cumsum(1) < generator.random((size, 1))).sum(1)
    return sharpness * logits, labels


def full_report(**changes) -> Report:
    """A report with every field."""
    settings = {
        "model": FACTS,
        "weights": "0" * 32,
        "trained_on": "me/news",
        "evaluated_on": "me/news",
        "language": "en",
        "loss": {"name": "adafocal", "num_bins": 2},
        "adaptation": [{"step": 0, "gammas": np.ones(2)}, {"step": 4, "gammas": [1.5, -0.25]}],
        "splits": {"train": 1000, "calibration": {"size": 300, "hash": "ab"}, "test": {"size": 300, "hash": None}},
        "held_out": {"adaptation": "calibration", "scaling": "calibration"},
        "overlap": {"policy": "drop", "rows": {"test in train": 0}, "dropped": 3},
        "ood": ("noise", predictions(40, seed=2)[0]),
        "baselines": {"cross_entropy": calibration_report(softmax(predictions()[0]), predictions()[1])},
        "seed": 3,
        "training": {"epochs": 3.0, "batch_size": 16},
        "examples": [{"input": "some text", "scores": {"a": 0.75, "b": 0.25}}],
        "num_resamples": 20,
    }
    return build_report(predictions(), predictions(seed=1), **{**settings, **changes})


class TestBuild:
    def test_both_rows_are_the_metrics_of_the_logits_before_and_after_the_fitted_temperature(self):
        (logits, labels), calibration = predictions(), predictions(seed=1)
        report = build_report((logits, labels), calibration, model=FACTS, num_resamples=20)
        scaling = fit_temperature_scaling(*calibration)
        assert report.test.raw == calibration_report(softmax(logits), labels)
        assert report.test.temperature_scaled == calibration_report(softmax(scaling.apply(logits)), labels)
        assert report.test.scaling == scaling and report.shipped == RAW and report.metrics == report.test.raw

    def test_without_a_calibration_split_there_is_one_row(self):
        report = build_report(predictions(), model=FACTS, num_resamples=20)
        assert list(report.test.rows()) == [RAW] and report.test.scaling is None and report.test.temperature is None

    def test_of_a_folded_model_the_row_as_trained_is_measured_with_the_scaling_undone(self):
        logits, labels = predictions()
        folded = Scaling(0.4, 0.0, 1.0, 0.9, 300)
        report = build_report((folded.apply(logits), labels), model=FACTS, folded=folded, num_resamples=20)
        plain = build_report((logits, labels), model=FACTS, num_resamples=20)
        assert report.test.raw == pytest.approx(plain.test.raw)
        assert report.shipped == SCALED and report.metrics["ece"] < report.test.raw["ece"]

    def test_tokens_and_pixels_that_are_ignored_do_not_count(self):
        logits, labels = predictions(12)
        tokens, of_tokens = logits.reshape(3, 4, 4).copy(), labels.reshape(3, 4).copy()
        of_tokens[1] = -100
        kept = np.r_[0:4, 8:12]
        report = build_report((tokens, of_tokens), model=FACTS, num_resamples=20)
        assert report.test.raw == calibration_report(softmax(logits[kept]), labels[kept])

    def test_per_sample_statistics_give_the_metrics_that_need_the_top_label_alone(self):
        logits, labels = predictions()
        p = softmax(logits)
        rows = PerSample(p.max(1), p.argmax(1) == labels, -np.log(p[np.arange(300), labels]))
        found = build_report(rows, model=FACTS, split="evaluation", num_resamples=20)
        expected = build_report((logits, labels), model=FACTS, num_resamples=20)
        for name in ("accuracy", "nll", "ece", "ada_ece", "mce", "num_samples"):
            assert found.metrics[name] == pytest.approx(expected.metrics[name])
            if name != "num_samples":
                assert found.test.intervals[RAW][name] == pytest.approx(expected.test.intervals[RAW][name])
        np.testing.assert_array_equal(found.test.reliability[RAW].count, expected.test.reliability[RAW].count)

    def test_of_a_folded_model_they_are_those_of_its_own_scores(self):
        rows = PerSample(np.full(20, 0.75), np.arange(20) % 4 > 0, np.full(20, 0.5))
        report = build_report(rows, model=FACTS, folded=Scaling(0.5), num_resamples=20)
        assert list(report.test.rows()) == [SCALED] and report.metrics["accuracy"] == 0.75

    def test_metrics_collected_before_are_taken_as_they_are(self):
        bins = binned(np.full(4, 0.7), np.array([1, 1, 0, 1]), 15, "equal_width")
        metrics = {"accuracy": 0.75, "nll": 0.5, "ece": 0.05, "ada_ece": float("nan")}
        report = build_report(Collected(metrics, 4, 15, bins), model=FACTS)
        assert report.metrics == {"num_samples": 4, "num_bins": 15, "accuracy": 0.75, "nll": 0.5, "ece": 0.05}
        assert report.test.intervals == {} and report.test.reliability[RAW].count.sum() == 4

    def test_the_share_of_the_most_frequent_label_is_kept(self):
        logits = np.zeros((4, 2))
        report = build_report((logits, np.array([0, 1, 1, 1])), model=FACTS, num_resamples=20)
        assert report.test.majority == 0.75

    def test_torch_tensors_are_taken(self):
        logits, labels = predictions()
        report = build_report((torch.tensor(logits), torch.tensor(labels)), model=FACTS, num_resamples=20)
        assert report.metrics["ece"] == pytest.approx(expected_calibration_error(softmax(logits), labels))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"folded": Scaling(0.5), "scaling": Scaling(0.5)}, "exclude each other"),
            ({"loss": {"gamma": 2}}, "loss.name is missing"),
            ({"adaptation": [{"step": 1}]}, r"adaptation\[0\].smoothing is missing"),
            ({"splits": {"test": -1}}, "splits.test.size must not be negative, found -1"),
            ({"overlap": {"policy": "drop", "rows": {"a in b": "many"}}}, "overlap.rows.a in b must be a whole"),
        ],
    )
    def test_what_is_no_field_is_an_error_that_names_it(self, changes, message):
        with pytest.raises(ValueError, match=message):
            full_report(**changes)


class TestFacts:
    @pytest.mark.parametrize(
        ("given", "name", "hub_id"),
        [
            ("me/news", "me/news", "me/news"),
            ("digits", "digits", None),
            ("../imgs", "imgs", None),
            ("/home/alice/secret project/imgs/", "imgs", None),
            ("~/imgs", "imgs", None),
            ("./a/b", "b", None),
            (r"C:\Users\alice\imgs", "imgs", None),
            ("..", "local data", None),
        ],
    )
    def test_of_a_local_path_the_folder_name_alone_is_kept(self, given, name, hub_id):
        assert DataSource.of(given) == DataSource(name, hub_id)

    def test_a_folder_that_exists_is_local_even_if_it_looks_like_an_id(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "me" / "news").mkdir(parents=True)
        assert DataSource.of("me/news") == DataSource("news", None)

    def test_a_model_is_described_by_class_task_and_labels(self, tmp_path):
        model = bert(id2label={0: "no", 1: "maybe", 2: "yes"})
        expected = ModelFacts("BertForSequenceClassification", "text-classification", ("no", "maybe", "yes"))
        assert describe_model(model) == expected
        model.save_pretrained(tmp_path / "local")
        loaded = type(model).from_pretrained(tmp_path / "local")
        assert describe_model(loaded).base_model is None  # a path is nobody else's business
        loaded.config._name_or_path = "google/bert"
        assert describe_model(torch.nn.DataParallel(loaded)).base_model == "google/bert"

    def test_an_adapter_is_described_by_the_model_below_it(self):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        found = describe_model(model)
        assert (found.architecture, found.adapter) == ("BertForSequenceClassification", True)


class TestDocument:
    def test_reading_what_was_written_gives_the_same_report(self):
        document = json.loads(json.dumps(full_report().to_dict(), allow_nan=False))
        again = Report.from_dict(document)
        assert again.to_dict() == document
        assert (again.seed, again.language, again.adaptation[1]["gammas"]) == (3, "en", [1.5, -0.25])

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("schema_version",), None, "schema_version is missing: .*hf-adafocal evaluate"),
            (("schema_version",), 99, "schema_version must be 1, found 99"),
            (("test",), None, "test must be an object, found None"),
            (("test", "raw"), None, "test.raw is missing"),
            (("test", "raw", "ece"), "low", "test.raw.ece must be a finite number, found 'low'"),
            (("test", "raw", "accuracy"), 76.0, r"test.raw.accuracy must be a fraction in \[0, 1\], found 76.0"),
            (("test", "raw", "num_samples"), 0, "test.raw.num_samples must be at least 1"),
            (("test", "intervals", "raw", "ece"), [0.2, 0.1], "test.intervals.raw.ece must be two ascending numbers"),
            (("test", "reliability", "raw", "count"), [0.5], "test.reliability.raw must hold three lists"),
            (("test", "scaling", "scale"), 0.0, "test.scaling must be a scaling .*must not be 0"),
            (("folded",), "yes", "folded must be true or false, found 'yes'"),
            (("adaptation",), {"step": 1}, "adaptation must be a list"),
            (("splits", "test", "size"), "300", "splits.test.size must be a whole number"),
            (("seed",), 1.5, "seed must be a whole number, found 1.5"),
            (("training",), {"x": float("nan")}, "training must be a JSON value without NaN"),
            (("surprise",), 1, "surprise is not a field of a report"),
        ],
    )
    def test_a_field_that_is_not_what_it_must_be_is_named(self, path, value, message):
        document = full_report().to_dict()
        part = document
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
        with pytest.raises(ValueError, match=message):
            Report.from_dict(document)

    @given(st.data())
    def test_any_damage_to_a_document_is_either_harmless_or_a_value_error(self, data):
        document = DOCUMENT()
        part = document
        while True:
            key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
            inner = part[key]
            if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
                part = inner
                continue
            part[key] = data.draw(JSON)
            break
        try:
            Report.from_dict(document).to_dict()
        except ValueError as error:
            assert str(error)

    @given(st.data())
    def test_so_is_any_json(self, data):
        try:
            Report.from_dict(data.draw(JSON))
        except ValueError as error:
            assert str(error)


_TEXT = json.dumps(full_report().to_dict())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def DOCUMENT():
    return json.loads(_TEXT)
