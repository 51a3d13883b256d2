import numpy as np
import pytest
import reference
import scipy.stats
from hypothesis import strategies as st

from hf_adafocal.metrics.binning import equal_mass_edges, equal_width_edges
from hf_adafocal.metrics.bootstrap import (
    Interval,
    PairedTest,
    bootstrap_interval,
    paired_calibration_error_test,
    paired_test,
    report_intervals,
)
from hf_adafocal.metrics.intervals import calibration_error_interval, classwise_error_interval
from hf_adafocal.metrics.scores import (
    accuracy,
    brier_score,
    calibration_error,
    calibration_report,
    negative_log_likelihood,
    softmax,
    top_label,
)

NORMS = {"l1": 1, "l2": 2, "max": np.inf}
every_norm = pytest.mark.parametrize("norm", NORMS)
every_scheme = pytest.mark.parametrize("scheme", ["equal_width", "equal_mass"])
every_bad_option = pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"level": 0}, "level must lie strictly between 0 and 1, found 0"),
        ({"level": 1}, "level must lie strictly between 0 and 1, found 1"),
        ({"level": 95}, "found 95; 0.95 stands for 95 %"),
        ({"level": np.nan}, "found nan"),
        ({"num_resamples": 0}, "num_resamples must be at least 1, found 0"),
    ],
    ids=str,
)
PAIRS = st.lists(st.tuples(st.one_of(st.sampled_from([0.0, 0.3, 1.0]), st.floats(0, 1)), st.booleans()), min_size=1)
PAIRS = PAIRS.map(lambda pairs: (np.array([c for c, _ in pairs]), np.array([r for _, r in pairs])))


def pairs_with_gap(generator, size, gap):
    """Confidence in [0.2, 0.8] plus the gap, which is a number or a function of it; and outcomes at that rate."""
    rate = 0.2 + 0.6 * generator.random(size)
    shift = gap(rate) if callable(gap) else gap
    return rate + shift, generator.random(size) < rate


def draws(size, num_resamples, seed):
    generator = np.random.default_rng(seed)
    return [generator.integers(size, size=size) for _ in range(num_resamples)]


def slow_noise(confidence, correct, num_bins, scheme, norm, num_resamples, seed):
    """Observed gaps and the noise of each resample, scaled as the norm wants, by a loop over bins."""
    edges = equal_width_edges(num_bins) if scheme == "equal_width" else equal_mass_edges(confidence, num_bins)
    size = len(confidence)

    def gaps(index):
        return np.array(
            [
                (c - a) * {"l1": n / size, "l2": np.sqrt(n / size), "max": 1.0}[norm]
                for n, c, a in reference.bins(confidence[index], correct[index], edges)
            ]
        )

    observed = gaps(np.arange(size))
    return observed, np.array([gaps(draw) - observed for draw in draws(size, num_resamples, seed)])


