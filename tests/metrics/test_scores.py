import inspect
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import scipy.special
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal import metrics
from hf_adafocal.metrics import validation as checks
from hf_adafocal.metrics.binning import equal_mass_edges, equal_width_edges
from hf_adafocal.metrics.classwise import class_adaptive_calibration_error, classwise_calibration_error
from hf_adafocal.metrics.scores import (
    accuracy,
    adaptive_calibration_error,
    binary_adaptive_calibration_error,
    binary_calibration_report,
    binary_expected_calibration_error,
    binary_maximum_calibration_error,
    brier_score,
    calibration_error,
    calibration_report,
    expected_calibration_error,
    maximum_calibration_error,
    negative_log_likelihood,
    softmax,
    top_label,
)

MULTICLASS = [
    top_label,
    accuracy,
    negative_log_likelihood,
    brier_score,
    expected_calibration_error,
    adaptive_calibration_error,
    maximum_calibration_error,
    classwise_calibration_error,
    class_adaptive_calibration_error,
    calibration_report,
]
BINNED = [
    expected_calibration_error,
    adaptive_calibration_error,
    maximum_calibration_error,
    classwise_calibration_error,
    class_adaptive_calibration_error,
]
BINARY = [
    binary_expected_calibration_error,
    binary_adaptive_calibration_error,
    binary_maximum_calibration_error,
    binary_calibration_report,
]
NORMS = ("l1", "l2", "max")
OPTIONS = [{"scheme": scheme, "norm": norm} for scheme in ("equal_width", "equal_mass") for norm in NORMS]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
every_multiclass = pytest.mark.parametrize("metric", MULTICLASS, ids=lambda f: f.__name__)
# Accuracy needs the order of the scores alone, so it looks at the largest of each row and not at sums.
every_use_of_values = pytest.mark.parametrize(
    "metric", [metric for metric in MULTICLASS if metric is not accuracy], ids=lambda f: f.__name__
)
every_binned = pytest.mark.parametrize("metric", BINNED, ids=lambda f: f.__name__)
every_binary = pytest.mark.parametrize("metric", BINARY, ids=lambda f: f.__name__)

CONFIDENCE = st.one_of(st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.floats(0, 1))
PAIRS = st.lists(st.tuples(CONFIDENCE, st.booleans()), min_size=1, max_size=60).map(
    lambda pairs: (np.array([c for c, _ in pairs]), np.array([r for _, r in pairs]))
)
NUM_BINS = st.sampled_from([1, 2, 10, 15, 20])


def predictions(size=300, classes=5, scale=2.0, seed=0):
    """Probabilities and labels that follow them only in part, so that no metric is near 0."""
    generator = np.random.default_rng(seed)
    logits = scale * generator.normal(size=(size, classes))
    labels = np.where(generator.random(size) < 0.4, logits.argmax(axis=1), generator.integers(classes, size=size))
    return softmax(logits), labels


class TestSoftmax:
    def test_it_equals_scipy(self):
        logits = np.random.default_rng(0).normal(size=(50, 7)) * 10
        np.testing.assert_allclose(softmax(logits), scipy.special.softmax(logits, axis=1))

    def test_huge_logits_do_not_overflow(self):
        assert softmax([[1e4, 0.0], [-1e4, -1e4]]).tolist() == [[1, 0], [0.5, 0.5]]

    def test_the_last_axis_holds_the_classes(self):
        assert softmax([0.0, 0.0]).tolist() == [0.5, 0.5]
        assert softmax(np.zeros((2, 3, 4))).tolist() == np.full((2, 3, 4), 0.25).tolist()

    def test_it_is_computed_in_float64(self):
        assert softmax(np.zeros((2, 3), dtype=np.float16)).dtype == np.float64

    def test_its_rows_pass_as_probabilities(self):
        logits = np.random.default_rng(0).normal(size=(50, 1000)) * 5
        assert accuracy(softmax(logits), logits.argmax(axis=1)) == 1


