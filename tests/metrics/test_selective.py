import itertools

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal.metrics.selective import (
    area_under_generalized_risk_coverage,
    area_under_risk_coverage,
    excess_area_under_risk_coverage,
    risk_coverage_curve,
)

AREAS = [
    area_under_risk_coverage,
    excess_area_under_risk_coverage,
    area_under_generalized_risk_coverage,
]
every_area = pytest.mark.parametrize("area", AREAS, ids=lambda f: f.__name__)
every_function = pytest.mark.parametrize("function", [risk_coverage_curve, *AREAS], ids=lambda f: f.__name__)

SCORE = st.one_of(st.sampled_from([-2.0, 0.0, 0.5, 7.0]), st.floats(-100, 100), st.just(-np.inf), st.just(np.inf))


def pairs(score=SCORE, max_size=40):
    return st.lists(st.tuples(score, st.booleans()), min_size=1, max_size=max_size).map(
        lambda rows: (np.array([c for c, _ in rows]), np.array([r for _, r in rows]))
    )


def few_ties(size=200, seed=0, levels=40):
    """Confidences with ties, right more often where they are high; the samples in random order."""
    generator = np.random.default_rng(seed)
    confidence = generator.integers(levels, size=size) / levels
    return confidence, generator.random(size) < 0.3 + 0.6 * confidence


def risks_in_order(correct):
    return [sum(not c for c in correct[:k]) / k for k in range(1, len(correct) + 1)]


def aurc_in_order(correct):
    return sum(risks_in_order(correct)) / len(correct)


def augrc_in_order(correct):
    size = len(correct)
    generalized = [0.0] + [risk * k / size for k, risk in enumerate(risks_in_order(correct), start=1)]
    return sum((a + b) / 2 for a, b in itertools.pairwise(generalized)) / size


def over_all_orders_of_ties(confidence, correct, area_in_order):
    """Mean of an area over every order of the samples that a sort by confidence may give."""
    levels = sorted(set(confidence), reverse=True)
    groups = [[right for c, right in zip(confidence, correct, strict=True) if c == level] for level in levels]
    orders = itertools.product(*(itertools.permutations(group) for group in groups))
    return np.mean([area_in_order(list(itertools.chain(*order))) for order in orders])


class TestRiskCoverageCurve:
    def test_it_equals_the_slow_loop_over_thresholds(self):
        confidence, correct = few_ties()
        curve = risk_coverage_curve(confidence, correct)
        assert curve.threshold.tolist() == sorted(set(confidence), reverse=True)
        for coverage, risk, threshold in zip(*curve, strict=True):
            accepted = confidence >= threshold
            assert coverage == accepted.mean()
            assert risk == pytest.approx(1 - correct[accepted].mean())

    def test_ties_are_accepted_together(self):
        curve = risk_coverage_curve([0.6, 0.9, 0.6, 0.6], [0, 1, 1, 1])
        assert [values.tolist() for values in curve] == [[0.25, 1.0], [0.0, 0.25], [0.9, 0.6]]

    def test_one_sample_is_one_point(self):
        assert risk_coverage_curve([-3.0], [0]) == ([1.0], [1.0], [-3.0])

    @given(pairs())
    def test_it_ends_at_the_error_rate_of_all_samples(self, sample):
        curve = risk_coverage_curve(*sample)
        assert curve.coverage[-1] == 1 and curve.risk[-1] == pytest.approx(1 - sample[1].mean())
        assert (np.diff(curve.coverage) > 0).all() and (curve.threshold[1:] < curve.threshold[:-1]).all()


