import math
import subprocess
import sys

import numpy as np
import pytest
import reference
import scipy.integrate
import scipy.stats
import sklearn.isotonic
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal.metrics.bin_free import (
    CalibrationTest,
    corp_decomposition,
    debiased_calibration_error,
    ece_sweep,
    ks_calibration_error,
    ks_test,
    monotone_num_bins,
    smooth_calibration_error,
    spiegelhalter_test,
)
from hf_adafocal.metrics.scores import calibration_error

ERRORS = [debiased_calibration_error, ece_sweep, smooth_calibration_error, ks_calibration_error]
TESTS = [ks_test, spiegelhalter_test]
EVERY = [*ERRORS, *TESTS, monotone_num_bins, corp_decomposition]
every_error = pytest.mark.parametrize("metric", ERRORS, ids=lambda f: f.__name__)
every_test = pytest.mark.parametrize("test", TESTS, ids=lambda f: f.__name__)
every_function = pytest.mark.parametrize("function", EVERY, ids=lambda f: f.__name__)

CONFIDENCE = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
PAIRS = st.lists(st.tuples(CONFIDENCE, st.booleans()), min_size=1, max_size=40).map(
    lambda pairs: (np.array([c for c, _ in pairs]), np.array([r for _, r in pairs]))
)


def draws(size, seed, power=1.0):
    """Uniform confidences; accuracy at confidence c is `c ** power`, so 1 is calibrated and 2 over-confident."""
    generator = np.random.default_rng(seed)
    confidence = generator.random(size)
    return confidence, (generator.random(size) < confidence**power).astype(float)


class TestEveryEstimator:
    @every_function
    @given(pairs=PAIRS, seed=st.integers(0, 9))
    def test_the_order_of_samples_does_not_matter(self, function, pairs, seed):
        order = np.random.default_rng(seed).permutation(len(pairs[0]))
        found, expected = function(pairs[0][order], pairs[1][order]), function(*pairs)
        # Near a gap of 0 rounding alone decides the statistic, and a root doubles its digits.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)

    @every_function
    @pytest.mark.parametrize("confidence", [[1.5, 0.5], [-0.1, 0.5], [math.nan, 0.5]], ids=str)
    def test_a_confidence_that_is_no_probability_is_an_error(self, function, confidence):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\] without NaN"):
            function(confidence, [1, 0])

    @every_function
    @pytest.mark.parametrize(("confidence", "correct"), [((3,), (2,)), ((3, 2), (3,)), ((0,), (0,))], ids=str)
    def test_shapes_that_do_not_fit_are_an_error(self, function, confidence, correct):
        with pytest.raises(ValueError, match="Expected two vectors of one length"):
            function(np.zeros(confidence), np.zeros(correct))

    @every_function
    def test_an_outcome_other_than_0_and_1_is_an_error(self, function):
        with pytest.raises(ValueError, match="must be 0 or 1"):
            function([0.5, 0.5], [0.5, 1])

    @every_function
    def test_the_arguments_are_left_alone(self, function):
        confidence, correct = draws(50, seed=0)
        function(confidence, correct)
        assert (confidence == draws(50, seed=0)[0]).all() and (correct == draws(50, seed=0)[1]).all()

    @every_error
    @given(pairs=PAIRS)
    def test_an_error_is_a_plain_fraction(self, metric, pairs):
        found = metric(*pairs)
        assert type(found) is float and 0 <= found <= 1

    @pytest.mark.parametrize("metric", [ece_sweep, smooth_calibration_error, ks_calibration_error])
    @given(confidence=CONFIDENCE, correct=st.lists(st.booleans(), min_size=1, max_size=30))
    def test_a_constant_predictor_has_its_gap_as_the_error(self, metric, confidence, correct):
        gap = abs(confidence - np.mean(correct))
        assert metric(np.full(len(correct), confidence), correct) == pytest.approx(gap, abs=1e-8)

    @pytest.mark.parametrize("metric", [ece_sweep, smooth_calibration_error, ks_calibration_error])
    @pytest.mark.parametrize("correct", [0, 1])
    def test_one_sample_has_its_residual_as_the_error(self, metric, correct):
        assert metric([0.3], [correct]) == pytest.approx(abs(0.3 - correct))

    @every_error
    def test_sure_and_right_is_perfect_and_sure_and_wrong_the_worst(self, metric):
        confidence = np.repeat([0.0, 1.0], 20)
        assert metric(confidence, confidence) == 0
        assert metric(np.ones(20), np.zeros(20)) == pytest.approx(1)
        assert metric(np.zeros(20), np.ones(20)) == pytest.approx(1)
        assert all(metric(np.ones(size), np.zeros(size)) <= 1 for size in (9, 18, 20, 21))  # whatever is rounded

    @every_error
    def test_an_over_confident_model_has_more_than_a_calibrated_one(self, metric):
        assert metric(*draws(2000, seed=0, power=2)) > 0.1 > 0.05 > metric(*draws(2000, seed=0))

    def test_importing_them_needs_numpy_alone(self):
        code = "import sys, hf_adafocal.metrics.bin_free; print(*{name.split('.')[0] for name in sys.modules})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        loaded = set(done.stdout.split())
        assert "numpy" in loaded and not {"torch", "scipy", "sklearn", "transformers"} & loaded


