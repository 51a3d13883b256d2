import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adafocal.metrics import classwise
from hf_adafocal.metrics.binning import equal_width_edges
from hf_adafocal.metrics.classwise import (
    add_class_gaps,
    class_adaptive_calibration_error,
    classwise_calibration_error,
)
from hf_adafocal.metrics.scores import binary_expected_calibration_error, softmax


def predictions(size=300, classes=5, scale=2.0, seed=0):
    """Probabilities and labels that follow them only in part, so that no metric is near 0."""
    generator = np.random.default_rng(seed)
    logits = scale * generator.normal(size=(size, classes))
    labels = np.where(generator.random(size) < 0.4, logits.argmax(axis=1), generator.integers(classes, size=size))
    return softmax(logits), labels


def slow_equal_mass(probabilities, labels, num_bins):
    """Classwise ECE and ACE over equal-mass bins, sample by sample."""
    errors, means = [], []
    for k, column in enumerate(np.asarray(probabilities, dtype=float).T):
        edges = reference.equal_mass_edges(column.tolist(), num_bins)
        bins = [(n, abs(c - a)) for n, c, a in reference.bins(column, labels == k, edges) if n]
        errors.append(sum(n * gap for n, gap in bins) / len(column))
        means.append(np.mean([gap for _, gap in bins]))
    return np.mean(errors), np.mean(means)


class TestClasswiseCalibrationError:
    def test_it_is_that_of_the_authors_code(self, golden):
        for case in golden("metrics")["cases"]:
            found = classwise_calibration_error(softmax(case["logits"]), np.array(case["labels"]), case["num_bins"])
            assert found == pytest.approx(case["classwise_ece"], rel=1e-5)

    def test_it_equals_the_slow_loop(self):
        expected = reference.classwise_calibration_error(*predictions(), 15)
        assert classwise_calibration_error(*predictions(), 15) == pytest.approx(expected)

    def test_with_two_classes_it_is_the_mean_of_both_binary_ones(self):
        probabilities, labels = predictions(classes=2)
        both = [binary_expected_calibration_error(probabilities[:, k], labels == k) for k in (0, 1)]
        assert classwise_calibration_error(probabilities, labels) == pytest.approx(np.mean(both))

    @given(data=st.data(), num_bins=st.sampled_from([1, 2, 3, 10, 15, 49]), dtype=st.sampled_from("efd"))
    def test_probabilities_on_and_beside_the_edges_are_in_the_bin_of_the_slow_loop(self, data, num_bins, dtype):
        step = st.integers(0, num_bins).map(lambda k: np.dtype(dtype).type(k / num_bins))
        beside = st.tuples(step, st.sampled_from([0, 1])).map(lambda pair: np.nextafter(*np.array(pair, dtype=dtype)))
        column = np.array(data.draw(st.lists(st.one_of(step, beside), min_size=1, max_size=30)), dtype=dtype)
        probabilities = np.stack([column, 1 - column], axis=1)
        labels = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(column), max_size=len(column))))
        expected = reference.classwise_calibration_error(probabilities.tolist(), labels, num_bins)
        assert classwise_calibration_error(probabilities, labels, num_bins) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("num_bins", [25, 29, 41, 49])  # where k / num_bins * num_bins is not always k
    def test_every_edge_is_in_the_bin_below_it(self, num_bins):
        edges = equal_width_edges(num_bins)[1:-1]
        column = np.concatenate([edges, edges, np.nextafter(edges, 1)])
        labels = np.repeat([1, 0, 0], len(edges))
        probabilities = np.stack([column, 1 - column], axis=1)
        expected = reference.classwise_calibration_error(probabilities.tolist(), labels, num_bins)
        assert classwise_calibration_error(probabilities, labels, num_bins) == pytest.approx(expected, abs=1e-12)

    def test_a_probability_that_rounding_puts_above_one_counts_as_one(self):
        assert classwise_calibration_error([[1.0005, 0.0]], [0], 10) == 0
        assert classwise_calibration_error([[1.0005, 0.0]], [1], 10) == 1

    @pytest.mark.parametrize("num_bins", [1, 10, 15])
    def test_equal_mass_bins_are_those_of_each_class(self, num_bins):
        probabilities, labels = predictions(307)
        errors = [
            reference.calibration_error(column, labels == k, reference.equal_mass_edges(column.tolist(), num_bins))
            for k, column in enumerate(probabilities.T)
        ]
        found = classwise_calibration_error(probabilities, labels, num_bins, scheme="equal_mass")
        assert found == pytest.approx(np.mean(errors))

    def test_an_unknown_scheme_is_an_error(self):
        with pytest.raises(ValueError, match="'equal_mass', found 'quantile'"):
            classwise_calibration_error(*predictions(), scheme="quantile")

    @pytest.mark.parametrize("num_bins", [3, 15, 60])
    def test_a_float32_value_that_equals_a_rounded_edge_is_in_the_bin_of_its_exact_value(self, num_bins):
        edge = np.float32(1 / num_bins)
        assert float(edge) > 1 / num_bins  # so it lies in the second bin
        # Class 0 has `edge` twice without a label and 0 twice with one: gaps of both signs, which cancel in one bin.
        probabilities = np.array([[edge, 1 - edge], [edge, 1 - edge], [0, 1], [0, 1]], dtype=np.float32)
        labels = np.array([1, 1, 0, 1])
        expected = reference.classwise_calibration_error(probabilities.tolist(), labels, num_bins)
        assert classwise_calibration_error(probabilities, labels, num_bins) == pytest.approx(expected, abs=1e-12)


