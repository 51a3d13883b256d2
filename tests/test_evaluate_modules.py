import doctest
import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
import yaml

import hf_adafocal
from hf_adafocal.metrics import adaptive_calibration_error, expected_calibration_error, softmax

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = {"ece": expected_calibration_error, "ada_ece": adaptive_calibration_error}
both_metrics = pytest.mark.parametrize("name", LIBRARY)


@pytest.fixture(scope="module", autouse=True)
def own_caches(tmp_path_factory):
    # evaluate reads its cache folders from the environment when it is imported, so they are replaced in its config.
    home = tmp_path_factory.mktemp("huggingface")
    forget_loaded_scripts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", home / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", home / "metrics")
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        yield
    forget_loaded_scripts()


def forget_loaded_scripts():
    for module in [module for module in sys.modules if module.split(".")[0] == "evaluate_modules"]:
        del sys.modules[module]


def load(name, cache_dir, **options):
    return evaluate.load(hf_adafocal.evaluate_module(name), cache_dir=str(cache_dir), **options)


def environment(home, **variables):
    return {**os.environ, "HF_HOME": str(home), "HF_EVALUATE_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}


def predictions_and_labels(size=200, num_classes=4, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    probabilities = softmax(2 * rng.normal(size=(size, num_classes))).astype(dtype)
    noise = rng.random(size) < 0.3
    return probabilities, np.where(noise, rng.integers(0, num_classes, size), probabilities.argmax(axis=1))


def as_pairs(probabilities, labels):
    return probabilities.max(axis=1), (probabilities.argmax(axis=1) == labels).astype(int)


class TestEvaluateModule:
    def test_is_the_absolute_path_of_a_folder_of_the_package_as_a_string(self):
        path = hf_adafocal.evaluate_module("ada_ece")
        assert isinstance(path, str)
        assert Path(path).is_absolute()
        assert Path(path) == Path(hf_adafocal.__file__).resolve().parent / "evaluate_modules" / "ada_ece"
        assert (Path(path) / "ada_ece.py").is_file()

    @pytest.mark.parametrize("name", ["accuracy", "ECE", "", ".", "base", "../evaluate_modules/ece"])
    def test_unknown_name_is_refused_with_the_names_there_are(self, name):
        with pytest.raises(ValueError, match="one of .*ada_ece.* ece.*; found " + re.escape(repr(name))):
            hf_adafocal.evaluate_module(name)

    def test_needs_none_of_the_libraries_that_are_slow_to_import(self):
        code = (
            "import sys, hf_adafocal; hf_adafocal.evaluate_module('ece');"
            "print({'torch', 'transformers', 'evaluate', 'datasets', 'numpy'} & set(sys.modules))"
        )
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"

    @both_metrics
    def test_loads_without_a_network_from_any_working_directory(self, name, tmp_path, monkeypatch):
        def no_network(*_args, **_kwargs):
            raise OSError("a connection was attempted")

        monkeypatch.setattr(socket.socket, "connect", no_network)
        monkeypatch.setattr(socket, "getaddrinfo", no_network)
        monkeypatch.chdir(tmp_path)
        metric = load(name, tmp_path)
        assert metric.name == name
        assert list(metric.compute(predictions=[0.5], references=[1])) == [name]

    @pytest.mark.slow
    def test_works_from_an_installed_wheel(self, tmp_path):
        def python(*command, **options):
            return subprocess.run(
                [sys.executable, *command], check=True, capture_output=True, text=True, cwd=tmp_path, **options
            ).stdout

        isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
        python("-m", "build", "--wheel", *isolation, "--outdir", str(tmp_path), str(ROOT))
        (wheel,) = tmp_path.glob("*.whl")
        target = tmp_path / "site"
        python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
        code = (
            "import evaluate, hf_adafocal;"
            "metric = evaluate.load(hf_adafocal.evaluate_module('ece'));"
            "print(hf_adafocal.__file__);"
            "print(metric.compute(predictions=[[0.75, 0.25], [0.75, 0.25]], references=[0, 1]))"
        )
        source, result = python("-c", code, env=environment(tmp_path, PYTHONPATH=str(target))).splitlines()
        assert Path(source) == target / "hf_adafocal" / "__init__.py"
        assert result == "{'ece': 0.25}"
        assert {path.parent.name for path in target.rglob("README.md")} >= set(LIBRARY)


class TestECE:
    def test_two_bins_by_hand(self, tmp_path):
        # (0, 0.5]: confidence 0.4, accuracy 1, one sample; (0.5, 1]: confidence 0.8, accuracy 2/3, three samples.
        metric = load("ece", tmp_path)
        result = metric.compute(predictions=[0.4, 0.7, 0.8, 0.9], references=[1, 1, 0, 1], num_bins=2)
        assert result == {"ece": pytest.approx((0.6 + 3 * (0.8 - 2 / 3)) / 4)}


class TestAdaECE:
    def test_two_bins_by_hand(self, tmp_path):
        # Edges 0.5, 0.8, 0.9. The lower bin holds 0.5, 0.6 and 0.8, all right; the upper one 0.9, wrong.
        metric = load("ada_ece", tmp_path)
        result = metric.compute(predictions=[0.5, 0.6, 0.8, 0.9], references=[1, 1, 1, 0], num_bins=2)
        assert result == {"ada_ece": pytest.approx((0.5 + 0.4 + 0.2 + 0.9) / 4)}


@both_metrics
class TestTopLabelMetric:
    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
    @pytest.mark.parametrize("options", [{}, {"num_bins": 4}])
    def test_is_exactly_the_value_of_the_library_in_both_forms(self, name, dtype, options, tmp_path):
        probabilities, labels = predictions_and_labels(dtype=dtype)
        expected = {name: LIBRARY[name](probabilities, labels, **options)}
        metric = load(name, tmp_path)
        assert metric.compute(predictions=probabilities, references=labels, **options) == expected
        confidence, correct = as_pairs(probabilities, labels)
        assert metric.compute(predictions=confidence, references=correct, **options) == expected
        assert metric.compute(predictions=confidence.tolist(), references=correct == 1, **options) == expected

    def test_batches_of_any_size_equal_one_compute(self, name, tmp_path):
        probabilities, labels = predictions_and_labels()
        metric = load(name, tmp_path)
        for part in np.split(np.arange(len(labels)), [1, 20, 130]):
            metric.add_batch(predictions=probabilities[part], references=labels[part])
        assert metric.compute(num_bins=9) == {name: LIBRARY[name](probabilities, labels, 9)}

    def test_the_last_batch_may_come_with_compute(self, name, tmp_path):
        probabilities, labels = predictions_and_labels()
        metric = load(name, tmp_path)
        metric.add_batch(predictions=probabilities[:50], references=labels[:50])
        result = metric.compute(predictions=probabilities[50:], references=labels[50:])
        assert result == {name: LIBRARY[name](probabilities, labels)}

    def test_samples_one_at_a_time_equal_one_compute_in_both_forms(self, name, tmp_path):
        probabilities, labels = predictions_and_labels(30)
        expected = {name: LIBRARY[name](probabilities, labels)}
        metric = load(name, tmp_path)
        for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
            metric.add(prediction=row, reference=label)
        assert metric.compute() == expected
        for confidence, correct in zip(*as_pairs(probabilities, labels), strict=True):
            metric.add(prediction=confidence, reference=correct)
        assert metric.compute() == expected

    def test_works_in_memory(self, name, tmp_path):
        probabilities, labels = predictions_and_labels()
        metric = load(name, tmp_path, keep_in_memory=True)
        expected = {name: LIBRARY[name](probabilities, labels)}
        assert metric.compute(predictions=probabilities, references=labels) == expected

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_torch_tensors_count_as_what_they_hold(self, name, dtype, tmp_path):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(100, 5, generator=generator).mul(3).requires_grad_()
        probabilities, labels = logits.softmax(-1).to(dtype), torch.arange(100) % 5
        # float16 holds these bfloat16 values, and numpy has no bfloat16
        values = probabilities.detach().to(torch.float32 if dtype == torch.float32 else torch.float16).numpy()
        expected = LIBRARY[name](values, labels.numpy())
        metric = load(name, tmp_path)
        assert metric.compute(predictions=probabilities, references=labels) == {name: expected}

    @pytest.mark.parametrize(
        ("predictions", "references", "message"),
        [
            ([[2.0, -1.0], [0.3, 4.0]], [0, 1], "look like logits"),
            ([[0.9, 0.3]], [0], "look like logits"),
            ([[np.nan, 1.0]], [0], "hold NaN"),
            ([[0.5, 0.5]], [2], r"labels must lie in \[0, 2\)"),
            ([[0.5, 0.5]], [-100], "Drop ignored samples"),
            ([[0.5, 0.5]], [0.0], "integer class indices"),
            ([[0.5, 0.5]], [0, 1], r"shapes \(1, 2\) and \(2,\)"),
            ([[0.5, 0.5]], None, r"shapes \(1, 2\) and \(\)"),
            ([[[0.5, 0.5]]], [[0]], r"shapes \(1, 1, 2\) and \(1, 1\)"),
            (None, [0], r"shapes \(\) and \(1,\)"),
            ([], [], r"shapes \(0,\) and \(0,\)"),
            ([0.5, 1.5], [0, 1], r"lie in \[0, 1\]"),
            ([0.5, np.nan], [0, 1], r"lie in \[0, 1\] without NaN"),
            ([0.5, 0.5], [0, 2], "Outcomes must be 0 or 1"),
            ([0.5, 0.5], [0, 0.5], "Outcomes must be 0 or 1"),
            ([0.5, 0.5], [1], r"shapes \(2,\) and \(1,\)"),
            ([0, 1], [0, 1], "predicted classes have no confidence"),
        ],
    )
    def test_wrong_input_is_refused_and_leaves_nothing_behind(self, name, predictions, references, message, tmp_path):
        metric = load(name, tmp_path)
        for method in (metric.add_batch, metric.compute):
            with pytest.raises(ValueError, match=message):
                method(predictions=predictions, references=references)
        assert len(metric) == 0
        assert not list(tmp_path.rglob("*.arrow*"))

    @pytest.mark.parametrize(
        ("prediction", "reference", "message"),
        [
            ([2.0, -1.0], 0, "look like logits"),
            ([0.5, 0.5], 2, r"labels must lie in \[0, 2\)"),
            ([0.5, 0.5], None, "integer class indices"),
            ([[0.5, 0.5]], [0], r"shapes \(1, 1, 2\) and \(1, 1\)"),
            (1.5, 1, r"lie in \[0, 1\]"),
            (0.5, 2, "Outcomes must be 0 or 1"),
            (1, 1, "predicted classes have no confidence"),
        ],
    )
    def test_one_wrong_sample_is_refused(self, name, prediction, reference, message, tmp_path):
        metric = load(name, tmp_path)
        with pytest.raises(ValueError, match=message):
            metric.add(prediction=prediction, reference=reference)
        assert len(metric) == 0

    def test_a_refused_batch_does_not_touch_the_earlier_ones(self, name, tmp_path):
        probabilities, labels = predictions_and_labels()
        metric = load(name, tmp_path)
        metric.add_batch(predictions=probabilities, references=labels)
        with pytest.raises(ValueError, match="look like logits"):
            metric.add_batch(predictions=4 * probabilities, references=labels)
        assert metric.compute() == {name: LIBRARY[name](probabilities, labels)}

    def test_unknown_input_is_refused(self, name, tmp_path):
        metric = load(name, tmp_path)
        with pytest.raises(ValueError, match="Bad inputs"):
            metric.add_batch(predictions=[0.5], references=[1], weights=[1.0])
        with pytest.raises(ValueError, match="Bad inputs"):
            metric.add(prediction=0.5, reference=1, weight=1.0)

    def test_a_batch_in_another_form_is_refused_until_compute(self, name, tmp_path):
        probabilities, labels = predictions_and_labels()
        confidence, correct = as_pairs(probabilities, labels)
        metric = load(name, tmp_path)
        metric.add_batch(predictions=probabilities, references=labels)
        other = r"Expected probabilities \(N, C\) as in the earlier batches, found confidences \(N,\)"
        with pytest.raises(ValueError, match=other):
            metric.add_batch(predictions=confidence, references=correct)
        with pytest.raises(ValueError, match=other):
            metric.add(prediction=confidence[0], reference=correct[0])
        expected = {name: LIBRARY[name](probabilities, labels)}
        assert metric.compute() == expected
        metric.add_batch(predictions=confidence, references=correct)
        with pytest.raises(ValueError, match=r"Expected confidences \(N,\) as in the earlier batches"):
            metric.add_batch(predictions=probabilities, references=labels)
        assert metric.compute() == expected

    def test_a_thousand_classes_are_reduced_to_two_numbers_before_they_are_stored(self, name, tmp_path, monkeypatch):
        size, num_classes = 50_000, 1_000
        rng = np.random.default_rng(0)
        top, predicted = rng.uniform(0.1, 1.0, size).astype(np.float32), rng.integers(0, num_classes, size)
        probabilities = np.repeat(((1 - top) / (num_classes - 1))[:, None], num_classes, axis=1)
        probabilities[np.arange(size), predicted] = top
        labels = np.where(rng.random(size) < 0.5, predicted, 0)

        metric = load(name, tmp_path)
        stored, compute_of_samples = {}, metric._compute

        def spy(predictions, references, **options):
            stored["shapes"] = np.shape(predictions), np.shape(references)
            stored["bytes"] = sum(os.path.getsize(path) for path in metric.file_paths)
            return compute_of_samples(predictions, references, **options)

        monkeypatch.setattr(metric, "_compute", spy)
        start = time.perf_counter()
        result = metric.compute(predictions=probabilities, references=labels)
        print(f"{name} of {size} x {num_classes}: {time.perf_counter() - start:.2f} s")
        assert metric.features == datasets.Features(
            {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        )
        assert stored["shapes"] == ((size,), (size,))
        assert stored["bytes"] < 1.1 * 16 * size
        assert result == {name: LIBRARY[name](probabilities, labels)}


def test_combined_metrics_give_both_values_from_compute_batches_and_single_samples(tmp_path):
    probabilities, labels = predictions_and_labels(40)
    combined = evaluate.combine([load(name, tmp_path) for name in LIBRARY])
    expected = {name: metric(probabilities, labels, 5) for name, metric in LIBRARY.items()}
    assert combined.compute(predictions=probabilities, references=labels, num_bins=5) == expected
    combined.add_batch(predictions=probabilities[:25], references=labels[:25])
    for row, label in zip(probabilities[25:], labels[25:], strict=True):
        combined.add(row, label)
    assert combined.compute(num_bins=5) == expected


def test_of_two_processes_rank_zero_gets_the_value_of_all_samples(tmp_path):
    probabilities, labels = predictions_and_labels(50)
    np.savez(tmp_path / "share.npz", predictions=probabilities[35:], references=labels[35:])
    rank_one = """if True:
        import sys
        import evaluate, hf_adafocal, numpy as np
        for name in ("ece", "ada_ece"):
            path = hf_adafocal.evaluate_module(name)
            metric = evaluate.load(path, num_process=2, process_id=1, experiment_id="two", cache_dir=sys.argv[1])
            metric.add_batch(**np.load(sys.argv[1] + "/share.npz"))
            print(metric.compute(num_bins=6))
    """
    command = [sys.executable, "-c", rank_one, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(tmp_path)) as other:
        for name in LIBRARY:
            metric = load(name, tmp_path, num_process=2, process_id=0, experiment_id="two")
            metric.add_batch(predictions=probabilities[:35], references=labels[:35])
            assert metric.compute(num_bins=6) == {name: LIBRARY[name](probabilities, labels, 6)}
        output, _ = other.communicate(timeout=60)
    assert (other.returncode, output.split()) == (0, ["None", "None"])


def test_in_compute_metrics_the_trainer_logs_the_value_of_its_predictions(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=3
    )
    model = BertForSequenceClassification(config)
    model.classifier.weight.data.normal_(std=2.0)  # spread confidences: an untrained head gives 1/3 everywhere
    dataset = [{"input_ids": torch.randint(0, 20, (6,)), "labels": int(torch.randint(0, 3, ()))} for _ in range(33)]
    metrics = [load(name, tmp_path) for name in LIBRARY]

    def compute_metrics(prediction):
        probabilities = softmax(prediction.predictions)
        results = [metric.compute(predictions=probabilities, references=prediction.label_ids) for metric in metrics]
        return {name: value for result in results for name, value in result.items()}

    args = TrainingArguments(tmp_path / "run", per_device_eval_batch_size=8, report_to="none", use_cpu=True)
    trainer = Trainer(model, args, eval_dataset=dataset, compute_metrics=compute_metrics)
    logged = trainer.evaluate()
    prediction = trainer.predict(dataset)
    probabilities = softmax(prediction.predictions)
    assert len(np.unique(probabilities.max(axis=1))) > 15
    for name, metric in LIBRARY.items():
        assert logged[f"eval_{name}"] == metric(probabilities, prediction.label_ids) > 0


@both_metrics
class TestMetricCard:
    @staticmethod
    def card(name):
        return (Path(hf_adafocal.evaluate_module(name)) / "README.md").read_text(encoding="utf-8")

    @staticmethod
    def run(text):
        blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
        examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "README.md", "README.md", 0)
        failures = []
        return doctest.DocTestRunner(verbose=False).run(examples, out=failures.append), "".join(failures)

    def test_examples_print_what_the_card_says(self, name):
        results, failures = self.run(self.card(name))
        assert results.attempted > 10
        assert results.failed == 0, failures

    def test_a_wrong_number_in_the_card_is_noticed(self, name):
        card = self.card(name)
        wrong = card.replace(f"{{'{name}': 0.25}}", f"{{'{name}': 0.26}}", 1)
        assert wrong != card
        assert self.run(wrong)[0].failed == 1

    def test_front_matter_is_that_of_a_metric_space(self, name):
        front_matter = yaml.safe_load(self.card(name).split("---\n")[1])
        assert front_matter["title"].lower() == name.replace("_", "")
        assert front_matter["tags"] == ["evaluate", "metric"]
        assert {"description", "sdk_version"} <= set(front_matter)
        assert (front_matter["sdk"], front_matter["app_file"]) == ("gradio", "app.py")

    def test_cites_what_the_metric_cites(self, name, tmp_path):
        assert load(name, tmp_path).citation.strip() in self.card(name)
