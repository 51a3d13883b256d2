import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal.metrics.ood import (
    energy_score,
    entropy_score,
    max_softmax_score,
    ood_aupr,
    ood_auroc,
    ood_fpr95,
    ood_report,
)

SCORES = [max_softmax_score, entropy_score, energy_score]
METRICS = [ood_auroc, ood_aupr, ood_fpr95]
every_score = pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda f: f.__name__)
both_classes = pytest.mark.parametrize("positive", ["in", "out"])

VALUES = st.lists(st.one_of(st.sampled_from([-1.0, 0.0, 0.5, np.inf]), st.floats(-100, 100)), min_size=1, max_size=40)


def logits(size=50, classes=7, scale=5.0, seed=0):
    return scale * np.random.default_rng(seed).normal(size=(size, classes))


def scores(levels=30, seed=0):
    """More in- than out-of-distribution scores, with ties among and between them, in random order."""
    generator = np.random.default_rng(seed)
    return np.round(generator.normal(1, 1, 237) * levels), np.round(generator.normal(0, 1, 120) * levels)


def as_labels(in_scores, out_scores):
    """What scikit-learn takes: 1 for in-distribution, and all scores."""
    return np.repeat([1, 0], [len(in_scores), len(out_scores)]), np.concatenate([in_scores, out_scores])


def finite(values):
    return np.nan_to_num(np.array(values), posinf=1e6)  # scikit-learn refuses infinite scores


class TestMaxSoftmaxScore:
    def test_it_equals_scipy(self):
        expected = scipy.special.softmax(logits(), axis=1).max(axis=1)
        np.testing.assert_allclose(max_softmax_score(logits()), expected)

    def test_equal_logits_give_one_over_the_number_of_classes(self):
        np.testing.assert_allclose(max_softmax_score(np.full((2, 5), 3.0)), 0.2)

    def test_one_class_is_sure(self):
        assert max_softmax_score([[3.0], [-2.0]]).tolist() == [1, 1]

    def test_a_lead_of_37_is_1_where_the_entropy_still_sees_one_of_700(self):
        surer = np.array([[0.0, -37.0], [0.0, -50.0], [0.0, -700.0]])
        assert max_softmax_score(surer).tolist() == [1, 1, 1]
        assert (np.diff(entropy_score(surer)) > 0).all() and entropy_score(surer)[-1] < 0


class TestEntropyScore:
    def test_it_equals_scipy(self):
        expected = -scipy.stats.entropy(scipy.special.softmax(logits(), axis=1), axis=1)
        np.testing.assert_allclose(entropy_score(logits()), expected)

    def test_equal_logits_give_minus_the_log_of_the_number_of_classes(self):
        np.testing.assert_allclose(entropy_score(np.full((2, 5), 3.0)), -np.log(5))

    def test_a_sure_row_is_0(self):
        assert entropy_score([[0.0, -1e4], [3.0, -np.inf]]).tolist() == [0, 0]

    def test_it_keeps_its_digits_where_the_probability_rounds_to_1(self):
        # two classes, a lead of d: -(d + 1) exp(-d) and terms of exp(-2 d)
        np.testing.assert_allclose(entropy_score([[0.0, -100.0]]), -101 * np.exp(-100))


class TestEnergyScore:
    @pytest.mark.parametrize("temperature", [0.1, 1.0, 1000.0])
    def test_it_equals_scipy(self, temperature):
        expected = temperature * scipy.special.logsumexp(logits() / temperature, axis=1)
        np.testing.assert_allclose(energy_score(logits(), temperature), expected)

    def test_a_low_temperature_gives_the_largest_logit(self):
        np.testing.assert_allclose(energy_score(logits(), 1e-6), logits().max(axis=1))

    def test_a_constant_added_to_a_row_is_added_to_the_score(self):
        np.testing.assert_allclose(energy_score(logits() + 3), energy_score(logits()) + 3)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, np.inf, np.nan])
    def test_a_temperature_that_is_not_positive_and_finite_is_an_error(self, temperature):
        with pytest.raises(ValueError, match="temperature must be finite and above 0"):
            energy_score(logits(), temperature)