class TestAddClassGaps:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_each_gap_is_that_of_its_class_and_bin(self, dtype):
        probabilities, labels = predictions(80, classes=4)
        probabilities = probabilities.astype(dtype)
        expected = np.ones((4, 10))  # what is there stays
        for row, label in zip(probabilities.tolist(), labels, strict=True):
            for k, p in enumerate(row):
                place = next(b for b in range(10) if p <= (b + 1) / 10)
                expected[k, place] += p - (k == label)
        found = np.ones((4, 10))
        add_class_gaps(found, probabilities, probabilities.astype(np.float64), labels, equal_width_edges(10))
        np.testing.assert_allclose(found, expected, atol=1e-12)


class TestClassAdaptiveCalibrationError:
    @pytest.mark.parametrize("num_bins", [1, 10, 15, 50])
    def test_it_equals_the_slow_loop(self, num_bins):
        probabilities, labels = predictions(307)
        gaps = []
        for k, column in enumerate(probabilities.T):
            edges = reference.equal_mass_edges(column.tolist(), num_bins)
            gaps.append([abs(c - a) for n, c, a in reference.bins(column, labels == k, edges) if n])
        expected = np.mean([np.mean(of_class) for of_class in gaps])
        assert class_adaptive_calibration_error(probabilities, labels, num_bins) == pytest.approx(expected)

    def test_it_weighs_bins_alike_and_not_by_their_samples(self):
        # Class 0: bins [.2, .6] and (.6, .8] with gaps .4 and .2. Class 1: [.2, .6], (.6, .8] with 3 and 1 samples,
        # gaps |1.2 / 3 - 2/3| and |.8 - 1|.
        column, labels = np.array([0.2, 0.4, 0.6, 0.8]), np.array([1, 1, 1, 0])
        probabilities = np.stack([column, 1 - column], axis=1)
        expected = ((0.4 + 0.2) / 2 + (abs(0.4 - 2 / 3) + 0.2) / 2) / 2
        assert class_adaptive_calibration_error(probabilities, labels, 2) == pytest.approx(expected)
        weighted = ((3 * 0.4 + 0.2) / 4 + (3 * abs(0.4 - 2 / 3) + 0.2) / 4) / 2
        assert classwise_calibration_error(probabilities, labels, 2, scheme="equal_mass") == pytest.approx(weighted)

    def test_it_is_about_that_of_the_papers_cut_into_equal_shares(self):
        probabilities, labels = predictions(3000)
        gaps = []
        for k, column in enumerate(probabilities.T):
            ranked = column.argsort()
            gaps += [abs(np.mean(column[share] - (labels[share] == k))) for share in np.split(ranked, 15)]
        assert class_adaptive_calibration_error(probabilities, labels) == pytest.approx(np.mean(gaps), abs=1e-3)

    def test_empty_bins_do_not_make_a_constant_predictor_look_better(self):
        probabilities, labels = np.tile([0.7, 0.3], (10, 1)), np.arange(10) % 2
        assert class_adaptive_calibration_error(probabilities, labels) == pytest.approx(0.2)


