import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_adafocal.metrics.binning import binned
from hf_adafocal.metrics.classwise import classwise_calibration_error
from hf_adafocal.metrics.intervals import (
    Interval,
    _count_below,
    _signed_bounds,
    calibration_error_interval,
    classwise_error_interval,
    count_above,
)
from hf_adafocal.metrics.scores import calibration_error, softmax

NORMS = ("l1", "l2", "max")
every_norm = pytest.mark.parametrize("norm", NORMS)
every_scheme = pytest.mark.parametrize("scheme", ["equal_width", "equal_mass"])
every_bad_level = pytest.mark.parametrize("level", [0, 1, 95, np.nan])
PAIRS = st.lists(st.tuples(st.one_of(st.sampled_from([0.0, 0.3, 1.0]), st.floats(0, 1)), st.booleans()), min_size=1)
PAIRS = PAIRS.map(lambda pairs: (np.array([c for c, _ in pairs]), np.array([r for _, r in pairs])))


def clopper_pearson(events, size, tail):
    """Exact bounds of a binomial mean, each with the given tail; the edge cases by Boole's inequality."""
    upper = scipy.stats.beta.isf(tail, events + 1, size - events) if events < size else 1.0
    lower = scipy.stats.beta.ppf(tail, events, size - events + 1) if events else 0.0
    if events == size - 1:
        upper = max(upper, 1 - tail / size)
    if events == 1:
        lower = min(lower, tail / size)
    return lower * size, upper * size


def slow_signed_bounds(gaps, positive, negative, occupied, size, weight, tail):
    """Bounds over all signs of the bins, one after the other."""
    low, high = -np.inf, -np.inf
    for signs in itertools.product([1, -1], repeat=len(gaps)):
        total = sum(s * g for s, g in zip(signs, gaps, strict=True))
        events = sum(p if s > 0 else n for s, p, n in zip(signs, positive, negative, strict=True))
        high = max(high, total + weight * (clopper_pearson(events, size, tail)[1] - events))
        low = max(low, total - weight * (events - clopper_pearson(events, size, tail / 2**occupied)[0]))
    return low, high


def pairs_with_gap(generator, size, gap):
    """Confidence in [0.2, 0.8] plus the gap, which is a number or a function of it; and outcomes at that rate."""
    rate = 0.2 + 0.6 * generator.random(size)
    shift = gap(rate) if callable(gap) else gap
    return rate + shift, generator.random(size) < rate


def predictions(size=200, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(size, classes)) * 2
    return softmax(2 * logits), (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)


def normal_bounds(confidence, correct, value, occupied, tail):
    """Bounds of a mean over drawn samples whose second moment is the Brier score of the pairs."""
    moment, size = np.mean((confidence - correct) ** 2), len(confidence)
    means = np.linspace(0, value, 100_001)
    above = means - scipy.stats.norm.ppf(tail) * np.sqrt(np.maximum(moment - means**2, 0) / size)
    below = value + scipy.stats.norm.ppf(tail / 2**occupied) * math.sqrt(max(moment - value**2, 0) / size)
    return below, above.max()


@pytest.mark.parametrize("tail", [0.025, 0.2])
@pytest.mark.parametrize("size", [1, 2, 10])
def test_counts_have_the_exact_bounds_of_their_mean(size, tail):
    events = np.arange(size + 1.0)
    low, high = events - _count_below(events, size, math.log(tail)), events + count_above(events, size, tail)
    expected = np.array([clopper_pearson(count, size, tail) for count in events])
    np.testing.assert_allclose(np.column_stack([low, high]), expected, rtol=1e-9)


def test_below_the_smallest_tail_a_count_is_bounded_by_hoeffding():
    # exp(-700) is a number and exp(-800) is 0: sqrt(700 * 1000 / 2) = 591.6, sqrt(800 * 1000 / 2) = 632.5
    for log_tail, reach in ((-700.0, 591.608), (-800.0, 632.456)):
        assert _count_below(np.array([0.0, 3.0, 900.0]), 1000, log_tail) == pytest.approx([0, 3, reach])


