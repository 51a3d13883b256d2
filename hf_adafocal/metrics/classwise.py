"""Calibration of the probability of every class, averaged over the classes: classwise ECE and ACE.

Of C classes most probabilities are small, and the `(N, C)` array is what these functions cost: equal-width bins read
it once in the order of memory; equal-mass bins find the quantiles of each column from a histogram instead of a sort.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from hf_adafocal.metrics.binning import Scheme, equal_width_edges
from hf_adafocal.metrics.validation import CHUNK_VALUES, as_multiclass, checked_chunks

# Columns are copied in blocks that fit the cache, and cut into 2^_CELL_DIGITS cells each.
_ROWS_COPIED, _COLUMNS_COPIED, _CELL_DIGITS = 256, 64, 12
_BITS_OF_ONE: dict[str, tuple[Any, int]] = {"f": (np.int32, 0x3F800000), "d": (np.int64, 0x3FF0000000000000)}
_FIRST = np.zeros(1, dtype=np.intp)


def classwise_calibration_error(
    probabilities: Any,
    labels: Any,
    num_bins: int = 15,
    *,
    scheme: Scheme = "equal_width",
    normalize: bool = False,
) -> float:
    """Compute classwise ECE: the ECE of each class's probability against "is this the label", mean over classes.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        num_bins: Number of bins.
        scheme: "equal_width" bins on [0, 1], or "equal_mass" bins of about equal numbers of samples per class.
        normalize: Divide each row by its sum first.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: As `top_label`, or if `scheme` is not one of the two.

    Source: Kull et al. 2019, arXiv 1910.12656.

    >>> classwise_calibration_error([[0.75, 0.25], [0.75, 0.25]], [0, 1])
    0.25
    """
    edges = equal_width_edges(num_bins)
    if scheme == "equal_mass":
        sums, _ = _equal_mass_sums(*as_multiclass(probabilities, labels, normalize), num_bins)
        return mean_class_error(sums, len(labels))
    if scheme != "equal_width":
        raise ValueError(f"scheme must be 'equal_width' or 'equal_mass', found {scheme!r}.")
    probabilities, labels = as_multiclass(probabilities, labels, normalize)
    sums = np.zeros((probabilities.shape[1], num_bins))
    for rows, chunk in checked_chunks(probabilities):
        add_class_gaps(sums, chunk, chunk.astype(np.float64), labels[rows], edges)
    return mean_class_error(sums, len(labels))


def class_adaptive_calibration_error(
    probabilities: Any, labels: Any, num_bins: int = 15, *, normalize: bool = False
) -> float:
    """Compute ACE: the mean absolute gap over all classes and the equal-mass bins of each class's probability.

    `adaptive_calibration_error` (AdaECE) uses the predicted class alone; ACE uses the probability of every class.
    `classwise_calibration_error` with "equal_mass" bins weighs a bin by its samples, ACE weighs all bins alike: the
    two differ only where the bins do not hold the same number. Samples of equal probability share a bin, so some bins
    may be empty; the mean is over the others.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        num_bins: Number of bins per class.
        normalize: Divide each row by its sum first.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: As `top_label`.

    Source: Nixon et al. 2019, arXiv 1904.01685.

    >>> class_adaptive_calibration_error([[0.75, 0.25], [0.75, 0.25]], [0, 1])
    0.25
    """
    sums, counts = _equal_mass_sums(*as_multiclass(probabilities, labels, normalize), num_bins)
    gaps = np.abs(sums) / np.maximum(counts, 1)
    return float(np.mean(gaps.sum(axis=1) / np.count_nonzero(counts, axis=1)))


def add_class_gaps(
    sums: np.ndarray, chunk: np.ndarray, wide: np.ndarray, labels: np.ndarray, edges: np.ndarray
) -> None:
    """Add probability minus outcome of each entry of a chunk to its equal-width bin, `sums[class, bin]`.

    Of many classes nearly all probabilities lie in the first bin. It gets the sums of whole columns; then the few
    entries beyond the first edge are moved to their own bins by the rule of `bin_statistics`.

    Args:
        sums: Shape `(C, num_bins)`, changed in place.
        chunk: Probabilities, shape `(n, C)`.
        wide: The same in float64.
        labels: Class indices, shape `(n,)`.
        edges: `equal_width_edges(num_bins)`.
    """
    classes, num_bins = sums.shape
    # The edge is compared in the dtype of the chunk, to which it may be rounded up or down: a value that equals the
    # rounded edge can lie above the exact one, so entries from there on are compared again in float64.
    just_before = np.nextafter(chunk.dtype.type(edges[1]), 0, dtype=chunk.dtype)
    beyond = np.flatnonzero(chunk > just_before)
    row = beyond // classes
    column = beyond - row * classes
    value = wide.ravel()[beyond]
    outcome = labels[row] == column
    first = np.ones(len(wide)) @ wide - np.bincount(labels, minlength=classes)
    np.subtract.at(first, column, value - outcome)
    sums[:, 0] += first
    np.minimum(value, 1, out=value)  # rounding may have put it a little above
    np.add.at(sums.reshape(-1), column * num_bins + _equal_width_index(value, edges), value - outcome)


def mean_class_error(sums: np.ndarray, size: int) -> float:
    """Compute classwise ECE from the sums of probability minus outcome, shape `(C, num_bins)`, over `size` samples."""
    return float(np.abs(sums).sum() / (size * len(sums)))


def _equal_width_index(value: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Bin `(lower, upper]` of each value in (0, 1]: by a product, corrected where that is rounded."""
    index = np.ceil(value * (len(edges) - 1)).astype(np.intp) - 1
    index += value > edges[index + 1]
    index -= value <= edges[index]
    return index