class TestEqualMassBins:
    """Both metrics find the bins of each class without a sort of the column."""

    VALUE = st.one_of(
        st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, 1e-30, 5e-324]),
        st.floats(0, 1),
        st.integers(-40, 0).map(lambda exponent: 2.0**exponent),
    )

    @given(
        column=st.lists(VALUE, min_size=1, max_size=60),
        num_bins=st.integers(1, 20),
        dtype=st.sampled_from("efdg"),
        seed=st.integers(0, 99),
        digits=st.sampled_from([1, 4, 11]),
    )
    @settings(max_examples=300)
    def test_they_are_those_of_the_slow_loop(self, column, num_bins, dtype, seed, digits):
        column = np.array(column).astype(dtype)
        probabilities = np.stack([column, 1 - column], axis=1)
        labels = np.random.default_rng(seed).integers(2, size=len(column))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classwise, "_CELL_DIGITS", digits)
            found = (
                classwise_calibration_error(probabilities, labels, num_bins, scheme="equal_mass"),
                class_adaptive_calibration_error(probabilities, labels, num_bins),
            )
        assert found == pytest.approx(slow_equal_mass(probabilities, labels, num_bins), abs=1e-12)

    @pytest.mark.parametrize(("rows", "copied"), [(7, 3), (300, 1), (1, 64), (256, 64)])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_the_size_of_the_blocks_does_not_matter(self, monkeypatch, rows, copied, dtype):
        for name, value in (("_ROWS_COPIED", rows), ("_COLUMNS_COPIED", copied)):
            monkeypatch.setattr(classwise, name, value)
        monkeypatch.setattr(classwise, "CHUNK_VALUES", 100)
        probabilities, labels = predictions(307, classes=7)
        probabilities = probabilities.astype(dtype)
        error, mean = slow_equal_mass(probabilities, labels, 15)
        assert classwise_calibration_error(probabilities, labels, scheme="equal_mass") == pytest.approx(error)
        assert class_adaptive_calibration_error(probabilities, labels) == pytest.approx(mean)

    def test_thousands_of_samples_and_strided_columns_give_the_same(self):
        probabilities, labels = predictions(20_000, classes=3, scale=8.0)
        strided = np.repeat(probabilities, 2, axis=1)[:, ::2].astype(np.float32)
        error, mean = slow_equal_mass(strided, labels, 15)
        assert classwise_calibration_error(strided, labels, scheme="equal_mass") == pytest.approx(error, abs=1e-12)
        assert class_adaptive_calibration_error(strided, labels) == pytest.approx(mean, abs=1e-12)

    def test_values_that_rounding_puts_outside_0_and_1_count_as_the_ends(self):
        inside = np.repeat([[1.0, 0.0], [0.75, 0.25]], 4, axis=0).astype(np.float32)
        outside = np.where(inside == 1, np.nextafter(inside, 2), np.where(inside == 0, np.float32(-1e-7), inside))
        labels = np.arange(8) % 2
        assert (outside > 1).any() and (outside < 0).any()
        found = class_adaptive_calibration_error(outside, labels, 3)
        assert found == class_adaptive_calibration_error(inside, labels, 3)