@given(
    bins=st.lists(
        st.tuples(st.floats(-1, 1), st.integers(0, 3), st.integers(0, 3)).map(
            lambda part: (part[0] * (part[1] + part[2]), part[1], part[2])
        ),
        min_size=1,
        max_size=4,
    ),
    weight=st.sampled_from([1, 2]),
    tail=st.sampled_from([1e-12, 0.025, 0.25, 0.45]),
)
@example(bins=[(-0.4, 0, 1)], weight=1, tail=0.025)
@example(bins=[(-0.25, 0, 1)], weight=1, tail=0.45)
def test_bounds_of_signed_sums_are_those_of_each_sign_in_turn(bins, weight, tail):
    gaps, positive, negative = (np.array(part) for part in zip(*bins, strict=True))
    size = max(int((positive + negative).sum()), 1)
    found = _signed_bounds(gaps, positive, negative, len(gaps), size, weight, tail)
    expected = slow_signed_bounds(gaps, positive, negative, len(gaps), size, weight, tail)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("weight", [1, 2])
@pytest.mark.parametrize("part", [0.5, 0.7, 0.83, 0.9])
def test_a_sum_far_below_the_largest_can_have_the_largest_bound(weight, part):
    # Right samples of one bin are events of its negative sign, wrong ones of the other bin of its positive sign. The
    # largest sum counts all 2000 events and has nothing above it; half as many events leave room for many more.
    tail = 1e-12
    away = part * weight * math.sqrt(-math.log(tail) * 1000)
    arguments = (np.array([-800.0, away / 2]), np.array([0, 1000]), np.array([1000, 0]), 2, 2000, weight, tail)
    found = _signed_bounds(*arguments)
    assert found == pytest.approx(slow_signed_bounds(*arguments)) and found[1] > 800 + away / 2