class TestBootstrapInterval:
    def test_it_equals_a_slow_loop(self):
        values = np.random.default_rng(0).random(30)
        means = sorted(sum(values[i] for i in draw) / 30 for draw in draws(30, 201, 7))
        # of 201 ranked values 2.5 % and 97.5 % are the ranks 5 and 195, counted from 0
        found = bootstrap_interval(np.mean, values, num_resamples=201, seed=7)
        assert found == pytest.approx((values.mean(), means[5], means[195]))

    def test_it_agrees_with_scipy_up_to_chance(self):
        values = np.random.default_rng(0).exponential(size=200)
        expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", random_state=1)
        found = bootstrap_interval(np.mean, values, num_resamples=4000)
        assert found[1:] == pytest.approx(tuple(expected.confidence_interval), abs=0.01)

    def test_it_has_the_width_of_the_normal_one_for_a_mean(self):
        values = np.random.default_rng(0).random(400)
        found = bootstrap_interval(np.mean, values)
        assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)

    def test_the_arrays_are_resampled_together(self):
        values = np.random.default_rng(0).random(50)
        assert bootstrap_interval(lambda a, b: np.abs(a - b).sum(), values, values) == Interval(0, 0, 0)

    def test_it_takes_metrics_of_probabilities_and_labels(self):
        generator = np.random.default_rng(0)
        probabilities, labels = generator.dirichlet(np.ones(3), size=80), generator.integers(3, size=80)
        found = bootstrap_interval(brier_score, probabilities, labels, num_resamples=50)
        assert found.value == brier_score(probabilities, labels) and found.low < found.value < found.high

    def test_a_larger_level_is_wider(self):
        values = np.random.default_rng(0).random(50)
        inner, outer = (bootstrap_interval(np.mean, values, level=level) for level in (0.5, 0.99))
        assert outer.low < inner.low < inner.high < outer.high

    def test_a_seed_fixes_it_and_another_seed_changes_it(self):
        values = np.random.default_rng(0).random(50)
        one, same, other = (bootstrap_interval(np.mean, values, seed=seed) for seed in (1, 1, 2))
        assert one == same != other

    def test_one_sample_is_its_own_interval(self):
        assert bootstrap_interval(np.mean, [0.25]) == Interval(0.25, 0.25, 0.25)

    def test_it_lies_above_the_truth_for_the_calibration_error_of_a_calibrated_model(self):
        pairs = pairs_with_gap(np.random.default_rng(0), 1000, gap=0)
        assert bootstrap_interval(calibration_error, *pairs, num_resamples=100).low > 0.01

    @every_bad_option
    def test_an_option_out_of_range_is_an_error(self, option, match):
        with pytest.raises(ValueError, match=match):
            bootstrap_interval(np.mean, [0.5, 0.5], **option)

    @pytest.mark.parametrize("shapes", [[], [(0,)], [(3,), (2,)], [(3, 2), (2, 3)], [()]], ids=str)
    def test_arrays_that_do_not_fit_are_an_error_that_names_the_shapes(self, shapes):
        with pytest.raises(ValueError) as error:
            bootstrap_interval(np.mean, *map(np.zeros, shapes))
        assert f"found shapes {shapes}" in str(error.value)

    def test_a_metric_that_is_undefined_on_some_resamples_is_an_error_that_counts_them(self):
        def only_with_both(values):
            return values.mean() if 0 < values.mean() < 1 else np.nan

        # both draws alike half of the time
        with pytest.raises(ValueError, match=r"NaN or infinity on (4|5|6)\d of 100 resamples"):
            bootstrap_interval(only_with_both, [0, 1], num_resamples=100)

    def test_a_metric_that_returns_several_numbers_is_an_error(self):
        with pytest.raises(ValueError, match=r"must return one number, found shape \(2,\)"):
            bootstrap_interval(lambda a: a, [0, 1])


def predictions(size=200, classes=4, seed=0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(size, classes)) * 2
    return softmax(2 * logits), (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)


class TestReportIntervals:
    def test_the_values_are_those_of_the_report_and_lie_inside(self):
        probabilities, labels = predictions()
        report = calibration_report(probabilities, labels, 7)
        intervals = report_intervals(probabilities, labels, 7, num_resamples=100)
        assert intervals.keys() == report.keys() - {"num_samples", "num_bins"}
        for name, (value, low, high) in intervals.items():
            assert value == pytest.approx(report[name], abs=1e-12)
            assert low <= value <= high

    @pytest.mark.parametrize(
        ("name", "metric"),
        [("accuracy", accuracy), ("nll", negative_log_likelihood), ("brier", brier_score)],
    )
    def test_means_are_those_of_resampled_rows(self, name, metric):
        arrays = predictions()
        expected = bootstrap_interval(metric, *arrays, num_resamples=50, seed=3)
        assert report_intervals(*arrays, num_resamples=50, seed=3)[name] == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("name", "options"), [("ece", {}), ("ada_ece", {"scheme": "equal_mass"}), ("mce", {"norm": "max"})]
    )
    def test_top_label_errors_have_the_interval_of_their_pairs(self, name, options):
        probabilities, labels = predictions()
        expected = calibration_error_interval(*top_label(probabilities, labels), **options)
        assert report_intervals(probabilities, labels, num_resamples=50)[name] == expected

    def test_classwise_ece_has_its_own_interval(self):
        arrays = predictions(60, 3)
        found = report_intervals(*arrays, 5, num_resamples=40, level=0.9)["classwise_ece"]
        assert found == classwise_error_interval(*arrays, 5, level=0.9)

    def test_the_defaults_are_15_bins_1000_resamples_a_level_of_95_percent_and_seed_0(self):
        arrays = predictions(40)
        expected = report_intervals(*arrays, 15, num_resamples=1000, level=0.95, seed=0)
        assert report_intervals(*arrays) == expected

    def test_half_precision_loses_nothing_beyond_its_own_rounding(self):
        probabilities, labels = predictions()
        half = probabilities.astype(np.float16)
        found, expected = (report_intervals(p, labels, num_resamples=20) for p in (half, half.astype(np.float64)))
        assert found["brier"] == pytest.approx(expected["brier"], rel=1e-6)

    @every_bad_option
    def test_an_option_out_of_range_is_an_error(self, option, match):
        with pytest.raises(ValueError, match=match):
            report_intervals(*predictions(20), **option)

    def test_logits_are_refused(self):
        with pytest.raises(ValueError, match="look like logits"):
            report_intervals(np.array([[3.0, -1.0]]), np.array([0]))


