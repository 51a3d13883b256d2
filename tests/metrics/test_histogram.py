import copy
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hf_adafocal.metrics.binning import bin_statistics, equal_mass_edges, equal_width_edges
from hf_adafocal.metrics.histogram import CalibrationHistogram
from hf_adafocal.metrics.scores import calibration_error

NESTED = [1, 2, 5, 8, 9, 10, 12, 15, 16, 18, 20, 25, 30, 32, 50, 64, 100, 1000]
NEXT_TO_HALF = float(np.nextafter(0.5, 1))
TRICKY = [
    0.0,
    1e-300,
    2.0**-53,
    1 / 3,
    0.1,
    float(np.float32(0.1)),
    0.5,
    NEXT_TO_HALF,
    1 - 2.0**-53,
    1 - 2.0**-24,
    1.0,
]

CONFIDENCE = st.one_of(
    st.sampled_from(TRICKY),
    st.floats(0, 1),
    st.floats(0, 1, width=32),
    st.floats(0, 50).map(lambda margin: 1 / (1 + math.exp(-margin))),
    st.integers(0, 99).map(lambda step: 0.61 + 1e-7 * step),  # many to a cell
)


def as_arrays(pairs):
    return np.array([c for c, _ in pairs], dtype=float), np.array([r for _, r in pairs], dtype=bool)


PAIRS = st.lists(st.tuples(CONFIDENCE, st.booleans()), min_size=1, max_size=80).map(as_arrays)


def histogram(*batches):
    result = CalibrationHistogram()
    for confidence, correct in batches:
        result.update(confidence, correct)
    return result


def merged(*parts):
    result = CalibrationHistogram()
    for part in parts:
        result.merge(part)
    return result


def split(pairs, *at):
    return list(zip(np.split(pairs[0], at), np.split(pairs[1], at), strict=True))


def assert_same_table(found, expected):
    """Counts exactly, sums of confidences up to the rounding of sums."""
    assert (found.to_array()[:2] == expected.to_array()[:2]).all()
    np.testing.assert_allclose(found.to_array()[2], expected.to_array()[2], rtol=1e-13)


def saturated(size, seed=0):
    """Margins near 12: most confidences are above 0.9999, right 98 % of the time, with gaps of both signs."""
    generator = np.random.default_rng(seed)
    confidence = 1 / (1 + np.exp(-np.maximum(generator.normal(12, 3, size), 0)))
    return confidence, generator.random(size) < confidence - 0.05 * (generator.random(size) < 0.4)


def smooth(size, seed=0):
    """Confidences all over [0.5, 1], over-confident in some places and under-confident in others."""
    generator = np.random.default_rng(seed)
    confidence = 1 / (1 + np.exp(-np.abs(generator.normal(1, 2, size))))
    return confidence, generator.random(size) < confidence + 0.1 * np.sin(9 * confidence)