class TestCalibrationErrorInterval:
    @every_scheme
    @pytest.mark.parametrize(("size", "num_bins"), [(1, 1), (2, 2), (3, 3), (40, 5), (300, 7)])
    @pytest.mark.parametrize("level", [0.5, 0.95])
    def test_its_ends_are_the_exact_ones_over_all_signs_of_the_bins(self, scheme, size, num_bins, level):
        confidence, correct = pairs_with_gap(np.random.default_rng(size), size, gap=0.1)
        stats = binned(confidence, correct, num_bins, scheme)
        held = stats.count > 0
        count, right = stats.count[held], np.rint(stats.accuracy * stats.count)[held].astype(int)
        gaps = stats.confidence[held] * count - right
        low, high = slow_signed_bounds(gaps, count - right, right, len(count), size, 1, (1 - level) / 2)
        found = calibration_error_interval(confidence, correct, num_bins, scheme=scheme, level=level)
        below, above = normal_bounds(confidence, correct, found.value, len(count), (1 - level) / 2)
        expected = max(min(low / size, below), 0), min(max(high / size, above), 1)
        assert found[1:] == pytest.approx(expected, abs=1e-7)

    def test_gaps_that_differ_between_drawn_confidences_are_covered_too(self):
        # Certain outcomes: given the confidences nothing is random, and 90 % of the samples have no gap.
        generator, limit, passed = np.random.default_rng(0), 0.055, 0
        for _ in range(200):
            confidence = np.where(generator.random(1000) < 0.9, 1.0, 0.55)
            passed += calibration_error_interval(confidence, confidence == 1).high < limit
        assert passed <= 11  # 5 on average

    def test_the_variance_of_drawn_confidences_widens_both_ends(self):
        confidence = np.repeat([0.9, 0.5], [600, 400])  # always right: gaps of .1 and .5, mean .26, second moment .106
        found = calibration_error_interval(confidence, np.ones(1000))
        error = math.sqrt((0.106 - 0.26**2) / 1000)
        assert found.high == pytest.approx(0.26 + 1.959964 * error)
        assert found.low == pytest.approx(0.26 + scipy.stats.norm.ppf(0.025 / 4) * error)

    def test_an_error_as_large_as_its_second_moment_allows_has_the_largest_bound_of_all_signs(self):
        # Every gap is 0.3, half of them of each sign: with one sign turned the mean is less and its variance more.
        confidence, correct = np.repeat([0.3, 0.7], 5), np.repeat([0, 1], 5)
        found = calibration_error_interval(confidence, correct, 15, level=0.5)
        slope = 0.67449 / math.sqrt(10)
        assert found.high >= 0.3 * math.sqrt(1 + slope**2) - 1e-6

    def test_with_one_bin_it_is_the_interval_of_clopper_and_pearson(self):
        # 0.98 - 20 / 20 and 0.98 - 50 / 100: the gap is known up to the accuracy
        found = calibration_error_interval(np.full(20, 0.98), np.ones(20))
        assert found == pytest.approx((0.02, 0, 0.98 - 0.025 ** (1 / 20)))
        found = calibration_error_interval(np.full(100, 0.98), np.arange(100) % 2)
        accuracy = scipy.stats.binomtest(50, 100).proportion_ci(0.95, method="exact").low
        low = 0.98 - scipy.stats.binomtest(50, 100).proportion_ci(0.975, method="exact").high
        assert found == pytest.approx((0.48, low, 0.98 - accuracy))

    @every_norm
    @pytest.mark.parametrize("level", [0.5, 0.9])
    @pytest.mark.parametrize("seed", range(6))
    def test_summed_over_all_outcomes_of_few_samples_no_end_fails_more_often_than_it_says(self, norm, level, seed):
        generator = np.random.default_rng(seed)
        size, num_bins = 7, 3
        confidence = generator.choice([generator.random(size), np.full(size, 0.9), np.full(size, 0.05)])
        rate = generator.choice([generator.random(size), confidence, np.minimum(confidence + 0.05, 1)])
        true = binned(confidence, rate, num_bins)
        gaps = np.abs(true.gap)
        truth = {
            "l1": gaps @ true.count / size,
            "l2": math.sqrt(gaps**2 @ true.count / size),
            "max": gaps.max(),
        }[norm]
        above = below = 0.0
        for outcome in itertools.product([0, 1], repeat=size):
            chance = np.prod(np.where(outcome, rate, 1 - rate))
            found = calibration_error_interval(confidence, outcome, num_bins, norm=norm, level=level)
            above += chance * (found.low > truth + 1e-9)
            below += chance * (found.high < truth - 1e-9)
        assert above <= (1 - level) / 2 + 1e-9 and below <= (1 - level) / 2 + 1e-9

    @every_scheme
    @every_norm
    @given(pairs=PAIRS, num_bins=st.sampled_from([1, 2, 15]))
    @settings(max_examples=30)
    def test_the_value_is_the_calibration_error_and_lies_inside(self, scheme, norm, pairs, num_bins):
        found = calibration_error_interval(*pairs, num_bins, scheme=scheme, norm=norm)
        assert found.value == calibration_error(*pairs, num_bins, scheme=scheme, norm=norm)
        assert 0 <= found.low <= found.value <= found.high <= 1

    @pytest.mark.parametrize(
        ("gap", "truth"),
        [
            (0.0, 0.0),
            (0.05, 0.05),
            (lambda rate: np.where(rate > 0.7, 0.2, 0.0), 0.2 / 6),
            (lambda rate: np.where(rate < 0.5, -0.1, 0.1), 0.1),
        ],
        ids=["calibrated", "over-confident", "wrong in few bins", "under- and over-confident"],
    )
    def test_it_covers_the_true_error_of_drawn_confidences(self, gap, truth):
        trials = [pairs_with_gap(np.random.default_rng(seed), 600, gap) for seed in range(200)]
        found = [calibration_error_interval(*pairs) for pairs in trials]
        assert sum(one.low <= truth <= one.high for one in found) >= 190

    def test_it_narrows_to_the_true_error(self):
        pairs = pairs_with_gap(np.random.default_rng(0), 200_000, gap=0.05)
        found = calibration_error_interval(*pairs)
        assert 0.04 < found.low < 0.05 < found.high < 0.055

    def test_low_is_0_for_a_calibrated_model_and_above_0_for_one_that_is_not(self):
        calibrated, other = (pairs_with_gap(np.random.default_rng(0), 1000, gap) for gap in (0, 0.15))
        assert calibration_error_interval(*calibrated).low == 0 < calibration_error_interval(*other).low

    @every_norm
    def test_gaps_of_exactly_0_are_not_taken_for_certain(self, norm):
        found = calibration_error_interval(np.full(400, 0.5), np.arange(400) % 2, norm=norm)
        # one bin: a mean of 400 coins
        assert found.low == found.value == 0 and found.high == pytest.approx(1.96 * 0.5 / 20, rel=0.15)

    @pytest.mark.parametrize("norm", ["l2", "max"])
    def test_bins_are_bounded_each_on_its_own_for_other_norms(self, norm):
        confidence, correct = np.repeat([0.25, 0.75], [40, 10]), np.repeat([1, 0, 1, 0], [10, 30, 9, 1])
        found = calibration_error_interval(confidence, correct, 2, norm=norm)
        uppers, lowers = [], []
        tail = 0.025 if norm == "max" else 0.025 / 2
        for p, right, size in ((0.25, 10, 40), (0.75, 9, 10)):
            low, high = clopper_pearson(right, size, tail)
            uppers.append(max(high / size - p, p - low / size))
            low, high = clopper_pearson(right, size, 0.025 / 4)
            lowers.append(max(low / size - p, p - high / size, 0))
        if norm == "max":
            expected = max(lowers), max(uppers)
        else:
            expected = (math.sqrt(np.dot([0.8, 0.2], np.square(ends))) for ends in (lowers, uppers))
        assert found[1:] == pytest.approx(tuple(expected))

    @pytest.mark.parametrize("norm", ["l2", "max"])
    def test_lower_ends_of_other_norms_are_above_0_where_the_gaps_are_large(self, norm):
        confidence, correct = np.repeat([0.1, 0.9], [300, 100]), np.repeat([1, 0, 1, 0], [240, 60, 10, 90])
        found = calibration_error_interval(confidence, correct, 2, norm=norm)
        tail = 0.025 / 4
        lowers = [clopper_pearson(240, 300, tail)[0] / 300 - 0.1, 0.9 - clopper_pearson(10, 100, tail)[1] / 100]
        low = max(lowers) if norm == "max" else math.sqrt(np.dot([0.75, 0.25], np.square(lowers)))
        assert found.low == pytest.approx(low)

    @every_scheme
    def test_the_order_of_samples_does_not_matter(self, scheme):
        confidence, correct = pairs_with_gap(np.random.default_rng(0), 500, gap=0.1)
        one = calibration_error_interval(confidence, correct, scheme=scheme)
        assert calibration_error_interval(confidence[::-1], correct[::-1], scheme=scheme) == pytest.approx(one)

    def test_a_larger_level_is_wider(self):
        pairs = pairs_with_gap(np.random.default_rng(0), 500, gap=0.1)
        inner, outer = (calibration_error_interval(*pairs, level=level) for level in (0.5, 0.99))
        assert outer.low < inner.low < inner.value < inner.high < outer.high

    def test_one_sample_tells_next_to_nothing(self):
        found = calibration_error_interval([0.75], [1])
        assert found == pytest.approx((0.25, 0, 0.725))  # an accuracy of 0.025 makes a right one in 40 draws

    def test_bins_without_number_leave_a_lower_end_of_0(self):
        generator = np.random.default_rng(0)
        confidence = generator.random(2000)
        found = calibration_error_interval(confidence, generator.random(2000) < confidence, 2000)
        assert found.low == 0 and found.value > 0.2

    def test_the_lower_end_of_a_thousand_bins_is_that_of_hoeffding(self):
        confidence = np.repeat((np.arange(1000) + 0.5) / 1000, 20)  # always wrong: a mean gap of .5
        found = calibration_error_interval(confidence, np.zeros(20_000), 1000)
        log_tail = math.log(0.025) - 1000 * math.log(2)
        assert found.value == pytest.approx(0.5)
        assert found.low == pytest.approx(0.5 - math.sqrt(-log_tail / 2 / 20_000))

    def test_the_normal_lower_end_of_a_thousand_bins_has_the_quantile_of_a_tail_that_exp_cannot_tell_from_0(self):
        # Half of the samples are right at 0.5 as often as not, the others never at 0.9 and more: residuals of variance
        # above 1/4, for which the normal bound is farther away than the one of Hoeffding.
        confidence = np.repeat(np.concatenate([10_000.5 + np.arange(500), 19_000.5 + np.arange(500)]) / 20_000, 20)
        correct = np.concatenate([np.tile([0, 1], 5000), np.zeros(10_000)])
        found = calibration_error_interval(confidence, correct, 20_000)
        value = (np.abs(confidence[:10_000] - 0.5).sum() + confidence[10_000:].sum()) / 20_000
        variance = ((confidence - correct) ** 2).mean() - value**2
        quantile = math.sqrt(2 * (1000 * math.log(2) - math.log(0.025)))
        assert variance > 0.25 and found.value == pytest.approx(value)
        assert found.low == pytest.approx(value - quantile * math.sqrt(variance / 20_000))

    def test_its_numbers_are_plain_floats(self):
        for norm in NORMS:
            found = calibration_error_interval(np.array([0.2, 0.9], dtype=np.float32), [0, 1], norm=norm)
            assert {type(number) for number in found} == {float}

    def test_the_arguments_are_left_alone(self):
        pairs = pairs_with_gap(np.random.default_rng(0), 20, gap=0.1)
        calibration_error_interval(*pairs)
        again = pairs_with_gap(np.random.default_rng(0), 20, gap=0.1)
        assert all((a == b).all() for a, b in zip(pairs, again, strict=True))

    @every_bad_level
    def test_a_level_out_of_range_is_an_error(self, level):
        with pytest.raises(ValueError, match=f"level must lie strictly between 0 and 1, found {level}; 0.95 stands"):
            calibration_error_interval([0.5, 0.5], [0, 1], level=level)
        with pytest.raises(ValueError, match=f"level must lie strictly between 0 and 1, found {level}"):
            classwise_error_interval([[0.5, 0.5]], [0], level=level)

    @pytest.mark.parametrize(
        ("pairs", "option", "match"),
        [
            (([1.5], [1]), {}, r"must lie in \[0, 1\]"),
            (([0.5], [2]), {}, "must be 0 or 1"),
            (([0.5], [1, 0]), {}, r"found shapes \(1,\) and \(2,\)"),
            (([0.5], [1]), {"norm": "l3"}, "found 'l3'"),
            (([0.5], [1]), {"scheme": "quantile"}, "found 'quantile'"),
            (([0.5], [1]), {"num_bins": 0}, "num_bins must be at least 1"),
        ],
        ids=str,
    )
    def test_what_the_calibration_error_refuses_is_refused(self, pairs, option, match):
        with pytest.raises(ValueError, match=match):
            calibration_error_interval(*pairs, **option)


