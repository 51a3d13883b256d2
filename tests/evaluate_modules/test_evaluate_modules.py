import doctest
import importlib.util
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import sklearn.metrics
import torch
import yaml

import hf_adafocal
from hf_adafocal.metrics.bin_free import smooth_calibration_error
from hf_adafocal.metrics.classwise import classwise_calibration_error
from hf_adafocal.metrics.scores import (
    adaptive_calibration_error,
    binary_adaptive_calibration_error,
    binary_calibration_report,
    binary_expected_calibration_error,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    softmax,
    top_label,
)
from hf_adafocal.metrics.selective import area_under_risk_coverage

ROOT = Path(__file__).resolve().parents[2]


def of_top_label(metric):
    return lambda probabilities, labels: metric(*top_label(probabilities, labels))


def of_columns(metric):
    return lambda probability, labels: metric(np.column_stack([1 - probability, probability]), labels)


LIBRARY = {
    "ece": expected_calibration_error,
    "ada_ece": adaptive_calibration_error,
    "classwise_ece": classwise_calibration_error,
    "smooth_ece": of_top_label(smooth_calibration_error),
    "brier": brier_score,
    "nll": negative_log_likelihood,
    "aurc": of_top_label(area_under_risk_coverage),
}
BINARY_LIBRARY = {
    "ece": binary_expected_calibration_error,
    "ada_ece": binary_adaptive_calibration_error,
    "classwise_ece": of_columns(classwise_calibration_error),
    "smooth_ece": smooth_calibration_error,
    "brier": lambda probability, labels: binary_calibration_report(probability, labels)["brier"],
    "nll": lambda probability, labels: binary_calibration_report(probability, labels)["nll"],
    "aurc": of_columns(of_top_label(area_under_risk_coverage)),
}
BINNED = ("ece", "ada_ece", "classwise_ece")
TITLES = {
    "ece": "ECE",
    "ada_ece": "AdaECE",
    "classwise_ece": "Classwise ECE",
    "smooth_ece": "Smooth ECE",
    "brier": "Brier Score",
    "nll": "NLL",
    "aurc": "AURC",
    "ood_detection": "OOD Detection",
}
OOD_KEYS = ["ood_auroc", "ood_aupr_in", "ood_aupr_out", "ood_fpr95"]
every_module = pytest.mark.parametrize("name", TITLES)
every_metric = pytest.mark.parametrize("name", LIBRARY)
metrics_of_pairs = pytest.mark.parametrize("name", ["ece", "ada_ece", "smooth_ece", "aurc"])
metrics_of_rows = pytest.mark.parametrize("name", ["classwise_ece", "brier", "nll"])


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


def load(name, cache_dir, config_name=None, **options):
    path = hf_adafocal.evaluate_module(name)
    return evaluate.load(path, config_name, cache_dir=str(cache_dir), **options)


