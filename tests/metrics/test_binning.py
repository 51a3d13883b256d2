import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from hf_adafocal.metrics.binning import (
    BinStats,
    bin_statistics,
    binned,
    equal_mass_edges,
    equal_width_edges,
    gap_norm,
    slope_of_norm,
    vector_norm,
    weighted_gaps,
    with_classes,
)
from hf_adafocal.metrics.scores import softmax, top_label

# Few distinct values, so that ties and confidences of exactly 0, 0.3 and 1 are common; and values in general position.
CONFIDENCE = st.one_of(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]), st.floats(0, 1))
PAIRS = st.lists(st.tuples(CONFIDENCE, st.booleans()), min_size=1, max_size=60).map(
    lambda pairs: (np.array([c for c, _ in pairs]), np.array([r for _, r in pairs]))
)
NUM_BINS = st.integers(1, 20)
NOT_VECTORS = [np.zeros(0), np.zeros((2, 1)), np.array(0.5)]


def share_a_bin(stats):
    return np.count_nonzero(stats.count) == 1


class TestBinStats:
    def test_the_gap_is_confidence_minus_accuracy(self):
        stats = BinStats(np.array([0, 0.5, 1]), np.array([4, 0]), np.array([0.4, 0.0]), np.array([0.75, 0.0]))
        np.testing.assert_allclose(stats.gap, [-0.35, 0.0])


class TestEqualWidthEdges:
    @pytest.mark.parametrize("num_bins", [1, 7, 15])
    def test_they_cut_the_unit_interval_into_equal_parts(self, num_bins):
        np.testing.assert_allclose(equal_width_edges(num_bins), reference.equal_width_edges(num_bins))

    @pytest.mark.parametrize("num_bins", [10, 15, 20])
    def test_a_confidence_on_an_edge_belongs_to_the_bin_below(self, num_bins):
        for b in range(1, num_bins + 1):
            stats = bin_statistics([b / num_bins], [1], equal_width_edges(num_bins))
            assert stats.count[b - 1] == 1

    @pytest.mark.parametrize("num_bins", [0, -1])
    def test_no_bin_is_an_error(self, num_bins):
        with pytest.raises(ValueError, match=f"num_bins must be at least 1, found {num_bins}"):
            equal_width_edges(num_bins)