class TestUpdate:
    @given(pairs=PAIRS, cuts=st.lists(st.integers(0, 80), max_size=5).map(sorted))
    def test_any_split_into_batches_gives_the_same_table(self, pairs, cuts):
        assert_same_table(histogram(*split(pairs, *cuts)), histogram(pairs))

    @given(pairs=PAIRS, data=st.data())
    def test_the_order_of_samples_does_not_matter(self, pairs, data):
        order = data.draw(st.permutations(range(len(pairs[0]))))
        assert_same_table(histogram((pairs[0][order], pairs[1][order])), histogram(pairs))

    def test_a_batch_of_many_blocks_gives_the_same_table(self):
        pairs = smooth(300_000)
        assert_same_table(histogram(pairs), histogram(*split(pairs, *range(0, 300_000, 7_777))))

    @pytest.mark.parametrize("shape", [(), (24,), (2, 12), (2, 3, 4)], ids=str)
    def test_any_shape_is_counted_flat(self, shape):
        confidence, correct = smooth(24)
        size = math.prod(shape)
        found = histogram((confidence[:size].reshape(shape), correct[:size].reshape(shape)))
        assert_same_table(found, histogram((confidence[:size], correct[:size])))

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_arrays_and_tensors_of_one_precision_give_the_same_table(self, dtype):
        confidence, correct = saturated(500)
        confidence = confidence.astype(dtype)
        expected = histogram((confidence.astype(np.float64), correct))
        assert_same_table(histogram((confidence, correct.astype(int))), expected)
        assert_same_table(histogram((torch.from_numpy(confidence), torch.from_numpy(correct))), expected)
        assert_same_table(histogram((torch.from_numpy(confidence), correct)), expected)
        assert_same_table(histogram((confidence.tolist(), correct.tolist())), expected)

    def test_bfloat16_with_a_graph_and_strides_is_accepted(self):
        confidence, correct = smooth(24)
        tensor = torch.from_numpy(confidence).bfloat16().reshape(4, 6).requires_grad_().T
        found = histogram((tensor, torch.from_numpy(correct).reshape(4, 6).T.long()))
        assert_same_table(found, histogram((tensor.detach().double().numpy(), correct.reshape(4, 6).T)))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_tensor_on_a_device_gives_the_same_table(self):
        pairs = [torch.from_numpy(values) for values in smooth(300_000)]
        mask = torch.arange(300_000) % 3 > 0
        found, expected = CalibrationHistogram(), CalibrationHistogram()
        found.update(*(values.cuda() for values in pairs), mask=mask.cuda())
        expected.update(*pairs, mask=mask)
        assert_same_table(found, expected)

    @pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
    def test_the_mask_says_what_counts(self, kind):
        confidence, correct = smooth(300_000)
        mask = np.random.default_rng(1).random(300_000) < 0.7
        found = CalibrationHistogram()
        found.update(kind(confidence), kind(correct), mask=kind(mask))
        assert_same_table(found, histogram((confidence[mask], correct[mask])))

    def test_what_is_ignored_may_hold_anything(self):
        found = CalibrationHistogram()
        labels = torch.tensor([[1, -100], [-100, 1]])
        confidence = torch.tensor([[0.8, math.nan], [7.0, 0.6]])
        found.update(confidence, torch.where(labels == -100, -100, 1), mask=labels != -100)
        assert_same_table(found, histogram((torch.tensor([0.8, 0.6]), [1, 1])))

    def test_a_batch_without_a_sample_changes_nothing(self):
        found = CalibrationHistogram()
        found.update([], [])
        found.update([0.5], [1], mask=[False])
        assert found.num_samples == 0

    @pytest.mark.parametrize("value", [1.5, -0.1, math.nan, math.inf])
    def test_a_confidence_that_is_no_probability_is_an_error(self, value):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\] without NaN"):
            CalibrationHistogram().update([0.5, value], [1, 0])

    def test_a_confidence_that_rounding_puts_outside_counts_as_0_or_1(self):
        found, expected = CalibrationHistogram(), CalibrationHistogram()
        found.update([1 + 2.3e-16, -1e-17], [1, 0])
        expected.update([1.0, 0.0], [1, 0])
        assert (found.to_array() == expected.to_array()).all()

    @pytest.mark.parametrize("value", [2, -1, -100, 0.5, math.nan])
    def test_an_outcome_other_than_0_and_1_is_an_error(self, value):
        with pytest.raises(ValueError, match="must be 0 or 1"):
            CalibrationHistogram().update([0.5, 0.5], [1, value])

    @pytest.mark.parametrize("last", [(math.nan, 1), (0.5, 2)], ids=str)
    def test_nothing_is_counted_of_a_batch_with_an_error_at_its_end(self, last):
        found = histogram(smooth(10))
        before = found.to_array()
        confidence, correct = smooth(300_000)
        with pytest.raises(ValueError):
            found.update(np.append(confidence, last[0]), np.append(correct, last[1]))
        assert (found.to_array() == before).all()

    def test_shapes_that_differ_are_an_error_that_names_them(self):
        with pytest.raises(ValueError, match=r"one shape, found \(2, 3\) and \(3, 2\)"):
            CalibrationHistogram().update(np.full((2, 3), 0.5), torch.ones(3, 2))
        with pytest.raises(ValueError, match=r"one shape, found \(2,\) and \(1,\)"):
            CalibrationHistogram().update([0.5, 0.5], [1, 1], mask=[True])

    @pytest.mark.parametrize(
        "mask", [[1, 0], torch.tensor([1, 0]), np.array([1.0, 0.0])], ids=["list", "torch", "float"]
    )
    def test_a_mask_of_numbers_is_an_error(self, mask):
        with pytest.raises(ValueError, match="mask must be boolean, found .*(int64|float64)"):
            CalibrationHistogram().update([0.5, 0.5], [1, 1], mask=mask)

    def test_the_arguments_are_left_alone(self):
        confidence, correct = saturated(100)
        histogram((confidence, correct))
        assert (confidence == saturated(100)[0]).all() and (correct == saturated(100)[1]).all()

    def test_its_memory_does_not_grow_with_the_batch(self):
        def peak(size):
            pairs = np.full(size, 0.7, dtype=np.float32), np.ones(size, dtype=bool)
            found = CalibrationHistogram()
            tracemalloc.start()
            found.update(*pairs)
            result = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return result

        assert peak(1_000_000) == pytest.approx(peak(200_000), rel=0.05)
        assert peak(1_000_000) < 20e6