class TestTopLabel:
    def test_it_equals_the_slow_loop(self):
        probabilities, labels = predictions()
        confidence, correct = top_label(probabilities, labels)
        expected = reference.top_label(probabilities, labels)
        assert confidence.tolist() == expected[0] and correct.tolist() == expected[1]

    def test_the_first_class_wins_a_tie(self):
        confidence, correct = top_label([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4]], [0, 2])
        assert confidence.tolist() == [0.4, 0.4] and correct.tolist() == [True, False]

    def test_one_class_is_always_right(self):
        confidence, correct = top_label(np.ones((3, 1)), [0, 0, 0])
        assert confidence.tolist() == [1, 1, 1] and correct.all()


class TestAccuracy:
    @given(st.integers(2, 40), st.floats(0.1, 3))
    def test_scores_that_pass_for_probabilities_give_the_accuracy_of_their_softmax(self, classes, width):
        generator = np.random.default_rng(classes)
        scores, labels = generator.random((50, classes)) * width, generator.integers(classes, size=50)
        try:
            found = accuracy(scores, labels)
        except ValueError:
            return
        assert found == accuracy(softmax(scores), labels)

    @pytest.mark.parametrize(
        ("row", "match"),
        [
            ([0.2, 0.1, 0.1], "row 1 sums to 0.4"),
            ([1.2, 0.0, 0.0], "look like logits"),
            ([np.nan, 0.5, 0.5], "hold NaN"),
            ([0.5, 0.5, np.nan], "hold NaN"),
        ],
        ids=str,
    )
    def test_a_row_whose_largest_value_is_no_probability_is_an_error(self, row, match):
        with pytest.raises(ValueError, match=match):
            accuracy(np.array([[0.5, 0.25, 0.25], row]), [0, 1])

    def test_it_equals_scikit_learn(self):
        probabilities, labels = predictions()
        assert accuracy(probabilities, labels) == sklearn.metrics.accuracy_score(labels, probabilities.argmax(axis=1))


class TestNegativeLogLikelihood:
    def test_it_equals_scikit_learn_and_the_slow_loop(self):
        probabilities, labels = predictions()
        found = negative_log_likelihood(probabilities, labels)
        assert found == pytest.approx(sklearn.metrics.log_loss(labels, probabilities))
        assert found == pytest.approx(reference.negative_log_likelihood(probabilities, labels))

    @pytest.mark.parametrize(("dtype", "nats"), [(np.float64, 708.4), (np.float32, 87.3)])
    def test_a_probability_of_zero_costs_a_finite_amount(self, dtype, nats):
        probabilities = np.array([[1.0, 0.0]], dtype=dtype)
        assert negative_log_likelihood(probabilities, [1]) == pytest.approx(nats, abs=0.1)
        assert negative_log_likelihood(probabilities, [0]) == 0

    def test_a_probability_that_rounding_put_above_one_costs_nothing(self):
        assert negative_log_likelihood(np.array([[1 + 1e-6, 0.0]]), [0]) == 0


class TestBrierScore:
    def test_it_equals_the_slow_loop_and_scikit_learn(self):
        probabilities, labels = predictions()
        found = brier_score(probabilities, labels)
        assert found == pytest.approx(reference.brier_score(probabilities, labels))
        of_classes = [sklearn.metrics.brier_score_loss(labels == k, probabilities[:, k]) for k in range(5)]
        assert found == pytest.approx(sum(of_classes))

    def test_it_is_0_for_sure_and_right_and_2_for_sure_and_wrong(self):
        assert brier_score([[1.0, 0.0]], [0]) == 0
        assert brier_score([[1.0, 0.0]], [1]) == 2

    def test_float32_probabilities_are_summed_in_float64(self):
        probabilities, labels = predictions(size=2000)
        half = probabilities.astype(np.float32)
        assert brier_score(half, labels) == pytest.approx(brier_score(half.astype(np.float64), labels), rel=1e-9)