class TestEqualMassEdges:
    def test_edges_and_means_are_those_of_the_authors_code(self, golden):
        for case in golden("metrics")["cases"]:
            confidence, correct = top_label(softmax(case["logits"]), case["labels"])
            edges, theirs = equal_mass_edges(confidence, case["num_bins"]), case["ada_bins"]
            np.testing.assert_allclose(edges[:-1], [b["lower"] for b in theirs], rtol=1e-5)
            np.testing.assert_allclose(edges[1:], [b["upper"] for b in theirs], rtol=1e-5)
            stats = bin_statistics(confidence, correct, edges)
            counts = np.round([b["proportion"] * len(confidence) for b in theirs]).astype(int)
            # the lowest sample counts here and not there
            np.testing.assert_array_equal(stats.count - counts, [1] + [0] * (len(counts) - 1))
            for name in ("confidence", "accuracy"):
                found, expected = getattr(stats, name), np.array([b[name] for b in theirs])
                np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-5)
                assert abs(found[0] - expected[0]) <= 1 / counts[0]

    @given(confidence=st.lists(st.floats(0, 1), min_size=1, max_size=60), num_bins=NUM_BINS)
    def test_they_equal_the_slow_interpolation(self, confidence, num_bins):
        expected = reference.equal_mass_edges(confidence, num_bins)
        np.testing.assert_allclose(equal_mass_edges(confidence, num_bins), expected, rtol=1e-9, atol=1e-12)

    @given(pairs=PAIRS, num_bins=NUM_BINS)
    def test_they_ascend_from_the_lowest_to_the_highest_confidence(self, pairs, num_bins):
        edges = equal_mass_edges(pairs[0], num_bins)
        assert edges.shape == (num_bins + 1,)
        assert edges[0] == pairs[0].min() and edges[-1] == pairs[0].max()
        assert (np.diff(edges) >= 0).all()

    @pytest.mark.parametrize("size", [150, 1000, 1003])
    def test_without_ties_bins_hold_about_the_same_number_of_samples(self, size):
        confidence = np.random.default_rng(0).random(size)
        count = bin_statistics(confidence, np.ones(size), equal_mass_edges(confidence, 15)).count
        assert count.max() - count.min() <= 2

    @given(pairs=PAIRS, num_bins=NUM_BINS)
    def test_the_order_of_samples_does_not_matter(self, pairs, num_bins):
        np.testing.assert_array_equal(equal_mass_edges(pairs[0][::-1], num_bins), equal_mass_edges(pairs[0], num_bins))

    @pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("size", [1, 4, 100])
    def test_one_confidence_gives_one_edge_repeated(self, value, size):
        assert equal_mass_edges(np.full(size, value), 15).tolist() == [value] * 16

    def test_the_argument_is_left_unsorted(self):
        confidence = np.array([0.9, 0.1, 0.5])
        equal_mass_edges(confidence, 2)
        assert confidence.tolist() == [0.9, 0.1, 0.5]

    @pytest.mark.parametrize("confidence", NOT_VECTORS, ids=lambda c: str(c.shape))
    def test_what_is_not_a_vector_is_an_error(self, confidence):
        with pytest.raises(ValueError, match=r"confidence must have shape \(N,\) with N >= 1"):
            equal_mass_edges(confidence)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_confidence_that_is_not_finite_is_an_error(self, value):
        with pytest.raises(ValueError, match="finite, found 1 NaN or infinite"):
            equal_mass_edges([0.5, value])

    def test_no_bin_is_an_error(self):
        with pytest.raises(ValueError, match="num_bins must be at least 1"):
            equal_mass_edges([0.5], 0)


