"""Intervals of the calibration error of samples that come in groups."""

import itertools

import numpy as np
import pytest
import scipy.stats

from hf_adafocal.metrics.binning import equal_width_edges
from hf_adafocal.metrics.gate import calibration_gate
from hf_adafocal.metrics.groups import count_groups, grouped_error_interval
from hf_adafocal.metrics.intervals import calibration_error_interval
from hf_adafocal.metrics.scores import calibration_error

EDGES = equal_width_edges(15)


def images(number, pixels, spread, shift, seed):
    """Confidences, outcomes and images of pixels whose image moves their log odds together."""
    random = np.random.default_rng(seed)
    confidence = random.beta(4, 1.2, (number, pixels))
    odds = np.log(confidence / (1 - confidence)) + random.normal(0, spread, (number, 1)) + shift
    correct = random.random((number, pixels)) < 1 / (1 + np.exp(-odds))
    return confidence.ravel(), correct.ravel(), np.arange(number).repeat(pixels)


def slow_interval(counts, level, occupied):
    """Student's interval of a ratio of totals over groups, largest over the signs of the bins, one after the other."""
    number, tail, total = len(counts), (1 - level) / 2, counts[..., 0].sum()
    highs, lows = [], []
    for signs in itertools.product([-1, 1], repeat=counts.shape[1]):
        signed = [sum(s * (c - hits) for s, (_, hits, c) in zip(signs, group, strict=True)) for group in counts]
        ratio = sum(signed) / total
        rest = [d - ratio * sum(n for n, _, _ in group) for d, group in zip(signed, counts, strict=True)]
        error = np.std(rest, ddof=1) * np.sqrt(number) / total
        highs.append(ratio + scipy.stats.t.ppf(1 - tail, number - 1) * error)
        lows.append((ratio, ratio + scipy.stats.t.ppf(tail / 2.0**occupied, number - 1) * error))
    return max(max(lows)[1], 0), min(max(highs), 1)


class TestCountGroups:
    def test_it_equals_a_loop_over_the_samples(self):
        confidence, correct, groups = images(7, 20, 1.0, 0.0, 0)
        order = np.random.default_rng(1).permutation(len(groups))
        expected = np.zeros((7, 15, 3))
        for c, hit, group in zip(confidence, correct, groups, strict=True):
            place = next(k for k in range(15) if c <= (k + 1) / 15)
            expected[group, place] += 1, hit, c
        found = count_groups(confidence[order], correct[order], groups[order], EDGES)
        np.testing.assert_allclose(found, expected)

    def test_names_and_other_lengths(self):
        assert count_groups([0.5, 0.5], [1, 0], ["b", "a"], EDGES)[:, :, 1].sum(1).tolist() == [0, 1]
        with pytest.raises(ValueError, match="group of each sample"):
            count_groups([0.5, 0.5], [1, 0], ["b"], EDGES)