def environment(home, **variables):
    return {**os.environ, "HF_HOME": str(home), "HF_EVALUATE_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}


def predictions_and_labels(size=200, num_classes=4, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    probabilities = softmax(2 * rng.normal(size=(size, num_classes))).astype(dtype)
    noise = rng.random(size) < 0.3
    return probabilities, np.where(noise, rng.integers(0, num_classes, size), probabilities.argmax(axis=1))


def binary_predictions_and_labels(size=200, seed=0):
    rng = np.random.default_rng(seed)
    probability = rng.random(size)
    return probability, (rng.random(size) < probability**2).astype(int)


def value(name, probabilities, labels, **options):
    # a mean of the batches' means may miss the mean of all samples by a rounding
    return {name: pytest.approx(LIBRARY[name](probabilities, labels, **options), rel=1e-12)}


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
        names = ", ".join(sorted(TITLES))
        with pytest.raises(ValueError, match=f"one of {names}; found " + re.escape(repr(name))):
            hf_adafocal.evaluate_module(name)

    def test_needs_none_of_the_libraries_that_are_slow_to_import(self):
        code = (
            "import sys, hf_adafocal; hf_adafocal.evaluate_module('ece');"
            "print({'torch', 'transformers', 'evaluate', 'datasets', 'numpy'} & set(sys.modules))"
        )
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"

    @every_module
    def test_loads_without_a_network_from_any_working_directory(self, name, tmp_path, monkeypatch):
        def no_network(*_args, **_kwargs):
            raise OSError("a connection was attempted")

        monkeypatch.setattr(socket.socket, "connect", no_network)
        monkeypatch.setattr(socket, "getaddrinfo", no_network)
        monkeypatch.chdir(tmp_path)
        metric = load(name, tmp_path)
        assert metric.name == name
        if name == "ood_detection":
            result = metric.compute(predictions=[0.5, 0.25], references=[1, 0])
            assert list(result) == OOD_KEYS
        else:
            result = metric.compute(predictions=[[0.75, 0.25]], references=[0])
            assert list(result) == [name]
        assert all(type(number) is float for number in result.values())

    @pytest.mark.slow
    def test_works_from_an_installed_wheel(self, tmp_path):
        def python(*command, **options):
            return subprocess.run(
                [sys.executable, *command], check=True, capture_output=True, text=True, cwd=tmp_path, **options
            ).stdout

        isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
        python("-m", "build", "--wheel", *isolation, "--outdir", str(tmp_path), str(ROOT))
        (wheel,) = tmp_path.glob("*.whl")
        files = {path.relative_to(ROOT) for path in (ROOT / "hf_adafocal").rglob("*") if path.is_file()}
        files = {path.as_posix() for path in files if "__pycache__" not in path.parts}
        assert "hf_adafocal/py.typed" in files and files <= set(zipfile.ZipFile(wheel).namelist())
        target = tmp_path / "site"
        python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
        code = (
            "import evaluate, hf_adafocal, sys;"
            "metrics = [evaluate.load(hf_adafocal.evaluate_module(name)) for name in sys.argv[1:]];"
            "print(hf_adafocal.__file__);"
            "print(metrics[0].compute(predictions=[[0.75, 0.25], [0.75, 0.25]], references=[0, 1]));"
            "print(*(metric.name for metric in metrics));"
            "[getattr(hf_adafocal, name) for name in hf_adafocal.__all__]"
        )
        output = python("-c", code, *TITLES, env=environment(tmp_path, PYTHONPATH=str(target)))
        source, result, names = output.splitlines()
        assert Path(source) == target / "hf_adafocal" / "__init__.py"
        assert result == "{'ece': 0.25}"
        assert names.split() == list(TITLES)
        assert {path.parent.name for path in target.rglob("README.md")} >= set(TITLES)


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


class TestClasswiseECE:
    def test_two_classes_and_two_bins_by_hand(self, tmp_path):
        # Class 0: (0, 0.5] holds 0.1, wrong; (0.5, 1] holds 0.7, right, and 0.8, wrong.
        # Class 1: (0, 0.5] holds 0.3, wrong, and 0.2, right; (0.5, 1] holds 0.9, right.
        metric = load("classwise_ece", tmp_path)
        result = metric.compute(predictions=[[0.1, 0.9], [0.7, 0.3], [0.8, 0.2]], references=[1, 0, 1], num_bins=2)
        class_0, class_1 = (0.1 + 2 * (0.75 - 0.5)) / 3, (0.1 + 2 * (0.5 - 0.25)) / 3
        assert result == {"classwise_ece": pytest.approx((class_0 + class_1) / 2)}

    def test_is_that_of_both_columns_for_a_binary_classifier(self, tmp_path):
        probability, labels = binary_predictions_and_labels()
        columns = np.column_stack([1 - probability, probability])
        expected = load("classwise_ece", tmp_path).compute(predictions=columns, references=labels)
        metric = load("classwise_ece", tmp_path, "binary")
        assert metric.compute(predictions=probability, references=labels) == expected

    def test_fifty_thousand_rows_of_a_hundred_classes_are_stored_in_their_own_size(self, tmp_path):
        probabilities, labels = predictions_and_labels(50_000, 100, np.float32)
        metric = load("classwise_ece", tmp_path)
        start = time.perf_counter()
        for part in np.split(np.arange(50_000), 50):
            metric.add_batch(predictions=probabilities[part], references=labels[part])
        stored = os.path.getsize(metric.cache_file_name)
        result = metric.compute()
        print(f"classwise_ece of 50000 x 100: {time.perf_counter() - start:.2f} s, {stored / 1e6:.1f} MB")
        assert 0.9 * probabilities.nbytes < stored < 1.05 * (probabilities.nbytes + labels.nbytes)
        assert result == {"classwise_ece": classwise_calibration_error(probabilities, labels)}


class TestSmoothECE:
    def test_is_the_mean_gap_where_every_confidence_is_the_same(self, tmp_path):
        metric = load("smooth_ece", tmp_path)
        result = metric.compute(predictions=[0.75] * 8, references=[1, 0] * 4)
        assert result == {"smooth_ece": pytest.approx(0.25, abs=0.01)}


class TestBrier:
    def test_is_twice_the_score_of_scikit_learn_in_two_columns_and_the_score_itself_for_class_one(self, tmp_path):
        probability, labels = binary_predictions_and_labels()
        expected = sklearn.metrics.brier_score_loss(labels, probability)
        columns = np.column_stack([1 - probability, probability])
        result = load("brier", tmp_path).compute(predictions=columns, references=labels)
        assert result == {"brier": pytest.approx(2 * expected)}
        result = load("brier", tmp_path, "binary").compute(predictions=probability, references=labels)
        assert result == {"brier": pytest.approx(expected)}

    def test_lies_between_zero_and_two(self, tmp_path):
        metric = load("brier", tmp_path)
        assert metric.compute(predictions=[[1.0, 0.0, 0.0]], references=[0]) == {"brier": 0.0}
        assert metric.compute(predictions=[[1.0, 0.0, 0.0]], references=[2]) == {"brier": 2.0}


class TestNLL:
    def test_is_the_log_loss_of_scikit_learn(self, tmp_path):
        probabilities, labels = predictions_and_labels()
        expected = {"nll": pytest.approx(sklearn.metrics.log_loss(labels, probabilities))}
        assert load("nll", tmp_path).compute(predictions=probabilities, references=labels) == expected
        probability, labels = binary_predictions_and_labels()
        expected = {"nll": pytest.approx(sklearn.metrics.log_loss(labels, probability))}
        assert load("nll", tmp_path, "binary").compute(predictions=probability, references=labels) == expected

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
    def test_a_probability_of_zero_costs_what_it_costs_in_the_library(self, dtype, tmp_path):
        predictions = np.array([[1.0, 0.0]], dtype=dtype)
        result = load("nll", tmp_path).compute(predictions=predictions, references=[1])
        assert result == {"nll": pytest.approx(-np.log(np.finfo(dtype).tiny, dtype=np.float64))}


class TestAURC:
    def test_three_samples_by_hand(self, tmp_path):
        # By falling confidence right, wrong, right: the risks at coverages 1/3, 2/3 and 1 are 0, 1/2 and 1/3.
        metric = load("aurc", tmp_path)
        result = metric.compute(predictions=[0.6, 0.9, 0.7], references=[1, 1, 0])
        assert result == {"aurc": pytest.approx((0 + 1 / 2 + 1 / 3) / 3)}

    def test_of_a_binary_classifier_ranks_by_the_probability_of_the_predicted_class(self, tmp_path):
        # Class 0 at 0.9, right; class 1 at 0.8, wrong; class 0 at 0.7, right.
        metric = load("aurc", tmp_path, "binary")
        result = metric.compute(predictions=[0.1, 0.8, 0.3], references=[0, 0, 0])
        assert result == {"aurc": pytest.approx((0 + 1 / 2 + 1 / 3) / 3)}


class TestOODDetection:
    @staticmethod
    def scores_and_inside(size=300):
        rng = np.random.default_rng(0)
        inside = rng.integers(0, 2, size)
        return rng.normal(size=size) + inside, inside

    def test_is_what_scikit_learn_says_of_scores_in_any_range(self, tmp_path):
        scores, inside = self.scores_and_inside()
        result = load("ood_detection", tmp_path).compute(predictions=scores, references=inside)
        assert result["ood_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(inside, scores))
        assert result["ood_aupr_in"] == pytest.approx(sklearn.metrics.average_precision_score(inside, scores))
        assert result["ood_aupr_out"] == pytest.approx(sklearn.metrics.average_precision_score(1 - inside, -scores))
        false, true, _ = sklearn.metrics.roc_curve(inside, scores, drop_intermediate=False)
        assert result["ood_fpr95"] == pytest.approx(false[true >= 0.95].min())

    def test_higher_scores_mean_in_distribution(self, tmp_path):
        metric = load("ood_detection", tmp_path)
        result = metric.compute(predictions=[0.9, 0.8, 0.2, 0.1], references=[1, 1, 0, 0])
        assert result == {"ood_auroc": 1.0, "ood_aupr_in": 1.0, "ood_aupr_out": 1.0, "ood_fpr95": 0.0}

    def test_both_kinds_may_come_in_batches_of_their_own_or_one_sample_at_a_time(self, tmp_path):
        scores, inside = self.scores_and_inside(60)
        metric = load("ood_detection", tmp_path)
        expected = metric.compute(predictions=scores, references=inside)
        for kind in (1, 0):
            metric.add_batch(predictions=torch.from_numpy(scores[inside == kind]), references=inside[inside == kind])
        assert metric.compute() == expected
        for score, reference in zip(scores, inside, strict=True):
            metric.add(prediction=score, reference=reference)
        assert metric.compute() == expected

    @pytest.mark.parametrize(
        ("predictions", "references", "message"),
        [
            ([[0.5, 0.5]], [1], r"shapes \(1, 2\) and \(1,\). Reduce probabilities or logits"),
            ([0.5, 0.5], [1], r"shapes \(2,\) and \(1,\)"),
            ([], [], r"shapes \(0,\) and \(0,\)"),
            (None, [1], r"shapes \(\) and \(1,\)"),
            ([0.5, np.nan], [1, 0], "floating-point numbers without NaN"),
            ([3, 1], [1, 0], "floating-point numbers without NaN, found int64"),
            ([0.5, 0.5], [0, 2], r"References must be 1 \(in-distribution\) or 0"),
            ([0.5, 0.5], ["in", "out"], r"References must be 1 \(in-distribution\) or 0"),
        ],
    )
    def test_wrong_input_is_refused_and_leaves_nothing_behind(self, predictions, references, message, tmp_path):
        metric = load("ood_detection", tmp_path)
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=predictions, references=references)
        assert not list(tmp_path.rglob("*.arrow*"))

    def test_scores_of_one_kind_alone_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="out_scores must .* N >= 1 .*found"):
            load("ood_detection", tmp_path).compute(predictions=[0.5], references=[1])

    def test_has_no_binary_configuration(self, tmp_path):
        with pytest.raises(ValueError, match="one of default; found 'binary'"):
            load("ood_detection", tmp_path, "binary")


@every_metric
class TestProbabilityMetric:
    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
    def test_is_exactly_the_value_of_the_library(self, name, dtype, tmp_path):
        probabilities, labels = predictions_and_labels(dtype=dtype)
        metric = load(name, tmp_path)
        assert metric.compute(predictions=probabilities, references=labels) == {
            name: LIBRARY[name](probabilities, labels)
        }

    def test_batches_of_any_size_equal_one_compute(self, name, tmp_path):
        probabilities, labels = predictions_and_labels()
        options = {"num_bins": 9} if name in BINNED else {}
        metric = load(name, tmp_path)
        for part in np.split(np.arange(len(labels)), [1, 20, 130]):
            metric.add_batch(predictions=probabilities[part], references=labels[part])
        assert metric.compute(**options) == value(name, probabilities, labels, **options)

    def test_the_last_batch_may_come_with_compute(self, name, tmp_path):
        probabilities, labels = predictions_and_labels()
        metric = load(name, tmp_path)
        metric.add_batch(predictions=probabilities[:50], references=labels[:50])
        result = metric.compute(predictions=probabilities[50:], references=labels[50:])
        assert result == value(name, probabilities, labels)

    def test_samples_one_at_a_time_equal_one_compute(self, name, tmp_path):
        probabilities, labels = predictions_and_labels(30)
        metric = load(name, tmp_path)
        for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
            metric.add(prediction=row, reference=label)
        assert metric.compute() == value(name, probabilities, labels)

    def test_works_in_memory(self, name, tmp_path):
        probabilities, labels = predictions_and_labels()
        metric = load(name, tmp_path, keep_in_memory=True)
        assert metric.compute(predictions=probabilities, references=labels) == value(name, probabilities, labels)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_torch_tensors_count_as_what_they_hold(self, name, dtype, tmp_path):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(100, 5, generator=generator).mul(3).requires_grad_()
        probabilities, labels = logits.softmax(-1).to(dtype), torch.arange(100) % 5
        # float32 holds all bfloat16 values, and numpy has no bfloat16
        values = probabilities.detach().to(torch.float16 if dtype == torch.float16 else torch.float32).numpy()
        expected = LIBRARY[name](values, labels.numpy())
        metric = load(name, tmp_path)
        assert metric.compute(predictions=probabilities, references=labels) == {name: expected}

    @pytest.mark.parametrize(
        ("predictions", "references", "message"),
        [
            ([[2.0, -1.0], [0.3, 4.0]], [0, 1], "look like logits"),
            ([[0.9, 0.3]], [0], r"sums to 1\.2.*pass normalize=True"),
            ([[np.nan, 1.0]], [0], "hold NaN"),
            ([[0.5, 0.5]], [2], r"labels must lie in \[0, 2\)"),
            ([[0.5, 0.5]], [-100], "Drop ignored samples"),
            ([[0.5, 0.5]], [0.0], "integer class indices"),
            ([[0.5, 0.5]], ["cat"], r"class names, such as 'cat'.*evaluate.load\(path, labels=\[...\]\)"),
            ([[0.5, 0.5], [0.5, 0.5]], np.array([0, "cat"], dtype=object), "class names, such as 'cat'"),
            ([[0.5, 0.5]], [0, 1], r"shapes \(1, 2\) and \(2,\)"),
            ([[0.5, 0.5]], None, r"shapes \(1, 2\) and \(\)"),
            ([[[0.5, 0.5]]], [[0]], r"shapes \(1, 1, 2\) and \(1, 1\)"),
            (None, [0], "probabilities must be numbers, found dtype object"),
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
            ([0.5, 0.5], "cat", "class names, such as 'cat'"),
            ([[0.5, 0.5]], [0], r"shapes \(1, 1, 2\) and \(1, 1\)"),
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
        other = r"Expected probabilities \(N, 4\) as in the earlier batches, found probabilities \(N, 2\)"
        with pytest.raises(ValueError, match=other):
            metric.add_batch(predictions=[[0.5, 0.5]], references=[0])
        assert metric.compute() == value(name, probabilities, labels)

    def test_unknown_input_is_refused(self, name, tmp_path):
        metric = load(name, tmp_path)
        with pytest.raises(ValueError, match="Bad inputs"):
            metric.add_batch(predictions=[[0.5, 0.5]], references=[1], weights=[1.0])
        with pytest.raises(ValueError, match="Bad inputs"):
            metric.add(prediction=[0.5, 0.5], reference=1, weight=1.0)

    def test_a_binary_classifier_is_asked_for_class_one_by_name(self, name, tmp_path):
        probability, labels = binary_predictions_and_labels()
        expected = {name: pytest.approx(BINARY_LIBRARY[name](probability, labels), rel=1e-12)}
        metric = load(name, tmp_path, "binary")
        assert metric.compute(predictions=probability, references=labels) == expected
        metric.add_batch(predictions=torch.from_numpy(probability[:150]), references=labels[:150] == 1)
        for probability_of_one, label in zip(probability[150:].tolist(), labels[150:].tolist(), strict=True):
            metric.add(prediction=probability_of_one, reference=label)
        assert metric.compute() == expected

    @pytest.mark.parametrize(
        ("predictions", "references", "message"),
        [
            ([[0.5, 0.5]], [0], r"expects the probability of class 1, shape \(N,\), found shape \(1, 2\)"),
            (None, [0], r"expects the probability of class 1, shape \(N,\), found shape \(\)"),
            ([0.5, 1.5], [0, 1], r"lie in \[0, 1\]"),
            ([0.5, 0.5], [0, 2], "must be 0 or 1"),
            ([0.5], [0, 1], r"shapes \(1,\) and \(2,\)"),
            ([], [], r"shapes \(0,\) and \(0,\)"),
            ([0, 1], [0, 1], "predicted classes have no confidence"),
            ([0.5, 0.5], ["no", "yes"], "class names, such as 'no'"),
        ],
    )
    def test_wrong_binary_input_is_refused(self, name, predictions, references, message, tmp_path):
        metric = load(name, tmp_path, "binary")
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=predictions, references=references)
        assert not list(tmp_path.rglob("*.arrow*"))

    def test_class_names_stand_for_the_columns_in_the_order_of_labels(self, name, tmp_path):
        probabilities, labels = predictions_and_labels(num_classes=3)
        names = ["dog", "ant", "cat"]
        strings = [names[label] for label in labels]
        metric = load(name, tmp_path, labels=names)
        expected = value(name, probabilities, labels)
        assert metric.compute(predictions=probabilities, references=strings) == expected
        metric.add_batch(predictions=probabilities[:150], references=np.array(strings[:150], dtype=object))
        for row, string in zip(probabilities[150:], strings[150:], strict=True):
            metric.add(prediction=row, reference=string)
        assert metric.compute() == expected

    def test_of_two_class_names_the_second_is_class_one(self, name, tmp_path):
        probability, labels = binary_predictions_and_labels()
        metric = load(name, tmp_path, "binary", labels=("spam", "ham"))
        result = metric.compute(predictions=probability, references=np.where(labels == 1, "ham", "spam"))
        assert result == {name: pytest.approx(BINARY_LIBRARY[name](probability, labels), rel=1e-12)}

    @pytest.mark.parametrize(
        ("predictions", "references", "message"),
        [
            ([[0.5, 0.5]], ["bird"], r"must be among labels=\['cat', 'dog'\], found 'bird'"),
            ([[0.5, 0.5]], [1], r"Expected class names as references, found dtype int64.*labels=\['cat', 'dog'\]"),
            ([[0.2, 0.3, 0.5]], ["cat"], r"labels name 2 classes, found predictions of shape \(1, 3\)"),
            ([0.5], ["cat"], r"labels name 2 classes, found predictions of shape \(1,\)"),
            ([[0.5, 0.5]], ["cat", "dog"], r"shapes \(1, 2\) and \(2,\)"),
            ([[0.5, 0.5]], None, "Expected class names as references, found dtype object"),
        ],
    )
    def test_names_that_do_not_fit_are_refused(self, name, predictions, references, message, tmp_path):
        metric = load(name, tmp_path, labels=["cat", "dog"])
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=predictions, references=references)
        assert not list(tmp_path.rglob("*.arrow*"))

    @pytest.mark.parametrize(
        ("config_name", "labels", "message"),
        [
            ("multiclass", None, "one of default, binary; found 'multiclass'"),
            (None, "ab", "distinct names of the classes in the order of the columns, found 'ab'"),
            (None, ["a"], "distinct names"),
            (None, ["a", "a"], "distinct names"),
            (None, [1, 2], "distinct names"),
            ("binary", ["a", "b", "c"], "'binary' has two classes, found 3 labels"),
        ],
    )
    def test_wrong_options_are_refused_when_the_metric_is_loaded(self, name, config_name, labels, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            load(name, tmp_path, config_name, labels=labels)


@metrics_of_pairs
class TestTopLabelMetric:
    def test_confidences_with_correctness_give_the_value_of_their_probabilities(self, name, tmp_path):
        probabilities, labels = predictions_and_labels(30)
        confidence, correct = as_pairs(probabilities, labels)
        expected = value(name, probabilities, labels)
        metric = load(name, tmp_path)
        assert metric.compute(predictions=confidence, references=correct) == expected
        assert metric.compute(predictions=confidence.tolist(), references=correct == 1) == expected
        for pair in zip(confidence, correct, strict=True):
            metric.add(prediction=pair[0], reference=pair[1])
        assert metric.compute() == expected

    @pytest.mark.parametrize(
        ("predictions", "references", "message"),
        [
            ([], [], r"shapes \(0,\) and \(0,\)"),
            ([0.5, 1.5], [0, 1], r"lie in \[0, 1\]"),
            ([0.5, np.nan], [0, 1], r"lie in \[0, 1\] without NaN"),
            ([0.5, 0.5], [0, 2], "Outcomes must be 0 or 1"),
            ([0.5, 0.5], [0, 0.5], "Outcomes must be 0 or 1"),
            ([0.5, 0.5], [1], r"shapes \(2,\) and \(1,\)"),
        ],
    )
    def test_wrong_confidences_are_refused_and_leave_nothing_behind(
        self, name, predictions, references, message, tmp_path
    ):
        metric = load(name, tmp_path)
        for method in (metric.add_batch, metric.compute):
            with pytest.raises(ValueError, match=message):
                method(predictions=predictions, references=references)
        assert len(metric) == 0
        assert not list(tmp_path.rglob("*.arrow*"))

    def test_a_batch_in_another_form_is_refused_until_compute(self, name, tmp_path):
        probabilities, labels = predictions_and_labels()
        confidence, correct = as_pairs(probabilities, labels)
        metric = load(name, tmp_path)
        metric.add_batch(predictions=probabilities, references=labels)
        other = r"Expected probabilities \(N, 4\) as in the earlier batches, found confidences \(N,\)"
        with pytest.raises(ValueError, match=other):
            metric.add_batch(predictions=confidence, references=correct)
        with pytest.raises(ValueError, match=other):
            metric.add(prediction=confidence[0], reference=correct[0])
        expected = value(name, probabilities, labels)
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


@metrics_of_rows
def test_metrics_of_every_class_take_no_confidences(name, tmp_path):
    metric = load(name, tmp_path)
    with pytest.raises(ValueError, match=r"Expected probabilities \(N, C\), found shape \(2,\).*'binary'"):
        metric.compute(predictions=[0.5, 0.75], references=[0, 1])
    assert not list(tmp_path.rglob("*.arrow*"))


@pytest.mark.parametrize("name", ["brier", "nll"])
def test_a_mean_stores_one_row_a_batch(name, tmp_path):
    probabilities, labels = predictions_and_labels()
    metric = load(name, tmp_path)
    for part in np.split(np.arange(len(labels)), 4):
        metric.add_batch(predictions=probabilities[part], references=labels[part])
    metric.writer.finalize()
    assert len(metric) == 4


def test_combined_metrics_give_all_values_from_compute_batches_and_single_samples(tmp_path):
    probabilities, labels = predictions_and_labels(40)
    combined = evaluate.combine([load(name, tmp_path) for name in LIBRARY])
    expected = {}
    for name in LIBRARY:
        expected |= value(name, probabilities, labels)
    assert combined.compute(predictions=probabilities, references=labels) == expected
    combined.add_batch(predictions=probabilities[:25], references=labels[:25])
    for row, label in zip(probabilities[25:], labels[25:], strict=True):
        combined.add(row, label)
    assert combined.compute() == expected


def test_combined_metrics_with_bins_share_their_number(tmp_path):
    probabilities, labels = predictions_and_labels(40)
    combined = evaluate.combine([load(name, tmp_path) for name in BINNED])
    expected = {name: LIBRARY[name](probabilities, labels, 5) for name in BINNED}
    assert combined.compute(predictions=probabilities, references=labels, num_bins=5) == expected


def test_combined_metrics_read_binary_predictions_and_class_names_as_each_was_loaded(tmp_path):
    probability, labels = binary_predictions_and_labels(40)
    combined = evaluate.combine([load(name, tmp_path, "binary", labels=["no", "yes"]) for name in LIBRARY])
    result = combined.compute(predictions=probability, references=np.where(labels == 1, "yes", "no"))
    assert result == {
        name: pytest.approx(metric(probability, labels), rel=1e-12) for name, metric in BINARY_LIBRARY.items()
    }


def test_scores_combine_with_metrics_of_confidences(tmp_path):
    confidence, correct = as_pairs(*predictions_and_labels(40))
    combined = evaluate.combine([load(name, tmp_path) for name in ("aurc", "ood_detection")])
    result = combined.compute(predictions=confidence, references=correct)
    assert list(result) == ["aurc", *OOD_KEYS]


def test_of_two_processes_rank_zero_gets_the_value_of_all_samples(tmp_path):
    probabilities, labels = predictions_and_labels(50)
    scores, inside = as_pairs(probabilities, labels)
    inputs = {name: {"predictions": probabilities, "references": labels} for name in LIBRARY}
    inputs["ood_detection"] = {"predictions": scores, "references": inside}
    for name, columns in inputs.items():
        np.savez(tmp_path / f"{name}.npz", **{key: values[35:] for key, values in columns.items()})

    def rank_one():
        for name in inputs:
            metric = load(name, tmp_path, num_process=2, process_id=1, experiment_id="two")
            metric.add_batch(**np.load(f"{tmp_path}/{name}.npz"))
            assert metric.compute() is None

    other = multiprocessing.get_context("fork").Process(target=rank_one)
    other.start()
    for name, columns in inputs.items():
        metric = load(name, tmp_path, num_process=2, process_id=0, experiment_id="two")
        metric.add_batch(**{key: values[:35] for key, values in columns.items()})
        result = metric.compute()
        if name == "ood_detection":
            assert result == load(name, tmp_path).compute(**columns)
        else:
            assert result == value(name, probabilities, labels)
    other.join(timeout=60)
    assert other.exitcode == 0


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
        assert logged[f"eval_{name}"] == pytest.approx(metric(probabilities, prediction.label_ids), rel=1e-12)
        assert logged[f"eval_{name}"] > 0


@every_module
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
        output = re.compile(r"^((?:>>>|[.]{3}) .*\n)(?!>>>|[.]{3}|```)(.*\d[.]\d*)(\d)", flags=re.MULTILINE)
        wrong = output.sub(lambda found: f"{found[1]}{found[2]}{9 - int(found[3])}", card, count=1)
        assert wrong != card
        assert self.run(wrong)[0].failed == 1

    def test_front_matter_is_that_of_a_metric_space(self, name):
        front_matter = yaml.safe_load(self.card(name).split("---\n")[1])
        assert front_matter["title"] == TITLES[name]
        assert front_matter["tags"] == ["evaluate", "metric"]
        assert {"description", "sdk_version"} <= set(front_matter)
        assert (front_matter["sdk"], front_matter["app_file"]) == ("gradio", "app.py")

    def test_cites_what_the_metric_cites(self, name, tmp_path):
        assert load(name, tmp_path).citation.strip() in self.card(name)