def slow_debiased(confidence, correct, edges):
    square = 0.0
    for count, mean, accuracy in reference.bins(confidence, correct, edges):
        if count > 1:
            square += count / len(confidence) * ((mean - accuracy) ** 2 - accuracy * (1 - accuracy) / (count - 1))
    return math.sqrt(max(square, 0))


def plain_l2(confidence, correct, num_bins):
    table = reference.bins(confidence, correct, reference.equal_mass_edges(confidence, num_bins))
    return math.sqrt(sum(n * (c - a) ** 2 for n, c, a in table) / len(confidence))


class TestDebiasedCalibrationError:
    @pytest.mark.parametrize("num_bins", [1, 10, 15, 60])
    @pytest.mark.parametrize("scheme", ["equal_mass", "equal_width"])
    @pytest.mark.parametrize("power", [1, 2])
    def test_it_equals_the_slow_loop(self, num_bins, scheme, power):
        pairs = draws(101, seed=1, power=power)
        edges = reference.equal_width_edges(num_bins)
        if scheme == "equal_mass":
            edges = reference.equal_mass_edges(pairs[0], num_bins)
        expected = pytest.approx(slow_debiased(*pairs, edges), abs=1e-8)
        assert debiased_calibration_error(*pairs, num_bins, scheme) == expected

    def test_a_bin_worked_by_hand(self):
        # Gap 1 - 1/2, noise of the accuracy (1/2)(1/2)/3.
        expected = math.sqrt(1 / 4 - 1 / 12)
        assert debiased_calibration_error([1, 1, 1, 1], [0, 1, 0, 1], 1) == pytest.approx(expected)

    def test_it_has_15_bins_of_equal_mass_unless_told(self):
        pairs = draws(500, seed=0, power=2)
        assert debiased_calibration_error(*pairs) == debiased_calibration_error(*pairs, 15, "equal_mass")

    def test_a_negative_square_is_reported_as_0(self):
        assert debiased_calibration_error([0.5] * 4, [0, 1, 0, 1]) == 0

    def test_a_bin_of_one_sample_contributes_nothing_but_counts(self):
        assert debiased_calibration_error([1.0], [0]) == 0
        three = debiased_calibration_error([0.2, 1.0, 1.0], [1, 0, 0], 2, "equal_width")
        assert three == pytest.approx(math.sqrt(2 / 3))

    def test_on_calibrated_draws_it_is_near_0_where_the_plain_one_is_not(self):
        samples = [draws(300, seed) for seed in range(60)]
        assert np.mean([debiased_calibration_error(*pairs) for pairs in samples]) < 0.04
        assert np.mean([plain_l2(*pairs, 15) for pairs in samples]) > 0.08

    def test_its_square_is_unbiased(self):
        # Confidence .8 and accuracy .6: the squared error is .04, of which the plain square makes .04 + .24 / 20.
        outcomes = np.random.default_rng(0).random((3000, 20)) < 0.6
        squares = [debiased_calibration_error(np.full(20, 0.8), row, 1) ** 2 for row in outcomes]
        plain = np.mean((0.8 - outcomes.mean(axis=1)) ** 2)
        assert plain == pytest.approx(0.052, abs=0.003)
        assert 0.04 <= np.mean(squares) < 0.045  # a little above, for a negative square counts as 0

    def test_an_unknown_scheme_is_an_error_that_names_both(self):
        with pytest.raises(ValueError, match="'equal_width' or 'equal_mass', found 'quantile'"):
            debiased_calibration_error([0.5], [1], scheme="quantile")

    def test_no_bin_is_an_error(self):
        with pytest.raises(ValueError, match="num_bins must be at least 1"):
            debiased_calibration_error([0.5], [1], 0)