class TestPairedTest:
    def test_it_equals_a_slow_loop(self):
        generator = np.random.default_rng(0)
        right_a, right_b = generator.random(40) < 0.6, generator.random(40) < 0.7
        drawn = sorted(
            sum(int(right_a[i]) - int(right_b[i]) for i in draw) / 40 for draw in draws(40, 201, seed=5)
        )  # fmt: skip
        found = paired_test(np.mean, [right_a], [right_b], num_resamples=201, seed=5)
        tail = min(sum(d >= -1e-12 for d in drawn), sum(d <= 1e-12 for d in drawn))
        expected = (right_a.mean() - right_b.mean(), drawn[5], drawn[195], min(1, 2 * (tail + 1) / 202))
        assert found == pytest.approx(expected)

    def test_equal_models_do_not_differ(self):
        values = np.random.default_rng(0).random(30)
        assert paired_test(np.mean, [values], [values]) == PairedTest(0, 0, 0, 1)

    def test_a_model_that_is_always_better_is_found_with_the_smallest_p_value(self):
        values = np.random.default_rng(0).random(30)
        found = paired_test(np.mean, [values], [values - 0.25], num_resamples=99)
        assert found == pytest.approx((0.25, 0.25, 0.25, 2 / 100))

    def test_exchanged_models_give_the_opposite(self):
        a, b = np.random.default_rng(0).random((2, 50))
        forth, back = paired_test(np.mean, [a], [b]), paired_test(np.mean, [b], [a])
        opposite = (-back.difference, -back.high, -back.low, back.p_value)
        assert forth == pytest.approx(opposite)

    def test_its_p_value_agrees_with_a_paired_t_test(self):
        generator = np.random.default_rng(3)
        a = generator.normal(size=300)
        noise = generator.normal(size=300)
        b = a + noise - noise.mean() + 0.1
        expected = scipy.stats.ttest_rel(a, b).pvalue
        assert 0.03 < expected < 0.2
        assert paired_test(np.mean, [a], [b], num_resamples=4000).p_value == pytest.approx(expected, abs=0.02)

    def test_the_p_value_is_small_exactly_if_the_interval_leaves_out_0(self):
        for seed in range(40):
            a, b = np.random.default_rng(seed).normal(size=(2, 30)) + [[0.4], [0]]
            found = paired_test(np.mean, [a], [b], num_resamples=199, seed=seed)
            if abs(found.p_value - 0.05) > 0.02:  # one rank decides in between
                assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)

    def test_it_takes_metrics_of_probabilities_and_labels(self):
        generator = np.random.default_rng(0)
        labels = generator.integers(3, size=200)
        good = 0.7 * np.eye(3)[labels] + 0.1
        bad = generator.dirichlet(np.ones(3), size=200)
        found = paired_test(brier_score, [good, labels], [bad, labels], num_resamples=50)
        assert found.difference == pytest.approx(brier_score(good, labels) - brier_score(bad, labels))
        assert found.high < 0 and found.p_value < 0.05

    @every_bad_option
    def test_an_option_out_of_range_is_an_error(self, option, match):
        with pytest.raises(ValueError, match=match):
            paired_test(np.mean, [[0.5, 0.5]], [[0.5, 0.5]], **option)

    def test_models_on_different_numbers_of_samples_are_an_error(self):
        with pytest.raises(ValueError, match=r"same N >= 1 samples.*found shapes \[\(3,\), \(2,\)\]"):
            paired_test(np.mean, [np.zeros(3)], [np.zeros(2)])

    def test_an_undefined_metric_is_an_error(self):
        with pytest.raises(ValueError, match="on 1000 of 1000 resamples"):
            paired_test(lambda a: np.nan, [[0, 1]], [[0, 1]])


class TestDefaults:
    """1,000 resamples, a level of 95 % and seed 0, of all functions that resample."""

    OPTIONS = {"num_resamples": 1000, "level": 0.95, "seed": 0}

    def test_one_resample_is_allowed(self):
        found = bootstrap_interval(np.mean, [0.25, 0.75], num_resamples=1)
        assert found.low == found.high

    def test_of_an_interval(self):
        values = np.random.default_rng(0).random(30)
        assert bootstrap_interval(np.mean, values) == bootstrap_interval(np.mean, values, **self.OPTIONS)

    def test_of_paired_tests(self):
        generator = np.random.default_rng(0)
        one, other = generator.random(30), generator.random(30)
        assert paired_test(np.mean, [one], [other]) == paired_test(np.mean, [one], [other], **self.OPTIONS)
        pairs = one, generator.random(30) < one, other, generator.random(30) < other
        expected = paired_calibration_error_test(*pairs, 15, scheme="equal_width", norm="l1", **self.OPTIONS)
        assert paired_calibration_error_test(*pairs) == expected


