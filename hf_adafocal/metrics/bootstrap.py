"""How sure a metric is: bootstrap intervals and paired tests between two models.

Samples are resampled with replacement, N out of N. A seed fixes which samples each resample draws, whatever the
metric, so two calls with one seed and one N resample alike. An interval speaks of other samples from the same source,
not of another training run.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hf_adafocal.metrics.binning import Norm, Scheme, binned
from hf_adafocal.metrics.scores import calibration_error, top_label
from hf_adafocal.metrics.validation import as_multiclass, check_pairs

_ORDER = {"l1": 1, "l2": 2, "max": np.inf}


class Interval(NamedTuple):
    """A metric and the range its population value lies in, in the unit of the metric.

    Attributes:
        value: The metric of the samples at hand.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """How two models differ on the same samples, in the unit of the metric.

    Attributes:
        difference: Metric of A minus metric of B; positive means that B is lower.
        low: Lower end of the interval of the difference.
        high: Upper end.
        p_value: Two-sided, in (0, 1]; small where "no difference" does not fit.
    """

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    metric: Callable[..., float],
    *arrays: np.ndarray,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of any metric: the middle `level` of its values on resampled samples.

    What a metric of `(N, C)` probabilities keeps of a sample is best computed once and handed in, (N,): resampling
    whole rows copies them each time. `report_intervals` does that for the metrics of a report.

    It is right for means and ranks (accuracy, NLL, Brier, AUROC, AURC). It is wrong for what is never negative and
    near 0, such as a calibration error: resampling adds noise to noise, so the whole interval can lie above the truth.
    `calibration_error_interval` is made for the binned ones; other calibration errors are read with that in mind.

    Args:
        metric: Called as `metric(*arrays)`, returns a finite number.
        *arrays: What the metric takes, each with the N samples along its first axis, N >= 1.
        num_resamples: How often the metric is computed, at least 1.
        level: Share of the resampled values inside the interval, in (0, 1).
        seed: Of the resampling.

    Returns:
        The metric of `arrays` and the ends of the interval.

    Raises:
        ValueError: If the arrays differ in length or are empty, an option is out of range, or the metric is not finite
            on some resample. An error of the metric itself (one class left, say) is passed on.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    >>> bootstrap_interval(np.mean, np.array([0.0, 1.0, 1.0, 1.0] * 25))
    Interval(value=0.75, low=0.66, high=0.83)
    """
    _check_options(num_resamples, level)
    arrays = _same_length(arrays)
    resampled = [metric(*(a[draw] for a in arrays)) for draw in _draws(len(arrays[0]), num_resamples, seed)]
    low, high = _quantiles(_finite(resampled), level)
    return Interval(float(metric(*arrays)), float(low), float(high))


def calibration_error_interval(
    confidence: np.ndarray,
    correct: np.ndarray,
    num_bins: int = 15,
    *,
    scheme: Scheme = "equal_width",
    norm: Norm = "l1",
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the binned calibration error that the same bins would show on unlimited data.

    A binned error is a norm `|g|` of the gaps `g` of the bins, and noise in the gaps can only raise its mean: a
    perfectly calibrated model never shows 0, and resampling doubles the noise. So the percentile interval and its
    usual corrections lie above the truth. Here the noise `e` of the gaps is resampled, not the error, and a norm is
    convex:

    * `|g + e| - |e| <= |g|`: `low` subtracts the quantile of the noise's norm. It is 0 if noise alone could explain
      the value, and cautious (too low) if all gaps are large.
    * `|g| <= |g + e| - u.e`, `u` the slope of the norm: `high` adds the quantile of the noise along the observed
      slope. Upward bias is left in `high`, which is cautious for small samples.

    The value always lies inside. Bins are held fixed, equal-mass ones at the observed edges. For "l1" the coverage is
    at least about `level`; for "l2" and "max" the slope is itself a guess, and "max" is only as good as its sparsest
    bin. A bin whose few samples are all right (or all wrong) shows too little noise, as in every bootstrap.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.
        num_bins: Number of bins.
        scheme: As in `calibration_error`.
        norm: As in `calibration_error`; "l1" is ECE, "max" is MCE.
        num_resamples: Number of resamples, at least 1; the time is proportional to it and to N.
        level: Probability that the interval covers, in (0, 1); each end fails with at most about `(1 - level) / 2`.
        seed: Of the resampling.

    Returns:
        The calibration error and the ends of its interval, fractions in [0, 1].

    Raises:
        ValueError: As `calibration_error`, or if an option is out of range.

    >>> calibration_error_interval(np.full(400, 0.75), np.array([1, 0] * 200)).value
    0.25
    """
    _check_options(num_resamples, level)
    value = calibration_error(confidence, correct, num_bins, scheme=scheme, norm=norm)
    gaps, resampled = _gaps(confidence, correct, num_bins, scheme, norm, num_resamples, seed)
    noise = resampled - gaps
    return _around(value, np.linalg.norm(noise, _ORDER[norm], axis=1), -noise @ _slope(gaps, norm), level)