class TestCalibrationError:
    @given(pairs=PAIRS, num_bins=NUM_BINS)
    def test_it_equals_the_slow_loop(self, pairs, num_bins):
        edges_of = {"equal_width": equal_width_edges(num_bins), "equal_mass": equal_mass_edges(pairs[0], num_bins)}
        for scheme, edges in edges_of.items():
            found = calibration_error(*pairs, num_bins, scheme=scheme)
            assert found == pytest.approx(reference.calibration_error(*pairs, edges.tolist()), abs=1e-12)
            found = calibration_error(*pairs, num_bins, scheme=scheme, norm="max")
            assert found == pytest.approx(reference.largest_gap(*pairs, edges.tolist()), abs=1e-12)
            squares = sum(n * (c - a) ** 2 for n, c, a in reference.bins(*pairs, edges.tolist()))
            found = calibration_error(*pairs, num_bins, scheme=scheme, norm="l2")
            assert found == pytest.approx(math.sqrt(squares / len(pairs[0])), abs=1e-9)

    @given(pairs=PAIRS, num_bins=NUM_BINS)
    def test_the_norms_ascend(self, pairs, num_bins):
        l1, l2, largest = (calibration_error(*pairs, num_bins, norm=norm) for norm in NORMS)
        assert l1 <= l2 + 1e-12 and l2 <= largest + 1e-12

    @every_option
    @given(pairs=PAIRS, num_bins=NUM_BINS)
    def test_it_lies_in_the_unit_interval(self, options, pairs, num_bins):
        assert 0 <= calibration_error(*pairs, num_bins, **options) <= 1 + 1e-12

    @every_option
    @given(pairs=PAIRS, num_bins=NUM_BINS, data=st.data())
    def test_the_order_of_samples_does_not_matter(self, options, pairs, num_bins, data):
        order = data.draw(st.permutations(range(len(pairs[0]))))
        shuffled = calibration_error(pairs[0][order], pairs[1][order], num_bins, **options)
        assert shuffled == pytest.approx(calibration_error(*pairs, num_bins, **options), abs=1e-12)

    @every_option
    @given(
        value=st.one_of(st.sampled_from([0.0, 0.3, 1.0]), st.floats(0, 1)),
        correct=st.lists(st.booleans(), min_size=1, max_size=50),
        num_bins=NUM_BINS,
    )
    def test_a_constant_predictor_gives_accuracy_minus_confidence(self, options, value, correct, num_bins):
        found = calibration_error(np.full(len(correct), value), np.array(correct), num_bins, **options)
        assert found == pytest.approx(abs(value - np.mean(correct)), abs=1e-12)

    @every_option
    def test_one_sample_gives_its_own_gap(self, options):
        assert calibration_error([0.8], [1], **options) == pytest.approx(0.2)
        assert calibration_error([0.8], [0], **options) == pytest.approx(0.8)

    @every_option
    @pytest.mark.parametrize("size", [1, 2, 14])
    def test_fewer_samples_than_bins_do_not_give_nan(self, options, size):
        confidence = np.linspace(0.3, 0.9, size)
        assert 0 < calibration_error(confidence, np.zeros(size), 15, **options) <= 0.9

    @every_option
    def test_one_bin_is_the_gap_of_the_means(self, options):
        confidence, correct = np.array([0.2, 0.9, 1.0, 0.0]), np.array([1, 1, 0, 1])
        assert calibration_error(confidence, correct, 1, **options) == pytest.approx(0.75 - 0.525)

    def test_a_confidence_of_one_gets_no_bin_of_its_own(self):
        assert calibration_error([0.95, 1.0], [1, 0], 10) == pytest.approx(0.475)

    def test_zero_is_counted(self):
        assert calibration_error([0.0, 0.0], [1, 1], 10) == 1

    def test_equal_mass_bins_see_samples_at_one_confidence(self):
        assert calibration_error([0.75] * 4, [1, 1, 0, 0], scheme="equal_mass") == 0.25
        assert calibration_error([1.0] * 4, [0, 0, 0, 0], scheme="equal_mass") == 1.0

    def test_equal_mass_bins_count_the_least_confident_sample(self):
        # bins [.2, .6] and (.6, .8]: 3/4 |.4 - 0| + 1/4 |.8 - 1|
        assert calibration_error([0.2, 0.4, 0.6, 0.8], [0, 0, 0, 1], 2, scheme="equal_mass") == pytest.approx(0.35)

    def test_worked_by_hand(self):
        # bins (.5, 1] and [0, .5]: 3/4 |.8 - 2/3| + 1/4 |.4 - 1|
        confidence, correct = [0.7, 0.8, 0.9, 0.4], [1, 0, 1, 1]
        assert calibration_error(confidence, correct, 2) == pytest.approx(0.75 * (0.8 - 2 / 3) + 0.15)
        assert calibration_error(confidence, correct, 2, norm="l2") == pytest.approx(math.sqrt(0.04 / 3 + 0.09))
        assert calibration_error(confidence, correct, 2, norm="max") == pytest.approx(0.6)

    @pytest.mark.parametrize(
        ("option", "match"), [({"scheme": "quantile"}, "'equal_mass'"), ({"norm": "l3"}, "'l2' or 'max'")]
    )
    def test_an_unknown_name_is_an_error(self, option, match):
        with pytest.raises(ValueError, match=match):
            calibration_error([0.5], [1], **option)

    @pytest.mark.parametrize("confidence", [[1.5, 0.5], [-0.1, 0.5], [math.nan, 0.5], [math.inf, 0.5]], ids=str)
    def test_a_confidence_that_is_no_probability_is_an_error(self, confidence):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\] without NaN"):
            calibration_error(confidence, [1, 0])

    @pytest.mark.parametrize("correct", [[2, 0], [0.5, 1], [-1, 1], [math.nan, 1]], ids=str)
    def test_an_outcome_other_than_0_and_1_is_an_error(self, correct):
        with pytest.raises(ValueError, match="must be 0 or 1"):
            calibration_error([0.5, 0.5], correct)

    @pytest.mark.parametrize(("confidence", "correct"), [((3,), (2,)), ((3,), (3, 2)), ((3, 2), (3,)), ((0,), (0,))])
    def test_shapes_that_do_not_fit_are_an_error_that_names_both(self, confidence, correct):
        with pytest.raises(ValueError) as error:
            calibration_error(np.zeros(confidence), np.zeros(correct))
        assert f"found shapes {confidence} and {correct}" in str(error.value)

    def test_no_bin_is_an_error(self):
        with pytest.raises(ValueError, match="num_bins must be at least 1"):
            calibration_error([0.5], [1], 0)


