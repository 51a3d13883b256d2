"""Calibration estimators and tests beyond the binned error: debiased, sweep, smooth, CORP, Kolmogorov-Smirnov.

All functions take a confidence and a 0/1 outcome per sample, as `metrics.calibration_error` does. `metrics.top_label`
computes them from class probabilities; for a binary classifier they are the probability of class 1 and the label. No
result is random or depends on the order of the samples (beyond rounding); samples of equal confidence are treated
alike.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hf_adafocal.metrics.binning import Scheme, binned
from hf_adafocal.metrics.scores import calibration_error
from hf_adafocal.metrics.validation import check_pairs

_GRID = 8192  # cells on [0, 1]; a bandwidth below 1 / _GRID is not resolved


class CorpDecomposition(NamedTuple):
    """CORP decomposition of the Brier score: `score = miscalibration - discrimination + uncertainty`.

    Attributes:
        score: Brier score of the pairs, the mean of `(confidence - correct)^2`, in [0, 1].
        miscalibration: MCB, the reduction of the score by isotonic recalibration, >= 0; 0 is calibrated.
        discrimination: DSC, the reduction of the score by the recalibrated confidence over the base rate, >= 0;
            higher is better.
        uncertainty: UNC, the score of always predicting the base rate, in [0, 0.25].
    """

    score: float
    miscalibration: float
    discrimination: float
    uncertainty: float


class CalibrationTest(NamedTuple):
    """Outcome of a test whose null hypothesis is perfect calibration.

    Attributes:
        statistic: The test statistic, defined by the function.
        p_value: Probability of a statistic at least this extreme if the confidence were calibrated, in [0, 1].
    """

    statistic: float
    p_value: float


def debiased_calibration_error(
    confidence: Any,
    correct: Any,
    num_bins: int = 15,
    scheme: Scheme = "equal_mass",
) -> float:
    """Compute the debiased L2 calibration error: the bias that sampling noise adds to its square is subtracted.

    The squared gap of a bin of n samples is lowered by the estimated variance of its accuracy, `a (1 - a) / (n - 1)`.
    A bin of one sample has no such estimate and contributes 0, as an empty one does; it still counts in N. Hence
    choose far fewer bins than samples: with no two samples in one bin the result is 0 whatever they are.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.
        num_bins: Number of bins.
        scheme: Bins that hold about the same number of samples, or bins of one width on [0, 1].

    Returns:
        The root of the estimated square, a fraction in [0, 1]; 0 where that estimate is negative.

    Raises:
        ValueError: If the shapes differ, a confidence is outside [0, 1], or `scheme` is not one of the two.

    Source: Kumar, Liang and Ma 2019, arXiv 1909.10155; one-sample bins as in their code.

    >>> debiased_calibration_error([0.75, 0.75, 0.75, 0.75], [0, 1, 0, 1])  # a gap of 0.25 may well be noise
    0.0
    """
    confidence, correct = check_pairs(confidence, correct)
    stats = binned(confidence, correct, num_bins, scheme)
    noise = stats.accuracy * (1 - stats.accuracy) / np.maximum(stats.count - 1, 1)
    square = np.where(stats.count > 1, stats.gap**2 - noise, 0) @ stats.count / len(confidence)
    return math.sqrt(max(square, 0.0))


def monotone_num_bins(confidence: Any, correct: Any) -> int:
    """Find the number of bins of `ece_sweep`: the largest before accuracy is no longer monotone over the bins.

    Bin counts 2, 3, ... are tried up to N; the first whose accuracies are not monotone ends the search, so a larger
    count may be monotone again. Empty bins, which tied confidences leave, are passed over.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.

    Returns:
        A number in [1, N]; N where accuracy never falls.

    Raises:
        ValueError: If the shapes differ or a confidence is outside [0, 1].

    Source: Roelofs, Cain, Shlens and Mozer 2022, arXiv 2012.08668.

    >>> monotone_num_bins([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 1, 0, 1, 0, 1])
    3
    """
    confidence, correct = check_pairs(confidence, correct)
    order = np.argsort(confidence)
    ranked, size = confidence[order], len(order)
    upto = np.searchsorted(ranked, ranked, side="right")  # samples no more confident than this one
    hits = np.concatenate([[0], np.cumsum(correct[order], dtype=np.int64)])  # integers: equal accuracies compare equal
    right, wrong = np.flatnonzero(np.diff(hits)), np.flatnonzero(np.diff(hits) == 0)
    if not (right.size and wrong.size):
        return size
    # Bins below the first group with a hit have accuracy 0, those above the last with a miss 1: it can fall between.
    low, high = np.searchsorted(ranked, ranked[right[0]]), upto[wrong[-1]]
    if low >= high:
        return size
    for num_bins in range(2, size + 1):
        cuts = np.arange(max(low * num_bins // size - 1, 0), min(high * num_bins // size + 1, num_bins) + 1)
        ends = upto[np.minimum(cuts * size // num_bins, size - 1)]  # the bins of `equal_mass_edges`
        ends[cuts == 0], ends[cuts == num_bins] = 0, size
        if _accuracy_falls(np.diff(ends), np.diff(hits[ends])):
            return num_bins - 1
    return size


def ece_sweep(confidence: Any, correct: Any) -> float:
    """Compute ECE over as many equal-mass bins as keep accuracy monotone in confidence (ECE-sweep).

    It is `calibration_error(confidence, correct, monotone_num_bins(confidence, correct), scheme="equal_mass")`, in
    the L1 norm. The authors' code splits tied confidences over bins; here they share one. The number of bins is only
    sensible if confidence ranks the samples well: a model that ranks them in reverse gets one bin, in which gaps of
    both signs cancel.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ or a confidence is outside [0, 1].

    Source: Roelofs, Cain, Shlens and Mozer 2022, arXiv 2012.08668.

    >>> ece_sweep([0.75, 0.75, 0.75, 0.75], [0, 1, 0, 1])
    0.25
    """
    return calibration_error(confidence, correct, monotone_num_bins(confidence, correct), scheme="equal_mass")


def smooth_calibration_error(confidence: Any, correct: Any) -> float:
    """Compute SmoothECE: the calibration error after smoothing by a Gaussian kernel reflected at 0 and 1.

    The bandwidth is the error itself: the one sigma where the error smoothed by sigma equals sigma. The residuals are
    split between the two nearest points of a grid of 8192 cells: an error below 1e-3 may come out a little low.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.

    Returns:
        A fraction in [0, 1]; 0 where every confidence equals its outcome.

    Raises:
        ValueError: If the shapes differ or a confidence is outside [0, 1].

    Source: Blasiok and Nakkiran 2023, arXiv 2309.12236.

    >>> round(smooth_calibration_error([0.75, 0.75, 0.75, 0.75], [0, 1, 0, 1]), 6)
    0.25
    """
    smoothed_error = _smoothed_error(*check_pairs(confidence, correct))
    low, high = 0.0, 1.0
    for _ in range(30):  # smoothing more only lowers the error, so it crosses sigma once
        middle = (low + high) / 2
        if smoothed_error(middle) < middle:
            high = middle
        else:
            low = middle
    return min(smoothed_error(high), 1.0)


def corp_decomposition(confidence: Any, correct: Any) -> CorpDecomposition:
    """Decompose the Brier score of the pairs into miscalibration, discrimination and uncertainty, without bins.

    The recalibrated confidence is the isotonic regression of correctness on confidence; samples of one confidence get
    one value. On a finite sample miscalibration is above 0 even for a calibrated model, for the fit follows the noise.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.

    Returns:
        The score and its three parts. A constant confidence has no discrimination; N = 1 has no uncertainty either.

    Raises:
        ValueError: If the shapes differ or a confidence is outside [0, 1].

    Source: Dimitriadis, Gneiting and Jordan 2021, arXiv 2008.03033.

    >>> corp_decomposition([0.5, 0.5, 1.0, 1.0], [0, 0, 1, 1])
    CorpDecomposition(score=0.125, miscalibration=0.125, discrimination=0.25, uncertainty=0.25)
    """
    from scipy.optimize import isotonic_regression  # here: importing the metrics needs numpy alone

    confidence, correct = check_pairs(confidence, correct)
    _, group, count = np.unique(confidence, return_inverse=True, return_counts=True)
    rate = np.bincount(group, correct) / count
    recalibrated = isotonic_regression(rate, weights=count).x[group]
    base_rate = correct.mean()
    score, best = np.mean((confidence - correct) ** 2), np.mean((recalibrated - correct) ** 2)
    return CorpDecomposition(
        score=float(score),
        miscalibration=max(float(score - best), 0.0),  # rounding may put it a little below
        discrimination=float(np.mean((recalibrated - base_rate) ** 2)),
        uncertainty=float(base_rate * (1 - base_rate)),
    )


def ks_calibration_error(confidence: Any, correct: Any) -> float:
    """Compute the KS error: the largest gap between the cumulative sums of confidence and correctness, over N.

    Samples are cumulated from the least to the most confident one, those of one confidence together.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ or a confidence is outside [0, 1].

    Source: Gupta et al. 2021, arXiv 2006.12800.

    >>> ks_calibration_error([0.25, 0.75], [0, 1])
    0.125
    """
    confidence, correct = check_pairs(confidence, correct)
    return _largest_cumulative_gap(confidence, correct) / len(confidence)


def ks_test(confidence: Any, correct: Any) -> CalibrationTest:
    """Test for perfect calibration by the largest cumulative gap between confidence and correctness.

    The statistic is `N ks_calibration_error / sqrt(sum p (1 - p))`. Its p-value is that of the largest absolute value
    of a Brownian motion on [0, 1], the limit for large N; for small N, or few distinct confidences, it is on the high
    side. Samples of confidence 0 or 1 have no variance; if all are such, the result is (0, 1) where every outcome is
    the certain one and (inf, 0) where one is not.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`; independent outcomes given the confidence.

    Returns:
        The statistic, >= 0, and its p-value.

    Raises:
        ValueError: If the shapes differ or a confidence is outside [0, 1].

    Source: Arrieta-Ibarra et al. 2022, arXiv 2205.09680.

    >>> ks_test([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1]).statistic
    2.0
    """
    confidence, correct = check_pairs(confidence, correct)
    gap = _largest_cumulative_gap(confidence, correct)
    statistic = _standardised(gap, float(confidence @ (1 - confidence)))
    return CalibrationTest(statistic, _brownian_maximum_tail(statistic))


def spiegelhalter_test(confidence: Any, correct: Any) -> CalibrationTest:
    """Test for perfect calibration by Spiegelhalter's z: the Brier score against its expectation.

    `z = sum (y - p)(1 - 2p) / sqrt(sum (1 - 2p)^2 p (1 - p))` is standard normal under calibration for large N:
    positive where the score is worse than expected (over-confident), negative where it is better.
    Confidences of 0, 0.5 and 1 have no variance; if all are such, the result is (0, 1) where every certain outcome
    came true and (inf, 0) where one did not. Gaps at 0.5 do not count, and gaps below 0.5 may cancel those above;
    `ks_test` has no such weakness.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`; independent outcomes given the confidence.

    Returns:
        z and its two-sided p-value.

    Raises:
        ValueError: If the shapes differ or a confidence is outside [0, 1].

    Source: Spiegelhalter 1986, Probabilistic prediction in patient management and clinical trials.

    >>> spiegelhalter_test([0.8, 0.8, 0.8, 0.8, 0.8], [1, 1, 1, 1, 0]).p_value > 0.99
    True
    """
    confidence, correct = check_pairs(confidence, correct)
    slope = 1 - 2 * confidence
    variance = float(np.sum(slope**2 * confidence * (1 - confidence)))
    z = _standardised(float((correct - confidence) @ slope), variance)
    return CalibrationTest(z, math.erfc(abs(z) / math.sqrt(2)))


def _accuracy_falls(count: np.ndarray, hits: np.ndarray) -> bool:
    count, hits = count[count > 0], hits[count > 0]
    return bool(np.any(hits[:-1] * count[1:] > hits[1:] * count[:-1]))


def _smoothed_error(confidence: np.ndarray, correct: np.ndarray) -> Callable[[float], float]:
    """Smoothed error as a function of the bandwidth; what does not depend on it is computed once."""
    position = confidence * _GRID
    cell = np.minimum(position.astype(np.int64), _GRID - 1)
    residual, part = (correct - confidence) / len(confidence), position - cell
    mass = np.bincount(cell, residual * (1 - part), _GRID + 1) + np.bincount(cell + 1, residual * part, _GRID + 1)
    # Reflection at 0 and 1 is an even function of period 2, in which a Gaussian is a product of Fourier coefficients.
    mirrored = np.concatenate([mass, mass[-2:0:-1]])
    mirrored[[0, _GRID]] *= 2  # 0 and 1 are their own mirror images
    spectrum, frequency = np.fft.rfft(mirrored), np.pi * np.arange(_GRID + 1)

    def smoothed_error(sigma: float) -> float:
        smooth = np.fft.irfft(spectrum * np.exp(-0.5 * (sigma * frequency) ** 2), len(mirrored))
        return float(np.abs(smooth).sum() / 2)

    return smoothed_error


def _largest_cumulative_gap(confidence: np.ndarray, correct: np.ndarray) -> float:
    order = np.argsort(confidence)
    ranked = confidence[order]
    last_of_ties = np.append(ranked[1:] > ranked[:-1], True)
    return float(np.abs(np.cumsum((correct - confidence)[order])[last_of_ties]).max())


def _standardised(value: float, variance: float) -> float:
    if variance > 0:
        return value / math.sqrt(variance)
    return math.copysign(math.inf, value) if value else 0.0


def _brownian_maximum_tail(x: float) -> float:
    """Probability that the absolute value of a Brownian motion exceeds x on [0, 1]."""
    if x >= 1:  # by reflection at the two barriers; keeps its digits far out
        return 2 * sum((-1) ** k * math.erfc((2 * k + 1) * x / math.sqrt(2)) for k in range(5))
    if x <= 0:
        return 1.0
    odd = (1, 3, 5)  # the same number as a Fourier series, which converges fast where the other converges slowly
    return 1 - 4 / math.pi * sum((-1) ** (k // 2) / k * math.exp(-((k * math.pi / x) ** 2) / 8) for k in odd)