def report_intervals(
    probabilities: np.ndarray,
    labels: np.ndarray,
    num_bins: int = 15,
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of all that `calibration_report` measures: of means by percentiles, of binned errors by their noise.

    Time and memory do not depend on C but for classwise ECE, which takes C times as long as ECE.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        num_bins: Number of bins of all binned metrics.
        num_resamples: Number of resamples, at least 1.
        level: As in `bootstrap_interval` and `calibration_error_interval`.
        seed: Of the resampling; all metrics see the same resamples.

    Returns:
        An interval for each of `accuracy`, `nll` (nats), `brier`, `ece`, `ada_ece`, `classwise_ece` and `mce`.

    Raises:
        ValueError: As `calibration_report`, or if an option is out of range.
    """
    options = {"num_resamples": num_resamples, "level": level, "seed": seed}
    confidence, correct = top_label(probabilities, labels)
    probabilities, labels = as_multiclass(probabilities, labels)
    of_label = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0].astype(np.float64)
    squares = np.einsum("ij,ij->i", probabilities, probabilities, dtype=np.float64)
    floor = np.finfo(probabilities.dtype).tiny  # as in `negative_log_likelihood`
    per_sample = {
        "accuracy": correct.astype(np.float64),
        "nll": -np.log(np.maximum(of_label, floor)),
        "brier": 1 + squares - 2 * of_label,
    }
    intervals = {name: bootstrap_interval(np.mean, values, **options) for name, values in per_sample.items()}
    for name, binning in {"ece": {}, "ada_ece": {"scheme": "equal_mass"}, "mce": {"norm": "max"}}.items():
        intervals[name] = calibration_error_interval(confidence, correct, num_bins, **binning, **options)
    intervals["classwise_ece"] = _classwise_interval(probabilities, labels, num_bins, **options)
    return intervals


def _classwise_interval(
    probabilities: np.ndarray, labels: np.ndarray, num_bins: int, num_resamples: int, level: float, seed: int
) -> Interval:
    """As `calibration_error_interval`; the error is one l1 norm of the gaps of all bins of all classes."""
    classes = probabilities.shape[1]
    value, below, above = 0.0, np.zeros(num_resamples), np.zeros(num_resamples)
    for k in range(classes):
        column = np.minimum(probabilities[:, k], 1, dtype=np.float64)  # rounding may have put it above 1
        gaps, resampled = _gaps(column, labels == k, num_bins, "equal_width", "l1", num_resamples, seed)
        noise = resampled - gaps
        value += np.abs(gaps).sum() / classes
        below += np.abs(noise).sum(axis=1) / classes
        above -= noise @ _slope(gaps, "l1") / classes
    return _around(float(value), below, above, level)


def paired_test(
    metric: Callable[..., float],
    arrays_a: Sequence[np.ndarray],
    arrays_b: Sequence[np.ndarray],
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Whether a metric of model A differs from that of model B on the same samples.

    Each resample draws the same samples for both, so what makes a sample hard for both cancels. The interval is the
    middle `level` of the resampled differences; the p-value is 1 minus the level of the widest such interval without
    0. What `bootstrap_interval` says of calibration errors holds here: `paired_calibration_error_test` is made for the
    binned ones.

    Args:
        metric: Called as `metric(*arrays)`, returns a finite number.
        arrays_a: What the metric takes for model A, N samples along each first axis, N >= 1.
        arrays_b: The same for model B; row i is the same sample as row i of A.
        num_resamples: How often both metrics are computed, at least 1; the p-value is a multiple of
            `2 / (num_resamples + 1)`.
        level: Of the interval, in (0, 1).
        seed: Of the resampling.

    Returns:
        Metric of A minus metric of B, the interval and the two-sided p-value; equal models give p = 1.

    Raises:
        ValueError: If any two arrays differ in length, or as `bootstrap_interval`.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    >>> right_a, right_b = np.array([1, 0] * 50), np.array([1, 1] * 50)
    >>> paired_test(np.mean, [right_a], [right_b]).difference
    -0.5
    """
    arrays = _same_length([*arrays_a, *arrays_b])
    arrays_a, arrays_b = arrays[: len(arrays_a)], arrays[len(arrays_a) :]

    def difference(draw: np.ndarray | slice) -> float:
        return metric(*(a[draw] for a in arrays_a)) - metric(*(b[draw] for b in arrays_b))

    _check_options(num_resamples, level)
    resampled = [difference(draw) for draw in _draws(len(arrays[0]), num_resamples, seed)]
    return _compared(float(difference(slice(None))), _finite(resampled), level)


def paired_calibration_error_test(
    confidence_a: np.ndarray,
    correct_a: np.ndarray,
    confidence_b: np.ndarray,
    correct_b: np.ndarray,
    num_bins: int = 15,
    *,
    scheme: Scheme = "equal_width",
    norm: Norm = "l1",
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Whether model A is better calibrated than model B on the same samples: negative differences say so.

    Each resample draws the same samples for both. As in `calibration_error_interval` the noise of the gaps is
    resampled, bins held fixed, and taken along the observed slope of the norm; what noise adds to the mean of an error
    is left in both. If it is alike for the two, the test is right or cautious. It is not where one model is wrong in
    few bins and calibrated in the others, and the other a little wrong in all: then two equally large errors are
    called different too often.

    Args:
        confidence_a: Probabilities of model A, shape `(N,)`, in [0, 1].
        correct_a: 1 where A was right, 0 where it was wrong, shape `(N,)`.
        confidence_b: Probabilities of model B, shape `(N,)`; sample i is sample i of A.
        correct_b: 1 where B was right, 0 where it was wrong, shape `(N,)`.
        num_bins: Number of bins of both.
        scheme: As in `calibration_error`.
        norm: As in `calibration_error`.
        num_resamples: As in `paired_test`.
        level: Of the interval, in (0, 1).
        seed: Of the resampling.

    Returns:
        Calibration error of A minus that of B, the interval and the two-sided p-value.

    Raises:
        ValueError: If the models have different numbers of samples, or as `calibration_error_interval`.
    """
    _check_options(num_resamples, level)
    _same_length([confidence_a, correct_a, confidence_b, correct_b])
    errors, noise = [], []
    for confidence, correct in ((confidence_a, correct_a), (confidence_b, correct_b)):
        errors.append(calibration_error(confidence, correct, num_bins, scheme=scheme, norm=norm))
        gaps, resampled = _gaps(confidence, correct, num_bins, scheme, norm, num_resamples, seed)
        noise.append((resampled - gaps) @ _slope(gaps, norm))
    difference = errors[0] - errors[1]
    return _compared(difference, difference - (noise[0] - noise[1]), level)


def _around(value: float, noise: np.ndarray, along: np.ndarray, level: float) -> Interval:
    """The interval that `calibration_error_interval` describes, from the noise's norm and its part along the slope."""
    _, below = _quantiles(noise, level)
    _, above = _quantiles(along, level)
    return Interval(value, float(max(value - below, 0)), float(min(value + max(above, 0), 1)))


def _gaps(
    confidence: np.ndarray,
    correct: np.ndarray,
    num_bins: int,
    scheme: Scheme,
    norm: Norm,
    num_resamples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Gaps of the non-empty bins, scaled so that their norm is the error, and the same of each resample.

    Shapes `(bins,)` and `(num_resamples, bins)`. In confidence order a bin is a run of samples, and a resample is how
    often it draws each sample.
    """
    confidence, correct = check_pairs(confidence, correct)
    count = binned(confidence, correct, num_bins, scheme).count
    count = count[count > 0]
    starts = np.cumsum(count) - count
    order = np.argsort(confidence, kind="stable")
    gap, size = (confidence - correct)[order], len(order)
    rank = np.empty(size, dtype=np.intp)
    rank[order] = np.arange(size)
    sums, counts = np.empty((num_resamples, len(count))), np.empty((num_resamples, len(count)))
    for k, draw in enumerate(_draws(size, num_resamples, seed)):
        times = np.bincount(rank[draw], minlength=size)
        np.add.reduceat(times * gap, starts, out=sums[k])
        counts[k] = np.add.reduceat(times, starts)
    return _scaled(np.add.reduceat(gap, starts), count, norm), _scaled(sums, counts, norm)


def _scaled(sums: np.ndarray, count: np.ndarray, norm: Norm) -> np.ndarray:
    size = count.sum(axis=-1, keepdims=True)
    count = np.maximum(count, 1)  # a bin that a resample leaves empty has sum 0
    return sums / {"l1": size, "l2": np.sqrt(count * size), "max": count}[norm]


def _slope(gaps: np.ndarray, norm: Norm) -> np.ndarray:
    """How the norm changes with each gap; at a kink one of the slopes that fit, never 0 for all gaps."""
    sign = np.where(gaps < 0, -1.0, 1.0)
    if norm == "l1":
        return sign
    if norm == "l2":
        direction = gaps if gaps.any() else sign
        return direction / np.linalg.norm(direction)
    return sign * (np.arange(len(gaps)) == np.abs(gaps).argmax())


def _draws(size: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield generator.integers(size, size=size)


def _compared(difference: float, resampled: np.ndarray, level: float) -> PairedTest:
    low, high = _quantiles(resampled, level)
    tail = min(np.count_nonzero(resampled >= 0), np.count_nonzero(resampled <= 0))
    p_value = min(2 * (tail + 1) / (len(resampled) + 1), 1)
    return PairedTest(difference, float(low), float(high), float(p_value))


def _quantiles(values: np.ndarray, level: float) -> np.ndarray:
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2])


def _finite(resampled: Sequence[float]) -> np.ndarray:
    values = np.asarray(resampled, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"metric must return one number, found shape {values.shape[1:]}.")
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise ValueError(
            f"metric must be finite, found NaN or infinity on {bad} of {len(values)} resamples. "
            "Use more samples, or a metric that is defined on every resample."
        )
    return values


def _same_length(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    arrays = [np.asarray(array) for array in arrays]
    if not arrays or not all(array.ndim and len(array) == len(arrays[0]) > 0 for array in arrays):
        raise ValueError(
            "Expected arrays with the same N >= 1 samples along the first axis, "
            f"found shapes {[array.shape for array in arrays]}."
        )
    return arrays


def _check_options(num_resamples: int, level: float) -> None:
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, found {num_resamples}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, found {level}; 0.95 stands for 95 %.")
