"""Binning of predictions by confidence, shared by ECE, AdaECE, the gamma update and the reliability diagram.

Bins are `(lower, upper]`, the first one closed: every sample is counted exactly once, and samples of equal confidence
share a bin. Inputs are a confidence per sample and whether its prediction was correct.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hf_adafocal.metrics.validation import as_numbers

Scheme = Literal["equal_width", "equal_mass"]
Norm = Literal["l1", "l2", "max"]

_ORDERS = {"l1": 1, "l2": 2, "max": np.inf}


@dataclass(frozen=True)
class BinStats:
    """Count, mean confidence and accuracy of each bin.

    Attributes:
        edges: Bin edges, ascending, shape `(num_bins + 1,)`, probability.
        count: Samples in each bin, shape `(num_bins,)`.
        confidence: Mean confidence of each bin, shape `(num_bins,)`; 0 where the bin is empty.
        accuracy: Share of correct samples of each bin, shape `(num_bins,)`; 0 where the bin is empty.
        class_gap: Gap of the samples of each bin that were predicted as each class, shape `(C, num_bins)`; 0 where
            there are none. None unless computed by `with_classes`.
        class_counts: Samples predicted as each class, shape `(C,)`; None as `class_gap`.

    >>> binned([0.25, 0.75, 0.75], [0, 1, 0], num_bins=2).gap
    array([0.25, 0.25])
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    class_gap: np.ndarray | None = None
    class_counts: np.ndarray | None = None

    @property
    def gap(self) -> np.ndarray:
        """Confidence minus accuracy, shape `(num_bins,)`: positive is over-confident, 0 where the bin is empty."""
        return self.confidence - self.accuracy


def equal_width_edges(num_bins: int = 15) -> np.ndarray:
    """Return the edges of bins of equal width on [0, 1], shape `(num_bins + 1,)`.

    Raises:
        ValueError: If `num_bins` is less than 1.

    >>> equal_width_edges(4)
    array([0.  , 0.25, 0.5 , 0.75, 1.  ])
    """
    _check_num_bins(num_bins)
    return np.arange(num_bins + 1) / num_bins  # exact where linspace may miss by a rounding


def equal_mass_edges(confidence: Any, num_bins: int = 15) -> np.ndarray:
    """Return the edges of bins that hold about the same number of samples each.

    The sorted confidences are interpolated at `k N / num_bins`, as AdaECE's authors do. Tied confidences repeat an
    edge; the bins between equal edges stay empty and no tie is split.

    Args:
        confidence: Probabilities, shape `(N,)`, N >= 1.
        num_bins: Number of bins.

    Returns:
        Edges from the smallest to the largest confidence, shape `(num_bins + 1,)`.

    Raises:
        ValueError: If `confidence` is empty, not one-dimensional or not finite.

    Source: Mukhoti et al. 2020, arXiv 2002.09437 (AdaECE); Ghosh et al. 2022, arXiv 2211.11838.

    >>> equal_mass_edges(np.array([0.4, 0.1, 0.3, 0.2]), num_bins=2)
    array([0.1, 0.3, 0.4])
    """
    _check_num_bins(num_bins)
    confidence = _vector("confidence", confidence)
    size = len(confidence)
    return np.interp(np.linspace(0, size, num_bins + 1), np.arange(size), np.sort(confidence))


def bin_statistics(confidence: Any, correct: Any, edges: Any) -> BinStats:
    """Compute count, mean confidence and accuracy of each bin.

    Args:
        confidence: Probabilities, shape `(N,)`, N >= 1; below the first or above the last edge counts in that end bin.
        correct: 1 (or True) where the prediction was right, 0 where it was wrong, shape `(N,)`.
        edges: Ascending bin edges, shape `(num_bins + 1,)`.

    Returns:
        The statistics of each bin; counts sum to N.

    Raises:
        ValueError: If the inputs are empty, of unequal length, not finite, or `edges` do not ascend.

    >>> bin_statistics([0.25, 0.75, 0.75], [0, 1, 0], edges=[0, 0.5, 1]).accuracy
    array([0. , 0.5])
    """
    confidence, correct = _vector("confidence", confidence), _vector("correct", correct)
    if len(confidence) != len(correct):
        raise ValueError(f"confidence and correct must have one length, found {len(confidence)} and {len(correct)}.")
    edges = _vector("edges", edges)
    if len(edges) < 2 or np.any(np.diff(edges) < 0):
        raise ValueError(f"edges must be at least two ascending numbers, found {edges}.")
    num_bins = len(edges) - 1
    index = _bin_index(confidence, edges[1:-1])
    count = np.bincount(index, minlength=num_bins)
    share = 1.0 / np.maximum(count, 1)
    return BinStats(
        edges=edges,
        count=count,
        confidence=np.bincount(index, confidence, num_bins) * share,
        accuracy=np.bincount(index, correct, num_bins) * share,
    )