class TestGroupedErrorInterval:
    @pytest.mark.parametrize(("spread", "shift"), [(0.0, 0.0), (1.0, 0.0), (0.0, -0.7), (1.0, -0.7)])
    @pytest.mark.slow
    def test_the_upper_end_is_passed_by_the_truth_about_as_rarely_as_it_promises(self, spread, shift):
        truth = calibration_error(*images(4000, 50, spread, shift, 0)[:2])
        missed = 0
        for seed in range(1, 201):
            found = grouped_error_interval(count_groups(*images(12, 50, spread, shift, seed), EDGES))
            missed += truth > found.high
            assert truth > found.low
        assert missed <= 12  # 2.5 % of 200 is 5, and more than 12 has a chance of 0.1 %

    def test_of_groups_of_one_it_is_close_to_that_of_single_samples(self):
        confidence, correct, _ = images(3000, 1, 0.0, -0.7, 0)
        found = grouped_error_interval(count_groups(confidence, correct, np.arange(3000), EDGES))
        single = calibration_error_interval(confidence, correct)
        assert found.value == pytest.approx(single.value) and found.high == pytest.approx(single.high, rel=0.1)

    def test_where_images_differ_it_is_wider_than_that_of_pixels(self):
        confidence, correct, groups = images(12, 400, 1.0, -0.7, 0)
        found = grouped_error_interval(count_groups(confidence, correct, groups, EDGES))
        single = calibration_error_interval(confidence, correct)
        assert found.high - found.value > 3 * (single.high - single.value)

    def test_the_bound_for_many_bins_is_above_that_over_all_signs(self, monkeypatch):
        counts = count_groups(*images(12, 50, 1.0, -0.7, 0), EDGES)
        exact = grouped_error_interval(counts)
        monkeypatch.setattr("hf_adafocal.metrics.groups._MOST_BINS", 3)
        assert grouped_error_interval(counts).high >= exact.high

    def test_one_group_is_an_error(self):
        counts = count_groups([0.5, 0.5], [1, 0], [0, 0], EDGES)
        with pytest.raises(ValueError, match="two of them with samples, found 1"):
            grouped_error_interval(np.concatenate([counts, 0 * counts]))

    @pytest.mark.parametrize(("number", "level"), [(2, 0.95), (3, 0.5), (12, 0.95), (20, 0.8)])
    def test_its_ends_are_those_of_the_ratio_of_totals_of_every_sign_of_the_bins(self, number, level):
        counts = count_groups(*images(number, 30, 0.5, -0.7, number), equal_width_edges(9))
        counts[:, 5, 1] = counts[:, 5, 0]  # one under-confident bin
        occupied = (counts[..., 0].sum(axis=0) > 0).sum()
        assert occupied < 9
        value, low, high = grouped_error_interval(counts, level)
        assert value == pytest.approx(np.abs((counts[..., 2] - counts[..., 1]).sum(axis=0)).sum() / number / 30)
        assert (low, high) == pytest.approx(slow_interval(counts, level, occupied))
        assert low < value < high

    def test_groups_of_unlike_sizes_weigh_as_their_samples(self):
        confidence, correct, groups = images(20, 30, 0.5, -0.7, 0)
        kept = np.random.default_rng(0).random(600) < np.linspace(0.1, 1, 20)[groups]
        counts = count_groups(confidence[kept], correct[kept], groups[kept], equal_width_edges(7))
        occupied = (counts[..., 0].sum(axis=0) > 0).sum()
        assert grouped_error_interval(counts)[1:] == pytest.approx(slow_interval(counts, 0.95, occupied))

    def test_bins_and_groups_without_samples_change_nothing(self):
        counts = count_groups(*images(6, 30, 0.5, -0.7, 0), equal_width_edges(8))
        counts[0, :, 1] = 0  # a group whose samples are all wrong, and one of a single wrong sample
        counts[1], counts[1, 6] = 0, (1, 0, 0.8)
        more = np.insert(np.insert(counts, 3, 0, axis=0), [0, 0, 5], 0, axis=1)
        assert grouped_error_interval(more, 0.5) == pytest.approx(grouped_error_interval(counts, 0.5))
        held = counts[..., 0].sum(axis=0) > 0
        assert grouped_error_interval(counts, 0.5)[1:] == pytest.approx(slow_interval(counts, 0.5, held.sum()))

    def test_errors_of_bins_that_go_together_give_the_same_ends_from_17_bins_on(self):
        # Gaps of 1, which vary between the 4 groups, and of 3, which do not, in turn.
        for bins in (16, 17):
            counts = np.zeros((4, bins, 3))
            counts[..., 0], counts[..., 2] = 5, 3
            counts[:, ::2, 2] = [[1], [0], [2], [1]]
            gaps = np.where(np.arange(bins) % 2, 3, 1).sum()
            error = (bins + 1) // 2 * counts[:, 0, 2].std(ddof=1) / 2
            found = grouped_error_interval(counts, 0.5)
            assert found.value == pytest.approx(gaps / (5 * bins))
            expected = (gaps + scipy.stats.t.ppf(0.75, 3) * error) / (5 * bins)
            assert found.high == pytest.approx(expected)
            lowest = scipy.stats.t.ppf(0.25 / 2**bins, 3)
            assert found.low == pytest.approx(max((gaps + lowest * error) / (5 * bins), 0))

    def test_errors_of_bins_that_cancel_are_added_from_17_bins_on(self):
        for bins in (16, 17):
            counts = np.zeros((4, bins, 3))
            counts[..., 0], counts[..., 2] = 5, 2
            counts[:, :2, 2] += np.array([[0.5, -0.5], [-0.5, 0.5], [1, -1], [-1, 1]])
            found = grouped_error_interval(counts, 0.5)
            error = 2 * np.std([0.5, -0.5, 1, -1], ddof=1) / 2 / (5 * bins)
            assert found.low == pytest.approx(0.4) and found.value == pytest.approx(0.4)
            assert found.high == pytest.approx(0.4 + scipy.stats.t.ppf(0.75, 3) * error * (bins == 17))

    @pytest.mark.parametrize("bins", [300, 900, 1100])
    def test_hundreds_of_bins_leave_a_lower_end_of_0_unless_the_groups_agree(self, bins):
        counts = np.zeros((4, bins, 3))
        counts[..., 0], counts[..., 2] = 1, 0.5
        assert grouped_error_interval(counts) == pytest.approx((0.5, 0.5, 0.5))
        counts[0, :, 2] += 0.25
        low, high = grouped_error_interval(counts)[1:]
        assert low == 0 and high > 0.6

    def test_the_ends_stay_in_the_unit_interval(self):
        counts = np.array([[[10.0, 0, 10]], [[10.0, 0, 10]], [[10.0, 10, 10]]])
        assert grouped_error_interval(counts) == pytest.approx((2 / 3, 0, 1))

    @pytest.mark.parametrize("level", [0, 1, 95, np.nan])
    def test_a_level_out_of_range_is_an_error(self, level):
        with pytest.raises(ValueError, match=f"level must lie strictly between 0 and 1, found {level}"):
            grouped_error_interval(np.ones((2, 1, 3)), level)


class TestGateOfGroups:
    def test_pixels_of_few_images_do_not_pass_where_as_many_samples_would(self):
        confidence, correct, groups = images(12, 2000, 1.0, 0.0, 3)
        value = calibration_error(confidence, correct)
        assert calibration_gate(confidence, correct, max_ece=value + 0.02).passed
        found = calibration_gate(confidence, correct, max_ece=value + 0.02, groups=groups)
        assert not found.passed and "24000 samples in 12 groups" in found.message
