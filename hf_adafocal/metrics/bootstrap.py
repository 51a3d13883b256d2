"""Bootstrap intervals of metrics and paired bootstrap tests of two models.

Samples are resampled with replacement, N out of N. A seed fixes which samples each resample draws, whatever the
metric, so two calls with equal seed and N resample alike. An interval is about other samples from the same source, not
about another training run. Calibration errors have intervals of their own, see `metrics.intervals`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_adafocal.metrics.binning import Norm, Scheme, binned, slope_of_norm, weighted_gaps
from hf_adafocal.metrics.intervals import Interval, calibration_error_interval, check_level, classwise_error_interval
from hf_adafocal.metrics.scores import at_class, brier_per_sample, calibration_error, nll_per_sample, top_label
from hf_adafocal.metrics.validation import as_array, as_multiclass, check_pairs, checked_chunks


class PairedTest(NamedTuple):
    """Difference of two models on the same samples with its interval and p-value, in the unit of the metric.

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
    *arrays: Any,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Compute the percentile bootstrap interval of any metric: the middle `level` of its values on resamples.

    A metric that is a mean over samples is best passed as `np.mean` with its value per sample, shape `(N,)`:
    resampling whole rows of probabilities copies them each time.

    It is right for means and ranks (accuracy, NLL, Brier, AUROC, AURC). It is wrong for what is never negative and
    near 0, such as a calibration error: resampling adds noise to noise, so the whole interval can lie above the truth.
    Use `calibration_error_interval` for the binned ones.

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
    samples = _same_length(arrays)
    resampled = [metric(*(a[draw] for a in samples)) for draw in draws(len(samples[0]), num_resamples, seed)]
    low, high = _quantiles(_finite(resampled), level)
    return Interval(float(metric(*samples)), float(low), float(high))


def report_intervals(
    probabilities: Any,
    labels: Any,
    num_bins: int = 15,
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    normalize: bool = False,
) -> dict[str, Interval]:
    """Compute intervals of all metrics of `calibration_report`: means by the bootstrap, calibration errors exactly.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        num_bins: Number of bins of all binned metrics.
        num_resamples: Number of resamples for the means, at least 1.
        level: As in `bootstrap_interval` and `calibration_error_interval`.
        seed: Of the resampling; all means see the same resamples.
        normalize: Divide each row by its sum first.

    Returns:
        An interval for each of `accuracy`, `nll` (nats), `brier`, `ece`, `ada_ece`, `classwise_ece` and `mce`.

    Raises:
        ValueError: As `calibration_report`, or if an option is out of range.

    >>> sorted(report_intervals([[0.75, 0.25]] * 8, [0, 0, 0, 1] * 2))
    ['accuracy', 'ada_ece', 'brier', 'classwise_ece', 'ece', 'mce', 'nll']
    """
    probabilities, labels = as_multiclass(probabilities, labels, normalize)
    confidence, correct = top_label(probabilities, labels)
    of_label = at_class(probabilities, labels)
    chunks = (chunk for _, chunk in checked_chunks(probabilities))
    squares = np.concatenate([np.einsum("ij,ij->i", chunk, chunk, dtype=np.float64) for chunk in chunks])
    per_sample = {
        "accuracy": correct.astype(np.float64),
        "nll": nll_per_sample(of_label),
        "brier": brier_per_sample(squares, of_label.astype(np.float64)),
    }
    intervals = {
        name: bootstrap_interval(np.mean, values, num_resamples=num_resamples, level=level, seed=seed)
        for name, values in per_sample.items()
    }
    intervals["ece"] = calibration_error_interval(confidence, correct, num_bins, level=level)
    intervals["ada_ece"] = calibration_error_interval(confidence, correct, num_bins, scheme="equal_mass", level=level)
    intervals["mce"] = calibration_error_interval(confidence, correct, num_bins, norm="max", level=level)
    intervals["classwise_ece"] = classwise_error_interval(probabilities, labels, num_bins, level=level)
    return intervals