def slow_num_bins(confidence, correct):
    """Every count of bins from 2 on, each binned anew, until an accuracy is below the one before."""
    for num_bins in range(2, len(confidence) + 1):
        table = reference.bins(confidence, correct, reference.equal_mass_edges(confidence, num_bins))
        accuracies = [round(a, 9) for n, _, a in table if n]
        if accuracies != sorted(accuracies):
            return num_bins - 1
    return len(confidence)


# Few distinct confidences, so ties abound; on a coarse lattice no rounding moves an edge over a sample.
LATTICE = st.lists(st.tuples(st.integers(0, 64), st.booleans()), min_size=1, max_size=40).map(
    lambda pairs: (np.array([c / 64 for c, _ in pairs]), np.array([float(r) for _, r in pairs]))
)


class TestMonotoneNumBins:
    @given(pairs=LATTICE)
    def test_it_equals_the_slow_loop(self, pairs):
        assert monotone_num_bins(*pairs) == slow_num_bins(*pairs)

    @pytest.mark.parametrize("power", [0.5, 1, 3, 20])
    @pytest.mark.parametrize("seed", range(3))
    def test_it_equals_the_slow_loop_on_larger_samples(self, power, seed):
        pairs = draws(250, seed, power)
        assert monotone_num_bins(*pairs) == slow_num_bins(*pairs)

    @given(misses=st.integers(0, 12), mixed=st.lists(st.booleans(), max_size=4), hits=st.integers(1, 12))
    def test_it_equals_the_slow_loop_where_few_samples_are_in_the_wrong_place(self, misses, mixed, hits):
        correct = np.array([0.0] * misses + [float(r) for r in mixed] + [1.0] * hits)
        confidence = np.arange(len(correct)) / 64
        assert monotone_num_bins(confidence, correct) == slow_num_bins(confidence, correct)

    def test_accuracy_that_never_falls_takes_every_sample(self):
        confidence = np.random.default_rng(0).random(50000)
        assert monotone_num_bins(confidence, confidence > 0.3) == 50000
        assert monotone_num_bins(confidence, np.ones(50000)) == 50000

    def test_accuracy_that_falls_at_once_takes_one_bin(self):
        assert monotone_num_bins([0.1, 0.2, 0.3, 0.4], [1, 1, 0, 0]) == 1

    def test_tied_confidences_share_one_bin_whatever_their_outcomes(self):
        assert monotone_num_bins([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0]) == 4
        assert ece_sweep([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0]) == 0


class TestEceSweep:
    @pytest.mark.parametrize("power", [0.5, 1, 2])
    def test_it_equals_the_slow_loop(self, power):
        confidence, correct = draws(200, seed=3, power=power)
        edges = reference.equal_mass_edges(confidence, slow_num_bins(confidence, correct))
        expected = reference.calibration_error(confidence, correct, edges)
        assert ece_sweep(confidence, correct) == pytest.approx(expected)

    def test_on_calibrated_draws_it_is_less_biased_than_15_bins(self):
        samples = [draws(300, seed) for seed in range(40)]
        swept = np.mean([ece_sweep(*pairs) for pairs in samples])
        assert swept < 0.75 * np.mean([calibration_error(*pairs, 15, scheme="equal_mass") for pairs in samples])


def slow_smoothed_error(confidence, correct, sigma, points=2001):
    """The integral of `|mean_i (y_i - c_i) K(t, c_i)|` over t by Simpson's rule, five mirror images on each side."""
    t = np.linspace(0, 1, points)[:, None]
    kernel = sum(
        scipy.stats.norm.pdf(t, sign * confidence + 2 * image, sigma) for image in range(-5, 6) for sign in (-1, 1)
    )
    return scipy.integrate.simpson(np.abs(kernel @ (correct - confidence)) / len(confidence), dx=1 / (points - 1))

    def test_a_model_that_ranks_the_wrong_way_round_gets_one_bin_where_gaps_cancel(self):
        assert ece_sweep([0.0, 0.0, 1.0, 1.0], [1, 1, 0, 0]) == 0


