import decimal

import numpy as np
import pandas
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_adafocal.metrics.bin_free import ks_calibration_error, smooth_calibration_error
from hf_adafocal.metrics.binning import bin_statistics
from hf_adafocal.metrics.bootstrap import bootstrap_interval, report_intervals
from hf_adafocal.metrics.classwise import class_adaptive_calibration_error, classwise_calibration_error
from hf_adafocal.metrics.gate import calibration_gate
from hf_adafocal.metrics.intervals import calibration_error_interval, classwise_error_interval
from hf_adafocal.metrics.ood import energy_score, ood_auroc
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
from hf_adafocal.metrics.selective import area_under_risk_coverage
from hf_adafocal.metrics.validation import TOLERANCE, as_array


def report_with_few_resamples(*arguments, **options):
    return report_intervals(*arguments, num_resamples=10, **options)


NORMALIZING = [
    top_label,
    negative_log_likelihood,
    brier_score,
    expected_calibration_error,
    adaptive_calibration_error,
    maximum_calibration_error,
    classwise_calibration_error,
    class_adaptive_calibration_error,
    calibration_report,
    report_with_few_resamples,
]
MULTICLASS = [*NORMALIZING, accuracy, classwise_error_interval]
BINARY = [
    binary_expected_calibration_error,
    binary_adaptive_calibration_error,
    binary_maximum_calibration_error,
    binary_calibration_report,
]
PAIRS = [
    *BINARY,
    calibration_error,
    calibration_error_interval,
    smooth_calibration_error,
    ks_calibration_error,
    lambda confidence, correct: calibration_gate(confidence, correct, max_ece=0.1),
]
every_multiclass = pytest.mark.parametrize("metric", MULTICLASS, ids=lambda f: f.__name__)
every_normalizing = pytest.mark.parametrize("metric", NORMALIZING, ids=lambda f: f.__name__)
every_binary = pytest.mark.parametrize("metric", BINARY, ids=lambda f: f.__name__)
every_metric_of_pairs = pytest.mark.parametrize("metric", PAIRS, ids=lambda f: f.__name__)

ROWS = arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(2, 5)), elements=st.floats(-4, 4)).map(softmax)


def predictions(size=40, classes=3):
    generator = np.random.default_rng(0)
    return softmax(2 * generator.normal(size=(size, classes))), generator.integers(classes, size=size)


def same(found, expected):
    if isinstance(found, dict):
        found, expected = list(found.values()), list(expected.values())
    np.testing.assert_equal(found, expected)


def close(found, expected, tolerance):
    """As `same`, up to a rounding: the order of a sum depends on the order in memory."""
    if isinstance(found, dict):
        found, expected = list(found.values()), list(expected.values())
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), rtol=0, atol=tolerance)


