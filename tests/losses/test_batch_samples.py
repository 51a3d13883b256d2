"""What the losses of a whole batch share: which samples and classes count, and the checks of their settings."""

import math

import pytest
import torch

from hf_adafocal.losses.batch_samples import MOST_PAIRED, check_bins, refuse_pairs
from hf_adafocal.losses.calibration_penalties import dca, mdca


def test_one_counted_sample_is_its_own_mean():
    assert dca(torch.zeros(2, 2), torch.tensor([1, -100])) == 0.5


def test_a_class_that_is_possible_for_ignored_samples_alone_is_not_averaged_over():
    logits, labels = torch.zeros(3, 3), torch.tensor([0, 0, -100])
    logits[:2, 2] = -math.inf
    assert mdca(logits, labels) == 0.5  # a gap of 1/2 in either of two classes


def test_as_many_samples_are_paired_as_the_error_says():
    refuse_pairs("mmce", torch.zeros(4096))
    with pytest.raises(ValueError, match="takes at most 4096 per call, found 4097 labels"):
        refuse_pairs("mmce", torch.zeros(MOST_PAIRED + 1))


def test_one_bin_is_enough_and_a_softness_is_finite():
    check_bins(1, temperature=1e-3)
    for value in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            check_bins(1, temperature=value)