class TestAreaUnderRiskCoverage:
    def test_hand_worked_numbers(self):
        # accepted in the order right, wrong, right, wrong: risks 0, 1/2, 1/3, 1/2
        assert area_under_risk_coverage([0.1, 0.4, 0.3, 0.2], [0, 1, 0, 1]) == pytest.approx(1 / 3)

    @given(st.lists(st.booleans(), min_size=1, max_size=40))
    def test_without_ties_it_is_the_mean_of_the_curve_and_equals_the_slow_loop(self, correct):
        confidence = -np.arange(len(correct))
        found = area_under_risk_coverage(confidence, correct)
        assert found == pytest.approx(aurc_in_order(correct))
        assert found == pytest.approx(risk_coverage_curve(confidence, correct).risk.mean())

    @given(pairs(st.sampled_from([0.0, 0.5, 1.0]), max_size=6))
    def test_ties_give_the_mean_over_all_their_orders(self, sample):
        assert area_under_risk_coverage(*sample) == pytest.approx(over_all_orders_of_ties(*sample, aurc_in_order))

    def test_all_confidences_equal_give_the_error_rate(self):
        assert area_under_risk_coverage([0.7] * 5, [1, 0, 1, 1, 0]) == pytest.approx(0.4)

    def test_all_right_is_0_and_all_wrong_is_1(self):
        assert area_under_risk_coverage([0.3, 0.2, 0.2], [1, 1, 1]) == 0
        assert area_under_risk_coverage([0.3, 0.2, 0.2], [0, 0, 0]) == 1

    def test_one_sample_is_its_error(self):
        assert area_under_risk_coverage([0.3], [1]) == 0
        assert area_under_risk_coverage([0.3], [0]) == 1

    def test_it_is_the_mean_of_its_authors_and_not_a_trapezoid(self):
        # torch-uncertainty integrates from coverage 1/N to 1 by trapezoids and divides by 1 - 1/N: NaN for N = 1, and
        # half of the weight for the first and last sample. For its documented example that is 1/12. The definition is
        # the mean over the coverages, 1/9.
        confidence, correct = [0.7, 0.6, 0.8], [1, 0, 1]
        curve = risk_coverage_curve(confidence, correct)
        trapezoids = sum(np.diff(curve.coverage) * (curve.risk[1:] + curve.risk[:-1]) / 2)
        assert trapezoids / (1 - 1 / 3) == pytest.approx(1 / 12)
        assert area_under_risk_coverage(confidence, correct) == pytest.approx(1 / 9)

    @given(pairs())
    def test_it_lies_between_0_and_1(self, sample):
        assert 0 <= area_under_risk_coverage(*sample) <= 1


class TestExcessAreaUnderRiskCoverage:
    @given(pairs())
    def test_it_is_the_area_less_that_of_the_samples_in_perfect_order(self, sample):
        confidence, correct = sample
        least = aurc_in_order(sorted(correct, reverse=True))
        expected = area_under_risk_coverage(confidence, correct) - least
        assert excess_area_under_risk_coverage(confidence, correct) == pytest.approx(expected)

    @given(pairs())
    def test_it_is_never_negative(self, sample):
        assert 0 <= excess_area_under_risk_coverage(*sample) < 1

    @given(st.lists(st.booleans(), min_size=1, max_size=200))
    def test_a_perfect_order_is_exactly_0(self, correct):
        assert excess_area_under_risk_coverage(np.array(correct, dtype=float), correct) == 0

    def test_for_many_samples_the_least_is_that_of_the_authors_formula(self):
        confidence, correct = few_ties(size=200_000)
        rate = 1 - correct.mean()
        expected = area_under_risk_coverage(confidence, correct) - (rate + (1 - rate) * np.log(1 - rate))
        assert excess_area_under_risk_coverage(confidence, correct) == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("outcome", [0, 1])
    @pytest.mark.parametrize("size", [1, 4])
    def test_all_right_and_all_wrong_are_0(self, outcome, size):
        assert excess_area_under_risk_coverage(np.arange(size), [outcome] * size) == 0


