"""Record the per-sample results of evaluations exactly, on any number of processes."""

from collections.abc import Sized
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from hf_adafocal.losses.layout import classes_last, is_single
from hf_adafocal.scaling.grid import SumsOnGrid, best_temperature, joined
from hf_adafocal.training.collectors import Collector, HistogramCollector, SampleCollector
from hf_adafocal.training.processes import DataProcesses
from hf_adafocal.training.sample_rows import IGNORED, check_counts, sample_rows

logger = logging.get_logger(__name__)

MOST_LOGITS = 1 << 28  # numbers: 1 GiB in float32
MOST_SAMPLES = 4_000_000  # tokens or pixels kept one by one (160 MB); beyond it a histogram of fixed size counts them


class EvaluationRecorder:
    """Record the predictions of each evaluation of a Trainer over all processes, every sample once.

    Args:
        processes: Of the run.
        num_bins: Bins of the metrics.
        histogram: Count in a histogram (True), keep every sample (False), or decide by their number (None).
        ignore_index: Label of samples that do not count.

    Attributes:
        active: An evaluation is under way.
        samples: Results of the last evaluation under each prefix.
        calibration: Results of the last evaluation of the calibration set; None if it found no labelled sample.
        num_classes: Most of the logits seen so far.
        single_output: The logits seen last were single ones, of two classes.
        keep_logits: Keep the logits of the evaluations that begin from now on.
        logits: Logits `(n, C)` and labels `(n,)` that the last evaluation kept, of counted samples; None if it kept
            none, or there were more than `MOST_LOGITS` numbers.
    """

    def __init__(
        self, processes: DataProcesses, num_bins: int = 15, histogram: bool | None = None, ignore_index: int = -100
    ) -> None:
        self.processes, self.num_bins = processes, num_bins
        self.histogram, self.ignore_index = histogram, ignore_index
        self.active = False
        self.samples: dict[str, Collector] = {}
        self.calibration: Collector | None = None
        self.num_classes: int | None = None
        self.single_output = False
        self._seen_classes = SeenClasses()
        self._of_calibration = False
        self.keep_logits = False
        self.logits: tuple[np.ndarray, np.ndarray] | None = None

    def begin(self, dataset: Any, *, of_calibration: bool) -> None:
        """Start an evaluation; `of_calibration` if its data set is the calibration set."""
        self.active, self._of_calibration = True, of_calibration
        self._size = len(dataset) if isinstance(dataset, Sized) else None
        self._collector: Collector | None = None
        self._grid = SumsOnGrid(self.ignore_index)
        self._kept: list[Tensor] | None = [] if self.keep_logits else None
        self.logits = None
        if of_calibration:
            self.calibration = None  # never that of an evaluation before, should this one find nothing

    def observe(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Record a batch of this process; the samples that pad the last batch of a distributed run do not count.

        Args:
            logits: As a model returns them, see `sample_rows.classes_last`.
            labels: Class indices or `ignore_index`, one per sample, token or pixel.

        Returns:
            `sample_rows` of the batch, padding included.
        """
        self.single_output = is_single(logits)
        logits = classes_last(logits.detach(), labels)
        rows = sample_rows(logits, labels, self.ignore_index)
        self.num_classes = max(self.num_classes or 0, logits.shape[-1])
        own = self.processes.without_padding(labels, self.ignore_index)
        if self._of_calibration:
            self._seen_classes.add(own, logits.shape[-1])
            self._grid.add(logits, own)
        if self._kept is not None:
            self._keep(logits, own)
        return self._count(rows, labels, own)

    def observe_rows(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Record a batch by its rows alone, as of a fused head; as `observe`, but without a temperature.

        Args:
            rows: As `sample_rows` returns them, shape `(N, ..., 5)`.
            labels: As in `observe`, shape `(N, ...)`.
        """
        return self._count(rows, labels, self.processes.without_padding(labels, self.ignore_index))

    def _count(self, rows: Tensor, labels: Tensor, own: Tensor) -> Tensor:
        counted = rows if own is labels else rows.where((own != self.ignore_index)[..., None], IGNORED)
        if self._collector is None:
            self._collector = self._new_collector(labels)
        if isinstance(self._collector, HistogramCollector):
            self._collector.add(counted)
        else:
            self._collector.add(self._gathered(counted))
            self._limit_memory()
        return rows

    def end(self, prefix: str, config: Any = None) -> dict[str, float] | None:
        """Finish an evaluation; None if it saw no labels.

        Args:
            prefix: The Trainer's prefix of this evaluation's metrics.
            config: Of the model, for the names of classes that the calibration set lacks.

        Returns:
            Metrics without the prefix; of single logits also `binary_metrics`; of the calibration set also
            `temperature`, the best one, and `refinement`, the NLL at that temperature.

        Raises:
            ValueError: If a logit was not finite or no label counts.
        """
        self.active = False
        collected, self._collector = self._collector, None
        if collected is None:
            return None
        collected.finish(self.processes)
        check_counts(len(collected), collected.not_finite, f"{prefix!r} set", self.ignore_index)
        self.samples[prefix] = collected
        if self._kept:
            kept = joined(self._kept)
            self.logits = kept[:, 1:].numpy(), kept[:, 0].long().numpy()
        metrics = collected.metrics(self.num_bins)
        if self.single_output:
            metrics |= collected.binary_metrics(self.num_bins)
        if self._of_calibration:
            self.calibration = collected
        if self._of_calibration and (sums := self._grid.total()) is not None:
            self._seen_classes.warn_of_missing(self.processes, config)
            temperature, refinement = best_temperature(self.processes.sum(sums), len(collected))
            metrics |= {"temperature": temperature, "refinement": refinement}
        return metrics

    def abort(self) -> None:
        """Discard an evaluation that failed."""
        self.active, self._collector = False, None

    def _keep(self, logits: Tensor, labels: Tensor) -> None:
        """Keep the logits and labels of counted samples of all processes, unless they become too many."""
        if self._kept is None or sum(part.numel() for part in self._kept) > MOST_LOGITS:
            self._kept = None
            return
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = torch.cat([labels[..., None].to(wide), logits.to(wide)], dim=-1)
        rows = self.processes.widened(rows, -torch.inf)  # batches of several processes may differ in their options
        rows = self._gathered(rows).reshape(-1, rows.shape[-1]).cpu()
        self._kept.append(rows[(rows[:, 0] != self.ignore_index) & (rows[:, 0] != IGNORED)])

    def _new_collector(self, labels: Tensor) -> Collector:
        positions = labels.numel() // max(len(labels), 1)
        many = self._size is not None and self._size * positions > MOST_SAMPLES
        if self.histogram or (self.histogram is None and many):
            if not self.histogram:
                _say_that_a_histogram_counts()
            return HistogramCollector()
        return SampleCollector()

    def _limit_memory(self) -> None:
        """Switch to a histogram if a stream turns out to be long."""
        if self.histogram is not None or not isinstance(self._collector, SampleCollector):
            return
        if sum(map(len, self._collector.waiting)) > MOST_SAMPLES:
            _say_that_a_histogram_counts()
            counting = HistogramCollector()
            for rows in self._collector.waiting:  # of all processes, each of which counts its share
                counting.add(rows[self.processes.index :: self.processes.count])
            self._collector = counting

    def _gathered(self, rows: Tensor) -> Tensor:
        """Gather rows of all processes, shape `(n, 5)`, in the order of the data."""
        flat = rows.reshape(-1, rows.shape[-1])
        ragged = rows.ndim > 2 or not self.processes.accelerator.even_batches  # lengths may differ by process
        return self.processes.gather(flat, IGNORED if ragged else None)


def _say_that_a_histogram_counts() -> None:
    logger.warning(
        f"This evaluation has more than {MOST_SAMPLES:,} tokens or pixels, so a histogram counts them: AdaECE and the "
        "edges of equal-mass bins are rounded to its cells. streaming_calibration=False keeps every sample."
    )


class SeenClasses:
    """Note which classes the calibration set has while it is evaluated for the first time."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._done = False

    def add(self, labels: Tensor, num_classes: int) -> None:
        """Note the labels of a batch of this process."""
        if not self._done:
            most = max(num_classes, 0 if self._seen is None else len(self._seen))
            seen = torch.isin(torch.arange(most, device=labels.device), labels)
            self._seen = seen if self._seen is None else F.pad(self._seen, (0, most - len(self._seen))) | seen

    def warn_of_missing(self, processes: DataProcesses, config: Any) -> None:
        """Once, over all processes, name the classes without a sample."""
        if self._done or self._seen is None:
            return
        seen = processes.gather(processes.widened(self._seen[None].int(), 0)).any(0)
        self._done, self._seen = True, None
        missing = (~seen).nonzero().flatten().tolist()
        if missing and len(seen) != getattr(
            config, "vocab_size", None
        ):  # words that are not predicted are no surprise
            names = getattr(config, "id2label", None) or {}
            names = names if len(names) == len(seen) else {}  # a single output has one name for two classes
            shown = ", ".join(f"{index} ({names[index]})" if index in names else str(index) for index in missing[:10])
            logger.warning(
                f"No sample of the calibration set has the label {shown}{', ...' if len(missing) > 10 else ''} "
                f"({len(missing)} of {len(seen)} classes), so the loss follows the other classes alone. Hold out a "
                "part that is stratified by label."
            )