class TestMerge:
    @given(pairs=PAIRS, cuts=st.tuples(st.integers(0, 80), st.integers(0, 80)).map(sorted))
    def test_it_is_commutative_and_associative_and_equals_one_stream(self, pairs, cuts):
        a, b, c = (histogram(part) for part in split(pairs, *cuts))
        assert_same_table(merged(a, b, c), histogram(pairs))
        assert_same_table(merged(c, a, b), merged(a, b, c))
        assert_same_table(merged(a, merged(b, c)), merged(merged(a, b), c))

    def test_the_other_stays_as_it_is(self):
        found, other = histogram(smooth(10)), histogram(smooth(20))
        before = other.to_array()
        found.merge(other)
        found.update([0.5], [1])
        assert found.num_samples == 31 and (other.to_array() == before).all()

    def test_an_empty_one_changes_nothing(self):
        assert_same_table(merged(histogram(smooth(10)), CalibrationHistogram()), histogram(smooth(10)))

    def test_a_copy_goes_its_own_way(self):
        found = histogram(smooth(10))
        copy.deepcopy(found).update([0.5], [1])
        assert found.num_samples == 10


class TestToArray:
    def test_the_sum_over_processes_is_the_merged_histogram(self):
        parts = [histogram(part) for part in split(smooth(3_000), 1_000, 1_001)]
        summed = torch.stack([torch.from_numpy(part.to_array()) for part in parts]).sum(dim=0)  # as all_reduce does
        assert_same_table(CalibrationHistogram.from_array(summed), histogram(smooth(3_000)))
        assert_same_table(CalibrationHistogram.from_array(summed.numpy()), histogram(smooth(3_000)))

    def test_it_holds_counts_correct_ones_and_confidences(self):
        pairs = smooth(1_000)
        assert histogram(pairs).to_array().sum(axis=1) == pytest.approx([1_000, pairs[1].sum(), pairs[0].sum()])

    def test_it_has_the_documented_number_of_cells(self):
        # the grid, and at either end 256 for each halving of the distance from 2^-8 to 2^-53, and one more
        assert CalibrationHistogram().to_array().shape == (3, 72_000 + 2 * (45 * 256 + 1))

    def test_it_is_a_copy(self):
        found = histogram(smooth(10))
        found.to_array()[:] = 0
        assert found.num_samples == 10