class TestClasswiseErrorInterval:
    @pytest.mark.parametrize(("size", "classes", "num_bins"), [(1, 2, 1), (5, 2, 3), (60, 3, 3), (60, 1, 4)])
    @pytest.mark.parametrize("level", [0.5, 0.95])
    def test_its_ends_are_the_exact_ones_over_all_signs_of_all_bins(self, size, classes, num_bins, level):
        probabilities, labels = predictions(size, classes)
        gaps, hits = [], []
        for k in range(classes):
            stats = binned(probabilities[:, k], labels == k, num_bins)
            gaps += (stats.gap * stats.count)[stats.count > 0].tolist()
            hits += np.rint(stats.accuracy * stats.count)[stats.count > 0].astype(int).tolist()
        # a class whose first bin is empty still counts as one more bin, which only lowers the lower end
        occupied = len(gaps) + sum((probabilities[:, k] > 1 / num_bins).all() for k in range(classes))
        low, high = slow_signed_bounds(gaps, np.zeros(len(gaps), int), hits, occupied, size, 2, (1 - level) / 2)
        found = classwise_error_interval(probabilities, labels, num_bins, level=level)
        assert found.value == pytest.approx(classwise_calibration_error(probabilities, labels, num_bins))
        scale = size * classes
        expected = max(low / scale, 0), max(min(high / scale, 2 / classes, 1), found.value)
        assert found[1:] == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("seed", range(4))
    def test_summed_over_all_labels_of_few_samples_no_end_fails_more_often_than_it_says(self, seed):
        generator = np.random.default_rng(seed)
        size, classes, num_bins, level = 5, 3, 2, 0.6
        probabilities = generator.dirichlet(np.ones(classes), size=size)
        rates = probabilities if seed % 2 else generator.dirichlet(np.ones(classes), size=size)
        truth = (
            sum(
                np.abs(stats.gap) @ stats.count / size
                for stats in (binned(probabilities[:, k], rates[:, k], num_bins) for k in range(classes))
            )
            / classes
        )
        above = below = 0.0
        for labels in itertools.product(range(classes), repeat=size):
            chance = np.prod(rates[np.arange(size), labels])
            found = classwise_error_interval(probabilities, np.array(labels), num_bins, level=level)
            above += chance * (found.low > truth + 1e-9)
            below += chance * (found.high < truth - 1e-9)
        assert above <= 0.2 + 1e-9 and below <= 0.2 + 1e-9

    def test_a_thousand_classes_take_no_quantile_of_a_vanishing_tail(self):
        generator = np.random.default_rng(0)
        probabilities = generator.dirichlet(np.full(1000, 0.05), size=300)
        labels = np.array([generator.choice(1000, p=row) for row in probabilities])
        found = classwise_error_interval(probabilities, labels)
        assert found.low == 0 < found.value < found.high < 2 / 1000

    def test_a_bin_counts_as_occupied_where_its_gap_equals_its_hits(self):
        # Class 0: 400 probabilities of .5 and 100 hits, a gap of 100. Class 1: 300 hits, a gap of -100.
        found = classwise_error_interval(np.full((400, 2), 0.5), np.arange(400) % 4 > 0)
        below = 300 - clopper_pearson(300, 400, 0.025 / 2**4)[0]  # two bins of each class: the first one counts always
        assert found.low == pytest.approx((200 - 2 * below) / 800) and found.low > 0

    def test_one_class_has_an_error_of_1_at_most(self):
        assert classwise_error_interval([[1.0]], [0]) == (0, 0, 1)

    def test_rows_that_sum_to_a_little_more_than_1_have_ends_on_both_sides_of_the_value(self):
        found = classwise_error_interval([[0.504, 0.5, 0.0]], [2])  # (.504 + .5 + 1) / 3
        assert found.low <= found.value <= found.high and found.value == pytest.approx(2.004 / 3)

    def test_a_sure_model_that_is_always_wrong_is_found_out(self):
        found = classwise_error_interval(np.tile([1.0, 0.0], (500, 1)), np.ones(500, dtype=int))
        assert found.value == 1 and 0.9 < found.low < 1 == found.high

    def test_values_on_rounded_edges_count_in_the_bin_of_the_metric(self):
        column = np.array([1 / 15, 0.2, 1 / 3, 0.6], dtype=np.float32)
        probabilities = np.stack([column, 1 - column], axis=1)
        found = classwise_error_interval(probabilities, [0, 1, 0, 1])
        assert isinstance(found, Interval)
        assert found.value == classwise_calibration_error(probabilities, [0, 1, 0, 1])
