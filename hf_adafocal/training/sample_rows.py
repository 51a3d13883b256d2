"""Per-sample results of an evaluation: five numbers per sample, whatever the number of classes.

`sample_rows` turns logits and labels into rows that can be gathered over processes like any other prediction;
metrics and the statistics that move AdaFocal's gamma are computed from the rows of all samples.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_adafocal.metrics.binning import BinStats, bin_statistics, equal_mass_edges, with_classes
from hf_adafocal.metrics.scores import calibration_error

COLUMNS = ("confidence", "correct", "nll", "predicted", "brier")
IGNORED = -100.0  # in all columns of a sample that does not count; the Trainer pads predictions with it too
LOWER_IS_BETTER = ("nll", "brier", "ece", "ada_ece", "refinement")  # of the metrics that evaluations add
CHUNK_VALUES = 1 << 24  # logits that are turned into probabilities at once: 64 MiB in float32


def sample_rows(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Compute confidence, correctness, NLL, predicted class and Brier score of each sample.

    Args:
        logits: Classes last, shape `(N, C)` or `(N, d1, ..., C)`; computed in float32 or wider, in chunks.
        labels: Class indices or `ignore_index`, shape `(N,)` or `(N, d1, ...)`.
        ignore_index: Label of samples that do not count; their row is `IGNORED`.

    Returns:
        Rows in the order of `COLUMNS` (NLL in nats), shape `(N, 5)` or `(N, d1, ..., 5)`; float32 holds class indices
        exactly up to 2^24.

    Raises:
        ValueError: If the shapes do not fit.

    >>> sample_rows(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]))
    tensor([[0.8000, 1.0000, 0.2231, 0.0000, 0.0800]])
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Expected logits (N, C) and labels (N,), found {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    flat = logits.reshape(-1, logits.shape[-1])
    step = max(1, CHUNK_VALUES // logits.shape[-1])
    chunks = zip(flat.split(step), labels.reshape(-1).split(step), strict=True)
    rows = [_rows_of(chunk, of_chunk, ignore_index) for chunk, of_chunk in chunks]
    return torch.cat(rows).reshape(*labels.shape, len(COLUMNS)) if rows else flat.new_empty(0, len(COLUMNS))


def _rows_of(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    top, predicted = log_p.max(-1)
    counted = labels != ignore_index
    of_label = log_p.gather(-1, labels.where(counted, 0).long()[:, None]).squeeze(-1)
    brier = (2 * log_p).exp().sum(-1) - 2 * of_label.exp() + 1
    correct, predicted = (predicted == labels).to(top.dtype), predicted.to(top.dtype)
    return torch.stack([top.exp(), correct, -of_label, predicted, brier], dim=-1).where(counted[:, None], IGNORED)


def mean_nll(rows: Tensor) -> Tensor:
    """Compute the mean NLL of the labelled rows, a scalar in nats; NaN if there are none."""
    counted = rows[..., 0] != IGNORED
    return rows[..., 2].where(counted, 0).sum() / counted.sum()


def counted_rows(rows: Tensor | np.ndarray) -> np.ndarray:
    """Drop the rows of ignored samples: float64, shape `(n, 5)`, from any shape `(..., 5)`."""
    rows = np.asarray(rows, dtype=np.float64).reshape(-1, len(COLUMNS))
    return rows[rows[:, 0] != IGNORED]


def split_finite(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Separate the finite rows, and count the rows that hold NaN or infinity."""
    finite = np.isfinite(rows).all(axis=1)
    return rows[finite], int(len(rows) - finite.sum())


def check_counts(counted: int, not_finite: int, name: str, ignore_index: int = -100) -> None:
    """Check that an evaluation has samples to measure and that their logits are finite.

    Args:
        counted: Samples with finite results.
        not_finite: Samples whose logits are NaN, or infinite where it matters.
        name: The evaluated set, for the error.
        ignore_index: Label of samples that do not count, for the error.

    Raises:
        ValueError: If a logit was not finite or no label counts.
    """
    if not_finite:
        raise ValueError(
            f"{not_finite} of {not_finite + counted} samples of the {name} have logits that are NaN or infinite. "
            "Check the learning rate and gradient clipping (has training diverged?), fp16 overflow (use bf16 or "
            "float32), and the inputs for NaN."
        )
    if not counted:
        raise ValueError(f"Every label of the {name} is ignored ({ignore_index}): there is nothing to evaluate.")


def sample_metrics(rows: np.ndarray, num_bins: int = 15) -> dict[str, float]:
    """Compute `accuracy`, `nll`, `brier`, `ece` and `ada_ece` of counted rows, shape `(n, 5)`."""
    confidence, correct, nll, _, brier = rows.T
    return {
        "accuracy": float(correct.mean()),
        "nll": float(nll.mean()),
        "brier": float(brier.mean()),
        "ece": calibration_error(confidence, correct, num_bins),
        "ada_ece": calibration_error(confidence, correct, num_bins, scheme="equal_mass"),
    }


def binary_metrics(rows: np.ndarray, num_bins: int = 15) -> dict[str, float]:
    """Compute `binary_ece` and `binary_ada_ece` of the counted rows of a two-class model, shape `(n, 5)`.

    They compare the probability of class 1 with its frequency, as calibration of binary classifiers is reported (Platt
    1999; scikit-learn, torchmetrics); `ece` and `ada_ece` ask how often the more likely class is right.
    """
    confidence, correct, _, predicted, _ = rows.T
    p, positive = np.where(predicted == 1, confidence, 1 - confidence), predicted == correct
    return {
        "binary_ece": calibration_error(p, positive, num_bins),
        "binary_ada_ece": calibration_error(p, positive, num_bins, scheme="equal_mass"),
    }


def equal_mass_statistics(rows: np.ndarray, num_bins: int = 15, num_classes: int | None = None) -> BinStats:
    """Bin counted rows, shape `(n, 5)`, into bins of equal mass: the edges and gaps that AdaFocal updates with.

    With `num_classes` also the gaps of each predicted class in those bins, which `ClasswiseAdaFocalLoss` needs.
    """
    confidence, correct, _, predicted, _ = rows.T
    stats = bin_statistics(confidence, correct, equal_mass_edges(confidence, num_bins))
    return stats if num_classes is None else with_classes(stats, confidence, correct, predicted, num_classes)


def is_lower_better(metric: str) -> bool:
    """Whether a metric, by its name with or without prefixes, is one of ours that falls as a model improves.

    >>> is_lower_better("eval_calibration_ece"), is_lower_better("accuracy")
    (True, False)
    """
    return any(metric == name or metric.endswith(f"_{name}") for name in LOWER_IS_BETTER)
