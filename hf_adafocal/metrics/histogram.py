"""Streaming calibration metrics in fixed memory, for tokens, pixels and evaluation over many processes.

A `CalibrationHistogram` counts samples in fine cells of confidence as batches arrive. Counts add, so batches and
processes merge, and the cells add up to the bins of `metrics.binning`.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from hf_adafocal.metrics.binning import BinStats, equal_width_edges, gap_norm
from hf_adafocal.metrics.validation import as_array, check_pairs

_GRID = 72_000  # cells of one width: 10, 12, 15, 16, 18, 20, 25, 30, 50, 64, 100 and 1,000 bins nest
_BLOCK = 1 << 17  # samples converted at a time: bounds the memory of one update, and the cache holds them


def _magnitude(distance: np.ndarray) -> np.ndarray:
    """Monotone integer code of numbers >= 0, from their float64 bits: 256 steps per doubling."""
    return distance.view(np.int64) >> 44


# A saturated model has most samples near 0 and 1, so cells there shrink in proportion to the distance to that end,
# from where this is finer than the grid to the last float64 before 1. Samples nearer to the end share one cell.
_OUTERMOST, _INNERMOST = _magnitude(np.array([2.0**-8, 2.0**-53])).tolist()
_TAIL = _OUTERMOST - _INNERMOST + 1
_NUM_CELLS = _GRID + 2 * _TAIL


class CalibrationHistogram:
    """Histogram of a stream of confidences with their correctness, for calibration metrics in 2.3 MB of memory.

    The cells are 72,000 of equal width on [0, 1], `(lower, upper]` with the first one closed, at the edges
    `k / 72,000`. Within 1 / 256 of 0 and 1 they are divided further, at 256 distances for each halving of the
    distance to that end, so that they stay fine where a saturated model has its samples. Counts are int64 and sums
    float64. Results are fractions in [0, 1].

    Over bins of equal width whose number divides 72,000 the results equal those of `metrics.scores` on all the
    samples, up to the rounding of sums. `adaptive_calibration_error` has a bound instead, which
    `adaptive_calibration_error_bound` computes.

    For token or pixel tasks, pass the counted positions as `mask`, such as `labels != -100`. Over several processes,
    let each count its own samples and sum the arrays once, at the end. `device` is that of the process: the backend
    nccl reduces tensors on the accelerator alone, gloo those on the CPU:

        table = torch.from_numpy(histogram.to_array()).to(device)
        torch.distributed.all_reduce(table)
        histogram = CalibrationHistogram.from_array(table)

    >>> histogram = CalibrationHistogram()
    >>> histogram.update([0.75, 0.75], [True, False])
    >>> histogram.update([[0.75, 0.5]], [[False, True]], mask=[[True, False]])
    >>> histogram.num_samples
    3
    >>> round(histogram.expected_calibration_error(), 4)  # 0.75 - 1 / 3
    0.4167
    """

    def __init__(self) -> None:
        self._count = np.zeros(_NUM_CELLS, dtype=np.int64)
        self._correct = np.zeros(_NUM_CELLS, dtype=np.int64)
        self._confidence = np.zeros(_NUM_CELLS)

    def update(self, confidence: Any, correct: Any, mask: Any = None) -> None:
        """Add a batch: arrays, lists or torch tensors of any shape, dtype and device.

        A tensor on a device is copied to the host, and everything is converted to float64, 131,072 samples at a time.

        Args:
            confidence: Probability that the sample is correct, in [0, 1].
            correct: 1 (or True) where it was, 0 where it was not, same shape.
            mask: Boolean, same shape: True where the sample counts, False where it is ignored with any value. All
                samples count by default. A batch may be empty.

        Raises:
            ValueError: If the shapes differ, `mask` is not boolean, a confidence that counts is NaN or outside
                [0, 1], or an outcome that counts is neither 0 nor 1. Nothing of the batch is counted then.
        """
        arrays = [_array(values) for values in (confidence, correct, mask) if values is not None]
        shapes = {str(tuple(array.shape)): None for array in arrays}
        if len(shapes) > 1:
            raise ValueError(f"confidence, correct and mask must have one shape, found {' and '.join(shapes)}.")
        arrays = [array.reshape(-1) for array in arrays]
        if mask is not None and _host(arrays[2][:0]).dtype != bool:
            raise ValueError(f"mask must be boolean, found {arrays[2].dtype}. Compare: `labels != -100`.")
        batch = CalibrationHistogram()  # of its own, so that an error in a later block leaves nothing behind
        for start in range(0, len(arrays[0]), _BLOCK):
            batch._count_block(*(_host(array[start : start + _BLOCK]) for array in arrays))
        self.merge(batch)

    def merge(self, other: "CalibrationHistogram") -> None:
        """Add the counts of another histogram, which is not changed."""
        self._count += other._count
        self._correct += other._correct
        self._confidence += other._confidence

    def to_array(self) -> np.ndarray:
        """Export samples, correct samples and sum of confidences of each cell, shape `(3, num_cells)`, float64.

        The array is a copy. The sum of such arrays is the array of the merged histogram; counts are exact up to 2^53.
        """
        return np.stack([self._count, self._correct, self._confidence])

    @classmethod
    def from_array(cls, array: Any) -> "CalibrationHistogram":
        """Build a histogram from the array of `to_array`, or from a sum of several.

        Args:
            array: Shape `(3, num_cells)`, an array or a torch tensor on any device.

        Raises:
            ValueError: If the shape is another one or the values cannot be counts and sums of confidences: a share
                or a mean of arrays, say.
        """
        array = as_array(array).astype(np.float64, copy=False)
        if array.shape != (3, _NUM_CELLS):
            raise ValueError(f"Expected an array of `to_array`, shape {(3, _NUM_CELLS)}, found {array.shape}.")
        count, correct, confidence = array
        whole = np.array_equal(array[:2], np.floor(array[:2])) and array.max() <= 2**53  # beyond, sums lose samples
        if not (whole and (array >= 0).all() and (correct <= count).all() and (confidence <= count).all()):
            raise ValueError(
                "Expected whole counts, no less than the correct ones or the confidence. Sum arrays, do not average."
            )
        histogram = cls()
        histogram._count[:], histogram._correct[:], histogram._confidence[:] = array
        return histogram

    @property
    def num_samples(self) -> int:
        """Number of samples counted so far, without the ignored ones."""
        return int(self._count.sum())

    def accuracy(self) -> float:
        """Return the fraction of correct samples.

        Raises:
            ValueError: If nothing has been counted.
        """
        return float(self._correct.sum() / self._counted())

    def bin_statistics(self, num_bins: int = 15) -> BinStats:
        """Compute the statistics of `num_bins` bins of equal width, as `binning.bin_statistics` of all samples.

        Raises:
            ValueError: If nothing has been counted, or `num_bins` does not divide 72,000.
        """
        edges = equal_width_edges(num_bins)
        if _GRID % num_bins:
            fits = [n for n in range(1, 101) if _GRID % n == 0]
            raise ValueError(f"num_bins must divide {_GRID:,}, found {num_bins}. Up to 100 these do: {fits}.")
        return self._statistics(edges, _cells(edges[1:-1]))

    def equal_mass_statistics(self, num_bins: int = 15) -> BinStats:
        """Compute the statistics of bins of about equal numbers of samples; `num_bins` may be any number.

        The edges are those of `binning.equal_mass_edges` moved up to the next edge of a cell, so that the
        statistics are exact for the edges returned. No tie is split.

        Raises:
            ValueError: If nothing has been counted, or `num_bins` is less than 1.
        """
        last, _ = self._cells_at_edges(num_bins)
        held = np.flatnonzero(self._count)
        return self._statistics(_upper(np.concatenate([held[:1] - 1, last, held[-1:]])), last)

    def expected_calibration_error(self, num_bins: int = 15) -> float:
        """Compute ECE over bins of equal width; raises as `bin_statistics`.

        Source: Guo et al. 2017, arXiv 1706.04599, eq. 3.
        """
        return gap_norm(self.bin_statistics(num_bins), "l1")

    def maximum_calibration_error(self, num_bins: int = 15) -> float:
        """Compute MCE, the largest gap of a non-empty bin of equal width; raises as `bin_statistics`.

        Source: Guo et al. 2017, arXiv 1706.04599, eq. 5.
        """
        return gap_norm(self.bin_statistics(num_bins), "max")

    def adaptive_calibration_error(self, num_bins: int = 15) -> float:
        """Compute AdaECE, the mean absolute gap over the bins of `equal_mass_statistics`; raises as that.

        It differs from AdaECE of all samples by at most `adaptive_calibration_error_bound`, and not at all where the
        samples of a cell have one confidence, unless an edge is rounded onto the sample above it.

        Source: Mukhoti et al. 2020, arXiv 2002.09437.
        """
        return gap_norm(self.equal_mass_statistics(num_bins), "l1")

    def adaptive_calibration_error_bound(self, num_bins: int = 15) -> float:
        r"""Compute an upper bound of the difference between `adaptive_calibration_error` and AdaECE of all samples.

        AdaECE is `sum_b |S_b| / N`, `S_b` the sum of confidence minus correctness over bin b. Edges at cell edges
        leave the bins as they are but for the cells that an edge of the samples splits. Such a cell lies in one bin
        whole; let D be its samples that belong to others. They add `S_D` to that bin, and take from the others parts
        of D, whose sums are at most `D+ + D-` together, `D+` the confidence of the wrong samples in D and `D-` the
        missing confidence, 1 - confidence, of the right ones. As `S_D = D+ - D-`, the cell changes the sum by at most
        `|D+ - D-| + D+ + D- = 2 max(D+, D-)`. With the cell's `(lower, upper]` and its wrong and right samples,

            bound = 2 / N sum_cells max(wrong upper, right (1 - lower)).

        That is at most twice the share of samples in split cells, and near confidence 1, where `1 - lower` is at most
        1 / 72,000, about twice the share of wrong samples there. Samples at exactly 1 are alone in the last cell,
        which no edge splits. Other ties are not recognized: for half precision the bound is wide and the value is
        nearly always exact. An edge lies between two neighbouring samples and rounding may put it on the upper one,
        so where they lie in two cells both count as split.

        Raises:
            ValueError: As `adaptive_calibration_error`.
        """
        below, above = self._cells_at_edges(num_bins)
        cells = np.union1d(below[below < _NUM_CELLS - 1], above[above > below])
        correct = self._correct[cells]
        wrong = self._count[cells] - correct
        worst = np.maximum(wrong * _upper(cells), correct * (1 - _upper(cells - 1)))
        return float(2 * worst.sum() / self._counted())

    def _count_block(self, confidence: np.ndarray, correct: np.ndarray, mask: np.ndarray | None = None) -> None:
        if mask is not None:
            confidence, correct = confidence[mask], correct[mask]
        if not confidence.size:
            return
        confidence, correct = check_pairs(confidence, correct)
        cells = _cells(confidence)
        np.add.at(self._count, cells, 1)
        np.add.at(self._correct, cells, correct.astype(np.int64))
        self._confidence += np.bincount(cells, confidence, _NUM_CELLS)  # sums of a block, so that rounding stays small

    def _counted(self) -> int:
        if not self.num_samples:
            raise ValueError("Expected at least one sample, found none: `update` first, with True in `mask` if given.")
        return self.num_samples

    def _statistics(self, edges: np.ndarray, last: np.ndarray) -> BinStats:
        """Bins of whole cells: `last` is the last one of each bin but the final bin, shape `(num_bins - 1,)`."""
        self._counted()
        index = np.searchsorted(last, np.arange(_NUM_CELLS))
        sums = (np.bincount(index, cells, len(edges) - 1) for cells in (self._count, self._correct, self._confidence))
        count, correct, confidence = sums
        share = 1.0 / np.maximum(count, 1)
        return BinStats(
            edges=edges, count=count.astype(np.int64), confidence=confidence * share, accuracy=correct * share
        )

    def _cells_at_edges(self, num_bins: int) -> np.ndarray:
        """Cells of the samples just below and just above each inner equal-mass edge, shape `(2, num_bins - 1)`."""
        size = self._counted()
        position = np.linspace(0, size, len(equal_width_edges(num_bins)))[1:-1]  # as `equal_mass_edges`
        rank = position.astype(np.int64)
        ranks = np.stack([rank, np.minimum(rank + 1, size - 1)])
        return np.searchsorted(self._count.cumsum(), ranks, side="right")


@lru_cache
def cell_edges() -> np.ndarray:
    """Return the largest float64 of each cell of a `CalibrationHistogram`, ascending, shape `(num_cells,)`.

    Comparisons alone tell the cell of a confidence by them: `lower < confidence <= upper`, the first one closed.

    >>> float(cell_edges()[-1])
    1.0
    """
    edges = _upper(np.arange(_NUM_CELLS))
    edges.flags.writeable = False
    return edges


def _cells(confidence: np.ndarray) -> np.ndarray:
    """Index of the cell of each confidence."""
    nearest = np.rint(confidence * _GRID)  # of the edges; the division below is how `equal_width_edges` rounds them
    uniform = np.maximum(nearest - (confidence <= nearest / _GRID), 0).astype(np.int64)
    return uniform + _tail(1 - confidence) + (_TAIL - _tail(confidence))


def _upper(cells: np.ndarray) -> np.ndarray:
    """Largest float64 of each cell or one before it, by bisection; 0 for cell -1."""
    low, high = (
        np.zeros(len(cells), dtype=np.int64),
        np.ones(len(cells)).view(np.int64),
    )  # bits ascend as the numbers do
    while (low < high).any():
        middle = (low + high + 1) // 2
        inside = _cells(middle.view(np.float64)) <= cells
        low, high = np.where(inside, middle, low), np.where(inside, high, middle - 1)
    return low.view(np.float64)


def _tail(distance: np.ndarray) -> np.ndarray:
    """Number of edges between a confidence and the region of the uniform grid, from the distance to the end."""
    return np.clip(_OUTERMOST - _magnitude(distance), 0, _TAIL)


def _array(values: Any) -> Any:
    """Detach a tensor, on its device; convert anything else to an array."""
    return values.detach() if hasattr(values, "detach") else np.asarray(values)


def _host(values: Any) -> np.ndarray:
    """Convert part of an `_array` to NumPy, floating tensors to float64: NumPy has no bfloat16."""
    if not hasattr(values, "detach"):
        return values
    values = values.cpu()
    return (values.double() if values.is_floating_point() else values).numpy()
