"""Measure calibration from logits, per-sample statistics or a histogram: metrics, intervals, reliability bins."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hf_adafocal.metrics.binning import BinStats, bin_statistics, equal_width_edges
from hf_adafocal.metrics.bootstrap import bootstrap_interval, report_intervals
from hf_adafocal.metrics.intervals import calibration_error_interval
from hf_adafocal.metrics.scores import (
    binary_adaptive_calibration_error,
    binary_expected_calibration_error,
    calibration_error,
    calibration_report,
    softmax,
    top_label,
)

IGNORE_INDEX = -100
MOST_FOR_INTERVALS = 200_000  # samples; beyond, resampling takes minutes and the intervals are narrower than rounding


class PerSample(NamedTuple):
    """Per-sample results of an evaluation, all of shape `(N,)`.

    Attributes:
        confidence: Probability of the predicted class.
        correct: Whether the prediction is the label, 0 or 1.
        nll: Negative log-probability of the label, in nats.
    """

    confidence: np.ndarray
    correct: np.ndarray
    nll: np.ndarray


class Collected(NamedTuple):
    """Metrics of a split that were computed earlier, such as those of a streaming histogram.

    Attributes:
        metrics: `accuracy`, `nll` (nats), `ece`, `ada_ece` and further ones by name, fractions.
        num_samples: Samples they were computed from.
        num_bins: Bins of the binned metrics.
        reliability: Bins of one width, for the reliability diagram.
    """

    metrics: Mapping[str, float]
    num_samples: int
    num_bins: int
    reliability: BinStats | None = None


@dataclass(frozen=True)
class Measured:
    """Calibration metrics, intervals and reliability bins of one set of scores.

    Attributes:
        metrics: By name, with `num_samples` and `num_bins`.
        intervals: Ends of the 95 % interval of each metric, by name; empty without samples to resample.
        reliability: Bins of one width; None where there are none.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    reliability: BinStats | None


def flat(logits: Any, labels: Any, ignore_index: int = IGNORE_INDEX) -> tuple[np.ndarray, np.ndarray]:
    """Select the labelled samples of logits and labels, shapes `(N, C)` and `(N,)`.

    Args:
        logits: Shape `(..., C)`; of a single logit, C = 1, both classes are returned.
        labels: Shape `(...)`; `ignore_index` where a token or pixel does not count.
        ignore_index: Label of samples that do not count.

    Raises:
        ValueError: If the shapes do not fit or no sample counts.

    >>> flat(np.zeros((1, 3, 2)), np.array([[0, -100, 1]]))[1]
    array([0, 1])
    """
    logits, labels = two_columns(np.asarray(logits)), np.asarray(labels)
    if logits.ndim < 2 or labels.shape != logits.shape[:-1]:
        raise ValueError(f"Expected logits (..., C) and labels (...), found {logits.shape} and {labels.shape}.")
    counted = labels != ignore_index
    if not counted.any():
        raise ValueError(f"Expected at least one label that counts, found {labels.size}, all of them {ignore_index}.")
    return logits[counted], labels[counted]


def two_columns(logits: np.ndarray) -> np.ndarray:
    """Return logits of two classes, 0 and z, for the single logits z of a binary classifier; others unchanged.

    >>> two_columns(np.array([[2.0]])).tolist()
    [[0.0, 2.0]]
    """
    single = logits.ndim > 1 and logits.shape[-1] == 1
    return np.concatenate([np.zeros_like(logits), logits], axis=-1) if single else logits


def measure_logits(
    logits: np.ndarray, labels: np.ndarray, num_bins: int = 15, num_resamples: int = 1000, *, binary: bool = False
) -> Measured:
    """Compute metrics and intervals of the softmax of logits.

    Args:
        logits: Shape `(N, C)`.
        labels: Class indices, shape `(N,)`.
        num_bins: Bins of the binned metrics.
        num_resamples: Resamples of the bootstrap.
        binary: Add `binary_ece` and `binary_ada_ece`, of the probability of class 1.

    Raises:
        ValueError: If the shapes do not fit, a label is no class, or a logit is not finite.
    """
    probabilities = softmax(logits)
    metrics, intervals = calibration_report(probabilities, labels, num_bins), {}
    if len(labels) <= MOST_FOR_INTERVALS:
        found = report_intervals(probabilities, labels, num_bins, num_resamples=num_resamples)
        intervals = {name: (interval.low, interval.high) for name, interval in found.items()}
    if binary:
        p, positive = probabilities[:, 1], labels == 1
        metrics["binary_ece"] = binary_expected_calibration_error(p, positive, num_bins)
        metrics["binary_ada_ece"] = binary_adaptive_calibration_error(p, positive, num_bins)
        if intervals:
            interval = calibration_error_interval(p, positive, num_bins)
            intervals["binary_ece"] = (interval.low, interval.high)
    confidence, correct = top_label(probabilities, labels)
    return Measured(
        metrics,
        intervals,
        bin_statistics(confidence, correct, equal_width_edges(num_bins)),
    )


def measure_samples(samples: PerSample, num_bins: int = 15, num_resamples: int = 1000) -> Measured:
    """Compute metrics and intervals from per-sample statistics, those that need only the top label.

    Args:
        samples: Of one split.
        num_bins: Bins of the binned metrics.
        num_resamples: Resamples of the bootstrap.

    Raises:
        ValueError: If the lengths differ or a confidence lies outside [0, 1].
    """
    confidence, correct, nll = (np.asarray(values, dtype=np.float64) for values in samples)
    metrics = {
        "num_samples": len(confidence),
        "num_bins": num_bins,
        "accuracy": float(correct.mean()),
        "nll": float(nll.mean()),
        "ece": calibration_error(confidence, correct, num_bins),
        "ada_ece": calibration_error(confidence, correct, num_bins, scheme="equal_mass"),
        "mce": calibration_error(confidence, correct, num_bins, norm="max"),
    }
    intervals = {}
    if len(confidence) <= MOST_FOR_INTERVALS:
        binned: dict[str, dict[str, Any]] = {"ece": {}, "ada_ece": {"scheme": "equal_mass"}, "mce": {"norm": "max"}}
        found = {
            "accuracy": bootstrap_interval(np.mean, correct, num_resamples=num_resamples),
            "nll": bootstrap_interval(np.mean, nll, num_resamples=num_resamples),
            **{
                name: calibration_error_interval(confidence, correct, num_bins, **kind)
                for name, kind in binned.items()
            },
        }
        intervals = {name: (interval.low, interval.high) for name, interval in found.items()}
    return Measured(metrics, intervals, bin_statistics(confidence, correct, equal_width_edges(num_bins)))


def measure_collected(collected: Collected) -> Measured:
    """Wrap metrics that were computed earlier as `Measured`."""
    counts = {"num_samples": int(collected.num_samples), "num_bins": int(collected.num_bins)}
    metrics = {name: float(value) for name, value in collected.metrics.items() if np.isfinite(value)}
    return Measured({**metrics, **counts}, {}, collected.reliability)