def paired_test(
    metric: Callable[..., float],
    arrays_a: Sequence[Any],
    arrays_b: Sequence[Any],
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Test whether a metric differs between two models on the same samples, by the paired bootstrap.

    Each resample draws the same samples for both, so what makes a sample hard for both cancels. The interval is the
    middle `level` of the resampled differences; the p-value is 1 minus the level of the widest such interval without
    0. Use `paired_calibration_error_test` for binned calibration errors.

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
    resampled = [difference(draw) for draw in draws(len(arrays[0]), num_resamples, seed)]
    return compared(float(difference(slice(None))), _finite(resampled), level)


def paired_calibration_error_test(
    confidence_a: Any,
    correct_a: Any,
    confidence_b: Any,
    correct_b: Any,
    num_bins: int = 15,
    *,
    scheme: Scheme = "equal_width",
    norm: Norm = "l1",
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Test whether two models differ in calibration error on the same samples, by the paired bootstrap.

    A binned error is a norm of the gaps of the bins, and resampling the error itself would add noise to noise. So the
    gaps are resampled, bins held fixed and the same samples for both models, and their noise is projected on the
    observed subgradient of the norm. What noise adds to the mean of an error is left in both. If it is alike for the
    two, the test is right or cautious. It is not where one model is wrong in few bins and calibrated in the others,
    and the other a little wrong in all: then two equally large errors are called different too often. A bin whose few
    samples are all right (or all wrong) shows too little noise, as in every bootstrap.

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
        Calibration error of A minus that of B (negative where A is better), the interval and the two-sided p-value.

    Raises:
        ValueError: If the models have different numbers of samples, or as `calibration_error_interval`.

    >>> confidence, correct = np.full(400, 0.75), np.array([1, 1, 1, 0] * 100)
    >>> paired_calibration_error_test(confidence, correct, confidence + 0.125, correct).difference
    -0.125
    """
    _check_options(num_resamples, level)
    _same_length([confidence_a, correct_a, confidence_b, correct_b])
    errors, noise = [], []
    for confidence, correct in ((confidence_a, correct_a), (confidence_b, correct_b)):
        errors.append(calibration_error(confidence, correct, num_bins, scheme=scheme, norm=norm))
        gaps, resampled = _gaps(confidence, correct, num_bins, scheme, norm, num_resamples, seed)
        noise.append((resampled - gaps) @ slope_of_norm(gaps, norm))
    difference = errors[0] - errors[1]
    return compared(difference, difference - (noise[0] - noise[1]), level)


def _gaps(
    confidence: Any,
    correct: Any,
    num_bins: int,
    scheme: Scheme,
    norm: Norm,
    num_resamples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted gaps of the non-empty bins, whose norm is the error, and the same of each resample.

    Shapes `(bins,)` and `(num_resamples, bins)`. In the order of confidence a bin is a run of samples, and a resample
    is how often it draws each sample.
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
    for k, draw in enumerate(draws(size, num_resamples, seed)):
        times = np.bincount(rank[draw], minlength=size)
        np.add.reduceat(times * gap, starts, out=sums[k])
        counts[k] = np.add.reduceat(times, starts)
    resampled = sums / np.maximum(counts, 1)  # a bin that a resample leaves empty has sum 0
    return weighted_gaps(np.add.reduceat(gap, starts) / count, count, norm), weighted_gaps(resampled, counts, norm)


def draws(size: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of the samples of each resample, shape `(size,)`, drawn with replacement."""
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield generator.integers(size, size=size)


def compared(difference: float, resampled: np.ndarray, level: float) -> PairedTest:
    """The interval and p-value of a difference from its values on resamples.

    Args:
        difference: Metric of A minus metric of B.
        resampled: The same on each resample, shape `(num_resamples,)`.
        level: Of the interval, in (0, 1).
    """
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


def _same_length(arrays: Sequence[Any]) -> list[np.ndarray]:
    arrays = [as_array(array) for array in arrays]
    if not arrays or not all(array.ndim and len(array) == len(arrays[0]) > 0 for array in arrays):
        raise ValueError(
            "Expected arrays with the same N >= 1 samples along the first axis, "
            f"found shapes {[array.shape for array in arrays]}."
        )
    return arrays


def _check_options(num_resamples: int, level: float) -> None:
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, found {num_resamples}.")
    check_level(level)