def _equal_mass_sums(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of probability minus outcome, and number of samples, in the equal-mass bins of each class.

    Both of shape `(C, num_bins)`; the bins are those of `equal_mass_edges` of each column.
    """
    for _ in checked_chunks(probabilities):
        pass
    size, classes = probabilities.shape
    position = np.linspace(0, size, len(equal_width_edges(num_bins)))[1:-1]  # as `equal_mass_edges`
    rank = np.minimum(position.astype(np.int64), size - 1)
    ranks = np.stack([rank, np.minimum(rank + 1, size - 1)])
    counts, sums = np.zeros((classes, num_bins + 1)), np.zeros((classes, num_bins + 1))
    between, edges = np.empty((classes, num_bins)), np.empty((classes, num_bins - 1))
    for k, column in enumerate(_columns(probabilities)):
        _cut_column(column, ranks, position - rank, counts[k, 1:], sums[k, 1:], between[k], edges[k])
    counts, sums = np.diff(counts), np.diff(sums) + between
    of_label = np.take_along_axis(probabilities, labels[:, None], axis=1).clip(0, 1).astype(np.float64)
    for start in range(0, size, CHUNK_VALUES // num_bins + 1):
        rows = slice(start, start + CHUNK_VALUES // num_bins + 1)
        index = labels[rows] * num_bins + (of_label[rows] > edges[labels[rows]]).sum(axis=1)
        sums -= np.bincount(index, minlength=sums.size).reshape(sums.shape)
    return sums, counts


def _columns(probabilities: np.ndarray) -> Iterator[np.ndarray]:
    """Iterate over the columns, each contiguous, in float32 or float64; the buffer is reused for the next ones."""
    size, classes = probabilities.shape
    dtype = np.float64 if probabilities.dtype.itemsize > 4 else np.float32
    block = np.empty((min(_COLUMNS_COPIED, classes), size), dtype)
    for start in range(0, classes, _COLUMNS_COPIED):
        columns = block[: classes - start]
        for row in range(0, size, _ROWS_COPIED):
            part = probabilities[row : row + _ROWS_COPIED, start : start + _COLUMNS_COPIED]
            columns[:, row : row + _ROWS_COPIED] = part.T
        yield from columns


def _cut_column(
    column: np.ndarray,
    ranks: np.ndarray,
    share: np.ndarray,
    counts: np.ndarray,
    sums: np.ndarray,
    between: np.ndarray,
    edges: np.ndarray,
) -> None:
    """Find the inner edges of the equal-mass bins of one class, and what lies up to the upper edge of each bin.

    The bits of non-negative floats ascend as the numbers do. The leading bits make cells whose counts tell which
    cells hold the samples next to an edge; the samples of those few cells alone are sorted and compared.

    Args:
        column: Probabilities, shape `(N,)`, float32 or float64; clipped to [0, 1].
        ranks: Of the samples next to each edge, shape `(2, num_bins - 1)`.
        share: Of the way from the lower to the upper one of them at which the edge lies, shape `(num_bins - 1,)`.
        counts: Receives the number of samples up to the upper edge of each bin, shape `(num_bins,)`.
        sums: Receives the sum of those of them that are in the cells of the edges, shape `(num_bins,)`.
        between: Receives the sum of the cells between the edges of each bin, shape `(num_bins,)`.
        edges: Receives the edges, shape `(num_bins - 1,)`.
    """
    integer, largest = _BITS_OF_ONE[column.dtype.char]
    bits = column.view(integer)
    low, high = bits.min(), bits.max()
    if low < 0 or high > largest:  # rounding, or a negative zero
        column = np.abs(column.clip(0, 1))
        bits = column.view(integer)
        low, high = bits.min(), bits.max()
    digits = max(4, min(_CELL_DIGITS, len(column).bit_length() - 4))
    bits = bits - low
    bits >>= max(int(high - low).bit_length() - digits, 0)
    cell = bits.astype(np.intp)
    count = np.bincount(cell, minlength=1 << digits)
    total = np.bincount(cell, column, 1 << digits)
    at = count.cumsum().searchsorted(ranks, side="right")
    mixed = np.zeros(1 << digits, dtype=bool)  # cells that hold a sample next to an edge
    mixed[at] = True
    value = column[mixed.take(cell).nonzero()[0]]
    value.sort()
    value = value.astype(np.float64)
    count[mixed] = total[mixed] = 0
    others = count.cumsum()  # samples up to each cell that are in no mixed one
    lower, upper = value[ranks - others[at]]
    edges[:] = (upper - lower) * share + lower
    ends = value.searchsorted(edges, side="right")
    counts[:-1] = others[at[0]] + ends
    counts[-1] = len(column)
    sums[:-1] = value.cumsum()[ends - 1]  # an edge is no lower than the sample below it, so `ends` is at least 1
    sums[-1] = value.sum()
    # An empty range of cells gives its first one, which is mixed and so 0.
    between[:] = np.add.reduceat(total, np.concatenate([_FIRST, at[0]]))