class TestFromArray:
    def test_it_undoes_to_array(self):
        found = CalibrationHistogram.from_array(histogram(saturated(1_000)).to_array())
        assert (found.to_array() == histogram(saturated(1_000)).to_array()).all()
        found.update([0.5], [1])
        assert found.num_samples == 1_001

    def test_it_takes_as_many_samples_as_float64_counts(self):
        array = CalibrationHistogram().to_array()
        array[:, -1] = 2.0**53
        assert CalibrationHistogram.from_array(array).num_samples == 2**53

    @pytest.mark.parametrize("cut", [lambda a: a[:2], lambda a: a[:, :-1], lambda a: a[None]])
    def test_another_shape_is_an_error(self, cut):
        with pytest.raises(ValueError, match="of `to_array`, shape"):
            CalibrationHistogram.from_array(cut(histogram(smooth(10)).to_array()))

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda a: a / 2,
            lambda a: -a,
            lambda a: a * math.nan,
            lambda a: a + math.inf,
            lambda a: a[[1, 0, 2]],
            lambda a: a * [[1], [1], [9]],
            lambda a: a + [[0], [1], [0]] * (np.arange(a.shape[1]) == 0),  # a correct sample in a cell without samples
            lambda a: a - [[0], [0], [1]] * (np.arange(a.shape[1]) == 0),  # a negative confidence
            lambda a: a + (2.0**53 + 2) * (np.arange(a.shape[1]) == 50_000),
        ],
    )
    def test_what_cannot_be_counts_and_confidences_is_an_error(self, wrong):
        with pytest.raises(ValueError, match="Sum arrays, do not average"):
            CalibrationHistogram.from_array(wrong(histogram(smooth(101)).to_array()))


class TestNumSamples:
    def test_it_counts_every_sample_once(self):
        assert histogram(smooth(100), saturated(50)).num_samples == 150
        assert CalibrationHistogram().num_samples == 0


class TestAccuracy:
    def test_it_is_the_share_of_correct_samples(self):
        assert histogram(([0.1, 0.5, 1.0, 1.0], [0, 1, 1, 1])).accuracy() == 0.75


