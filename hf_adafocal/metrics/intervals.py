"""Confidence intervals of calibration errors with guaranteed coverage for any number of samples.

The guarantee is given the confidences: each outcome is a Bernoulli draw of its own unknown probability, independent of
the others, and the true error is the one that the same samples show when every outcome is replaced by that
probability.

An l1 error is `max_s sum_b s_b g_b / N` over all signs `s` of the bins, `g_b` the sum of confidence minus outcome in
bin b. For fixed signs the sum is a known number plus a count of events: wrong samples in bins with `s_b = 1`, right
ones in the others. Hoeffding (1956) showed that the tails of such a count (of independent events of unequal
probabilities) are never heavier than those of the binomial of equal mean, so the exact binomial bounds of Clopper and
Pearson (1934) hold for it. The signs of the true gaps are unknown but fixed. Hence

* the upper bound is the largest of the upper bounds of all signs, each at the full level: it holds because it is at
  least the one of the true signs, and needs no correction for their number;
* the lower bound is the largest of the lower bounds of all signs, each at the level divided by their number.

The largest over all `2^bins` signs is found exactly by dynamic programming over the count of events.

Other samples have other confidences. What that adds to the variance matters only where the gaps are large and differ
between confidences. For the l1 error the ends are therefore at least as far from the value as the normal bounds of the
mean of `s (confidence - outcome)` over drawn samples, whose second moment, whatever the signs, is the Brier score of
the pairs. That part holds for many samples; `model_cards/gate.md` simulates both.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from hf_adafocal.metrics.binning import Norm, Scheme, binned, equal_width_edges, gap_norm, vector_norm, weighted_gaps
from hf_adafocal.metrics.classwise import add_class_gaps, mean_class_error
from hf_adafocal.metrics.scores import at_class
from hf_adafocal.metrics.validation import as_multiclass, check_pairs, checked_chunks

_SMALLEST_EXPONENT = -600.0  # below, `exp` of it is too small for the quantiles of a beta distribution


class Interval(NamedTuple):
    """A metric and the confidence interval of its true value, in the unit of the metric.

    Attributes:
        value: The metric of the samples at hand.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def calibration_error_interval(
    confidence: Any,
    correct: Any,
    num_bins: int = 15,
    *,
    scheme: Scheme = "equal_width",
    norm: Norm = "l1",
    level: float = 0.95,
) -> Interval:
    """Compute a confidence interval of the binned calibration error that holds for any number of samples.

    Each end is passed by the true error with a probability of at most `(1 - level) / 2`, given the confidences, as
    the module describes; for "l1" also where the confidences are drawn anew, if the samples are many. The interval is
    not symmetric: sampling noise raises a calibration error, so a calibrated model has a value above 0 and a lower end
    of 0. For "l1" the upper end is close to the smallest that can hold for few occupied bins and cautious for many;
    the lower end, and both ends of "l2", are cautious.

    The error is that of the same bins: gaps of both signs within a bin cancel in the true error too.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`; independent outcomes.
        num_bins: Number of bins.
        scheme: As in `calibration_error`; the bins depend on the confidences alone.
        norm: As in `calibration_error`; "l1" is ECE, "max" is MCE.
        level: Probability that the interval covers, in (0, 1).

    Returns:
        The calibration error and the ends of its interval, fractions in [0, 1].

    Raises:
        ValueError: As `calibration_error`, or if `level` is out of range.

    Source: Clopper and Pearson 1934, The use of confidence or fiducial limits illustrated in the case of the
    binomial; Hoeffding 1956, On the distribution of the number of successes in independent trials, theorem 4.

    >>> interval = calibration_error_interval(np.full(20, 0.98), np.ones(20))
    >>> f"{interval.value:.3f}, {interval.low:.3f} to {interval.high:.3f}"
    '0.020, 0.000 to 0.148'
    """
    check_level(level)
    confidence, correct = check_pairs(confidence, correct)
    stats = binned(confidence, correct, num_bins, scheme)
    value = gap_norm(stats, norm)
    held = stats.count > 0
    count, gap = stats.count[held], stats.gap[held]
    right = np.rint(stats.accuracy[held] * count).astype(np.int64)
    tail = (1 - level) / 2
    if norm == "l1":
        low, high = _signed_bounds(gap * count, count - right, right, len(count), len(confidence), 1, tail)
        second_moment = float(np.mean((confidence - correct) ** 2))
        low, high = low / len(confidence), high / len(confidence)
        low = min(low, _normal_below(value, second_moment, len(confidence), len(count), tail))
        high = max(high, _normal_above(value, second_moment, len(confidence), tail))
    else:
        # The largest gap is that of one bin, unknown but fixed; "l2" needs the bounds of all bins, each of one sign.
        shared = tail if norm == "max" else tail / len(count)
        wrong = count - right
        upper = np.maximum(gap + _above(wrong, count, shared), _above(right, count, shared) - gap)
        shared = math.log(tail / (2 * len(count)))
        lower = np.maximum(gap - _below(wrong, count, shared), -gap - _below(right, count, shared))
        low, high = (float(vector_norm(weighted_gaps(np.maximum(g, 0), count, norm), norm)) for g in (lower, upper))
    return Interval(value, float(min(max(low, 0), value)), float(min(max(high, value), 1)))