class TestSmoothCalibrationError:
    @pytest.mark.parametrize(("size", "power"), [(2, 1), (10, 2), (50, 1), (400, 1), (400, 3)])
    def test_it_is_the_bandwidth_at_which_the_quadrature_gives_the_bandwidth(self, size, power):
        pairs = draws(size, seed=0, power=power)
        found = smooth_calibration_error(*pairs)
        assert slow_smoothed_error(*pairs, found) == pytest.approx(found, rel=2e-4)

    # What relplot 1.0.3 prints for `relplot.smECE(*draws(size, 0, power))`. It searches the bandwidth in steps of
    # 1/1024 and integrates over 200 points, hence the tolerance.
    @pytest.mark.parametrize(
        ("size", "power", "printed"),
        [
            (100, 2, 0.20818299977667046),
            (1000, 1, 0.02977956854884101),
            (1000, 2, 0.1497708584475488),
            (10000, 1, 0.01401739066949222),
            (10000, 1.5, 0.10843143020369184),
            (50000, 1.1, 0.02048894415243725),
        ],
    )
    def test_it_is_what_relplot_prints(self, size, power, printed):
        assert smooth_calibration_error(*draws(size, seed=0, power=power)) == pytest.approx(printed, abs=1e-3)

    def test_it_does_not_cut_the_kernel_off_as_relplot_does(self):
        # Ten samples need a bandwidth of .27, and relplot's kernel ends at a distance of .5: it prints .2841.
        pairs = draws(10, seed=0, power=2)
        assert smooth_calibration_error(*pairs) == pytest.approx(0.2670, abs=1e-4)
        assert slow_smoothed_error(*pairs, 0.2670) == pytest.approx(0.2670, abs=1e-4)

    def test_it_does_not_jump_where_a_bin_would_end(self):
        below = smooth_calibration_error([0.4999, 0.5], [0, 1])
        assert smooth_calibration_error([0.5, 0.5001], [0, 1]) == pytest.approx(below, abs=1e-3)

    def test_confidences_near_1_are_resolved_as_those_near_0(self):
        confidence, correct = np.full(3000, 1 - 5e-5), np.arange(3000) > 0  # all in the last cell of the grid
        mirrored = smooth_calibration_error(1 - confidence, ~correct)
        assert smooth_calibration_error(confidence, correct) == pytest.approx(mirrored, abs=1e-8)

    def test_residuals_of_both_signs_at_one_confidence_cancel(self):
        assert smooth_calibration_error([0.5, 0.5], [0, 1]) == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("wrong", [0, 1])
    def test_of_sure_and_always_wrong_samples_it_is_1_whatever_the_sum_is_rounded_to(self, wrong):
        found = [smooth_calibration_error(np.full(n, 1.0 - wrong), np.full(n, wrong)) for n in range(9, 40)]
        assert max(found) == 1 and min(found) == pytest.approx(1, abs=1e-12)


class TestCorpDecomposition:
    @given(pairs=PAIRS)
    def test_the_score_is_miscalibration_less_discrimination_plus_uncertainty(self, pairs):
        score, miscalibration, discrimination, uncertainty = corp_decomposition(*pairs)
        assert score == pytest.approx(np.mean((pairs[0] - pairs[1]) ** 2))
        assert score == pytest.approx(miscalibration - discrimination + uncertainty)
        assert min(miscalibration, discrimination) >= 0 and 0 <= uncertainty <= 0.25

    @given(pairs=PAIRS)
    def test_it_equals_scikit_learns_isotonic_regression(self, pairs):
        confidence, correct = pairs
        ranks = np.unique(confidence, return_inverse=True)[1]  # scikit-learn pools values that differ by 1e-15 alone
        best = np.mean((sklearn.isotonic.IsotonicRegression().fit_transform(ranks, correct) - correct) ** 2)
        expected = (np.mean((confidence - correct) ** 2) - best, np.var(correct) - best)
        assert corp_decomposition(*pairs)[1:3] == pytest.approx(expected, abs=1e-9)

    def test_numbers_worked_by_hand(self):
        # Pooled to .5, .5, 1: score (.04 + .36 + .01) / 3, best 1/6, uncertainty 2/9.
        found = corp_decomposition([0.2, 0.6, 0.9], [1, 0, 1])
        score, best = (0.64 + 0.36 + 0.01) / 3, 0.5 / 3
        assert found == pytest.approx((score, score - best, 2 / 9 - best, 2 / 9))
        assert found._fields == ("score", "miscalibration", "discrimination", "uncertainty")

    def test_ties_are_pooled_before_the_fit(self):
        for correct in ([0, 1, 1], [1, 0, 1]):
            assert corp_decomposition([0.5, 0.5, 0.5], correct) == pytest.approx((0.25, 1 / 36, 0, 2 / 9))

    def test_a_recalibrated_model_has_no_miscalibration(self):
        confidence, correct = draws(300, seed=0, power=2)
        recalibrated = sklearn.isotonic.IsotonicRegression().fit_transform(confidence, correct)
        assert corp_decomposition(recalibrated, correct).miscalibration == pytest.approx(0, abs=1e-12)

    def test_one_sample_is_all_miscalibration(self):
        assert corp_decomposition([0.3], [1]) == pytest.approx((0.49, 0.49, 0, 0))

    def test_its_values_are_plain_numbers(self):
        assert {type(value) for value in corp_decomposition(*draws(20, seed=0))} == {float}