class TestRowSums:
    @every_multiclass
    def test_a_softmax_in_bfloat16_passes_as_float32(self, metric):
        logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
        rows = logits.bfloat16().softmax(-1).float()
        assert (rows.sum(-1) - 1).abs().max() > 1e-3  # more than the rounding of float32
        same(metric(rows, logits.argmax(-1)), metric(rows.numpy(), logits.argmax(-1).numpy()))

    @every_normalizing
    @given(probabilities=ROWS, scale=st.one_of(st.floats(0.5, 0.99), st.floats(1.01, 1.9)), data=st.data())
    @settings(max_examples=10)
    def test_a_sum_that_is_off_is_named_and_normalize_divides_by_it(self, metric, probabilities, scale, data):
        labels = np.array([data.draw(st.integers(0, probabilities.shape[1] - 1)) for _ in probabilities])
        scaled = probabilities * scale
        inside = scaled.max() <= 1
        expected = r"row \d sums to [\d.]+\. .*pass normalize=True" if inside else "look like logits"
        if inside or scaled.max() > 1 + TOLERANCE:
            with pytest.raises(ValueError, match=expected):
                metric(scaled, labels)
        same(metric(scaled, labels, normalize=True), metric(scaled / scaled.sum(axis=1, keepdims=True), labels))

    def test_rounded_rows_have_the_ece_of_themselves_not_of_their_softmax(self):
        rows = np.array([[0.66, 0.33, 0.0], [0.33, 0.33, 0.33]])  # .99: rounded down
        with pytest.raises(ValueError, match="from 0 to 0.66 and row 0 sums to 0.99. If they are rounded"):
            expected_calibration_error(rows, [0, 0])
        assert expected_calibration_error(rows, [0, 0], normalize=True) == pytest.approx((1 / 3 + 2 / 3) / 2)
        assert expected_calibration_error([[0.667, 0.334]], [0]) == pytest.approx(0.333)  # 1.001 passes as it is

    @pytest.mark.parametrize(
        "rows",
        [[[0.5, -0.1]], [[0.0, 0.0]], [[np.nan, 1.0]], [[np.inf, 1.0], [0.5, 0.5]], [[1.0, 0.0], [0.0, 0.0]]],
        ids=str,
    )
    def test_rows_that_no_sum_makes_probabilities_cannot_be_normalized(self, rows):
        with pytest.raises(ValueError, match="normalize=True needs rows that are finite, non-negative and not all 0"):
            brier_score(rows, [0] * len(rows), normalize=True)

    def test_counts_and_percentages_are_normalized(self):
        assert brier_score([[25, 75]], [1], normalize=True) == 0.125

    @every_multiclass
    @pytest.mark.parametrize("row", [[1.2, -0.2], [3.0, -1.0], [0.9, 1.4]], ids=str)
    def test_values_outside_the_unit_interval_are_called_logits(self, metric, row):
        with pytest.raises(ValueError, match=r"look like logits: pass softmax\(logits\)"):
            metric([row, [0.5, 0.5]], [0, 1])

    def test_a_value_above_1_that_others_below_0_make_up_for_is_called_logits(self):
        with pytest.raises(
            ValueError, match=r"reach from -0\.004 to 1\.016 and row 0 sums to 1\. These look like logits"
        ):
            calibration_report([[1.016, -0.004, -0.004, -0.004, -0.004]], [0])

    @pytest.mark.parametrize("row", [[0.999, 0.5], [1.0, 0.0625], [0.25, 0.25]])
    def test_rows_within_the_unit_interval_that_do_not_sum_to_1_are_not_called_logits(self, row):
        with pytest.raises(ValueError, match="pass normalize=True"):
            calibration_report([row], [0])


class TestRounding:
    """Means and products of probabilities are rounded: what they miss [0, 1] by is cut off, by one tolerance."""

    @every_multiclass
    @given(off=st.one_of(st.sampled_from([2.3e-16, 1e-17, 1e-9]), st.floats(0, 0.9 * TOLERANCE)))
    @example(off=TOLERANCE)
    @settings(max_examples=10)
    def test_a_value_a_little_outside_counts_as_0_or_1_in_rows(self, metric, off):
        rows = np.array([[1 + off, -off, 0.0], [0.25, 0.5, 0.25]])
        exact = np.array([[1.0, 0.0, 0.0], [0.25, 0.5, 0.25]])
        close(metric(rows, [1, 0]), metric(exact, [1, 0]), 1e-5)  # a value above 1 by less than 1e-6 may stay

    @pytest.mark.parametrize("off", [1.2e-6, 1e-3, 0.9 * TOLERANCE])
    def test_a_value_above_1_beside_zeros_counts_as_1_in_every_metric(self, off):
        # no value below 0 that says so, and a row sum within the tolerance
        rows, exact = np.array([[1 + off, 0.0], [0.25, 0.75]]), np.array([[1.0, 0.0], [0.25, 0.75]])
        for metric in (*MULTICLASS, lambda p, y: classwise_calibration_error(p, y, scheme="equal_mass")):
            close(metric(rows, [1, 0]), metric(exact, [1, 0]), 1e-12)

    @every_metric_of_pairs
    @given(off=st.one_of(st.sampled_from([2.3e-16, 1e-17, 1e-9]), st.floats(0, 0.9 * TOLERANCE)))
    @example(off=TOLERANCE)
    @settings(max_examples=10)
    def test_a_value_a_little_outside_counts_as_0_or_1_in_pairs(self, metric, off):
        same(metric([1 + off, -off, 0.5], [1, 0, 1]), metric([1.0, 0.0, 0.5], [1, 0, 1]))

    @every_metric_of_pairs
    @pytest.mark.parametrize("value", [1 + 1.1 * TOLERANCE, -1.1 * TOLERANCE, 1.5, np.nan, np.inf])
    def test_a_value_farther_outside_is_an_error(self, metric, value):
        with pytest.raises(ValueError, match=r"Probabilities must lie in \[0, 1\] without NaN"):
            metric([value, 0.5], [1, 0])

    @every_multiclass
    def test_the_arguments_are_not_clipped_in_place(self, metric):
        rows = np.array([[1 + 1e-9, -1e-9], [0.5, 0.5]])
        metric(rows, [0, 1])
        assert rows[0].tolist() == [1 + 1e-9, -1e-9]


