"""Confidence intervals of the calibration error of samples that come in groups, such as the pixels of an image.

Samples of one group are not independent, so the interval of `metrics.intervals` would be too narrow. Groups are, and
for fixed signs of the bins the error is a ratio of totals over groups, `sum_i s d_i / sum_i n_i` with the gaps `d_i`
and the samples `n_i` of group i, which has a Student interval. The signs of the true gaps are unknown but fixed, so as
in `metrics.intervals` the upper bound is the largest over all signs, and the lower bound is that of the observed signs
with the level divided by the number of signs.
"""

import math
from itertools import product
from typing import Any

import numpy as np

from hf_adafocal.metrics.binning import bin_statistics, slope_of_norm
from hf_adafocal.metrics.intervals import Interval, check_level
from hf_adafocal.metrics.validation import as_array, check_pairs

_MOST_BINS = 16  # whose signs are tried one by one
_SMALLEST_TAIL = 1e-150  # of a smaller one SciPy's Student quantile can be wrong, even in sign


def count_groups(confidence: Any, correct: Any, groups: Any, edges: np.ndarray) -> np.ndarray:
    """Count samples, correct samples and the sum of confidences of each group in each bin.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.
        groups: Number or name of each sample's group, shape `(N,)`.
        edges: Of the bins, ascending, shape `(B + 1,)`.

    Returns:
        Shape `(G, B, 3)`, one row per group, in the order of their sorted names.

    Raises:
        ValueError: If the lengths differ, or as `bin_statistics`.

    >>> count_groups([0.2, 0.9, 0.8], [0, 1, 1], ["a", "a", "b"], np.array([0.0, 0.5, 1.0])).tolist()
    [[[1.0, 0.0, 0.2], [1.0, 1.0, 0.9]], [[0.0, 0.0, 0.0], [1.0, 1.0, 0.8]]]
    """
    confidence, correct = check_pairs(confidence, correct)
    groups = as_array(groups)
    if groups.shape != confidence.shape:
        raise ValueError(f"groups must name the group of each sample, shape {confidence.shape}; found {groups.shape}.")
    _, index = np.unique(groups, return_inverse=True)
    order = np.argsort(index, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(index[order])) + 1)
    rows = [bin_statistics(confidence[part], correct[part], edges) for part in parts]
    return np.stack(
        [np.stack([row.count, row.count * row.accuracy, row.count * row.confidence], axis=-1) for row in rows]
    )


def grouped_error_interval(counts: np.ndarray, level: float = 0.95) -> Interval:
    """Compute a confidence interval of ECE over other groups from the same source.

    Args:
        counts: Samples, correct samples and sum of confidences of each group and bin, shape `(G, B, 3)`, as
            `count_groups` returns them; two groups at least. Groups without samples are left out.
        level: Probability that the interval covers, in (0, 1).

    Returns:
        The error of all samples pooled and the ends of its interval, fractions in [0, 1].

    Raises:
        ValueError: If fewer than two groups hold samples, or `level` is out of range.

    Source: Cochran 1977, Sampling Techniques, section 9A (ratio of totals of clusters).

    >>> counts = np.array([[[10.0, 8.0, 9.0]], [[10.0, 8.0, 9.0]]])
    >>> grouped_error_interval(counts)  # the groups agree
    Interval(value=0.1, low=0.1, high=0.1)
    """
    check_level(level)
    counts = np.asarray(counts, dtype=np.float64)
    counts = counts[counts[..., 0].sum(axis=1) > 0]
    if len(counts) < 2:
        raise ValueError(f"An interval over groups needs two of them with samples, found {len(counts)}.")
    from scipy.special import stdtrit

    held = counts[..., 0].sum(axis=0) > 0
    gaps, sizes = (counts[..., 2] - counts[..., 1])[:, held], counts[..., 0].sum(axis=1)
    total, bins = sizes.sum(), int(held.sum())
    mean = gaps.sum(axis=0) / total
    rest = gaps - sizes[:, None] * mean  # of each group, for any signs
    # `root @ signs` has the length of `rest @ signs`, the standard error, and at most as many rows as there are bins.
    root = np.asarray(np.linalg.qr(rest, mode="r")) * math.sqrt(len(counts) / (len(counts) - 1)) / total
    value = float(np.abs(mean).sum())
    tail, freedom = (1 - level) / 2, len(counts) - 1
    reach = float(stdtrit(freedom, 1 - tail))
    if bins <= _MOST_BINS:
        signs = np.array(list(product((-1.0, 1.0), repeat=bins)))
        high = float((signs @ mean + reach * np.linalg.norm(signs @ root.T, axis=1)).max())
    else:  # the error of a sum is at most the sum of the errors
        high = value + reach * float(np.linalg.norm(root, axis=0).sum())
    smallest = math.ldexp(tail, -bins)
    lowest = -float(stdtrit(freedom, smallest)) if smallest > _SMALLEST_TAIL else math.inf
    error = float(np.linalg.norm(root @ slope_of_norm(mean, "l1")))
    low = value - lowest * error if error > 0 else value
    return Interval(value, min(max(low, 0.0), value), min(max(high, value), 1.0))