class TestPairedCalibrationErrorTest:
    @every_scheme
    @every_norm
    @pytest.mark.parametrize("size", [7, 60])  # with 7 samples a bin is drawn once, or not at all
    def test_it_equals_a_slow_loop(self, scheme, norm, size):
        confidence, correct = pairs_with_gap(np.random.default_rng(0), size, gap=0.1)
        other = np.clip(confidence - 0.05, 0, 1)
        parts = []
        for values in (confidence, other):
            observed, noise = slow_noise(values, correct, 4, scheme, norm, num_resamples=81, seed=3)
            slope = {
                "l1": np.sign(observed),
                "l2": observed / np.sqrt((observed**2).sum()),
                "max": np.sign(observed) * (np.abs(observed) == np.abs(observed).max()),
            }[norm]
            parts.append((np.linalg.norm(observed, NORMS[norm]), noise @ slope))
        difference = parts[0][0] - parts[1][0]
        likely = sorted(difference - (parts[0][1] - parts[1][1]))
        tail = min(sum(d >= 0 for d in likely), sum(d <= 0 for d in likely))
        expected = (difference, likely[2], likely[78], min(1, 2 * (tail + 1) / 82))
        options = {"scheme": scheme, "norm": norm, "num_resamples": 81, "seed": 3}
        found = paired_calibration_error_test(confidence, correct, other, correct, 4, **options)
        assert found == pytest.approx(expected)

    def test_it_agrees_with_the_general_test_where_all_gaps_are_large(self):
        confidence, correct = pairs_with_gap(np.random.default_rng(0), 3000, gap=0.19)
        a, b = (confidence, correct), (confidence - 0.06, correct)
        fast = paired_calibration_error_test(*a, *b, 5)
        general = paired_test(lambda c, r: calibration_error(c, r, 5), a, b)
        assert fast == pytest.approx(general, abs=0.005)

    def test_equal_models_do_not_differ(self):
        a = pairs_with_gap(np.random.default_rng(0), 100, gap=0.1)
        assert paired_calibration_error_test(*a, *a) == PairedTest(0, 0, 0, 1)

    def test_the_better_calibrated_model_is_found(self):
        confidence, correct = pairs_with_gap(np.random.default_rng(0), 2000, gap=0)
        found = paired_calibration_error_test(confidence, correct, confidence + 0.1, correct)
        assert found.high < 0 and found.p_value < 0.01

    def test_exchanged_models_give_the_opposite(self):
        confidence, correct = pairs_with_gap(np.random.default_rng(0), 500, gap=0)
        a, b = (confidence, correct), (confidence + 0.05, correct)
        forth, back = paired_calibration_error_test(*a, *b), paired_calibration_error_test(*b, *a)
        assert forth == pytest.approx((-back.difference, -back.high, -back.low, back.p_value))

    def test_models_with_opposite_gaps_of_one_size_are_rarely_called_different(self):
        rejected = 0
        for seed in range(100):
            confidence, correct = pairs_with_gap(np.random.default_rng(seed), 600, gap=0)
            models = (confidence + 0.06, correct, confidence - 0.06, correct)
            rejected += paired_calibration_error_test(*models, num_resamples=100).p_value <= 0.05
        assert rejected <= 11  # 5 on average; more than 11 by chance in 1 of 200 experiments

    def test_calibrated_models_are_rarely_called_different(self):
        rejected = 0
        for seed in range(100):
            a, b = np.random.default_rng(seed).random((2, 600))
            correct = np.random.default_rng(1000 + seed).random(600) < (a + b) / 2
            models = (a / 2 + 0.25, correct, b / 2 + 0.25, correct)  # each knows one half of what decides
            rejected += paired_calibration_error_test(*models, num_resamples=100).p_value <= 0.05
        assert rejected <= 11

    @every_bad_option
    def test_an_option_out_of_range_is_an_error(self, option, match):
        with pytest.raises(ValueError, match=match):
            paired_calibration_error_test([0.5, 0.5], [0, 1], [0.5, 0.5], [0, 1], **option)

    def test_models_on_different_numbers_of_samples_are_an_error(self):
        with pytest.raises(ValueError, match="same N >= 1 samples"):
            paired_calibration_error_test([0.5, 0.5], [0, 1], [0.5], [1])

    def test_what_the_calibration_error_refuses_is_refused(self):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            paired_calibration_error_test([0.5], [1], [1.5], [1])
