"""Calibration check for continuous integration: is ECE, including its uncertainty, below a limit."""

import math
from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np

from hf_adafocal.metrics.binning import Scheme, binned
from hf_adafocal.metrics.groups import count_groups, grouped_error_interval
from hf_adafocal.metrics.intervals import Interval, calibration_error_interval, count_above
from hf_adafocal.metrics.validation import check_pairs

_MOST_SAMPLES = 10**9


class GateResult(NamedTuple):
    """Verdict of the gate with the numbers it rests on.

    Attributes:
        ece: Expected calibration error, a fraction in [0, 1].
        interval: ECE with its interval.
        passed: Whether the upper end of the interval is at most the limit.
        message: One line that says all of this.
    """

    ece: float
    interval: Interval
    passed: bool
    message: str


def calibration_gate(
    confidence: Any,
    correct: Any,
    *,
    max_ece: float,
    confidence_level: float = 0.95,
    num_bins: int = 15,
    scheme: Scheme = "equal_width",
    groups: Any = None,
) -> GateResult:
    """Pass if the confidence interval of ECE ends at or below `max_ece`.

    A model whose true ECE is above the limit passes with a probability of at most `(1 - confidence_level) / 2`, 2.5 %
    by default, for any number of samples: see `calibration_error_interval`. The price is that few samples cannot
    pass: not even a model that is calibrated and always right proves an ECE below 0.03 with 100 samples. Where the
    interval contains the limit, the message gives the number of samples from which on a calibrated model passes 9
    times in 10 (`samples_needed`). `model_cards/gate.md` holds both rates by simulation.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`; independent outcomes, or independent groups of them.
        max_ece: The limit, a fraction in [0, 1].
        confidence_level: Level of the two-sided interval, in (0, 1).
        num_bins: Number of bins; fewer bins need fewer samples.
        scheme: As in `calibration_error`; "equal_mass" makes it a gate on AdaECE.
        groups: Number or name of the group of each sample, shape `(N,)`, where samples are not independent, such as
            the image of each pixel: the interval is then that of `grouped_error_interval`, which holds for many
            groups. None if every sample is on its own.

    Returns:
        ECE, its interval, the verdict and one line about it.

    Raises:
        ValueError: If `max_ece` is not in [0, 1], or as `calibration_error_interval` or `count_groups`.

    Source: as `calibration_error_interval`, Clopper and Pearson 1934 and Hoeffding 1956.

    >>> print(calibration_gate(np.full(400, 0.5), np.array([1, 0] * 200), max_ece=0.1).message)
    PASS: ECE 0 (95% interval 0 to 0.05009; 400 samples, 15 equal-width bins); the upper end is within the limit 0.1
    >>> calibration_gate(np.full(20, 0.98), np.ones(20), max_ece=0.03).passed
    False
    """
    if not 0 <= max_ece <= 1:
        raise ValueError(f"max_ece must be a fraction in [0, 1], found {max_ece}; 0.03 stands for 3 %.")
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must lie strictly between 0 and 1, found {confidence_level}.")
    confidence, correct = check_pairs(confidence, correct)
    if groups is None:
        interval = calibration_error_interval(confidence, correct, num_bins, scheme=scheme, level=confidence_level)
        sampled = f"{len(confidence)} samples"
    else:
        counts = count_groups(confidence, correct, groups, binned(confidence, correct, num_bins, scheme).edges)
        interval = grouped_error_interval(counts, confidence_level)
        sampled = f"{len(confidence)} samples in {len(counts)} groups"
    passed = interval.high <= max_ece
    message = (
        f"{'PASS' if passed else 'FAIL'}: ECE {interval.value:.4g} ({confidence_level * 100:g}% interval "
        f"{interval.low:.4g} to {interval.high:.4g}; {sampled}, {num_bins} {scheme.replace('_', '-')} "
        f"bins); the upper end is {'within' if passed else 'above'} the limit {max_ece:g}"
    )
    if interval.low <= max_ece < interval.high and groups is None:
        needed = samples_needed(
            confidence, max_ece=max_ece, confidence_level=confidence_level, num_bins=num_bins, scheme=scheme
        )
        message += ", the lower end is not: " + (
            f"a calibrated model with these confidences needs about {needed:,} samples to pass"
            if needed
            else "no number of samples suffices for this limit"
        )
    return GateResult(interval.value, interval, passed, message)


def samples_needed(
    confidence: Any,
    *,
    max_ece: float,
    confidence_level: float = 0.95,
    num_bins: int = 15,
    scheme: Scheme = "equal_width",
) -> int | None:
    """Estimate how many samples a calibrated model needs to pass `calibration_gate` 9 times in 10.

    Under calibration the gap of a bin is about normal with the variance `sum p (1 - p)`. The upper end of the interval
    is approximated by the 90 % quantile of ECE plus the exact radius for a count of events whose variance is the mean
    over all signs of the bins.

    Args:
        confidence: Confidences whose distribution the samples have, shape `(N,)`, in [0, 1].
        max_ece: The limit, a fraction.
        confidence_level: Level of the two-sided interval.
        num_bins: Number of bins.
        scheme: As in `calibration_error`.

    Returns:
        The number, with two digits; None if it is beyond a billion, as for a limit of 0.

    >>> samples_needed([0.75], max_ece=0.05)
    990
    """
    confidence, _ = check_pairs(confidence, np.ones(np.shape(confidence)))
    stats = binned(confidence, confidence * (1 - confidence), num_bins, scheme)
    share = stats.count / len(confidence)
    variance = share * stats.accuracy  # of the gap of each bin, for one sample
    mean, spread = math.sqrt(2 / math.pi) * np.sqrt(variance).sum(), math.sqrt(1 - 2 / math.pi) * variance.sum() ** 0.5
    pooled = max(0.25 - float(share**2 @ (0.5 - stats.confidence) ** 2), 0.0)
    rate = 0.5 - math.sqrt(0.25 - pooled)
    tail = (1 - confidence_level) / 2

    def upper_end(size: int) -> float:
        radius = float(count_above(np.array(rate * size), size, tail)) / size
        return min((mean + 1.2816 * spread) / math.sqrt(size) + radius, 1.0)

    # The upper end falls with the number of samples.
    needed = bisect_left(range(_MOST_SAMPLES), True, key=lambda fewer: upper_end(fewer + 1) <= max_ece) + 1
    if needed > _MOST_SAMPLES:
        return None
    rounded = 10 ** max(len(str(needed)) - 2, 0)
    return math.ceil(needed / rounded) * rounded