def golden_cases(golden):
    for case in golden("metrics")["cases"]:
        yield SimpleNamespace(**case, arguments=(softmax(case["logits"]), np.array(case["labels"]), case["num_bins"]))


class TestExpectedCalibrationError:
    def test_it_is_that_of_the_authors_code(self, golden):
        for case in golden_cases(golden):
            assert expected_calibration_error(*case.arguments) == pytest.approx(case.ece, rel=1e-5)

    @pytest.mark.parametrize("num_bins", [1, 10, 15, 50])
    def test_it_equals_the_slow_loop(self, num_bins):
        expected = reference.expected_calibration_error(*predictions(), num_bins)
        assert expected_calibration_error(*predictions(), num_bins) == pytest.approx(expected)

    def test_it_has_15_bins_unless_told_and_so_has_every_metric(self):
        functions = [getattr(metrics, name) for name in metrics.__all__]
        signatures = [inspect.signature(function).parameters for function in functions if callable(function)]
        defaults = [parameters["num_bins"].default for parameters in signatures if "num_bins" in parameters]
        assert len(defaults) >= 19 and set(defaults) <= {15, inspect.Parameter.empty}
        assert expected_calibration_error(*predictions()) == expected_calibration_error(*predictions(), 15)

    def test_a_perfectly_calibrated_predictor_has_almost_none(self):
        generator = np.random.default_rng(0)
        probabilities = softmax(generator.normal(size=(20000, 4)))
        labels = (generator.random((20000, 1)) > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)
        assert expected_calibration_error(probabilities, labels) < 0.02


class TestAdaptiveCalibrationError:
    def test_it_is_that_of_the_authors_code_but_for_the_sample_they_drop(self, golden):
        for case in golden_cases(golden):
            expected = pytest.approx(case.ada_ece, abs=1 / len(case.labels))
            assert adaptive_calibration_error(*case.arguments) == expected

    @pytest.mark.parametrize("num_bins", [1, 10, 15, 50])
    def test_it_equals_the_slow_loop(self, num_bins):
        expected = reference.adaptive_calibration_error(*predictions(307), num_bins)
        assert adaptive_calibration_error(*predictions(307), num_bins) == pytest.approx(expected)

    def test_all_samples_at_one_confidence_are_not_called_perfect(self):
        probabilities = np.array([[0.75, 0.25]] * 4)
        assert adaptive_calibration_error(probabilities, [0, 0, 1, 1]) == 0.25
        assert adaptive_calibration_error(np.array([[1.0, 0.0]] * 4), [1, 1, 1, 1]) == 1.0