def classwise_error_interval(probabilities: Any, labels: Any, num_bins: int = 15, *, level: float = 0.95) -> Interval:
    """Compute a confidence interval of classwise ECE (equal-width bins) that holds for any number of samples.

    As `calibration_error_interval`, with signs for the bins of every class: a label counts as an event where its
    probability lies in a bin of negative sign, and each event moves the sum over classes by 2. The lower end is 0
    unless the evidence is overwhelming, because the bins of all classes are many.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        num_bins: Number of bins.
        level: Probability that the interval covers, in (0, 1).

    Returns:
        Classwise ECE and the ends of its interval, fractions in [0, 1].

    Raises:
        ValueError: As `classwise_calibration_error`, or if `level` is out of range.

    >>> interval = classwise_error_interval([[0.75, 0.25]] * 100, [0, 0, 0, 1] * 25)
    >>> f"{interval.value:.3f}, {interval.low:.3f} to {interval.high:.3f}"
    '0.000, 0.000 to 0.097'
    """
    check_level(level)
    probabilities, labels = as_multiclass(probabilities, labels)
    classes = probabilities.shape[1]
    edges, gaps = equal_width_edges(num_bins), np.zeros((classes, num_bins))
    for rows, chunk in checked_chunks(probabilities):
        add_class_gaps(gaps, chunk, chunk.astype(np.float64), labels[rows], edges)
    bins = np.searchsorted(edges[1:-1], at_class(probabilities, labels).astype(np.float64))
    hits = np.bincount(labels * num_bins + bins, minlength=gaps.size)
    tail, size = (1 - level) / 2, len(labels)
    occupied = classes + np.count_nonzero(np.abs(gaps[:, 1:]) + hits.reshape(gaps.shape)[:, 1:])
    low, high = _signed_bounds(gaps.ravel(), np.zeros_like(hits), hits, occupied, size, 2, tail)
    value = mean_class_error(gaps, size)
    low, high = low / (size * classes), high / (size * classes)
    return Interval(value, min(max(low, 0.0), value), min(max(high, value), 1.0))