def slow_ks(confidence, correct):
    """The gap at every threshold, each summed anew over the samples up to it."""
    thresholds = sorted(set(confidence.tolist()))
    return max(abs(sum(y - c for c, y in zip(confidence, correct, strict=True) if c <= t)) for t in thresholds)


class TestKsCalibrationError:
    @given(pairs=PAIRS)
    def test_it_equals_the_slow_loop(self, pairs):
        confidence, correct = pairs[0], pairs[1].astype(float)
        expected = slow_ks(confidence, correct) / len(confidence)
        assert ks_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-12)

    @given(pairs=PAIRS)
    def test_it_is_at_least_the_gap_of_the_means(self, pairs):
        assert ks_calibration_error(*pairs) >= abs(pairs[0].mean() - pairs[1].mean()) - 1e-12

    def test_ties_are_cumulated_together(self):
        assert ks_calibration_error([0.5, 0.5, 0.5, 0.5], [1, 1, 0, 0]) == 0


class TestKsTest:
    def test_the_statistic_is_the_error_over_its_standard_deviation(self):
        confidence, correct = draws(200, seed=0)
        deviation = math.sqrt(sum(c * (1 - c) for c in confidence)) / 200
        expected = ks_calibration_error(confidence, correct) / deviation
        assert ks_test(confidence, correct).statistic == pytest.approx(expected)

    # P(max |B| <= x) of Brownian motion on [0, 1]: 2.2414 and 1.96 are its .95 and .9 quantiles.
    @pytest.mark.parametrize(("quantile", "p_value"), [(1.9600, 0.1), (2.2414, 0.05), (2.8070, 0.01)])
    def test_the_p_value_is_that_of_the_tables(self, quantile, p_value):
        # A statistic of choice: one confidence of 1/2 and k more hits than half give k / sqrt(n / 4).
        size = 10**6
        hits = size // 2 + round(quantile * math.sqrt(size / 4))
        found = ks_test(np.full(size, 0.5), np.arange(size) < hits)
        assert found.statistic == pytest.approx(quantile, abs=1e-3)
        assert found.p_value == pytest.approx(p_value, rel=5e-3)

    def test_it_is_the_chance_that_a_random_walk_reaches_as_far(self):
        steps = np.random.default_rng(0).choice([-1, 1], size=(4000, 900))
        reach = np.abs(np.cumsum(steps, axis=1)).max(axis=1) / 30
        for hits in (9, 12, 16, 21):  # 100 samples at one half: statistics .9, 1.2 and so on after subtracting 50
            found = ks_test(np.full(100, 0.5), np.arange(100) < 50 + hits // 2)
            assert found.p_value == pytest.approx(np.mean(reach >= found.statistic), abs=0.05)

    @pytest.mark.parametrize("hits", [10, 15, 25, 40, 49, 50, 51, 75, 150])
    def test_the_p_value_equals_the_long_sum_over_reflected_paths(self, hits):
        found = ks_test(np.full(10000, 0.5), np.arange(10000) < 5000 + hits)
        reflections = np.arange(200)
        terms = (-1.0) ** reflections * scipy.stats.norm.sf((2 * reflections + 1) * hits / 50)
        assert found.statistic == pytest.approx(hits / 50)
        assert found.p_value == pytest.approx(4 * terms.sum(), rel=1e-12)

    def test_on_calibrated_draws_the_p_values_are_about_uniform(self):
        values = [ks_test(*draws(500, seed)).p_value for seed in range(400)]
        assert scipy.stats.kstest(values, "uniform").pvalue > 0.01

    def test_a_p_value_far_out_keeps_its_digits(self):
        found = ks_test(np.full(400, 0.5), np.ones(400))
        assert found.statistic == 20
        assert found.p_value == pytest.approx(4 * scipy.stats.norm.sf(20), rel=1e-9)


class TestSpiegelhalterTest:
    def test_it_equals_the_slow_loop(self):
        confidence, correct = draws(200, seed=0, power=1.3)
        pairs = list(zip(confidence, correct, strict=True))
        # In terms of the Brier score, its mean and its variance, which is how the test is derived.
        score = sum((y - p) ** 2 for p, y in pairs)
        expected = sum(p * (1 - p) for p, _ in pairs)
        deviation = math.sqrt(sum((1 - 2 * p) ** 2 * p * (1 - p) for p, _ in pairs))
        found = spiegelhalter_test(confidence, correct)
        assert found.statistic == pytest.approx((score - expected) / deviation)
        assert found.p_value == pytest.approx(2 * scipy.stats.norm.sf(abs(found.statistic)))

    def test_on_calibrated_draws_z_is_standard_normal(self):
        values = [spiegelhalter_test(*draws(300, seed)) for seed in range(400)]
        assert scipy.stats.kstest([value.statistic for value in values], "norm").pvalue > 0.01
        assert scipy.stats.kstest([value.p_value for value in values], "uniform").pvalue > 0.01

    def test_over_confident_is_positive_and_under_confident_negative(self):
        assert spiegelhalter_test([0.9] * 10 + [0.1] * 10, [1, 0] * 10).statistic > 3
        assert spiegelhalter_test([0.7] * 20 + [0.3] * 20, [1] * 20 + [0] * 20).statistic < -3

    def test_numbers_worked_by_hand(self):
        # Five of -.2 x .6 and five of -.8 x -.6, over the root of ten times .6 x .6 x .16.
        found = spiegelhalter_test([0.2] * 5 + [0.8] * 5, [0] * 10).statistic
        assert found == pytest.approx((5 * -0.12 + 5 * 0.48) / math.sqrt(0.576))

    def test_errors_that_mirror_each_other_at_one_half_cancel(self):
        correct = [1] * 4 + [0] * 6 + [1] * 8 + [0] * 2  # .4 at a confidence of .3, .8 at .7
        assert spiegelhalter_test([0.3] * 10 + [0.7] * 10, correct).statistic == pytest.approx(0, abs=1e-12)

    def test_at_one_half_it_sees_nothing(self):
        assert spiegelhalter_test([0.5] * 10, [1] * 10) == (0, 1)


class TestCalibrationTest:
    @every_test
    def test_its_values_are_plain_numbers_by_name(self, test):
        found = test(*draws(100, seed=0))
        assert isinstance(found, CalibrationTest) and found._fields == ("statistic", "p_value")
        assert type(found.statistic) is float and type(found.p_value) is float

    @every_test
    @given(pairs=PAIRS)
    def test_the_p_value_is_a_probability_and_nothing_is_nan(self, test, pairs):
        found = test(*pairs)
        assert 0 <= found.p_value <= 1 and not math.isnan(found.statistic)

    @every_test
    def test_certain_and_always_right_is_calibrated_for_sure(self, test):
        assert test([0.0, 1.0], [0, 1]) == (0, 1)

    @every_test
    @pytest.mark.parametrize("correct", [[1, 1], [0, 0], [1, 0]], ids=str)
    def test_certain_and_once_wrong_is_not_calibrated_for_sure(self, test, correct):
        assert test([0.0, 1.0], correct) == (math.inf, 0)

    @every_test
    def test_one_sample_has_a_p_value_that_rejects_nothing(self, test):
        assert test([0.4], [1]).p_value > 0.1 and test([0.4], [0]).p_value > 0.1

    @every_test
    def test_an_over_confident_model_is_found_out(self, test):
        confidence, correct = draws(2000, seed=0, power=2)
        sure = confidence > 0.5
        assert test(confidence[sure], correct[sure]).p_value < 1e-6
