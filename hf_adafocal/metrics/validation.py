"""What the metrics ask of their inputs, said once."""

from collections.abc import Iterator

import numpy as np

CHUNK_VALUES = 1 << 18  # 1 MiB in float32 and 2 MiB as their float64 copy
_CHUNK_ROWS = 1 << 12  # short vectors are cheap to allocate again and again


def check_pairs(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A probability and a 0/1 outcome a sample, in float64, both `(N,)`, N >= 1.

    Raises:
        ValueError: If the shapes differ, a probability is NaN or outside [0, 1], or an outcome is neither 0 nor 1.
    """
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
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError(f"Outcomes must be 0 or 1, found values from {correct.min()} to {correct.max()}.")
    return confidence, correct


def as_multiclass(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `(N, C)` of a floating dtype and class indices `(N,)`, N >= 1; rows are not looked at.

    Raises:
        ValueError: If the shapes do not fit, or labels are not integers in `[0, C)`.
    """
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
    return probabilities, labels.astype(np.intp, copy=False)


def checked_chunks(probabilities: np.ndarray, values: int = CHUNK_VALUES) -> Iterator[tuple[slice, np.ndarray]]:
    """Chunks of about so many values, whole rows, each found to be probabilities before it is handed out.

    Raises:
        ValueError: If any row of the array is not.
    """
    step = min(_CHUNK_ROWS, max(1, values // probabilities.shape[1]))
    quick = np.promote_types(probabilities.dtype, np.float32)
    ones = np.ones(probabilities.shape[1], dtype=quick)
    certain = _tolerance(probabilities) / 2  # the other half is more than these sums can be off
    passed = False
    for start in range(0, len(probabilities), step):
        rows = slice(start, start + step)
        chunk = probabilities[rows]
        sums = chunk.astype(quick, copy=False) @ ones
        close = sums.min() >= 1 - certain and sums.max() <= 1 + certain  # False with NaN
        if not (passed or (close and chunk.min() >= 0)):
            _check_rows(probabilities)
            passed = True
        yield rows, chunk


def check_top(probabilities: np.ndarray, top: np.ndarray) -> None:
    """Refuse rows whose largest value `top`, shape `(N,)`, is none of a distribution's: logits and NaN, at no cost.

    Raises:
        ValueError: If such a row is there.
    """
    slack = _tolerance(probabilities)
    if not (top.min() >= 1 / probabilities.shape[1] - slack and top.max() <= 1 + slack):  # also True for NaN
        _check_rows(probabilities)


def _tolerance(probabilities: np.ndarray) -> float:
    return 1e-2 if probabilities.dtype.itemsize < 4 else 1e-3  # what a softmax in that precision can miss


def _check_rows(probabilities: np.ndarray) -> None:
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if np.isnan(sums).any():
        raise ValueError(f"probabilities hold NaN in {np.count_nonzero(np.isnan(sums))} of {len(sums)} rows.")
    if probabilities.min() < 0 or np.abs(sums - 1).max() > _tolerance(probabilities):
        worst = np.abs(sums - 1).argmax()
        raise ValueError(
            f"Each row of probabilities must be non-negative and sum to 1; the smallest value is "
            f"{probabilities.min():.4g} and row {worst} sums to {sums[worst]:.4g}. These look like logits: "
            "pass softmax(logits)."
        )
