"""How good and how calibrated predicted probabilities are: numpy functions of (probabilities, labels).

Conventions, the same everywhere: results are fractions, not percent; bins are those of `metrics.binning`; an empty
bin contributes 0. Multiclass functions take `(N, C)` probabilities and look at the top label unless they say
"classwise"; `binary_*` functions take `(N,)` probabilities of class 1. Logits are refused: `softmax` turns them into
probabilities.

Passes over the `(N, C)` array are what these functions cost, so each reads it once, in chunks of rows that stay in the
cache: a chunk is checked and used before the next one is touched. Sums are in float64.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from hf_adafocal.metrics.argmax import argmax_rows, predicted_classes
from hf_adafocal.metrics.binning import Norm, Scheme, binned, equal_width_edges, gap_norm
from hf_adafocal.metrics.validation import CHUNK_VALUES, as_multiclass, check_pairs, check_top, checked_chunks


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits in float64, shape `(N, C)`.

    >>> softmax(np.array([[0.0, 0.0]]))
    array([[0.5, 0.5]])
    """
    logits = np.asarray(logits, dtype=np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def top_label(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of the predicted class and whether it is the label; the first class wins a tie.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.

    Returns:
        Confidence, shape `(N,)`, and correctness (bool), shape `(N,)`.

    Raises:
        ValueError: If the shapes do not fit, a label is out of range, or rows are not probabilities.
    """
    probabilities, labels = as_multiclass(probabilities, labels)
    return _top_label(probabilities, labels, predicted_classes(probabilities))


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose most probable class is the label; arguments as `top_label`.

    Of each row only the largest value is checked: it alone decides.
    """
    probabilities, labels = as_multiclass(probabilities, labels)
    predicted = np.empty(len(labels), dtype=np.intp)
    check_top(probabilities, argmax_rows(probabilities, predicted))
    return float(np.mean(predicted == labels))


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean `-log p` of the label, in nats; arguments as `top_label`.

    A probability of 0 counts as the smallest normal number of its dtype (708 nats in float64): the mean is finite.

    >>> round(negative_log_likelihood(np.array([[0.25, 0.75]]), np.array([1])), 4)
    0.2877
    """
    probabilities, labels = as_multiclass(probabilities, labels)
    for _ in checked_chunks(probabilities):
        pass
    return _mean_nll(_at(probabilities, labels))


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance to the one-hot label, summed over classes: 0 is perfect, 2 is worst.

    Arguments as `top_label`. Source: Brier 1950.

    >>> brier_score(np.array([[0.25, 0.75]]), np.array([1]))
    0.125
    """
    probabilities, labels = as_multiclass(probabilities, labels)
    squares = 0.0
    for _, chunk in checked_chunks(probabilities):
        squares += _sum_of_squares(chunk.astype(np.float64))
    return _brier(squares, _at(probabilities, labels))


def calibration_error(
    confidence: np.ndarray,
    correct: np.ndarray,
    num_bins: int = 15,
    *,
    scheme: Scheme = "equal_width",
    norm: Norm = "l1",
) -> float:
    """Gap between confidence and accuracy over bins, for any (confidence, correct) pairs.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.
        num_bins: Number of bins.
        scheme: Bins of one width on [0, 1], or bins that hold about the same number of samples.
        norm: "l1" is the mean of the absolute gaps and "l2" the root of the mean of their squares, both weighted by
            the samples in the bin; "max" is the largest gap.

    Returns:
        The calibration error, a fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ, a confidence is outside [0, 1], or a name is not one of those above.
    """
    return gap_norm(binned(*check_pairs(confidence, correct), num_bins, scheme), norm)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """ECE: mean absolute gap between top-label confidence and accuracy over bins of one width.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        num_bins: Number of bins on [0, 1].

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: As `top_label`.

    Source: Guo et al. 2017, arXiv 1706.04599, eq. 3.

    >>> expected_calibration_error(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]))
    0.25
    """
    return gap_norm(binned(*top_label(probabilities, labels), num_bins, "equal_width"), "l1")


def adaptive_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """AdaECE: as `expected_calibration_error`, over bins that hold about the same number of samples.

    Unlike the authors' code every sample is counted, the least confident one too.

    Source: Mukhoti et al. 2020, arXiv 2002.09437.
    """
    return gap_norm(binned(*top_label(probabilities, labels), num_bins, "equal_mass"), "l1")


def maximum_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """MCE: the largest gap of a non-empty bin; otherwise as `expected_calibration_error`.

    Source: Guo et al. 2017, arXiv 1706.04599, eq. 5.
    """
    return gap_norm(binned(*top_label(probabilities, labels), num_bins, "equal_width"), "max")


def classwise_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15, *, scheme: Scheme = "equal_width"
) -> float:
    """Classwise ECE: ECE of each class's probability against "is this the label", averaged over the C classes.

    Arguments as `expected_calibration_error`; `scheme` as `calibration_error`, where bins of "equal_mass" are those of
    each class. Source: Kull et al. 2019, arXiv 1910.12656.
    """
    if scheme != "equal_width":
        return in_mode(calibration_error, probabilities, labels, "classwise", num_bins=num_bins, scheme=scheme)
    probabilities, labels = as_multiclass(probabilities, labels)
    edges, gaps = equal_width_edges(num_bins), np.zeros((probabilities.shape[1], num_bins))
    for rows, chunk in checked_chunks(probabilities):
        _add_class_gaps(gaps, chunk, chunk.astype(np.float64), labels[rows], edges)
    return _mean_class_error(gaps, len(labels))


def class_adaptive_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """ACE: mean absolute gap over all classes and the equal-mass bins of each class's probability.

    AdaECE (`adaptive_calibration_error`) looks at the top label alone; this looks at the probability of every class.
    `classwise_calibration_error` with "equal_mass" bins weighs a bin by its samples, ACE weighs all bins alike: the
    two differ only where the bins do not hold the same number. Samples with one probability share a bin, so some bins
    may be empty; the mean is over the others.

    Arguments as `expected_calibration_error`. Source: Nixon et al. 2019, arXiv 1904.01685.

    >>> class_adaptive_calibration_error(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]))
    0.25
    """
    return in_mode(_mean_gap, probabilities, labels, "classwise", num_bins=num_bins)


def in_mode(
    metric: Callable[..., float],
    probabilities: np.ndarray,
    labels: np.ndarray,
    mode: Literal["top_label", "classwise", "binary"] = "top_label",
    **options,
) -> float:
    """A metric of (confidence, correct) pairs, applied to the pairs that a mode makes of the predictions.

    Args:
        metric: Function of a probability in [0, 1] and a 0/1 outcome, both shape `(N,)`, such as `calibration_error`.
        probabilities: Shape `(N, C)`, rows sum to 1; for "binary" the probability of class 1, shape `(N,)`.
        labels: Class indices in `[0, C)`, shape `(N,)`; for "binary" 0 or 1.
        mode: "top_label" asks whether the predicted class is the label, given its probability; "classwise" whether
            class k is, given the probability of class k, and takes the mean over the C classes; "binary" whether
            class 1 is, given its probability.
        **options: Passed on to the metric.

    Returns:
        What the metric returns; in "classwise" mode its mean.

    Raises:
        ValueError: As `top_label`, or as `binary_expected_calibration_error` for "binary"; if `mode` is none of those.

    >>> in_mode(calibration_error, np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]), "classwise", norm="max")
    0.25
    """
    if mode == "top_label":
        return metric(*top_label(probabilities, labels), **options)
    if mode == "binary":
        return metric(*check_pairs(probabilities, labels), **options)
    if mode != "classwise":
        raise ValueError(f"mode must be 'top_label', 'classwise' or 'binary', found {mode!r}.")
    probabilities, labels = as_multiclass(probabilities, labels)
    for _ in checked_chunks(probabilities):
        pass
    return float(np.mean([metric(column, labels == k, **options) for k, column in enumerate(_columns(probabilities))]))


def calibration_report(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> dict[str, float | int]:
    """Every metric of this module for multiclass predictions, with the numbers needed to reproduce them.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        num_bins: Number of bins of all binned metrics.

    Returns:
        `num_samples`, `num_bins`, `accuracy`, `nll` (nats), `brier`, `ece`, `ada_ece`, `classwise_ece`, `mce`.

    Raises:
        ValueError: As `top_label`.
    """
    probabilities, labels = as_multiclass(probabilities, labels)
    edges, gaps = equal_width_edges(num_bins), np.zeros((probabilities.shape[1], num_bins))
    predicted, squares = np.empty(len(labels), dtype=np.intp), 0.0
    for rows, chunk in checked_chunks(probabilities):
        argmax_rows(chunk, predicted[rows])
        wide = chunk.astype(np.float64)
        squares += _sum_of_squares(wide)
        _add_class_gaps(gaps, chunk, wide, labels[rows], edges)
    of_label = _at(probabilities, labels)
    confidence, correct = _top_label(probabilities, labels, predicted)
    equal_width = binned(confidence, correct, num_bins, "equal_width")
    return {
        "num_samples": len(labels),
        "num_bins": num_bins,
        "accuracy": float(correct.mean()),
        "nll": _mean_nll(of_label),
        "brier": _brier(squares, of_label),
        "ece": gap_norm(equal_width, "l1"),
        "ada_ece": gap_norm(binned(confidence, correct, num_bins, "equal_mass"), "l1"),
        "classwise_ece": _mean_class_error(gaps, len(labels)),
        "mce": gap_norm(equal_width, "max"),
    }


def binary_expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """ECE of the probability of class 1 against the frequency of class 1.

    This is not the top-label ECE of the two-column form, which asks how often the *predicted* class is right.

    Args:
        probabilities: Probability of class 1, shape `(N,)`, in [0, 1].
        labels: 0 or 1, shape `(N,)`.
        num_bins: Number of bins of one width on [0, 1].

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ, a probability is outside [0, 1] or a label is neither 0 nor 1.
    """
    return calibration_error(probabilities, labels, num_bins)


def binary_adaptive_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """AdaECE of the probability of class 1; arguments as `binary_expected_calibration_error`."""
    return calibration_error(probabilities, labels, num_bins, scheme="equal_mass")


def binary_maximum_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """MCE of the probability of class 1; arguments as `binary_expected_calibration_error`."""
    return calibration_error(probabilities, labels, num_bins, norm="max")


def binary_calibration_report(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> dict:
    """The report of a binary classifier; arguments as `binary_expected_calibration_error`.

    Class 1 is predicted from a probability above 0.5. `brier` is the mean of `(p - y)^2`, in [0, 1]: half of what
    `brier_score` gives for the same predictions as two columns.

    Returns:
        `num_samples`, `num_bins`, `accuracy`, `nll` (nats), `brier`, `ece`, `ada_ece`, `mce`.
    """
    probabilities, labels = check_pairs(probabilities, labels)
    equal_width = binned(probabilities, labels, num_bins, "equal_width")
    return {
        "num_samples": len(labels),
        "num_bins": num_bins,
        "accuracy": float(np.mean((probabilities > 0.5) == labels)),
        "nll": _mean_nll(np.where(labels == 1, probabilities, 1 - probabilities)),
        "brier": float(np.mean((probabilities - labels) ** 2)),
        "ece": gap_norm(equal_width, "l1"),
        "ada_ece": gap_norm(binned(probabilities, labels, num_bins, "equal_mass"), "l1"),
        "mce": gap_norm(equal_width, "max"),
    }


def _mean_gap(confidence: np.ndarray, correct: np.ndarray, num_bins: int) -> float:
    stats = binned(confidence, correct, num_bins, "equal_mass")
    return float(np.abs(stats.gap).sum() / np.count_nonzero(stats.count))


def _add_class_gaps(
    gaps: np.ndarray, chunk: np.ndarray, wide: np.ndarray, labels: np.ndarray, edges: np.ndarray
) -> None:
    """Add probability minus outcome of each entry of `chunk` to `gaps[class, bin]`.

    Of many classes nearly all probabilities lie in the first bin. It gets the sums of whole columns; then the few
    entries beyond the first edge move on, each to its own bin by the rule of `bin_statistics`.
    """
    classes, num_bins = gaps.shape
    just_before = np.nextafter(chunk.dtype.type(edges[1]), 0, dtype=chunk.dtype)  # of the first edge, which is rounded
    beyond = np.flatnonzero(chunk > just_before)
    row = beyond // classes
    column = beyond - row * classes
    value = wide.ravel()[beyond]
    outcome = labels[row] == column
    first = np.ones(len(wide)) @ wide - np.bincount(labels, minlength=classes)
    np.subtract.at(first, column, value - outcome)
    gaps[:, 0] += first
    np.minimum(value, 1, out=value)  # rounding may have put it a little above
    np.add.at(gaps.reshape(-1), column * num_bins + _equal_width_index(value, edges), value - outcome)


def _equal_width_index(value: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin `(lower, upper]` of each value in (0, 1]: by a product, put right where that is rounded."""
    index = np.ceil(value * (len(edges) - 1)).astype(np.intp) - 1
    index += value > edges[index + 1]
    index -= value <= edges[index]
    return index


def _mean_class_error(gaps: np.ndarray, size: int) -> float:
    return float(np.abs(gaps).sum() / (size * len(gaps)))


def _columns(probabilities: np.ndarray) -> Iterator[np.ndarray]:
    """Columns in float64, at most 1; several are copied at once, because memory is read in pieces of rows."""
    step = max(1, 16 * CHUNK_VALUES // len(probabilities))
    for start in range(0, probabilities.shape[1], step):
        yield from np.minimum(probabilities[:, start : start + step].T, 1, dtype=np.float64, order="C")


def _at(probabilities: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return np.take_along_axis(probabilities, classes[:, None], axis=1)[:, 0]


def _top_label(probabilities: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.minimum(_at(probabilities, predicted), 1), predicted == labels  # rounding may have put it above 1


def _sum_of_squares(wide: np.ndarray) -> float:
    values, step = wide.ravel(), 1 << 13  # BLAS shares longer ones among threads, and waits for busy cores
    return sum(float(part @ part) for part in (values[i : i + step] for i in range(0, len(values), step)))


def _brier(squares: float, of_label: np.ndarray) -> float:
    return float(1 + (squares - 2 * of_label.sum(dtype=np.float64)) / len(of_label))


def _mean_nll(of_label: np.ndarray) -> float:
    floor = np.finfo(of_label.dtype).tiny
    return float(-np.mean(np.log(np.maximum(of_label, floor), dtype=np.float64)))