class TestEveryScore:
    @every_score
    def test_a_surer_row_scores_higher(self, score):
        found = score(np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [4.0, 0.0, 0.0]]))
        assert (np.diff(found) > 0).all()

    @every_score
    @pytest.mark.parametrize("offset", [1e4, -1e4])
    def test_huge_logits_do_not_overflow(self, score, offset):
        with np.errstate(all="raise", under="ignore"):
            found = score(logits() + offset)
        shift = offset if score is energy_score else 0
        np.testing.assert_allclose(found, score(logits()) + shift, rtol=1e-9, atol=1e-12)

    @every_score
    def test_a_class_ruled_out_counts_for_nothing(self, score):
        with np.errstate(all="raise", under="ignore"):
            found = score(np.column_stack([np.full(50, -np.inf), logits(), np.full(50, -np.inf)]))
        np.testing.assert_allclose(found, score(logits()))

    @every_score
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_half_and_single_precision_are_computed_in_double(self, score, dtype):
        rounded = logits().astype(dtype)
        assert score(rounded).dtype == np.float64
        np.testing.assert_array_equal(score(rounded), score(rounded.astype(np.float64)))

    @every_score
    def test_integers_and_lists_are_accepted(self, score):
        np.testing.assert_array_equal(score([[1, 2], [3, 1]]), score(np.array([[1.0, 2.0], [3.0, 1.0]])))

    @every_score
    @pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0), (2, 3, 4)], ids=str)
    def test_a_shape_other_than_rows_of_classes_is_an_error_that_names_it(self, score, shape):
        with pytest.raises(ValueError) as error:
            score(np.zeros(shape))
        assert f"found shape {shape}" in str(error.value)

    @every_score
    @pytest.mark.parametrize("row", [[np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf], [np.nan, np.inf]], ids=str)
    def test_a_row_without_finite_maximum_is_an_error_that_counts(self, score, row):
        with pytest.raises(ValueError, match="1 of 2 are NaN or infinite"):
            score(np.array([row, [0.0, 0.0]]))

    @every_score
    def test_the_logits_are_left_alone(self, score):
        values = logits()
        score(values)
        np.testing.assert_array_equal(values, logits())


class TestOodAuroc:
    @pytest.mark.parametrize("levels", [0.5, 3, 1e6])
    def test_it_equals_scikit_learn(self, levels):
        expected = sklearn.metrics.roc_auc_score(*as_labels(*scores(levels)))
        assert ood_auroc(*scores(levels)) == pytest.approx(expected)

    @given(VALUES, VALUES)
    def test_it_equals_the_slow_loop_over_all_pairs(self, in_scores, out_scores):
        wins = [(i > o) + (i == o) / 2 for i in in_scores for o in out_scores]
        assert ood_auroc(in_scores, out_scores) == pytest.approx(sum(wins) / len(wins))

    def test_all_scores_equal_are_chance(self):
        assert ood_auroc([1.0] * 3, [1.0] * 5) == 0.5

    @given(VALUES, VALUES)
    def test_it_is_the_same_whichever_is_called_positive(self, in_scores, out_scores):
        swapped = ood_auroc(-np.array(out_scores), -np.array(in_scores))
        assert ood_auroc(in_scores, out_scores) == pytest.approx(swapped)

    def test_one_sample_of_each_is_right_wrong_or_a_tie(self):
        assert [ood_auroc([value], [1.0]) for value in (2.0, 1.0, 0.0)] == [1, 0.5, 0]


