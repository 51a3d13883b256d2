"""Accuracy, NLL, Brier score and binned calibration errors as NumPy functions of (probabilities, labels).

Conventions, the same everywhere: results are fractions, not percent; bins are those of `metrics.binning`; an empty
bin contributes 0. Multiclass functions take `(N, C)` probabilities and use the top label unless they are called
"classwise" (`metrics.classwise`); `binary_*` functions take `(N,)` probabilities of class 1. Logits are rejected:
`softmax` turns them into probabilities.

Passes over the `(N, C)` array are what these functions cost, so each reads it once, in chunks of rows that stay in the
cache: a chunk is checked and used before the next one is read. Sums are in float64.
"""

from typing import Any

import numpy as np

from hf_adafocal.metrics.argmax import argmax_rows, predicted_classes
from hf_adafocal.metrics.binning import Norm, Scheme, binned, equal_width_edges, gap_norm
from hf_adafocal.metrics.classwise import add_class_gaps, mean_class_error
from hf_adafocal.metrics.validation import as_multiclass, as_numbers, check_pairs, check_top, checked_chunks


def softmax(logits: Any) -> np.ndarray:
    """Compute the softmax of logits over the last axis, in float64, shape `(..., C)`.

    >>> softmax(np.array([[0.0, 0.0]]))
    array([[0.5, 0.5]])
    """
    logits = as_numbers(logits, "logits")
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def top_label(probabilities: Any, labels: Any, *, normalize: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the confidence of the predicted class and whether it is the label; the first class wins a tie.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1: an array, a list or a torch tensor. A sum may be off by 0.005,
            a value as far outside [0, 1], which counts as 0 or 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        normalize: Divide each row by its sum first, for probabilities that are rounded or cover some of the classes.

    Returns:
        Confidence, shape `(N,)`, and correctness (bool), shape `(N,)`.

    Raises:
        ValueError: If the shapes do not fit, a label is out of range, or rows are not probabilities.

    >>> confidence, correct = top_label([[0.75, 0.25], [0.5, 0.5]], [0, 1])
    >>> confidence, correct
    (array([0.75, 0.5 ]), array([ True, False]))
    """
    probabilities, labels = as_multiclass(probabilities, labels, normalize)
    return _top_label(probabilities, labels, predicted_classes(probabilities))


def accuracy(probabilities: Any, labels: Any) -> float:
    """Compute the share of samples whose most probable class is the label; arguments as `top_label`.

    Of each row only the largest value is checked: it alone decides.

    >>> accuracy([[0.75, 0.25], [0.75, 0.25]], [0, 1])
    0.5
    """
    probabilities, labels = as_multiclass(probabilities, labels)
    predicted = np.empty(len(labels), dtype=np.intp)
    check_top(probabilities, argmax_rows(probabilities, predicted))
    return float(np.mean(predicted == labels))


def negative_log_likelihood(probabilities: Any, labels: Any, *, normalize: bool = False) -> float:
    """Compute the mean `-log p` of the label, in nats; arguments as `top_label`.

    A probability of 0 counts as the smallest normal number of its dtype (708 nats in float64): the mean is finite.

    >>> round(negative_log_likelihood(np.array([[0.25, 0.75]]), np.array([1])), 4)
    0.2877
    """
    probabilities, labels = as_multiclass(probabilities, labels, normalize)
    for _ in checked_chunks(probabilities):
        pass
    return float(np.mean(nll_per_sample(at_class(probabilities, labels))))


def brier_score(probabilities: Any, labels: Any, *, normalize: bool = False) -> float:
    """Compute the mean squared distance to the one-hot label, summed over classes: 0 is perfect, 2 is worst.

    Arguments as `top_label`. Source: Brier 1950, Verification of forecasts expressed in terms of probability.

    >>> brier_score(np.array([[0.25, 0.75]]), np.array([1]))
    0.125
    """
    probabilities, labels = as_multiclass(probabilities, labels, normalize)
    squares = 0.0
    for _, chunk in checked_chunks(probabilities):
        squares += _sum_of_squares(chunk.astype(np.float64))
    return _brier(squares, at_class(probabilities, labels))


def calibration_error(
    confidence: Any,
    correct: Any,
    num_bins: int = 15,
    *,
    scheme: Scheme = "equal_width",
    norm: Norm = "l1",
) -> float:
    """Compute the binned calibration error of (confidence, correct) pairs of any origin.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.
        num_bins: Number of bins.
        scheme: "equal_width" bins on [0, 1], or "equal_mass" bins of about equal numbers of samples.
        norm: "l1" is the mean of the absolute gaps and "l2" the root of the mean of their squares, both weighted by
            the samples in the bin; "max" is the largest gap.

    Returns:
        The calibration error, a fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ, a confidence is outside [0, 1], or a name is not one of those above.

    >>> calibration_error([0.75, 0.75, 0.75, 0.75], [1, 1, 0, 0])
    0.25
    """
    return gap_norm(binned(*check_pairs(confidence, correct), num_bins, scheme), norm)


def expected_calibration_error(
    probabilities: Any, labels: Any, num_bins: int = 15, *, normalize: bool = False
) -> float:
    """Compute ECE: the mean absolute gap between top-label confidence and accuracy over bins of equal width.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        num_bins: Number of bins on [0, 1].
        normalize: Divide each row by its sum first.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: As `top_label`.

    Source: Guo et al. 2017, arXiv 1706.04599, eq. 3.

    >>> expected_calibration_error(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]))
    0.25
    """
    return gap_norm(binned(*top_label(probabilities, labels, normalize=normalize), num_bins, "equal_width"), "l1")


def adaptive_calibration_error(
    probabilities: Any, labels: Any, num_bins: int = 15, *, normalize: bool = False
) -> float:
    """Compute AdaECE: as `expected_calibration_error`, over bins that hold about the same number of samples.

    Unlike in the authors' code every sample is counted, the least confident one too.

    Source: Mukhoti et al. 2020, arXiv 2002.09437.

    >>> adaptive_calibration_error([[0.75, 0.25], [0.75, 0.25]], [0, 1])
    0.25
    """
    return gap_norm(binned(*top_label(probabilities, labels, normalize=normalize), num_bins, "equal_mass"), "l1")


def maximum_calibration_error(
    probabilities: Any, labels: Any, num_bins: int = 15, *, normalize: bool = False
) -> float:
    """Compute MCE: the largest gap of a non-empty bin; otherwise as `expected_calibration_error`.

    Source: Guo et al. 2017, arXiv 1706.04599, eq. 5.

    >>> maximum_calibration_error([[0.75, 0.25], [1.0, 0.0]], [0, 1])
    1.0
    """
    return gap_norm(binned(*top_label(probabilities, labels, normalize=normalize), num_bins, "equal_width"), "max")


def calibration_report(
    probabilities: Any, labels: Any, num_bins: int = 15, *, normalize: bool = False
) -> dict[str, float | int]:
    """Compute all multiclass metrics in one pass, with the numbers needed to reproduce them.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        num_bins: Number of bins of all binned metrics.
        normalize: Divide each row by its sum first.

    Returns:
        `num_samples`, `num_bins`, `accuracy`, `nll` (nats), `brier`, `ece`, `ada_ece`, `classwise_ece`, `mce`.

    Raises:
        ValueError: As `top_label`.

    >>> calibration_report([[0.75, 0.25], [0.75, 0.25]], [0, 1])["classwise_ece"]
    0.25
    """
    probabilities, labels = as_multiclass(probabilities, labels, normalize)
    edges, gaps = equal_width_edges(num_bins), np.zeros((probabilities.shape[1], num_bins))
    predicted, squares = np.empty(len(labels), dtype=np.intp), 0.0
    for rows, chunk in checked_chunks(probabilities):
        argmax_rows(chunk, predicted[rows])
        wide = chunk.astype(np.float64)
        squares += _sum_of_squares(wide)
        add_class_gaps(gaps, chunk, wide, labels[rows], edges)
    of_label = at_class(probabilities, labels)
    confidence, correct = _top_label(probabilities, labels, predicted)
    equal_width = binned(confidence, correct, num_bins, "equal_width")
    return {
        "num_samples": len(labels),
        "num_bins": num_bins,
        "accuracy": float(correct.mean()),
        "nll": float(np.mean(nll_per_sample(of_label))),
        "brier": _brier(squares, of_label),
        "ece": gap_norm(equal_width, "l1"),
        "ada_ece": gap_norm(binned(confidence, correct, num_bins, "equal_mass"), "l1"),
        "classwise_ece": mean_class_error(gaps, len(labels)),
        "mce": gap_norm(equal_width, "max"),
    }


def binary_expected_calibration_error(probabilities: Any, labels: Any, num_bins: int = 15) -> float:
    """Compute the ECE of the probability of class 1 against the frequency of class 1.

    This is not the top-label ECE of the two-column form, which asks how often the *predicted* class is right.

    Args:
        probabilities: Probability of class 1, shape `(N,)` or `(N, 1)`, in [0, 1].
        labels: 0 or 1, shape `(N,)` or `(N, 1)`.
        num_bins: Number of bins of equal width on [0, 1].

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ, a probability is outside [0, 1] or a label is neither 0 nor 1.

    >>> binary_expected_calibration_error([0.25, 0.25, 0.25, 0.25], [1, 1, 0, 0])
    0.25
    """
    return calibration_error(probabilities, labels, num_bins)


def binary_adaptive_calibration_error(probabilities: Any, labels: Any, num_bins: int = 15) -> float:
    """Compute AdaECE of the probability of class 1; arguments as `binary_expected_calibration_error`.

    >>> binary_adaptive_calibration_error([0.25, 0.25, 0.25, 0.25], [1, 1, 0, 0])
    0.25
    """
    return calibration_error(probabilities, labels, num_bins, scheme="equal_mass")


def binary_maximum_calibration_error(probabilities: Any, labels: Any, num_bins: int = 15) -> float:
    """Compute MCE of the probability of class 1; arguments as `binary_expected_calibration_error`.

    >>> binary_maximum_calibration_error([0.25, 0.75], [0, 1])
    0.25
    """
    return calibration_error(probabilities, labels, num_bins, norm="max")


def binary_calibration_report(probabilities: Any, labels: Any, num_bins: int = 15) -> dict[str, float | int]:
    """Compute all metrics of a binary classifier; arguments as `binary_expected_calibration_error`.

    Class 1 is predicted from a probability above 0.5. `brier` is the mean of `(p - y)^2`, in [0, 1]: half of what
    `brier_score` gives for the same predictions as two columns.

    Returns:
        `num_samples`, `num_bins`, `accuracy`, `nll` (nats), `brier`, `ece`, `ada_ece`, `mce`.

    >>> binary_calibration_report([0.75, 0.25], [1, 0])["brier"]
    0.0625
    """
    probabilities, labels = check_pairs(probabilities, labels)
    equal_width = binned(probabilities, labels, num_bins, "equal_width")
    return {
        "num_samples": len(labels),
        "num_bins": num_bins,
        "accuracy": float(np.mean((probabilities > 0.5) == labels)),
        "nll": float(np.mean(nll_per_sample(np.where(labels == 1, probabilities, 1 - probabilities)))),
        "brier": float(np.mean((probabilities - labels) ** 2)),
        "ece": gap_norm(equal_width, "l1"),
        "ada_ece": gap_norm(binned(probabilities, labels, num_bins, "equal_mass"), "l1"),
        "mce": gap_norm(equal_width, "max"),
    }


def at_class(probabilities: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the probability of one class per sample, shape `(N,)`, clipped to [0, 1]."""
    return np.take_along_axis(probabilities, classes[:, None], axis=1)[:, 0].clip(0, 1)


def nll_per_sample(of_label: np.ndarray) -> np.ndarray:
    """Compute `-log p` in nats from the probability of each label, in float64; finite where it is 0."""
    return -np.log(np.maximum(of_label, np.finfo(of_label.dtype).tiny), dtype=np.float64)


def brier_per_sample(squares: Any, of_label: Any) -> Any:
    """Compute Brier scores from the sum of the squared probabilities and the probability of the label.

    It is linear in both, so means of them give the mean score.
    """
    return 1 + squares - 2 * of_label


def _top_label(probabilities: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return at_class(probabilities, predicted), predicted == labels


def _sum_of_squares(wide: np.ndarray) -> float:
    values, step = wide.ravel(), 1 << 13  # BLAS shares longer ones among threads, and waits for busy cores
    return sum(float(part @ part) for part in (values[i : i + step] for i in range(0, len(values), step)))


def _brier(squares: float, of_label: np.ndarray) -> float:
    return float(brier_per_sample(squares / len(of_label), of_label.mean(dtype=np.float64)))