class TestAreaUnderGeneralizedRiskCoverage:
    def test_hand_worked_numbers(self):
        # accepted in the order right, wrong, right: 0, 0, 1/3, 1/3 at coverages 0, 1/3, 2/3, 1
        assert area_under_generalized_risk_coverage([0.9, 0.8, 0.7], [1, 0, 1]) == pytest.approx(1 / 6)

    @given(st.lists(st.booleans(), min_size=1, max_size=40))
    def test_without_ties_it_equals_the_slow_loop(self, correct):
        found = area_under_generalized_risk_coverage(-np.arange(len(correct)), correct)
        assert found == pytest.approx(augrc_in_order(correct))

    @given(pairs(st.sampled_from([0.0, 0.5, 1.0]), max_size=6))
    def test_ties_give_the_mean_over_all_their_orders(self, sample):
        expected = over_all_orders_of_ties(*sample, augrc_in_order)
        assert area_under_generalized_risk_coverage(*sample) == pytest.approx(expected)

    @pytest.mark.parametrize("levels", [2, 10, 10**6])
    def test_it_follows_from_scikit_learns_auroc_and_the_error_rate(self, levels):
        confidence, correct = few_ties(levels=levels)
        rate, auroc = 1 - correct.mean(), sklearn.metrics.roc_auc_score(correct, confidence)
        expected = (1 - auroc) * rate * (1 - rate) + rate**2 / 2
        assert area_under_generalized_risk_coverage(confidence, correct) == pytest.approx(expected)

    def test_it_is_the_trapezoid_area_under_the_share_accepted_and_wrong(self):
        confidence, correct = few_ties()
        curve = risk_coverage_curve(confidence, correct)
        expected = sklearn.metrics.auc(np.append(0, curve.coverage), np.append(0, curve.coverage * curve.risk))
        assert area_under_generalized_risk_coverage(confidence, correct) == pytest.approx(expected)

    def test_all_right_is_0_and_all_wrong_is_one_half(self):
        assert area_under_generalized_risk_coverage([0.3, 0.2, 0.2], [1, 1, 1]) == 0
        assert area_under_generalized_risk_coverage([0.3, 0.2, 0.2], [0, 0, 0]) == 0.5

    def test_one_sample_is_half_its_error(self):
        assert area_under_generalized_risk_coverage([0.3], [1]) == 0
        assert area_under_generalized_risk_coverage([0.3], [0]) == 0.5

    def test_all_confidences_equal_give_half_the_error_rate(self):
        assert area_under_generalized_risk_coverage([0.7] * 5, [1, 0, 1, 1, 0]) == pytest.approx(0.2)

    def test_every_sample_twice_changes_nothing(self):
        confidence, correct = few_ties()
        twice = area_under_generalized_risk_coverage(np.tile(confidence, 2), np.tile(correct, 2))
        assert twice == pytest.approx(area_under_generalized_risk_coverage(confidence, correct))


class TestEveryArea:
    @every_area
    @given(sample=pairs(), seed=st.integers(0, 100))
    def test_the_order_of_samples_does_not_matter_at_all(self, area, sample, seed):
        confidence, correct = sample
        order = np.random.default_rng(seed).permutation(len(correct))
        assert area(confidence[order], correct[order]) == area(confidence, correct)

    @every_area
    def test_only_the_order_of_the_confidences_counts(self, area):
        confidence, correct = few_ties()
        assert area(np.exp(7 * confidence) - 1000, correct) == area(confidence, correct)

    @every_area
    def test_minus_zero_ties_with_zero(self, area):
        assert area([0.0, -0.0], [1, 0]) == area([0.0, 0.0], [1, 0]) == area([-0.0, 0.0], [1, 0])

    @every_area
    def test_confidence_that_finds_the_errors_is_better_than_one_that_hides_them(self, area):
        confidence, correct = few_ties()
        assert area(confidence, correct) < area(np.zeros(len(correct)), correct) < area(-confidence, correct)

    @every_area
    def test_it_is_a_plain_number(self, area):
        assert type(area(*few_ties())) is float


class TestEveryFunction:
    @every_function
    @pytest.mark.parametrize(
        ("confidence", "correct"), [((3,), (2,)), ((0,), (0,)), ((3, 1), (3, 1)), ((), ()), ((3,), (3, 1))], ids=str
    )
    def test_shapes_that_do_not_fit_are_an_error_that_names_both(self, function, confidence, correct):
        with pytest.raises(ValueError) as error:
            function(np.zeros(confidence), np.zeros(correct))
        assert f"found shapes {confidence} and {correct}" in str(error.value)

    @every_function
    def test_nan_is_an_error_that_counts(self, function):
        with pytest.raises(ValueError, match="NaN in 1 of 2"):
            function([np.nan, 0.5], [0, 1])

    @every_function
    @pytest.mark.parametrize("outcome", [2, -1, 0.5, np.nan])
    def test_an_outcome_other_than_0_and_1_is_an_error(self, function, outcome):
        with pytest.raises(ValueError, match="Outcomes must be 0 or 1"):
            function([0.1, 0.5], [0, outcome])

    @every_function
    @pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
    def test_outcomes_of_any_type_give_the_same(self, function, dtype):
        confidence, correct = few_ties()
        np.testing.assert_equal(function(confidence, correct.astype(dtype)), function(confidence, correct))

    @every_function
    def test_unsigned_integer_confidences_are_sorted_like_numbers(self, function):
        confidence, correct = np.array([0, 200, 100], dtype=np.uint8), [0, 1, 0]
        np.testing.assert_equal(function(confidence, correct), function(confidence.astype(float), correct))

    @every_function
    def test_the_arguments_are_left_alone(self, function):
        confidence, correct = few_ties()
        function(confidence, correct)
        np.testing.assert_equal((confidence, correct), few_ties())