class TestBinStatistics:
    @given(pairs=PAIRS, num_bins=NUM_BINS, equal_mass=st.booleans())
    def test_they_equal_the_slow_loop(self, pairs, num_bins, equal_mass):
        confidence, correct = pairs
        edges = equal_mass_edges(confidence, num_bins) if equal_mass else equal_width_edges(num_bins)
        stats = bin_statistics(confidence, correct, edges)
        count, mean, accuracy = zip(*reference.bins(confidence, correct, edges.tolist()), strict=True)
        np.testing.assert_array_equal(stats.count, count)
        np.testing.assert_allclose(stats.confidence, mean, atol=1e-12)
        np.testing.assert_allclose(stats.accuracy, accuracy, atol=1e-12)
        np.testing.assert_array_equal(stats.edges, edges)

    @given(pairs=PAIRS, num_bins=NUM_BINS)
    def test_every_sample_is_counted_once(self, pairs, num_bins):
        for edges in (equal_width_edges(num_bins), equal_mass_edges(pairs[0], num_bins)):
            stats = bin_statistics(*pairs, edges)
            assert stats.count.sum() == len(pairs[0])
            assert stats.count @ stats.confidence == pytest.approx(pairs[0].sum(), abs=1e-12)
            assert stats.count @ stats.accuracy == pytest.approx(pairs[1].sum())

    @given(pairs=PAIRS, num_bins=NUM_BINS, value=st.sampled_from([0.0, 0.3, 1.0]))
    def test_ties_stay_together(self, pairs, num_bins, value):
        edges = equal_mass_edges(pairs[0], num_bins)
        size = np.count_nonzero(pairs[0] == value)
        if size:
            assert share_a_bin(bin_statistics(np.full(size, value), np.ones(size), edges))

    @pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
    def test_all_samples_at_one_confidence_share_a_bin(self, value):
        confidence, correct = np.full(8, value), np.arange(8) % 2
        for edges in (equal_width_edges(15), equal_mass_edges(confidence, 15)):
            stats = bin_statistics(confidence, correct, edges)
            assert share_a_bin(stats)
            assert np.abs(stats.gap).max() == pytest.approx(abs(value - 0.5))

    def test_the_lowest_confidence_counts(self):
        confidence = np.array([0.2, 0.4, 0.6, 0.8])
        assert bin_statistics(confidence, np.ones(4), equal_mass_edges(confidence, 2)).count.tolist() == [3, 1]

    def test_zero_and_one_are_in_the_end_bins(self):
        assert bin_statistics([0.0, 1.0, 1.0], [0, 1, 1], equal_width_edges(10)).count.tolist() == [1] + [0] * 8 + [2]

    def test_what_lies_outside_the_edges_counts_in_the_end_bins(self):
        stats = bin_statistics([0.0, 0.2, 0.95, 1.0], [0, 0, 1, 1], np.array([0.3, 0.6, 0.9]))
        assert stats.count.tolist() == [2, 2]

    def test_an_empty_bin_is_all_zeros(self):
        stats = bin_statistics([0.9], [0], equal_width_edges(2))
        assert (stats.count[0], stats.confidence[0], stats.accuracy[0], stats.gap[0]) == (0, 0, 0, 0)

    def test_empty_bins_at_the_end_are_counted_too(self):
        stats = bin_statistics([0.1, 0.2], [1, 0], equal_width_edges(4))
        assert stats.count.tolist() == [2, 0, 0, 0] and stats.gap.tolist() == pytest.approx([-0.35, 0, 0, 0])

    @pytest.mark.parametrize("num_bins", [63, 64, 65, 66, 255, 256, 257, 300, 1000])
    def test_hundreds_of_bins_equal_the_slow_loop(self, num_bins):
        generator = np.random.default_rng(num_bins)
        confidence, correct = generator.random(100), generator.random(100) < 0.5
        confidence[:3] = 0, 1, 1 / num_bins
        stats = bin_statistics(confidence, correct, equal_width_edges(num_bins))
        count, mean, accuracy = zip(*reference.bins(confidence, correct, equal_width_edges(num_bins)), strict=True)
        assert stats.count.tolist() == list(count)
        assert stats.confidence == pytest.approx(np.array(mean)) and stats.accuracy == pytest.approx(
            np.array(accuracy)
        )

    def test_fewer_samples_than_bins_give_no_nan(self):
        stats = bin_statistics([0.4, 0.6], [1, 0], equal_mass_edges([0.4, 0.6], 15))
        assert stats.count.sum() == 2
        assert np.isfinite(stats.gap).all()

    @pytest.mark.parametrize("dtype", [bool, np.int64, np.float32])
    def test_correctness_may_have_any_dtype(self, dtype):
        stats = bin_statistics(np.float32([0.25, 0.75]), np.array([0, 1], dtype=dtype), equal_width_edges(2))
        assert stats.accuracy.tolist() == [0, 1]

    @pytest.mark.parametrize("bad", NOT_VECTORS, ids=lambda c: str(c.shape))
    def test_what_is_not_a_vector_is_an_error(self, bad):
        with pytest.raises(ValueError, match=r"confidence must have shape \(N,\)"):
            bin_statistics(bad, [1], equal_width_edges())
        with pytest.raises(ValueError, match=r"correct must have shape \(N,\)"):
            bin_statistics([0.5], bad, equal_width_edges())

    def test_unequal_lengths_are_an_error(self):
        with pytest.raises(ValueError, match="one length, found 2 and 3"):
            bin_statistics([0.5, 0.5], [1, 0, 1], equal_width_edges())

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_number_that_is_not_finite_is_an_error(self, value):
        with pytest.raises(ValueError, match="confidence must be finite, found 1"):
            bin_statistics([value, 0.5], [1, 0], equal_width_edges())
        with pytest.raises(ValueError, match="correct must be finite, found 1"):
            bin_statistics([0.5, 0.5], [value, 0], equal_width_edges())

    @pytest.mark.parametrize("edges", [[0.5], [0.0, 0.6, 0.4, 1.0]], ids=str)
    def test_edges_that_do_not_ascend_are_an_error(self, edges):
        with pytest.raises(ValueError, match="edges must be at least two ascending numbers"):
            bin_statistics([0.5], [1], edges)