def with_classes(
    stats: BinStats, confidence: np.ndarray, correct: np.ndarray, predicted: np.ndarray, num_classes: int
) -> BinStats:
    """Add the gaps per predicted class to bin statistics, in the same bins for every class.

    The class is the predicted one: conditional on the true class even a calibrated model has a gap.

    Args:
        stats: `bin_statistics` of these samples.
        confidence: Probabilities, shape `(N,)`.
        correct: 1 (or True) where the prediction was right, 0 where it was wrong, shape `(N,)`.
        predicted: Class index of each prediction, shape `(N,)`.
        num_classes: Classes of the model; those never predicted have gap and count 0.

    Raises:
        ValueError: If an index lies outside [0, num_classes).

    >>> stats = bin_statistics([0.75, 0.75], [1, 0], edges=[0, 1])
    >>> with_classes(stats, np.array([0.75, 0.75]), np.array([1, 0]), np.array([0, 1]), 2).class_gap
    array([[-0.25],
           [ 0.75]])
    """
    predicted = np.asarray(predicted).astype(np.int64)
    if predicted.min() < 0 or predicted.max() >= num_classes:
        raise ValueError(
            f"Predicted classes must lie in [0, {num_classes}), found {predicted.min()} to {predicted.max()}."
        )
    num_bins = len(stats.count)
    index = predicted * num_bins + _bin_index(confidence, stats.edges[1:-1])  # one count for all classes at once
    count = np.bincount(index, minlength=num_classes * num_bins).reshape(num_classes, num_bins)
    total = np.bincount(index, confidence - correct, num_classes * num_bins).reshape(num_classes, num_bins)
    return replace(stats, class_gap=total / np.maximum(count, 1), class_counts=count.sum(axis=1))


def binned(confidence: Any, correct: Any, num_bins: int = 15, scheme: Scheme = "equal_width") -> BinStats:
    """Compute `bin_statistics` over bins of equal width on [0, 1], or of about equal numbers of samples.

    Raises:
        ValueError: As `bin_statistics`, or if `scheme` is not one of the two.

    >>> binned([0.25, 0.75, 0.75], [0, 1, 0], num_bins=2).count
    array([1, 2])
    """
    if scheme == "equal_width":
        return bin_statistics(confidence, correct, equal_width_edges(num_bins))
    if scheme == "equal_mass":
        return bin_statistics(confidence, correct, equal_mass_edges(confidence, num_bins))
    raise ValueError(f"scheme must be 'equal_width' or 'equal_mass', found {scheme!r}.")


def gap_norm(stats: BinStats, norm: Norm = "l1") -> float:
    """Compute the calibration error of binned samples: a norm of the gaps, weighted by the samples per bin.

    Args:
        stats: Bin statistics.
        norm: "l1" is the mean of the absolute gaps, "l2" the root of the mean of their squares, "max" the largest.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If `norm` is not one of the three.

    >>> gap_norm(binned([0.25, 0.75, 0.75], [0, 1, 1], num_bins=2), "max")
    0.25
    """
    return float(vector_norm(weighted_gaps(stats.gap, stats.count, norm), norm))


def weighted_gaps(gap: np.ndarray, count: np.ndarray, norm: Norm) -> np.ndarray:
    """Scale the gaps of bins so that their `vector_norm` is the calibration error.

    Args:
        gap: Gap of each bin, shape `(..., num_bins)`; 0 where the bin is empty.
        count: Samples in each bin, same shape.
        norm: "l1", "l2" or "max".

    Raises:
        ValueError: If `norm` is not one of the three.
    """
    if norm not in _ORDERS:
        raise ValueError(f"norm must be 'l1', 'l2' or 'max', found {norm!r}.")
    share = count / count.sum(axis=-1, keepdims=True)
    return gap * share ** {"l1": 1, "l2": 0.5, "max": 0}[norm]


def vector_norm(values: np.ndarray, norm: Norm) -> np.ndarray:
    """Compute the l1, l2 or maximum norm along the last axis."""
    return np.linalg.norm(values, _ORDERS[norm], axis=-1)


def slope_of_norm(values: np.ndarray, norm: Norm) -> np.ndarray:
    """Compute a subgradient of `vector_norm` at a vector, shape `(num_bins,)`; a sign of 0 counts as +1."""
    sign = np.where(values < 0, -1.0, 1.0)
    if norm == "l1":
        return sign
    if norm == "l2":
        direction = values if values.any() else sign
        return direction / np.linalg.norm(direction)
    return sign * (np.arange(len(values)) == np.abs(values).argmax())


def _bin_index(confidence: np.ndarray, inner_edges: np.ndarray) -> np.ndarray:
    """Index of the bin `(lower, upper]` of each confidence; the end bins are open outwards."""
    if len(inner_edges) > 64:
        return np.searchsorted(inner_edges, confidence, side="left")
    index = np.zeros(len(confidence), dtype=np.uint8)  # few edges: comparing with each is ten times as fast
    for edge in inner_edges:
        index += confidence > edge
    return index


def _check_num_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, found {num_bins}.")


def _vector(name: str, values: Any) -> np.ndarray:
    values = as_numbers(values, name)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must have shape (N,) with N >= 1, found {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, found {np.count_nonzero(~np.isfinite(values))} NaN or infinite.")
    return values
