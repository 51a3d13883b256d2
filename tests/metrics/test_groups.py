"""Intervals of the calibration error of samples that come in groups."""

import numpy as np
import pytest

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


class TestGateOfGroups:
    def test_pixels_of_few_images_do_not_pass_where_as_many_samples_would(self):
        confidence, correct, groups = images(12, 2000, 1.0, 0.0, 3)
        value = calibration_error(confidence, correct)
        assert calibration_gate(confidence, correct, max_ece=value + 0.02).passed
        found = calibration_gate(confidence, correct, max_ece=value + 0.02, groups=groups)
        assert not found.passed and "24000 samples in 12 groups" in found.message