class TestOodAupr:
    @pytest.mark.parametrize("levels", [0.5, 3, 1e6])
    def test_it_equals_scikit_learn(self, levels):
        labels, values = as_labels(*scores(levels))
        expected = sklearn.metrics.average_precision_score(labels, values)
        assert ood_aupr(*scores(levels)) == ood_aupr(*scores(levels), positive="in") == pytest.approx(expected)

    @pytest.mark.parametrize("levels", [0.5, 3, 1e6])
    def test_out_as_positive_equals_scikit_learn(self, levels):
        labels, values = as_labels(*scores(levels))
        expected = sklearn.metrics.average_precision_score(1 - labels, -values)
        assert ood_aupr(*scores(levels), positive="out") == pytest.approx(expected)

    @given(VALUES, VALUES)
    def test_few_scores_with_ties_equal_scikit_learn_for_either_class(self, in_scores, out_scores):
        labels, values = as_labels(finite(in_scores), finite(out_scores))
        expected = sklearn.metrics.average_precision_score(labels, values)
        assert ood_aupr(in_scores, out_scores) == pytest.approx(expected)
        expected = sklearn.metrics.average_precision_score(1 - labels, -values)
        assert ood_aupr(in_scores, out_scores, positive="out") == pytest.approx(expected)

    def test_all_scores_equal_give_the_share_of_the_positive_class(self):
        assert ood_aupr([1.0] * 3, [1.0] * 5, positive="in") == pytest.approx(3 / 8)
        assert ood_aupr([1.0] * 3, [1.0] * 5, positive="out") == pytest.approx(5 / 8)

    def test_another_class_is_an_error(self):
        with pytest.raises(ValueError, match="positive must be 'in' or 'out', found 'ood'"):
            ood_aupr([1.0], [0.0], positive="ood")


class TestOodFpr95:
    @pytest.mark.parametrize("levels", [0.5, 3, 1e6])
    @pytest.mark.parametrize("recall", [0.01, 0.5, 0.8, 0.95, 1.0])
    def test_it_is_the_first_point_of_scikit_learns_roc_curve_with_that_recall(self, levels, recall):
        fpr, tpr, _ = sklearn.metrics.roc_curve(*as_labels(*scores(levels)), drop_intermediate=False)
        assert ood_fpr95(*scores(levels), recall) == pytest.approx(fpr[tpr >= recall][0])

    @given(VALUES, VALUES, st.sampled_from([0.3, 0.5, 0.95, 1.0]))
    def test_it_is_the_least_of_all_thresholds_with_that_recall(self, in_scores, out_scores, recall):
        accepted = [(np.mean(in_scores >= t), np.mean(out_scores >= t)) for t in np.array(in_scores + out_scores)]
        expected = min(false for true, false in accepted if true >= recall)
        assert ood_fpr95(np.array(in_scores), np.array(out_scores), recall) == pytest.approx(expected)

    @pytest.mark.parametrize("size", [20, 40, 100, 1000])
    def test_exactly_95_percent_is_enough(self, size):
        # the lowest 5 % of the in-distribution scores lie below every other, the one above them is a false positive
        in_scores = np.arange(size)
        assert ood_fpr95(in_scores, [size * 0.05 - 0.5, size]) == 0.5

    def test_out_as_positive_is_the_same_function_of_negative_scores(self):
        labels, values = as_labels(*scores())
        fpr, tpr, _ = sklearn.metrics.roc_curve(1 - labels, -values, drop_intermediate=False)
        in_scores, out_scores = scores()
        assert ood_fpr95(-out_scores, -in_scores) == pytest.approx(fpr[tpr >= 0.95][0])
        assert ood_fpr95(-out_scores, -in_scores) != ood_fpr95(in_scores, out_scores)

    def test_all_scores_equal_accept_everything(self):
        assert ood_fpr95([1.0] * 3, [1.0] * 5) == 1

    @pytest.mark.parametrize("recall", [0.0, -0.5, 1.01, 95, np.nan])
    def test_a_recall_outside_0_to_1_is_an_error(self, recall):
        with pytest.raises(ValueError, match=r"recall must lie in \(0, 1\]"):
            ood_fpr95([1.0], [0.0], recall)


