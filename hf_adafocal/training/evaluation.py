"""From logits to what calibration needs: four numbers a sample, whatever the number of classes.

A trainer or a loop keeps `per_sample(logits, labels)` of each batch, gathers it over processes like any other
prediction, and turns it into metrics and bin statistics once.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_adafocal.metrics.binning import BinStats, bin_statistics, binned, equal_mass_edges, with_classes
from hf_adafocal.metrics.histogram import CalibrationHistogram
from hf_adafocal.metrics.scores import calibration_error

IGNORED = -100.0  # in all four columns of a sample that does not count; the Trainer pads predictions with it too


def classes_last(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits `(N, C)` and `(N, L, C)` as they are; those of segmentation, `(N, C, h, w)`, as `(N, H, W, C)`.

    Logits of another size than the labels are resized to them, as transformers' own segmentation losses do.
    """
    if logits.ndim != 4:
        return logits
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return logits.movedim(1, -1)


def per_sample(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Confidence, correctness, NLL and predicted class of each sample.

    Args:
        logits: Classes last, shape `(N, C)` or `(N, d1, ..., C)`; computed in float32 or wider.
        labels: Class indices or `ignore_index`, shape `(N,)` or `(N, d1, ...)`.
        ignore_index: Label of samples that do not count; their row is `IGNORED`.

    Returns:
        Rows `(confidence, correct, nll in nats, predicted class)`, shape `(N, 4)` or `(N, d1, ..., 4)`; float32 holds
        class indices exactly up to 2^24.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Expected logits (N, C) and labels (N,), found {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    top, predicted = log_p.max(-1)
    counted = labels != ignore_index
    of_label = log_p.gather(-1, labels.where(counted, 0).long()[..., None]).squeeze(-1)
    rows = torch.stack([top.exp(), (predicted == labels).to(top.dtype), -of_label, predicted.to(top.dtype)], dim=-1)
    return rows.where(counted[..., None], IGNORED)


def split_finite(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows whose numbers are all finite, and how many are not: their logits were NaN, or infinite where it matters."""
    finite = np.isfinite(rows).all(axis=1)
    return rows[finite], int(len(rows) - finite.sum())


def counted_rows(rows: Tensor | np.ndarray) -> np.ndarray:
    """Rows of samples that count, in float64, shape `(n, 4)`, from any shape `(..., 4)`."""
    rows = np.asarray(rows, dtype=np.float64).reshape(-1, 4)
    return rows[rows[:, 0] != IGNORED]


def sample_metrics(rows: np.ndarray, num_bins: int = 15) -> dict[str, float]:
    """`accuracy`, `nll`, `ece` and `ada_ece` of counted rows, shape `(n, 4)`."""
    confidence, correct, nll = rows.T[:3]
    return {
        "accuracy": float(correct.mean()),
        "nll": float(nll.mean()),
        "ece": calibration_error(confidence, correct, num_bins),
        "ada_ece": calibration_error(confidence, correct, num_bins, scheme="equal_mass"),
    }


def equal_mass_statistics(rows: np.ndarray, num_bins: int = 15, num_classes: int | None = None) -> BinStats:
    """Equal-mass bins of counted rows, shape `(n, 4)`: the edges and gaps that AdaFocal updates with.

    With `num_classes` also the gaps of each predicted class in those bins, which `ClasswiseAdaFocalLoss` needs.
    """
    confidence, correct, _, predicted = rows.T
    stats = bin_statistics(confidence, correct, equal_mass_edges(confidence, num_bins))
    return stats if num_classes is None else with_classes(stats, confidence, correct, predicted, num_classes)


class SampleCollector:
    """Keeps the four numbers of every sample of an evaluation: exact, 32 bytes a sample.

    Attributes:
        not_finite: Samples with NaN or infinite logits; they are counted here and nowhere else.
    """

    def __init__(self) -> None:
        self._batches: list[np.ndarray] = []
        self.not_finite = 0

    def add(self, rows: Tensor) -> None:
        """Add a batch of `per_sample` rows, shape `(..., 4)`; ignored ones are dropped."""
        finite, others = split_finite(counted_rows(rows.cpu()))
        self._batches.append(finite)
        self.not_finite += others

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    def metrics(self, num_bins: int = 15) -> dict[str, float]:
        """`accuracy`, `nll` (nats), `ece` and `ada_ece` of the samples so far, at least one."""
        return sample_metrics(np.concatenate(self._batches), num_bins)

    def statistics(self, num_bins: int = 15, num_classes: int | None = None) -> BinStats:
        """`equal_mass_statistics` of the samples so far, at least one."""
        return equal_mass_statistics(np.concatenate(self._batches), num_bins, num_classes)

    def diagram(self, num_bins: int = 15) -> BinStats:
        """Bins of one width, for a reliability diagram of the samples so far, at least one."""
        confidence, correct = np.concatenate(self._batches).T[:2]
        return binned(confidence, correct, num_bins)


class HistogramCollector:
    """A `SampleCollector` of fixed size, for evaluations of many millions of tokens or pixels.

    Accuracy, NLL and ECE are exact if the number of bins divides the histogram's cells (it says so if not); AdaECE
    and the equal-mass edges are moved to the next cell (see `CalibrationHistogram`).
    """

    def __init__(self) -> None:
        self._histogram = CalibrationHistogram()
        self._nll = 0.0
        self.not_finite = 0

    def add(self, rows: Tensor) -> None:
        """As `SampleCollector.add`."""
        finite, others = split_finite(counted_rows(rows.cpu()))
        self.not_finite += others
        if not len(finite):
            return
        confidence, correct, nll = finite.T[:3]
        self._histogram.update(confidence, correct)
        self._nll += float(nll.sum())

    def __len__(self) -> int:
        return self._histogram.num_samples

    def metrics(self, num_bins: int = 15) -> dict[str, float]:
        """As `SampleCollector.metrics`."""
        return {
            "accuracy": self._histogram.accuracy(),
            "nll": self._nll / len(self),
            "ece": self._histogram.expected_calibration_error(num_bins),
            "ada_ece": self._histogram.adaptive_calibration_error(num_bins),
        }

    def statistics(self, num_bins: int = 15, num_classes: int | None = None) -> BinStats:
        """As `SampleCollector.statistics`, but never of single classes.

        Raises:
            ValueError: If `num_classes` is given: that would need a histogram for each class.
        """
        if num_classes is not None:
            raise ValueError("A histogram keeps no statistics of single classes: collect samples instead.")
        return self._histogram.equal_mass_statistics(num_bins)

    def diagram(self, num_bins: int = 15) -> BinStats:
        """As `SampleCollector.diagram`."""
        return self._histogram.bin_statistics(num_bins)


class CalibrationMetrics:
    """Feeds `AdaFocalCallback` from a Trainer that is not ours, through its own two arguments.

    Only four numbers a sample are gathered. The evaluation set is then the calibration set. The loss may be an
    `AdaFocalLoss` of any kind, also `ClasswiseAdaFocalLoss`.

    Args:
        num_bins: Bins of the metrics and of the loss's table.

    ```python
    loss = AdaFocalLoss()
    calibration = CalibrationMetrics(loss.num_bins)
    trainer = Trainer(
        ...,
        compute_loss_func=loss,
        preprocess_logits_for_metrics=calibration.reduce,
        compute_metrics=calibration,
        callbacks=[AdaFocalCallback(loss, calibration.calibrate)],
    )
    ```
    """

    def __init__(self, num_bins: int = 15) -> None:
        self.num_bins = num_bins
        self._rows: np.ndarray | None = None
        self._num_classes: int | None = None

    def reduce(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Replace logits by `per_sample` rows; for `preprocess_logits_for_metrics`."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        self._num_classes = logits.shape[-1]
        return per_sample(logits, labels)

    def __call__(self, prediction) -> dict[str, float]:
        """Metrics of an `EvalPrediction` whose predictions are rows; for `compute_metrics`."""
        rows, others = split_finite(counted_rows(prediction.predictions))
        if others:
            raise ValueError(
                f"{others} of {others + len(rows)} evaluated samples have logits that are NaN or infinite. Check the "
                "learning rate and gradient clipping (has training diverged?), fp16 overflow (use bf16 or float32), "
                "and the inputs for NaN."
            )
        self._rows = rows
        return sample_metrics(self._rows, self.num_bins)

    def calibrate(self) -> BinStats:
        """Equal-mass statistics of the last evaluation, also of single classes; for `AdaFocalCallback`.

        Raises:
            RuntimeError: If nothing has been evaluated.
        """
        if self._rows is None:
            raise RuntimeError("No evaluation yet: pass this object as the Trainer's `compute_metrics`.")
        return equal_mass_statistics(self._rows, self.num_bins, self._num_classes)
