"""How good and how calibrated predicted probabilities are: numpy functions of (probabilities, labels).

Conventions, the same everywhere: results are fractions, not percent; bins are those of `hf_adafocal.binning`; an empty
bin contributes 0. Multiclass functions take `(N, C)` probabilities and look at the top label unless they say
"classwise"; `binary_*` functions take `(N,)` probabilities of class 1. Logits are refused: `softmax` turns them into
probabilities.
"""

from typing import Literal

import numpy as np

from hf_adafocal.binning import bin_statistics, equal_mass_edges, equal_width_edges


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
    probabilities, labels = _check_multiclass(probabilities, labels)
    predicted = probabilities.argmax(axis=1)
    confidence = np.take_along_axis(probabilities, predicted[:, None], axis=1)[:, 0]
    return np.minimum(confidence, 1), predicted == labels  # rounding may have put it a little above 1


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose most probable class is the label; arguments as `top_label`."""
    return float(top_label(probabilities, labels)[1].mean())


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean `-log p` of the label, in nats; arguments as `top_label`.

    A probability of 0 counts as the smallest normal number of its dtype (708 nats in float64): the mean is finite.

    >>> round(negative_log_likelihood(np.array([[0.25, 0.75]]), np.array([1])), 4)
    0.2877
    """
    probabilities, labels = _check_multiclass(probabilities, labels)
    return _mean_nll(np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0])


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance to the one-hot label, summed over classes: 0 is perfect, 2 is worst.

    Arguments as `top_label`. Source: Brier 1950.

    >>> brier_score(np.array([[0.25, 0.75]]), np.array([1]))
    0.125
    """
    probabilities, labels = _check_multiclass(probabilities, labels)
    of_label = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0].astype(np.float64)
    squares = np.einsum("nc,nc->n", probabilities, probabilities, dtype=np.float64)
    return float(np.mean(squares - 2 * of_label + 1))


def calibration_error(
    confidence: np.ndarray,
    correct: np.ndarray,
    num_bins: int = 15,
    *,
    scheme: Literal["equal_width", "equal_mass"] = "equal_width",
    norm: Literal["l1", "max"] = "l1",
) -> float:
    """Gap between confidence and accuracy over bins, for any (confidence, correct) pairs.

    Args:
        confidence: Probability that the sample is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.
        num_bins: Number of bins.
        scheme: Bins of one width on [0, 1], or bins that hold about the same number of samples.
        norm: "l1" weighs the absolute gaps by the samples in the bin; "max" takes the largest.

    Returns:
        The calibration error, a fraction in [0, 1].

    Raises:
        ValueError: If the shapes differ, a confidence is outside [0, 1], or a name is not one of those above.
    """
    confidence, correct = _check_pairs(confidence, correct)
    if scheme == "equal_width":
        edges = equal_width_edges(num_bins)
    elif scheme == "equal_mass":
        edges = equal_mass_edges(confidence, num_bins)
    else:
        raise ValueError(f"scheme must be 'equal_width' or 'equal_mass', found {scheme!r}.")
    stats = bin_statistics(confidence, correct, edges)
    gap = np.abs(stats.gap)
    if norm == "l1":
        return float(gap @ stats.count / stats.count.sum())
    if norm == "max":
        return float(gap.max())
    raise ValueError(f"norm must be 'l1' or 'max', found {norm!r}.")


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
    return calibration_error(*top_label(probabilities, labels), num_bins)


def adaptive_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """AdaECE: as `expected_calibration_error`, over bins that hold about the same number of samples.

    Unlike the authors' code every sample is counted, the least confident one too.

    Source: Mukhoti et al. 2020, arXiv 2002.09437.
    """
    return calibration_error(*top_label(probabilities, labels), num_bins, scheme="equal_mass")


def maximum_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """MCE: the largest gap of a non-empty bin; otherwise as `expected_calibration_error`.

    Source: Guo et al. 2017, arXiv 1706.04599, eq. 5.
    """
    return calibration_error(*top_label(probabilities, labels), num_bins, norm="max")


def classwise_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """Classwise ECE: ECE of each class's probability against "is this the label", averaged over the C classes.

    Arguments as `expected_calibration_error`. Source: Kull et al. 2019, arXiv 1910.12656.
    """
    probabilities, labels = _check_multiclass(probabilities, labels)
    columns = np.minimum(probabilities, 1).T
    return float(np.mean([calibration_error(column, labels == k, num_bins) for k, column in enumerate(columns)]))


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
    confidence, correct = top_label(probabilities, labels)
    return {
        "num_samples": len(confidence),
        "num_bins": num_bins,
        "accuracy": float(correct.mean()),
        "nll": negative_log_likelihood(probabilities, labels),
        "brier": brier_score(probabilities, labels),
        "ece": calibration_error(confidence, correct, num_bins),
        "ada_ece": calibration_error(confidence, correct, num_bins, scheme="equal_mass"),
        "classwise_ece": classwise_calibration_error(probabilities, labels, num_bins),
        "mce": calibration_error(confidence, correct, num_bins, norm="max"),
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
    probabilities, labels = _check_pairs(probabilities, labels)
    return {
        "num_samples": len(labels),
        "num_bins": num_bins,
        "accuracy": float(np.mean((probabilities > 0.5) == labels)),
        "nll": _mean_nll(np.where(labels == 1, probabilities, 1 - probabilities)),
        "brier": float(np.mean((probabilities - labels) ** 2)),
        "ece": calibration_error(probabilities, labels, num_bins),
        "ada_ece": calibration_error(probabilities, labels, num_bins, scheme="equal_mass"),
        "mce": calibration_error(probabilities, labels, num_bins, norm="max"),
    }


def _mean_nll(of_label: np.ndarray) -> float:
    floor = np.finfo(of_label.dtype).tiny
    return float(-np.mean(np.log(np.maximum(of_label, floor), dtype=np.float64)))


def _check_pairs(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or confidence.size == 0:
        raise ValueError(
            "Expected two vectors of one length N >= 1: a probability and a 0/1 outcome a sample; "
            f"found shapes {confidence.shape} and {correct.shape}."
        )
    if not (confidence.min() >= 0 and confidence.max() <= 1):  # also True for NaN
        raise ValueError(
            f"Probabilities must lie in [0, 1] without NaN, found {confidence.min()} to {confidence.max()}."
        )
    if not np.isin(correct, (0.0, 1.0)).all():
        raise ValueError(f"Outcomes must be 0 or 1, found values from {correct.min()} to {correct.max()}.")
    return confidence, correct


def _check_multiclass(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or probabilities.size == 0:
        raise ValueError(
            "Expected probabilities (N, C) and labels (N,) with N >= 1; "
            f"found shapes {probabilities.shape} and {labels.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integer class indices, found dtype {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"labels must lie in [0, {probabilities.shape[1]}), found {labels.min()} to {labels.max()}. "
            "Drop ignored samples first."
        )
    if not np.issubdtype(probabilities.dtype, np.floating):
        probabilities = probabilities.astype(np.float64)
    tolerance = 1e-2 if probabilities.dtype.itemsize < 4 else 1e-3  # what a softmax in that precision can miss
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if np.isnan(sums).any():
        raise ValueError(f"probabilities hold NaN in {np.count_nonzero(np.isnan(sums))} of {len(sums)} rows.")
    if probabilities.min() < 0 or np.abs(sums - 1).max() > tolerance:
        worst = np.abs(sums - 1).argmax()
        raise ValueError(
            f"Each row of probabilities must be non-negative and sum to 1; the smallest value is "
            f"{probabilities.min():.4g} and row {worst} sums to {sums[worst]:.4g}. These look like logits: "
            "pass softmax(logits)."
        )
    return probabilities, labels