class TestBinStatistics:
    @pytest.mark.parametrize("num_bins", NESTED)
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_every_edge_and_its_neighbours_fall_where_the_metrics_put_them(self, num_bins, dtype):
        edges = equal_width_edges(num_bins).astype(dtype)
        one = dtype(1)
        sides = [edges, np.nextafter(edges, 0 * one), np.nextafter(edges, one)]
        for values in (
            *sides,
            *np.concatenate(sides)[:: max(1, num_bins // 8), None],
        ):  # all of a side, then each alone
            pair = values, np.ones(len(values), bool)
            expected = bin_statistics(*pair, equal_width_edges(num_bins))
            assert histogram(pair).bin_statistics(num_bins).count.tolist() == expected.count.tolist(), values

    @given(pairs=PAIRS, num_bins=st.sampled_from(NESTED))
    def test_it_equals_that_of_all_samples(self, pairs, num_bins):
        found = histogram(pairs).bin_statistics(num_bins)
        expected = bin_statistics(*pairs, equal_width_edges(num_bins))
        assert found.edges.tolist() == expected.edges.tolist()
        assert found.count.tolist() == expected.count.tolist() and found.count.dtype == np.int64
        np.testing.assert_allclose(found.confidence, expected.confidence, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.accuracy, expected.accuracy, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("num_bins", [7, 11, 14, 1024, 144_000])
    def test_bins_that_do_not_nest_are_an_error_that_names_those_that_do(self, num_bins):
        with pytest.raises(
            ValueError, match=rf"divide 72,000, found {num_bins}. Up to 100 these do: \[1, 2, .*10, 12, 15, 16"
        ):
            histogram(smooth(10)).bin_statistics(num_bins)

    def test_all_72000_bins_can_be_had(self):
        confidence, correct = saturated(5_000)
        found = histogram((confidence, correct)).bin_statistics(72_000)
        expected = bin_statistics(confidence, correct, equal_width_edges(72_000))
        assert (found.count == expected.count).all()
        edge = [1 / 72_000, np.nextafter(1 / 72_000, 1)]
        assert histogram((edge, [1, 1])).bin_statistics(72_000).count[:3].tolist() == [1, 1, 0]


class TestEqualMassStatistics:
    @given(pairs=PAIRS, num_bins=st.sampled_from([1, 2, 3, 7, 15, 30]))
    def test_it_is_exact_for_its_own_edges(self, pairs, num_bins):
        found = histogram(pairs).equal_mass_statistics(num_bins)
        expected = bin_statistics(*pairs, found.edges)
        assert found.count.tolist() == expected.count.tolist() and found.count.dtype == np.int64
        np.testing.assert_allclose(found.confidence, expected.confidence, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.accuracy, expected.accuracy, rtol=0, atol=1e-12)

    @given(pairs=PAIRS)
    def test_its_edges_ascend_and_enclose_the_samples(self, pairs):
        edges = histogram(pairs).equal_mass_statistics().edges
        assert edges.shape == (16,) and (np.diff(edges) >= 0).all()
        assert 0 <= edges[0] <= pairs[0].min() and pairs[0].max() <= edges[-1] <= 1

    @pytest.mark.parametrize("pairs", [smooth, saturated])
    def test_its_edges_are_those_of_all_samples_up_to_a_cell(self, pairs):
        confidence, correct = pairs(200_000)
        edges = histogram((confidence, correct)).equal_mass_statistics().edges
        np.testing.assert_allclose(edges, equal_mass_edges(confidence), rtol=0, atol=1 / 72_000)

    def test_it_splits_no_tie(self):
        found = histogram(([0.75] * 5, [1, 0, 0, 0, 0])).equal_mass_statistics(3)
        assert found.count.tolist() == [5, 0, 0] and found.gap == pytest.approx([0.55, 0, 0])
        assert histogram(([1.0] * 5, [1, 0, 0, 0, 0])).equal_mass_statistics(3).count.tolist() == [5, 0, 0]


class TestExpectedCalibrationError:
    @given(pairs=PAIRS, num_bins=st.sampled_from(NESTED[:-1]))
    def test_it_equals_that_of_all_samples_and_the_slow_loop(self, pairs, num_bins):
        found = histogram(pairs).expected_calibration_error(num_bins)
        assert found == pytest.approx(calibration_error(*pairs, num_bins), abs=1e-12)
        edges = reference.equal_width_edges(num_bins)
        assert found == pytest.approx(reference.calibration_error(*pairs, edges), abs=1e-12)

    @pytest.mark.parametrize("pairs", [smooth, saturated])
    def test_a_million_samples_in_chunks_give_that_of_all(self, pairs):
        confidence, correct = pairs(1_000_000)
        found = histogram(*split((confidence, correct), *range(70_000, 1_000_000, 70_000)))
        assert found.num_samples == 1_000_000 and found.accuracy() == correct.mean()
        for num_bins in (15, 100):
            expected = calibration_error(confidence, correct, num_bins)
            assert found.expected_calibration_error(num_bins) == pytest.approx(expected, abs=1e-12)
        expected = calibration_error(confidence, correct, scheme="equal_mass")
        bound = found.adaptive_calibration_error_bound()
        assert abs(found.adaptive_calibration_error() - expected) <= bound < 5e-4

    @pytest.mark.slow
    def test_a_hundred_million_samples_need_no_more_memory_than_a_million(self):
        generator = np.random.default_rng(0)
        found, gaps, peaks = CalibrationHistogram(), np.zeros(15), []
        tracemalloc.start()
        for _ in range(100):
            confidence = generator.random(1_000_000, dtype=np.float32)
            correct = generator.random(1_000_000, dtype=np.float32) < confidence**2
            tracemalloc.reset_peak()
            found.update(confidence, correct)
            peaks.append(tracemalloc.get_traced_memory()[1])
            bins = np.digitize(confidence.astype(np.float64), np.arange(1, 15) / 15, right=True)
            gaps += np.bincount(bins, confidence.astype(np.float64) - correct)
        tracemalloc.stop()
        assert max(peaks[1:]) == pytest.approx(peaks[1], rel=0.01)
        assert found.num_samples == 100_000_000
        assert found.expected_calibration_error() == pytest.approx(np.abs(gaps).sum() / 1e8, abs=1e-12)
        assert found.expected_calibration_error() == pytest.approx(1 / 6, abs=3e-4)  # the integral of c - c^2
        assert found.adaptive_calibration_error() == pytest.approx(1 / 6, abs=3e-4)
        assert found.adaptive_calibration_error_bound() < 5e-4


class TestMaximumCalibrationError:
    @given(pairs=PAIRS, num_bins=st.sampled_from(NESTED))
    def test_it_equals_that_of_all_samples(self, pairs, num_bins):
        expected = calibration_error(*pairs, num_bins, norm="max")
        assert histogram(pairs).maximum_calibration_error(num_bins) == pytest.approx(expected, abs=1e-12)


class TestAdaptiveCalibrationError:
    @given(pairs=PAIRS, num_bins=st.sampled_from([1, 2, 3, 7, 15, 30]))
    @example(pairs=as_arrays([(0.5, 1)] * 2 + [(NEXT_TO_HALF, 0)] * 3), num_bins=3)  # an edge that rounds up
    @example(pairs=as_arrays([(1 - 2.0**-53, 1)] * 2 + [(1.0, 0)] * 3), num_bins=3)
    def test_it_is_within_the_bound_of_that_of_all_samples(self, pairs, num_bins):
        found = histogram(pairs)
        expected = calibration_error(*pairs, num_bins, scheme="equal_mass")
        error = abs(found.adaptive_calibration_error(num_bins) - expected)
        assert error <= found.adaptive_calibration_error_bound(num_bins) + 1e-12

    @given(
        st.lists(st.tuples(st.integers(0, 64), st.booleans()), min_size=1, max_size=80), st.sampled_from([1, 4, 15])
    )
    def test_it_is_exact_where_a_cell_holds_one_confidence(self, samples, num_bins):
        confidence, correct = np.array([c / 64 for c, _ in samples]), np.array([r for _, r in samples])
        expected = reference.calibration_error(
            confidence, correct, reference.equal_mass_edges(confidence.tolist(), num_bins)
        )
        found = histogram((confidence, correct)).adaptive_calibration_error(num_bins)
        assert found == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_it_is_exact_for_a_saturated_model_in_half_precision(self, dtype):
        confidence, correct = saturated(5_000)
        confidence = torch.from_numpy(confidence).to(dtype)
        expected = calibration_error(confidence.double().numpy(), correct, scheme="equal_mass")
        assert histogram((confidence, correct)).adaptive_calibration_error() == pytest.approx(expected, abs=1e-12)

    def test_samples_at_one_confidence_are_not_called_perfect(self):
        assert histogram(([0.75] * 4, [1, 1, 0, 0])).adaptive_calibration_error() == 0.25
        assert histogram(([1.0] * 4, [0, 0, 0, 0])).adaptive_calibration_error() == 1

    def test_one_sample_gives_its_own_gap(self):
        assert histogram(([0.8], [1])).adaptive_calibration_error() == pytest.approx(0.2)

    def test_every_sample_is_counted_with_more_bins_than_samples(self):
        pairs = [0.2, 0.4, 1.0], [0, 0, 0]
        assert histogram(pairs).adaptive_calibration_error(50) == pytest.approx(1.6 / 3)


class TestAdaptiveCalibrationErrorBound:
    def test_it_is_reached(self):
        # bins of all samples: the first four, -3.2, and the last two, 1.0. The last three share a cell, so bin 1 gets
        # all six: 4.2 / 6 becomes 2.2 / 6. The cell has two wrong samples at 0.5.
        pairs = [0.1, 0.1, 0.1, 0.499999, 0.4999995, 0.5], [1, 1, 1, 1, 0, 0]
        assert calibration_error(*pairs, 2, scheme="equal_mass") == pytest.approx(4.2 / 6, abs=1e-6)
        assert histogram(pairs).adaptive_calibration_error(2) == pytest.approx(2.2 / 6, abs=1e-6)
        assert histogram(pairs).adaptive_calibration_error_bound(2) == pytest.approx(2 / 6, abs=1e-6)

    @pytest.mark.parametrize("pairs", [smooth, saturated])
    def test_it_is_at_most_twice_the_share_of_samples_in_split_cells(self, pairs):
        confidence, correct = pairs(200_000)
        edges = equal_mass_edges(confidence)[1:-1]
        split_cells = np.ceil(edges * 72_000)  # whole cells of the grid, also where the histogram cuts them on
        share = np.isin(np.ceil(confidence * 72_000), np.append(split_cells, split_cells + 1)).mean()
        assert 0 < histogram((confidence, correct)).adaptive_calibration_error_bound() <= 2 * share

    def test_it_is_small_for_a_saturated_model(self):
        confidence, correct = saturated(200_000)
        assert (confidence > 0.9999).mean() > 0.75
        assert histogram((confidence, correct)).adaptive_calibration_error_bound() < 2e-4
        single = confidence.astype(np.float32)  # near 1 it has few values, so a cell holds more samples
        assert histogram((single, correct)).adaptive_calibration_error_bound() < 5e-3

    def test_it_is_small_for_a_rare_class(self):
        confidence, correct = saturated(200_000)
        rare = histogram((1 - confidence, ~correct)).adaptive_calibration_error_bound()
        assert rare == pytest.approx(histogram((confidence, correct)).adaptive_calibration_error_bound(), abs=2e-4)

    def test_it_is_0_where_no_edge_can_split_a_cell(self):
        assert histogram(smooth(1_000)).adaptive_calibration_error_bound(1) == 0
        assert histogram(([1.0] * 40, [1, 0] * 20)).adaptive_calibration_error_bound() == 0


RESULTS = [
    CalibrationHistogram.bin_statistics,
    CalibrationHistogram.equal_mass_statistics,
    CalibrationHistogram.expected_calibration_error,
    CalibrationHistogram.maximum_calibration_error,
    CalibrationHistogram.adaptive_calibration_error,
    CalibrationHistogram.adaptive_calibration_error_bound,
]


class TestEveryResult:
    @pytest.mark.parametrize("result", [CalibrationHistogram.accuracy, *RESULTS], ids=lambda f: f.__name__)
    def test_before_the_first_sample_it_is_an_error(self, result):
        with pytest.raises(ValueError, match="at least one sample, found none: `update` first"):
            result(CalibrationHistogram())

    @pytest.mark.parametrize("result", RESULTS, ids=lambda f: f.__name__)
    def test_no_bins_are_an_error(self, result):
        with pytest.raises(ValueError, match="num_bins must be at least 1, found 0"):
            result(histogram(smooth(10)), 0)

    @pytest.mark.parametrize("result", RESULTS, ids=lambda f: f.__name__)
    def test_it_has_15_bins_unless_told(self, result):
        found = histogram(smooth(1_000))
        default, expected = result(found), result(found, 15)
        assert np.array_equal(getattr(default, "gap", default), getattr(expected, "gap", expected))

    @pytest.mark.parametrize("result", [CalibrationHistogram.accuracy, *RESULTS[2:]], ids=lambda f: f.__name__)
    def test_it_is_a_plain_number(self, result):
        assert type(result(histogram(smooth(10)))) is float


class TestImport:
    def test_streaming_needs_numpy_alone(self):
        code = "import sys, hf_adafocal.metrics.histogram; print(*sys.modules)"
        modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert not set(modules.split()) & {"torch", "transformers", "scipy", "sklearn"}


def test_the_bound_of_adaptive_ece_counts_the_cells_on_both_sides_of_an_edge():
    # wrong samples in two bins: the edge lies between the third and the fourth, .3 and .4
    for confidence in ([0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.3, 0.4]):
        found = histogram((confidence, np.zeros(len(confidence))))
        expected = 2 / len(confidence) * (0.3 + 0.4)
        assert found.adaptive_calibration_error_bound(2) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([0.500002, 0.500003, 0.500004, 0.500005], [1, 1, 1, 0], 2 / 4 * 3 * (1 - 36_000 / 72_000)),
        ([0.500002, 0.500003, 0.500004, 0.500005], [0, 0, 0, 1], 2 / 4 * 3 * (36_001 / 72_000)),
        ([1 - 2.0**-53] * 4, [0, 0, 0, 0], 2 / 4 * 4),
    ],
)
def test_the_bound_of_adaptive_ece_is_that_of_the_cell_an_edge_splits(confidence, correct, expected):
    found = histogram((confidence, correct))
    assert found.adaptive_calibration_error_bound(2) == pytest.approx(expected, rel=1e-9)