class TestMaximumCalibrationError:
    def test_it_is_that_of_the_authors_code(self, golden):
        for case in golden_cases(golden):
            assert maximum_calibration_error(*case.arguments) == pytest.approx(case.mce, rel=1e-5)

    def test_it_equals_the_slow_loop(self):
        expected = reference.maximum_calibration_error(*predictions(), 15)
        assert maximum_calibration_error(*predictions(), 15) == pytest.approx(expected)

    def test_it_is_at_least_the_expected_one(self):
        assert maximum_calibration_error(*predictions()) >= expected_calibration_error(*predictions())


@pytest.fixture(params=[1, 7, 299, 300])
def rows_at_once(request, monkeypatch):
    monkeypatch.setattr(checks, "_CHUNK_ROWS", request.param)
    return request.param


class TestChunks:
    def test_they_do_not_change_the_report(self, rows_at_once):
        found, (probabilities, labels) = calibration_report(*predictions()), predictions()
        assert found == {
            "num_samples": 300,
            "num_bins": 15,
            "accuracy": np.mean(reference.top_label(probabilities, labels)[1]),
            "nll": pytest.approx(reference.negative_log_likelihood(probabilities, labels)),
            "brier": pytest.approx(reference.brier_score(probabilities, labels)),
            "ece": pytest.approx(reference.expected_calibration_error(probabilities, labels, 15)),
            "ada_ece": pytest.approx(reference.adaptive_calibration_error(probabilities, labels, 15)),
            "classwise_ece": pytest.approx(reference.classwise_calibration_error(probabilities, labels, 15)),
            "mce": pytest.approx(reference.maximum_calibration_error(probabilities, labels, 15)),
        }

    @every_binned
    def test_they_do_not_change_a_single_metric(self, metric, monkeypatch):
        whole = metric(*predictions())
        monkeypatch.setattr(checks, "_CHUNK_ROWS", 7)
        assert metric(*predictions()) == pytest.approx(whole, abs=1e-12)

    @every_use_of_values
    def test_the_last_row_is_checked_too(self, rows_at_once, metric):
        probabilities, labels = predictions()
        probabilities[-1] = 0.5
        with pytest.raises(ValueError, match="row 299 sums to 2.5"):
            metric(probabilities, labels)

    @every_use_of_values
    @pytest.mark.parametrize(("total", "valid"), [(0.9951, True), (1.0049, True), (1.0051, False), (0.9949, False)])
    def test_rows_may_miss_one_by_a_two_hundredth(self, metric, total, valid):
        probabilities = np.full((3, 4), total / 4)
        if valid:
            metric(probabilities, [0, 1, 2])
        else:
            with pytest.raises(ValueError, match=f"row 0 sums to {total:.4g}.*pass normalize=True"):
                metric(probabilities, [0, 1, 2])

    @pytest.mark.parametrize("order", ["C", "F"])
    def test_the_order_in_memory_does_not_matter(self, order):
        probabilities, labels = predictions()
        found = calibration_report(np.asarray(probabilities, order=order), labels)
        assert found == pytest.approx(calibration_report(probabilities[:, ::-1][:, ::-1], labels))