class TestEveryMetric:
    @every_metric
    @given(in_scores=VALUES, out_scores=VALUES)
    def test_it_lies_between_0_and_1(self, metric, in_scores, out_scores):
        assert 0 <= metric(in_scores, out_scores) <= 1

    @every_metric
    def test_perfect_separation_is_perfect(self, metric):
        assert metric([3.0, 4.0, 4.0], [1.0, 2.0]) == (0 if metric is ood_fpr95 else 1)

    @both_classes
    def test_perfect_separation_is_perfect_for_either_class(self, positive):
        assert ood_aupr([3.0, 4.0, 4.0], [1.0, 2.0], positive) == 1

    @every_metric
    def test_only_the_order_of_the_scores_counts(self, metric):
        in_scores, out_scores = scores()
        assert metric(np.arctan(in_scores / 100), np.arctan(out_scores / 100)) == metric(in_scores, out_scores)

    @every_metric
    def test_the_order_of_the_samples_does_not_matter_at_all(self, metric):
        in_scores, out_scores = scores()
        assert metric(in_scores[::-1], np.sort(out_scores)) == metric(in_scores, out_scores)

    @every_metric
    def test_it_is_a_plain_number(self, metric):
        assert type(metric(*scores())) is float

    @every_metric
    @pytest.mark.parametrize("shape", [(), (0,), (3, 1)], ids=str)
    def test_scores_that_are_no_vector_are_an_error_that_names_them(self, metric, shape):
        with pytest.raises(ValueError) as error:
            metric(np.zeros(shape), [1.0])
        assert f"in_scores must be (N,) with N >= 1 and no NaN, found shape {shape}" in str(error.value)
        with pytest.raises(ValueError, match="out_scores must be"):
            metric([1.0], np.zeros(shape))

    @every_metric
    def test_nan_is_an_error_that_counts(self, metric):
        with pytest.raises(ValueError, match=r"out_scores .* found shape \(3,\), 2 NaN"):
            metric([1.0], [np.nan, 0.0, np.nan])

    @every_metric
    def test_the_scores_are_left_alone(self, metric):
        in_scores, out_scores = scores()
        metric(in_scores, out_scores)
        np.testing.assert_equal((in_scores, out_scores), scores())


class TestOodReport:
    def test_it_holds_what_each_function_says(self):
        known, unknown = logits(), logits(size=30, scale=1.0, seed=1)
        expected = {"num_in": 50, "num_out": 30}
        for name, score in zip(["max_softmax", "entropy", "energy"], SCORES, strict=True):
            found = score(known), score(unknown)
            expected[f"{name}_auroc"] = ood_auroc(*found)
            expected[f"{name}_aupr_in"] = ood_aupr(*found, positive="in")
            expected[f"{name}_aupr_out"] = ood_aupr(*found, positive="out")
            expected[f"{name}_fpr95"] = ood_fpr95(*found)
        assert ood_report(known, unknown) == expected

    def test_surer_logits_in_distribution_are_told_apart_by_every_score(self):
        report = ood_report(logits(size=500), logits(size=500, scale=0.1, seed=1))
        assert all(value > 0.95 for name, value in report.items() if "auroc" in name)
        assert all(value < 0.05 for name, value in report.items() if "fpr95" in name)

    def test_the_same_samples_on_both_sides_are_chance(self):
        report = ood_report(logits(), logits())
        assert {report[f"{name}_auroc"] for name in ("max_softmax", "entropy", "energy")} == {0.5}

    def test_its_values_are_plain_numbers(self):
        assert {type(value) for value in ood_report(logits(), logits()).values()} == {int, float}

    def test_lists_are_accepted(self):
        assert ood_report([[3.0, 0.0]], [[0.0, 0.0]])["energy_auroc"] == 1

    def test_logits_of_two_models_are_an_error_that_names_the_shapes(self):
        with pytest.raises(ValueError, match=r"found shapes \(50, 7\) and \(50, 3\)"):
            ood_report(logits(), logits(classes=3))

    def test_scores_instead_of_logits_are_an_error(self):
        with pytest.raises(ValueError, match=r"Expected logits \(N, C\)"):
            ood_report(*scores())
