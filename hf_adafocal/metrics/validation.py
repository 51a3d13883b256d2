"""Input validation of the metrics: conversion to arrays, shapes, ranges and row sums of probabilities."""

from collections.abc import Iterator
from typing import Any

import numpy as np

CHUNK_VALUES = 1 << 18  # 1 MiB in float32 and 2 MiB as their float64 copy
_CHUNK_ROWS = 1 << 12  # short vectors are cheap to allocate again and again

# What a probability may lie outside [0, 1], and a row sum away from 1: a softmax in bfloat16 misses by up to 2^-8.
TOLERANCE = 5e-3

_TWINS = (
    "For probabilities of class 1, shape (N,), use the binary functions (`binary_expected_calibration_error`, "
    "`binary_calibration_report`, ...); for a confidence and a 0/1 outcome per sample use `calibration_error`."
)


def as_array(values: Any) -> np.ndarray:
    """Convert lists, arrays, torch tensors and pandas columns to a NumPy array in native byte order.

    Args:
        values: Anything that `np.asarray` takes; a torch tensor of any dtype on any device, with or without a
            gradient; a sequence or pandas Series whose entries are arrays of one shape.

    Returns:
        The array: the caller's own memory where no conversion was needed. bfloat16 becomes float32.

    Raises:
        ValueError: If the rows differ in length, or entries of a masked array are masked.

    >>> as_array([[0.25, 0.75]]).shape
    (1, 2)
    """
    if hasattr(values, "detach"):  # a torch tensor; numpy has no bfloat16, which float32 holds exactly
        values = values.detach().cpu()
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    if np.ma.is_masked(values):
        raise ValueError(
            f"Expected an array without masked entries, found {np.ma.count_masked(values)}. Drop them first."
        )
    try:
        if isinstance(values, list | tuple) and values and hasattr(values[0], "detach"):
            values = [as_array(value) for value in values]
        array = np.asarray(values)
        if array.dtype == object:
            array = _from_objects(array)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected an array, or rows of one length: {' '.join(str(error).split())}") from error
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _from_objects(array: np.ndarray) -> np.ndarray:
    """Array of numbers from one of Python objects: scalars, or one array per entry; strings stay objects."""
    entries = []
    for entry in array.flat:
        nested = isinstance(entry, np.ndarray | list | tuple) or hasattr(entry, "detach")  # a dict would never end
        entries.append(as_array(entry) if nested else np.asarray(entry))
        if entries[-1].dtype.kind not in "biuf":
            return array
    return np.stack(entries).reshape(array.shape + entries[0].shape) if entries else array