class TestPeers:
    """Where another library's convention is not ours. The extra `bench` installs those that are not needed."""

    def test_scikit_learn_raises_a_small_probability_to_the_epsilon_of_its_dtype(self):
        probabilities = np.array([[1.0, 1e-10]], dtype=np.float32)
        found = sklearn.metrics.log_loss([1], probabilities, labels=[0, 1])
        assert found == pytest.approx(-math.log(np.finfo(np.float32).eps))
        assert negative_log_likelihood(probabilities, [1]) == pytest.approx(-math.log(1e-10))  # float32 can hold it

    def test_torchmetrics_gives_a_confidence_of_one_a_bin_of_its_own(self):
        peer = pytest.importorskip("torchmetrics.functional.classification", reason="extra `bench` is not installed")
        import torch

        probabilities, labels = np.array([[0.95, 0.05], [1.0, 0.0]]), np.array([0, 1])
        found = peer.multiclass_calibration_error(torch.tensor(probabilities), torch.tensor(labels), 2, n_bins=10)
        assert float(found) == pytest.approx((0.05 + 1) / 2)  # eleven bins
        assert expected_calibration_error(probabilities, labels, 10) == pytest.approx(0.475)  # one bin, as asked

    def test_relplot_does_so_too(self):
        peer = pytest.importorskip("relplot.metrics", reason="extra `bench` is not installed")
        assert peer.binnedECE(np.array([0.95, 1.0]), np.array([1, 0]), 10) == pytest.approx((0.05 + 1) / 2)

    def test_netcal_puts_an_edge_into_the_bin_above_it(self):
        peer = pytest.importorskip("netcal.metrics", reason="extra `bench` is not installed")
        confidence, correct = np.array([0.5, 0.75]), np.array([1, 0])
        assert peer.ECE(2).measure(confidence, correct) == pytest.approx(abs(0.625 - 0.5))
        assert calibration_error(confidence, correct, 2) == pytest.approx((0.5 + 0.75) / 2)  # (0, .5] as Guo et al.

    def test_torch_uncertainty_cuts_through_ties_by_the_order_of_samples(self):
        peer = pytest.importorskip("torch_uncertainty.metrics", reason="extra `bench` is not installed")
        import torch

        probabilities, labels = np.tile([0.75, 0.25], (4, 1)), np.array([0, 0, 1, 1])
        metric = peer.AdaptiveCalibrationError(task="multiclass", num_classes=2, num_bins=2)
        metric.update(torch.tensor(probabilities), torch.tensor(labels))
        assert float(metric.compute()) == pytest.approx((0.25 + 0.75) / 2)  # right ones apart from wrong ones
        assert adaptive_calibration_error(probabilities, labels, 2) == 0.25  # of one confidence half are right