def check_level(level: float) -> None:
    """Reject a confidence level that is no probability.

    Raises:
        ValueError: If it does not lie strictly between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, found {level}; 0.95 stands for 95 %.")


def count_above(count: np.ndarray, size: Any, tail: float) -> np.ndarray:
    """Compute the exact upper confidence bound of the mean of a count of independent events, minus the count.

    Args:
        count: Events seen, 0 to `size`; fractions are interpolated.
        size: Number of samples, each an event or not.
        tail: Probability that the mean is above the bound, at most.
    """
    from scipy.special import betaincinv  # here: importing the metrics needs numpy alone

    rest = np.maximum(size - count, np.finfo(float).tiny)
    bound = size * np.where(count < size, 1 - betaincinv(rest, count + 1.0, tail), 1)
    # Hoeffding's theorem asks for a mean of at least count + 1; if all events but one are seen the union bound holds.
    return np.where(count == size - 1, np.maximum(bound, size - tail), bound) - count


def _above(count: np.ndarray, size: np.ndarray, tail: float) -> np.ndarray:
    return count_above(count, size, tail) / size


def _below(count: np.ndarray, size: np.ndarray, log_tail: float) -> np.ndarray:
    return _count_below(count, size, log_tail) / size


def _count_below(count: np.ndarray, size: Any, log_tail: float) -> np.ndarray:
    """Count of events minus the exact lower confidence bound of its mean; the tail is given by its logarithm."""
    if log_tail < _SMALLEST_EXPONENT:
        return np.minimum(np.sqrt(-log_tail * size / 2), count)  # Hoeffding's inequality of 1963
    tail = math.exp(log_tail)
    from scipy.special import betaincinv

    bound = size * np.where(count > 0, betaincinv(np.maximum(count, 0.5), size - count + 1.0, tail), 0)
    return count - np.where(count == 1, np.minimum(bound, tail), bound)


def _normal_above(value: float, second_moment: float, size: int, tail: float) -> float:
    """Largest normal upper bound of a mean, at most `value`, of a variable with the given second moment."""
    from scipy.special import ndtri

    slope = -ndtri(tail) / math.sqrt(size)
    mean = min(value, math.sqrt(second_moment / (1 + slope**2)))  # beyond, a larger mean has a lower bound
    return float(mean + slope * math.sqrt(max(second_moment - mean**2, 0)))


def _normal_below(value: float, second_moment: float, size: int, occupied: int, tail: float) -> float:
    """Normal lower bound of the mean `value`, the largest over the signs of the bins."""
    from scipy.special import ndtri

    log_tail = math.log(tail) - occupied * math.log(2)
    quantile = -ndtri(math.exp(log_tail)) if log_tail > _SMALLEST_EXPONENT else math.sqrt(-2 * log_tail)
    return float(value - quantile * math.sqrt(max(second_moment - value**2, 0) / size))


def _signed_bounds(
    gaps: np.ndarray, positive: np.ndarray, negative: np.ndarray, occupied: int, size: int, weight: int, tail: float
) -> tuple[float, float]:
    """Bounds of the largest signed sum of the true gaps, each violated with a probability of at most `tail`.

    Args:
        gaps: Sum of confidence minus outcome of each bin, shape `(B,)`.
        positive: Events that a bin of positive sign counts, integers, shape `(B,)`.
        negative: Events that a bin of negative sign counts.
        occupied: Bins that hold samples.
        size: Number of samples; each is at most one event, whatever the signs.
        weight: What an event adds to the signed sum.
        tail: Of each side.
    """
    free = (positive == 0) & (negative == 0)
    best = np.array([np.abs(gaps[free]).sum()])  # largest signed sum for each count of events
    for gap, first, second in zip(gaps[~free], positive[~free], negative[~free], strict=True):
        extended = np.full(len(best) + max(first, second), -np.inf)
        extended[first : first + len(best)] = best + gap
        part = extended[second : second + len(best)]
        np.maximum(part, best - gap, out=part)
        best = extended
    log_tail = math.log(tail) - occupied * math.log(2)
    # No bound is farther from the count than Hoeffding's inequality (1963) says, so most counts need no quantile.
    reach = weight * np.sqrt(np.array([-math.log(tail), -log_tail]) * size / 2)
    counts = np.flatnonzero(best >= best.max() - reach[0])
    high = (best[counts] + weight * count_above(counts, size, tail)).max()
    counts = np.flatnonzero(best >= best.max() - reach[1])
    low = (best[counts] - weight * _count_below(counts, size, log_tail)).max()
    return float(low), float(high)