FORMS = {
    "a list": np.ndarray.tolist,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "a torch tensor": torch.tensor,
    "a torch tensor with a gradient": lambda a: torch.tensor(a, requires_grad=a.dtype.kind == "f"),
    "objects": lambda a: a.astype(object),
    "a Series of arrays": lambda a: pandas.Series(list(a)),
    "a Series of lists": lambda a: pandas.Series(a.tolist()),
    "a DataFrame or Series": lambda a: pandas.DataFrame(a) if a.ndim == 2 else pandas.Series(a),
    "nullable numbers": lambda a: pandas.Series(a).convert_dtypes() if a.ndim == 1 else a,
    "a list of torch tensors": lambda a: list(torch.tensor(a)),
    "a masked array without masked entries": np.ma.asarray,
    "a view with strides": lambda a: np.repeat(a, 2, axis=0)[::2],
    "read-only": lambda a: (a.setflags(write=False), a)[1],
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


class TestForms:
    @every_form
    @every_multiclass
    def test_probabilities_and_labels_come_in_any_form(self, metric, form):
        probabilities, labels = predictions()
        close(metric(form(probabilities.copy()), form(labels.copy())), metric(probabilities, labels), 1e-12)

    @every_form
    @every_metric_of_pairs
    def test_pairs_come_in_any_form(self, metric, form):
        confidence, correct = top_label(*predictions())
        same(metric(form(confidence.copy()), form(correct.copy())), metric(confidence, correct))

    @every_form
    def test_so_do_the_inputs_of_all_other_functions(self, form):
        confidence, correct = (a.copy() for a in top_label(*predictions()))
        same(bin_statistics(form(confidence), form(correct), form(np.array([0.0, 0.5, 1.0]))).gap,
             bin_statistics(confidence, correct, [0.0, 0.5, 1.0]).gap)  # fmt: skip
        same(area_under_risk_coverage(form(confidence), form(correct)), area_under_risk_coverage(confidence, correct))
        same(ood_auroc(form(confidence), form(confidence / 2)), ood_auroc(confidence, confidence / 2))
        logits = np.log(predictions()[0])
        same(energy_score(form(logits.copy())), energy_score(logits))
        same(softmax(form(logits.copy())), softmax(logits))
        same(bootstrap_interval(np.mean, form(confidence)), bootstrap_interval(np.mean, confidence))

    @every_multiclass
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_tensors_count_as_what_they_hold(self, metric, dtype):
        probabilities, labels = predictions()
        rows = torch.tensor(probabilities).to(dtype)
        same(
            metric(rows, torch.tensor(labels)),
            metric(rows.float() if dtype is torch.bfloat16 else rows.numpy(), labels),
        )

    @pytest.mark.parametrize("kind", [list, tuple, pandas.Series])
    @pytest.mark.parametrize("count", [1, 2])
    def test_bfloat16_tensors_in_a_sequence_count_as_what_they_hold(self, kind, count):
        found = as_array(kind([torch.tensor([0.25, 0.75], dtype=torch.bfloat16)] * count))
        assert found.tolist() == [[0.25, 0.75]] * count

    def test_a_series_of_nested_lists_is_an_array_of_their_dimensions(self):
        rows = [[[0.25, 0.75], [0.5, 0.5]]]
        assert as_array(pandas.Series(rows)).tolist() == rows
        assert as_array(pandas.Series([pandas.Series(rows[0]).map(np.array).to_numpy()])).tolist() == rows

    @pytest.mark.parametrize(
        ("values", "match"),
        [
            (np.ma.array([0.5, 0.5], mask=[True, False]), "without masked entries, found 1"),
            ([[0.5, 0.5], [1.0]], "rows of one length"),
            (pandas.Series([np.array([0.5, 0.5]), np.array([1.0])]), "rows of one length"),
        ],
        ids=["masked", "ragged", "ragged series"],
    )
    def test_what_is_no_array_is_an_error(self, values, match):
        with pytest.raises(ValueError, match=match):
            brier_score(values, [0, 1])

    @pytest.mark.parametrize(
        "values",
        [
            ["a", "b"],
            [None, 0.5],
            [pandas.NA, 0.5],
            [1j, 0.5],
            [{"score": 0.5}, {"score": 0.5}],
            np.array(["2020"], "M8"),
        ],
        ids=["strings", "None", "NA", "complex", "dicts", "dates"],
    )
    def test_what_is_no_number_is_an_error_that_names_the_dtype(self, values):
        for metric in (calibration_error, binary_calibration_report):
            with pytest.raises(ValueError, match="Probabilities must be numbers, found dtype"):
                metric(values, [1, 0])
        with pytest.raises(ValueError, match="probabilities must be numbers, found dtype"):
            brier_score([list(values)], [0])
        with pytest.raises(ValueError, match="confidence must be numbers, found dtype"):
            bin_statistics(values, [1, 0], [0, 1])

    def test_decimals_are_no_floats(self):
        with pytest.raises(ValueError, match="must be numbers, found dtype object"):
            calibration_error([decimal.Decimal("0.5")], [1])

    def test_outcomes_as_strings_are_an_error(self):
        with pytest.raises(ValueError, match="Outcomes must be numbers, found dtype <U3"):
            calibration_error([0.5, 0.5], ["yes", "no"])


class TestTwins:
    """Inputs of the other kind of function."""

    @every_multiclass
    def test_probabilities_of_class_1_name_the_binary_functions(self, metric):
        with pytest.raises(ValueError, match=r"found shapes \(3,\) and \(3,\)\..*binary_expected_calibration_error"):
            metric([0.25, 0.5, 0.75], [0, 1, 1])

    @every_multiclass
    @pytest.mark.parametrize("labels", [[0, 1, 1], [0, 0, 0]], ids=str)
    def test_a_column_of_sigmoids_names_the_binary_functions(self, metric, labels):
        with pytest.raises(ValueError, match="binary_calibration_report"):
            metric([[0.25], [0.5], [0.75]], labels)

    @every_metric_of_pairs
    def test_a_column_counts_as_a_vector(self, metric):
        confidence, correct = [[0.25], [0.5], [0.75]], [[0], [1], [1]]
        expected = metric([0.25, 0.5, 0.75], [0, 1, 1])
        same(metric(confidence, correct), expected)
        same(metric(torch.tensor(confidence, dtype=torch.float64), [0, 1, 1]), expected)

    @every_metric_of_pairs
    def test_two_columns_name_the_functions_without_binary(self, metric):
        with pytest.raises(
            ValueError, match=r"found shapes \(2, 2\) and \(2,\)\. For probabilities of C classes.*top_label"
        ):
            metric([[0.5, 0.5], [0.5, 0.5]], [0, 1])

    @every_multiclass
    def test_boolean_labels_of_two_classes_are_0_and_1(self, metric):
        probabilities, labels = predictions(classes=2)
        same(metric(probabilities, labels == 1), metric(probabilities, labels))

    @every_multiclass
    def test_a_column_of_labels_counts_as_a_vector(self, metric):
        probabilities, labels = predictions()
        same(metric(probabilities, labels[:, None]), metric(probabilities, labels))

    @every_multiclass
    def test_one_hot_labels_say_argmax(self, metric):
        probabilities, labels = predictions()
        with pytest.raises(ValueError, match=r"one-hot, pass labels.argmax\(axis=1\)"):
            metric(probabilities, np.eye(3, dtype=int)[labels])

    @every_multiclass
    @pytest.mark.parametrize("kind", [np.array, pandas.Series, lambda v: pandas.Series(v, dtype="category"), list])
    def test_class_names_say_how_to_pass_indices(self, metric, kind):
        with pytest.raises(ValueError, match=r"Such as 'cat': pass the column of each name.*names.index"):
            metric([[0.5, 0.5]] * 3, kind(["cat", "dog", "cat"]))