class TestEveryMulticlassMetric:
    @every_multiclass
    def test_logits_by_mistake_are_an_error_that_says_so(self, metric):
        with pytest.raises(ValueError, match=r"look like logits: pass softmax\(logits\)"):
            metric(np.random.default_rng(0).normal(size=(8, 3)), np.zeros(8, dtype=int))

    @every_use_of_values
    def test_positive_logits_by_mistake_are_an_error_too(self, metric):
        with pytest.raises(ValueError, match="row 1 sums to 2.9.*look like logits"):
            metric(np.array([[0.5, 0.5], [0.9, 2.0]]), [0, 1])

    @every_multiclass
    def test_logits_that_happen_to_sum_to_one_are_an_error_too(self, metric):
        with pytest.raises(ValueError, match="from -0.5 to 1.5.*look like logits"):
            metric(np.array([[0.5, 0.5], [1.5, -0.5]]), [0, 1])

    @every_multiclass
    def test_nan_is_an_error_that_counts_the_rows(self, metric):
        with pytest.raises(ValueError, match="NaN in 1 of 2 rows"):
            metric(np.array([[0.5, 0.5], [np.nan, 0.5]]), [0, 1])

    @every_multiclass
    def test_infinity_is_an_error(self, metric):
        with pytest.raises(ValueError, match="sum to 1"):
            metric(np.array([[0.5, 0.5], [np.inf, 0.5]]), [0, 1])

    @every_multiclass
    @pytest.mark.parametrize(
        ("probabilities", "labels"),
        [((4, 2), (3,)), ((4, 2), (4, 2)), ((4,), (4,)), ((4, 2, 2), (4, 2)), ((0, 2), (0,)), ((4, 0), (4,))],
        ids=str,
    )
    def test_shapes_that_do_not_fit_are_an_error_that_names_both(self, metric, probabilities, labels):
        with pytest.raises(ValueError) as error:
            metric(np.full(probabilities, 0.5), np.zeros(labels, dtype=int))
        assert f"found shapes {probabilities} and {labels}" in str(error.value)

    @every_multiclass
    @pytest.mark.parametrize(
        ("dtype", "hint"),
        [(float, r"labels.astype\(int\)"), (bool, r"calibration_error\("), (str, "'0'.*names.index")],
    )
    def test_labels_that_are_not_integers_are_an_error_that_says_what_to_pass(self, metric, dtype, hint):
        with pytest.raises(ValueError, match=f"integer class indices, found dtype.*{hint}"):
            metric(np.full((2, 4), 0.25), np.array([0, 1]).astype(dtype))

    @every_multiclass
    @pytest.mark.parametrize("label", [2, -1, -100])
    def test_labels_out_of_range_are_an_error_that_names_the_range(self, metric, label):
        with pytest.raises(ValueError, match=rf"\[0, 2\), found {min(0, label)} to {max(0, label)}"):
            metric(np.full((2, 2), 0.5), [0, label])

    @every_multiclass
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_half_and_single_precision_give_about_the_same(self, metric, dtype):
        logits = np.random.default_rng(0).normal(size=(50, 4))
        labels = logits.argmax(axis=1) * (np.arange(50) % 3 > 0)
        found, exact = metric(softmax(logits).astype(dtype), labels), metric(softmax(logits), labels)
        if isinstance(found, dict):
            found, exact = list(found.values()), list(exact.values())
        np.testing.assert_allclose(found, exact, atol=2e-3)

    @every_multiclass
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64])
    def test_labels_of_any_integer_type_are_accepted(self, metric, dtype):
        probabilities, labels = predictions()
        np.testing.assert_equal(metric(probabilities, labels.astype(dtype)), metric(probabilities, labels))

    @every_multiclass
    def test_lists_are_accepted(self, metric):
        metric([[0.5, 0.5], [0.1, 0.9]], [0, 1])

    @every_multiclass
    def test_one_hot_integers_are_accepted(self, metric):
        metric(np.eye(3, dtype=int), [0, 1, 1])

    @every_multiclass
    def test_a_row_that_rounding_puts_a_little_above_one_is_accepted(self, metric):
        metric(np.array([[np.nextafter(np.float32(1), np.float32(2)), 0.0]]), [0])

    @every_multiclass
    def test_the_arguments_are_left_alone(self, metric):
        probabilities, labels = predictions(size=20)
        metric(probabilities, labels)
        again = predictions(size=20)
        assert (probabilities == again[0]).all() and (labels == again[1]).all()

    @every_binned
    def test_the_order_of_samples_does_not_matter(self, metric):
        probabilities, labels = predictions()
        order = np.random.default_rng(1).permutation(len(labels))
        assert metric(probabilities[order], labels[order]) == pytest.approx(metric(probabilities, labels))

    @every_binned
    @pytest.mark.parametrize("size", [1, 2, 14])
    def test_fewer_samples_than_bins_do_not_give_nan(self, metric, size):
        assert 0 <= metric(*predictions(size), num_bins=15) <= 1

    @every_binned
    def test_one_class_is_perfect(self, metric):
        assert metric(np.ones((5, 1)), np.zeros(5, dtype=int)) == 0

    @every_binned
    def test_sure_and_always_wrong_is_the_worst(self, metric):
        assert metric(np.array([[1.0, 0.0]] * 20), np.ones(20, dtype=int)) == 1


class TestCalibrationReport:
    def test_it_holds_what_each_function_says(self):
        probabilities, labels = predictions()
        assert calibration_report(probabilities, labels, 10) == {
            "num_samples": 300,
            "num_bins": 10,
            "accuracy": accuracy(probabilities, labels),
            "nll": negative_log_likelihood(probabilities, labels),
            "brier": brier_score(probabilities, labels),
            "ece": expected_calibration_error(probabilities, labels, 10),
            "ada_ece": adaptive_calibration_error(probabilities, labels, 10),
            "classwise_ece": classwise_calibration_error(probabilities, labels, 10),
            "mce": maximum_calibration_error(probabilities, labels, 10),
        }

    def test_its_values_are_plain_numbers(self):
        assert {type(value) for value in calibration_report(*predictions()).values()} == {int, float}


def binary_predictions():
    probabilities, labels = predictions(classes=2)
    return probabilities[:, 1], labels