def check_pairs(confidence: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
    """Validate a probability and a 0/1 outcome per sample and return both in float64, shape `(N,)`, N >= 1.

    One column, shape `(N, 1)`, counts as a vector. Probabilities within `TOLERANCE` of [0, 1] are clipped.

    Raises:
        ValueError: If the shapes differ, a probability is NaN or outside [0, 1], or an outcome is neither 0 nor 1.
    """
    confidence, correct = (_without_column(as_numbers(values, name)) for name, values in _named(confidence, correct))
    if confidence.ndim != 1 or confidence.shape != correct.shape or confidence.size == 0:
        hint = " For probabilities of C classes, (N, C), use the functions without `binary_`, or `top_label` first."
        raise ValueError(
            "Expected two vectors of one length N >= 1: a probability and a 0/1 outcome per sample; "
            f"found shapes {confidence.shape} and {correct.shape}.{hint if confidence.ndim == 2 else ''}"
        )
    low, high = confidence.min(), confidence.max()
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also True for NaN
        raise ValueError(f"Probabilities must lie in [0, 1] without NaN, found {low} to {high}.")
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError(f"Outcomes must be 0 or 1, found values from {correct.min()} to {correct.max()}.")
    return confidence.clip(0, 1), correct


def as_multiclass(probabilities: Any, labels: Any, normalize: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Validate the shapes and types of probabilities `(N, C)` and class indices `(N,)`, N >= 1.

    The values of the rows are not checked here: `checked_chunks` and `check_top` do that.

    Args:
        probabilities: Shape `(N, C)`.
        labels: Class indices, shape `(N,)` or `(N, 1)`; booleans if there are two classes.
        normalize: Divide each row by its sum first; rows must be non-negative and not all 0.

    Returns:
        Probabilities of a floating dtype, and labels as `intp`.

    Raises:
        ValueError: If the shapes do not fit, labels are not integers in `[0, C)`, or rows cannot be normalized.
    """
    probabilities, labels = as_numbers(probabilities, "probabilities", keep=True), as_array(labels)
    shapes = f"found shapes {probabilities.shape} and {labels.shape}."
    labels = _without_column(labels)
    if probabilities.ndim == 1 and probabilities.size:
        raise ValueError(f"Expected probabilities (N, C) and labels (N,) with N >= 1; {shapes} {_TWINS}")
    if labels.ndim == 2 and labels.shape == probabilities.shape and labels.size:
        raise ValueError(f"Expected labels (N,); {shapes} If they are one-hot, pass labels.argmax(axis=1).")
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or probabilities.size == 0:
        raise ValueError(f"Expected probabilities (N, C) and labels (N,) with N >= 1; {shapes}")
    classes = probabilities.shape[1]
    labels = _class_indices(labels, classes)
    if labels.min() < 0 or labels.max() >= classes:
        one_column = f" {_TWINS}" if classes == 1 else ""
        raise ValueError(
            f"labels must lie in [0, {classes}), found {labels.min()} to {labels.max()}. "
            f"Drop ignored samples first.{one_column}"
        )
    return (_normalized(probabilities) if normalize else probabilities), labels.astype(np.intp, copy=False)


def checked_chunks(probabilities: np.ndarray, values: int = CHUNK_VALUES) -> Iterator[tuple[slice, np.ndarray]]:
    """Iterate over chunks of whole rows, each checked to be probabilities.

    Values outside [0, 1] by rounding are clipped, but for those that exceed 1 by less than 1e-6.

    Args:
        probabilities: Shape `(N, C)`, floating.
        values: Approximate number of values per chunk.

    Yields:
        The rows of the chunk as a slice, and their probabilities, which may be the caller's memory.

    Raises:
        ValueError: If any row of the array is not a distribution within `TOLERANCE`.
    """
    step = min(_CHUNK_ROWS, max(1, values // probabilities.shape[1]))
    quick = np.promote_types(probabilities.dtype, np.float32)
    ones = np.ones(probabilities.shape[1], dtype=quick)
    certain = TOLERANCE / 2  # the other half is more than these sums can be off
    passed = False
    for start in range(0, len(probabilities), step):
        rows = slice(start, start + step)
        chunk = probabilities[rows]
        sums = chunk.astype(quick, copy=False) @ ones
        largest = sums.max()
        close = sums.min() >= 1 - certain and largest <= 1 + certain  # False with NaN
        non_negative = chunk.min() >= 0
        if not (passed or (close and non_negative)):
            _check_rows(probabilities)
            passed = True
        above = largest > 1 + 1e-6 and chunk.max() > 1  # where a value is, the sum is, but for one below 0
        yield rows, chunk if non_negative and not above else chunk.clip(0, 1)


def check_top(probabilities: np.ndarray, top: np.ndarray) -> None:
    """Reject rows whose largest value, `top` of shape `(N,)`, cannot be a probability: logits and NaN.

    Raises:
        ValueError: If such a row exists.
    """
    least = 1 / probabilities.shape[1] - TOLERANCE
    if not (top.min() >= least and top.max() <= 1 + TOLERANCE):  # also True for NaN
        _check_rows(probabilities)


def _named(confidence: Any, correct: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("Probabilities", confidence), ("Outcomes", correct)


def as_numbers(values: Any, name: str, keep: bool = False) -> np.ndarray:
    """Convert values to an array of real numbers: float64, or with `keep` the floating dtype that it has.

    Raises:
        ValueError: If the values are no numbers; `name` is what they are called in the message.
    """
    array = as_array(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers, found dtype {array.dtype}.")
    return array if keep and array.dtype.kind == "f" else array.astype(np.float64, copy=False)


def _without_column(array: np.ndarray) -> np.ndarray:
    """Vector `(N,)` from one column `(N, 1)`; anything else as it is."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def _class_indices(labels: np.ndarray, classes: int) -> np.ndarray:
    if labels.dtype.kind in "iu":
        return labels
    if labels.dtype == bool:
        if classes == 2:
            return labels.astype(np.intp)
        raise ValueError(
            f"labels must be integer class indices, found dtype bool with {classes} classes. If they say whether the "
            "prediction was right, pass it with its confidence: calibration_error(confidence, correct)."
        )
    hint = ""
    if labels.dtype.kind in "UO":
        hint = (
            f" Such as {str(labels.flat[0])!r}: pass the column of each name, "
            "np.array([names.index(label) for label in labels]) with `names` in the order of the columns."
        )
    elif labels.dtype.kind == "f":
        hint = " Pass labels.astype(int) if they are whole numbers."
    raise ValueError(f"labels must be integer class indices, found dtype {labels.dtype}.{hint}")


def _normalized(probabilities: np.ndarray) -> np.ndarray:
    sums = probabilities.sum(axis=1, keepdims=True, dtype=np.float64)
    if not (probabilities.min() >= 0 and sums.min() > 0 and np.isfinite(sums).all()):  # also True for NaN
        raise ValueError(
            "normalize=True needs rows that are finite, non-negative and not all 0; the smallest value is "
            f"{probabilities.min():.4g} and sums reach from {sums.min():.4g} to {sums.max():.4g}. "
            "For logits pass softmax(logits)."
        )
    return probabilities / sums


def _check_rows(probabilities: np.ndarray) -> None:
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if np.isnan(sums).any():
        raise ValueError(f"probabilities hold NaN in {np.count_nonzero(np.isnan(sums))} of {len(sums)} rows.")
    low, high = probabilities.min(), probabilities.max()
    off = np.abs(sums - 1)
    if low >= -TOLERANCE and high <= 1 + TOLERANCE and off.max() <= TOLERANCE:
        return
    worst = off.argmax()
    found = (
        "Each row of probabilities must be non-negative and sum to 1; the values reach from "
        f"{low:.4g} to {high:.4g} and row {worst} sums to {sums[worst]:.4g}."
    )
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"{found} These look like logits: pass softmax(logits).")
    if probabilities.shape[1] == 1:
        raise ValueError(f"{found} {_TWINS}")
    raise ValueError(f"{found} If they are rounded or cover some of the classes, pass normalize=True.")