class TestWithClasses:
    @pytest.mark.parametrize("num_bins", [1, 2, 7, 80])
    def test_the_gap_of_each_class_and_bin_is_that_of_its_samples(self, num_bins):
        generator = np.random.default_rng(0)
        confidence, predicted = generator.random(200), generator.integers(3, size=200)
        correct = generator.random(200) < 0.5
        edges = equal_width_edges(num_bins)
        found = with_classes(bin_statistics(confidence, correct, edges), confidence, correct, predicted, 5)
        assert found.class_gap.shape == (5, num_bins)
        for k in range(5):
            mine = predicted == k
            assert found.class_counts[k] == mine.sum()
            expected = [c - a for _, c, a in reference.bins(confidence[mine], correct[mine], edges)]
            assert found.class_gap[k] == pytest.approx(expected)

    @pytest.mark.parametrize("predicted", [[0, 3], [-1, 0]])
    def test_a_class_out_of_range_is_an_error(self, predicted):
        stats = bin_statistics([0.5, 0.5], [1, 0], [0, 1])
        match = rf"must lie in \[0, 3\), found {min(predicted)} to {max(predicted)}"
        with pytest.raises(ValueError, match=match):
            with_classes(stats, np.array([0.5, 0.5]), np.array([1, 0]), np.array(predicted), 3)


class TestNorms:
    COUNT, GAP = np.array([3, 0, 1]), np.array([0.2, 0.0, -0.4])

    @pytest.mark.parametrize(("norm", "expected"), [("l1", 0.25), ("l2", (0.03 + 0.04) ** 0.5), ("max", 0.4)])
    def test_a_calibration_error_is_a_norm_of_the_gaps_weighted_by_samples(self, norm, expected):
        stats = BinStats(edges=equal_width_edges(3), count=self.COUNT, confidence=self.GAP, accuracy=np.zeros(3))
        assert gap_norm(stats, norm) == pytest.approx(expected)
        assert vector_norm(weighted_gaps(self.GAP, self.COUNT, norm), norm) == pytest.approx(expected)

    @pytest.mark.parametrize("norm", ["l1", "l2", "max"])
    def test_the_slope_is_the_derivative_of_the_norm(self, norm):
        values = np.array([0.3, -0.7, 0.2])
        steps = 1e-6 * np.eye(3)
        expected = [(vector_norm(values + d, norm) - vector_norm(values - d, norm)) / 2e-6 for d in steps]
        assert slope_of_norm(values, norm) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("norm", ["l1", "l2", "max"])
    def test_each_of_several_rows_of_bins_is_weighed_by_its_own_samples(self, norm):
        gaps, counts = np.array([self.GAP, [0.5, 0.25, -0.125]]), np.array([self.COUNT, [1, 1, 6]])
        found = weighted_gaps(gaps, counts, norm)
        assert found.shape == (2, 3)
        for row, gap, count in zip(found, gaps, counts, strict=True):
            assert row == pytest.approx(weighted_gaps(gap, count, norm))

    @pytest.mark.parametrize(("norm", "expected"), [("l1", [1, 1, -1]), ("l2", [0.6, 0, -0.8]), ("max", [0, 0, -1])])
    def test_the_slope_at_a_bin_without_a_gap_is_that_of_its_norm(self, norm, expected):
        assert slope_of_norm(np.array([0.3, 0.0, -0.4]), norm) == pytest.approx(expected)

    @pytest.mark.parametrize(("norm", "expected"), [("l1", [1, 1]), ("l2", [0.5**0.5, 0.5**0.5]), ("max", [1, 0])])
    def test_without_any_gap_the_slope_is_not_0(self, norm, expected):
        assert slope_of_norm(np.zeros(2), norm) == pytest.approx(expected)

    def test_an_unknown_norm_is_an_error(self):
        with pytest.raises(ValueError, match="norm must be 'l1', 'l2' or 'max', found 'l3'"):
            gap_norm(binned([0.5], [1]), "l3")
