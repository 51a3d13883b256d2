"""Collect the per-sample results of an evaluation on their device: one by one, or counted in a histogram."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hf_adafocal.metrics.binning import BinStats, binned
from hf_adafocal.metrics.histogram import CalibrationHistogram, cell_edges
from hf_adafocal.training.processes import DataProcesses
from hf_adafocal.training.sample_rows import (
    COLUMNS,
    IGNORED,
    binary_metrics,
    counted_rows,
    equal_mass_statistics,
    sample_metrics,
    split_finite,
)

_ROWS_AT_ONCE = 1 << 20  # of one count: bounds its memory
_SCALE = 2.0**24  # of the two digits after the point: 48 bits, all that a float32 from 2^-25 to 1 has
_MOST_NATS = 2.0**31  # a sum of that many samples fits 64 bits


class SampleCollector:
    """Keep five numbers per sample of an evaluation: exact, 40 bytes per sample.

    Rows stay on their device until `finish` copies them to the CPU at once, so no batch waits for the device.

    Attributes:
        not_finite: Samples with NaN or infinite logits, known after `finish`; they are counted nowhere else.
    """

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []
        self._rows = np.empty((0, 5))
        self.not_finite = 0

    def add(self, rows: Tensor) -> None:
        """Add the rows of a batch from all processes, shape `(..., 5)`; `finish` drops ignored ones."""
        self.waiting.append(rows.reshape(-1, rows.shape[-1]))

    def finish(self, processes: DataProcesses | None = None) -> None:
        """Copy the rows to the CPU; call it once after the last batch."""
        if self.waiting:
            self._rows, self.not_finite = split_finite(counted_rows(torch.cat(self.waiting).cpu()))
            self.waiting = []

    def __len__(self) -> int:
        return len(self._rows)

    def metrics(self, num_bins: int = 15) -> dict[str, float]:
        """Compute `accuracy`, `nll` (nats), `brier`, `ece` and `ada_ece` of the samples, at least one."""
        return sample_metrics(self._rows, num_bins)

    def binary_metrics(self, num_bins: int = 15) -> dict[str, float]:
        """Compute `sample_rows.binary_metrics` of the samples, at least one, of a two-class model."""
        return binary_metrics(self._rows, num_bins)

    def statistics(self, num_bins: int = 15, num_classes: int | None = None) -> BinStats:
        """Compute `equal_mass_statistics` of the samples, at least one."""
        return equal_mass_statistics(self._rows, num_bins, num_classes)

    def diagram(self, num_bins: int = 15) -> BinStats:
        """Compute equal-width bins for a reliability diagram of the samples, at least one."""
        return binned(self._rows[:, 0], self._rows[:, 1], num_bins)


class HistogramCollector:
    """Count an evaluation in a histogram of fixed size, for many millions of tokens or pixels.

    Every process counts its own rows on their device, and `finish` adds the counts up and copies them to the CPU
    once. All sums are of integers, so that no split into batches or processes and no order of atomic additions
    changes a result, on devices without float64 as on others. Accuracy, NLL, Brier score and ECE are exact to 2^-48
    per sample if the number of bins divides the histogram's cells (an error says so if not); AdaECE and the
    equal-mass edges are moved to the next cell (see `CalibrationHistogram`). An NLL above 2^31 nats counts as that.

    Attributes:
        not_finite: As in `SampleCollector`.
    """

    def __init__(self) -> None:
        self._histogram = CalibrationHistogram()
        self._nll = self._brier = 0.0
        self.not_finite = 0
        self._cells: Tensor | None = None  # samples, correct ones and both digits of the confidences, by cell
        self._totals: Tensor | None = None  # samples that are not finite, then three digits of NLL and Brier score

    def add(self, rows: Tensor) -> None:
        """Count the rows of a batch of this process, shape `(..., 5)`; ignored ones are dropped."""
        for part in rows.reshape(-1, len(COLUMNS)).split(_ROWS_AT_ONCE):
            self._count(part)

    def _count(self, rows: Tensor) -> None:
        edges = _edges(rows.dtype, rows.device)
        if self._cells is None or self._totals is None:
            self._cells = torch.zeros(4, len(edges), dtype=torch.long, device=rows.device)
            self._totals = torch.zeros(7, dtype=torch.long, device=rows.device)
        counted, finite = rows[:, 0] != IGNORED, rows.isfinite().all(-1)
        kept = counted & finite
        confidence, correct, nll, _, brier = rows.where(kept[:, None], 0).unbind(-1)
        values = torch.stack([kept.long(), correct.long(), *_digits(confidence.clamp(max=1))])
        cell = torch.bucketize(confidence.contiguous(), edges).clamp(max=len(edges) - 1)
        place = cell + len(edges) * torch.arange(4, device=cell.device)[:, None]
        self._cells.view(-1).index_add_(0, place.view(-1), values.view(-1))
        sums = [(counted & ~finite).long()]
        for numbers in (nll.clamp(max=_MOST_NATS), brier):
            whole = numbers.trunc()
            sums += [whole.long(), *_digits(numbers - whole)]
        self._totals += torch.stack(sums).sum(1)

    def finish(self, processes: DataProcesses | None = None) -> None:
        """Add up the counts of all processes; call it once after the last batch, on every process."""
        size = len(cell_edges())
        if self._cells is None or self._totals is None:
            counts = torch.zeros(4 * size + 7, dtype=torch.long)
        else:
            counts = torch.cat([self._cells.view(-1), self._totals])
            self._cells = self._totals = None
        if processes is not None:
            counts = processes.sum(counts.to(processes.device))
        numbers = counts.cpu().numpy()
        samples, correct, first, second = numbers[: 4 * size].reshape(4, size)
        self._histogram = CalibrationHistogram.from_array(np.stack([samples, correct, _number(first, second)]))
        self.not_finite = int(numbers[4 * size])
        nll, brier = numbers[4 * size + 1 :].reshape(2, 3)
        self._nll, self._brier = (float(whole + _number(*digits)) for whole, *digits in (nll, brier))

    def __len__(self) -> int:
        return self._histogram.num_samples

    def metrics(self, num_bins: int = 15) -> dict[str, float]:
        """As `SampleCollector.metrics`."""
        return {
            "accuracy": self._histogram.accuracy(),
            "nll": self._nll / len(self),
            "brier": self._brier / len(self),
            "ece": self._histogram.expected_calibration_error(num_bins),
            "ada_ece": self._histogram.adaptive_calibration_error(num_bins),
        }

    def binary_metrics(self, num_bins: int = 15) -> dict[str, float]:
        """Return no metrics: a histogram counts which predictions are right, not which class they are of."""
        return {}

    def statistics(self, num_bins: int = 15, num_classes: int | None = None) -> BinStats:
        """As `SampleCollector.statistics`, but never per class.

        Raises:
            ValueError: If `num_classes` is given: that would need a histogram for each class.
        """
        if num_classes is not None:
            raise ValueError("A histogram keeps no statistics of single classes: collect samples instead.")
        return self._histogram.equal_mass_statistics(num_bins)

    def diagram(self, num_bins: int = 15) -> BinStats:
        """As `SampleCollector.diagram`."""
        return self._histogram.bin_statistics(num_bins)


Collector = SampleCollector | HistogramCollector


def _digits(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Two digits of base 2^24 after the point of numbers in [-1, 1], int64; 1 is a first digit of 2^24."""
    scaled = numbers * _SCALE
    first = scaled.trunc()
    return first.long(), ((scaled - first) * _SCALE).long()


def _number(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What sums of the two digits stand for, float64."""
    return (first + second / _SCALE) / _SCALE


@lru_cache
def _edges(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Largest number of each cell of the histogram in a dtype, so that comparisons there are exact."""
    edges = torch.tensor(cell_edges())
    rounded = edges.to(dtype)
    below = torch.nextafter(rounded, torch.zeros((), dtype=dtype))
    return torch.where(rounded.double() > edges, below, rounded).to(device)