class TestBinaryExpectedCalibrationError:
    def test_it_equals_the_slow_loop(self):
        p, labels = binary_predictions()
        expected = reference.calibration_error(p, labels, reference.equal_width_edges(15))
        assert binary_expected_calibration_error(p, labels) == pytest.approx(expected)

    def test_it_is_not_the_top_label_one_of_two_columns(self):
        # Class 1 happens never at .2 and half of the time at .7. Class 0 at .8 is always right, class 1 at .7 half of
        # the time: together .75 of the time at a confidence of .75.
        p, labels = np.array([0.2, 0.2, 0.7, 0.7]), np.array([0, 0, 0, 1])
        assert binary_expected_calibration_error(p, labels, 2) == pytest.approx((0.2 + 0.2) / 2)
        assert expected_calibration_error(np.stack([1 - p, p], axis=1), labels, 2) == pytest.approx(0)

    def test_it_equals_one_column_of_the_classwise_one(self):
        p, labels = binary_predictions()
        other = binary_expected_calibration_error(1 - p, 1 - labels)
        expected = 2 * classwise_calibration_error(np.stack([1 - p, p], axis=1), labels) - other
        assert binary_expected_calibration_error(p, labels) == pytest.approx(expected)


class TestBinaryAdaptiveCalibrationError:
    def test_it_equals_the_slow_loop(self):
        p, labels = binary_predictions()
        expected = reference.calibration_error(p, labels, reference.equal_mass_edges(p.tolist(), 13))
        assert binary_adaptive_calibration_error(p, labels, 13) == pytest.approx(expected)


class TestBinaryMaximumCalibrationError:
    def test_it_equals_the_slow_loop(self):
        p, labels = binary_predictions()
        expected = reference.largest_gap(p, labels, reference.equal_width_edges(15))
        assert binary_maximum_calibration_error(p, labels) == pytest.approx(expected)


class TestBinaryCalibrationReport:
    def test_it_equals_scikit_learn_and_the_single_functions(self):
        p, labels = binary_predictions()
        report = binary_calibration_report(p, labels, 10)
        assert report == {
            "num_samples": 300,
            "num_bins": 10,
            "accuracy": sklearn.metrics.accuracy_score(labels, p > 0.5),
            "nll": pytest.approx(sklearn.metrics.log_loss(labels, p)),
            "brier": pytest.approx(sklearn.metrics.brier_score_loss(labels, p)),
            "ece": binary_expected_calibration_error(p, labels, 10),
            "ada_ece": binary_adaptive_calibration_error(p, labels, 10),
            "mce": binary_maximum_calibration_error(p, labels, 10),
        }
        assert {type(value) for value in report.values()} == {int, float}

    def test_accuracy_and_nll_are_those_of_two_columns_and_brier_is_half(self):
        p, labels = binary_predictions()
        one, two = binary_calibration_report(p, labels), calibration_report(np.stack([1 - p, p], axis=1), labels)
        assert (one["accuracy"], one["nll"]) == pytest.approx((two["accuracy"], two["nll"]))
        assert one["brier"] == pytest.approx(two["brier"] / 2)

    def test_one_half_predicts_class_0(self):
        assert binary_calibration_report([0.5], [0])["accuracy"] == 1

    def test_sure_and_wrong_costs_a_finite_amount(self):
        assert math.isfinite(binary_calibration_report([1.0, 0.0], [0, 1])["nll"])


class TestEveryBinaryMetric:
    @every_binary
    def test_two_columns_are_an_error_that_names_the_shapes(self, metric):
        with pytest.raises(ValueError, match=r"found shapes \(4, 2\) and \(4,\)"):
            metric(np.full((4, 2), 0.5), [0, 1, 0, 1])

    @every_binary
    def test_logits_by_mistake_are_an_error(self, metric):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            metric([-0.7, 1.3], [0, 1])

    @every_binary
    def test_nan_is_an_error(self, metric):
        with pytest.raises(ValueError, match="without NaN"):
            metric([np.nan, 0.5], [0, 1])

    @every_binary
    @pytest.mark.parametrize("label", [2, -1, -100, 0.5])
    def test_a_label_other_than_0_and_1_is_an_error(self, metric, label):
        with pytest.raises(ValueError, match="must be 0 or 1"):
            metric([0.5, 0.5], [0, label])


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


class TestImport:
    def test_the_metrics_need_numpy_alone(self):
        heavy = {"torch", "transformers", "scipy", "sklearn", "datasets", "evaluate", "matplotlib"}
        assert not modules_after("import hf_adafocal.metrics.scores") & heavy

    def test_the_package_loads_neither_torch_nor_transformers(self):
        assert not modules_after("import hf_adafocal") & {"torch", "transformers"}
