"""Predicted class of each row of probabilities: an argmax that is fast for few classes too."""

import numpy as np

from hf_adafocal.metrics.validation import CHUNK_VALUES, checked_chunks

FEW_CLASSES = 16  # up to here comparing whole columns beats numpy's argmax, which pays for each row


def predicted_classes(probabilities: np.ndarray) -> np.ndarray:
    """Return the most probable class of each row, shape `(N,)`, and check that the rows are probabilities.

    The first class wins a tie.

    Args:
        probabilities: Shape `(N, C)`, floating, N >= 1.

    Raises:
        ValueError: If rows are not probabilities.

    >>> predicted_classes(np.array([[0.25, 0.75], [0.5, 0.5]]))
    array([1, 0])
    """
    predicted = np.empty(len(probabilities), dtype=np.intp)
    for rows, chunk in checked_chunks(probabilities, 2 * CHUNK_VALUES):
        argmax_rows(chunk, predicted[rows])
    return predicted


def argmax_rows(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write the index of the largest value of each row to `out`, as `values.argmax(axis=1, out=out)`.

    Args:
        values: Shape `(n, C)`.
        out: Gets the index of the first of the largest values, shape `(n,)`; with NaN in a row it may be any.

    Returns:
        The largest values, shape `(n,)`; NaN where a row holds one.
    """
    if values.shape[1] > FEW_CLASSES:
        values.argmax(axis=1, out=out)  # the first NaN if there is one
        return np.take_along_axis(values, out[:, None], axis=1)[:, 0]
    best, *columns = np.ascontiguousarray(values.T)
    best, index = best.copy(), np.zeros(len(values), dtype=np.uint8)  # the columns may be the caller's own
    for k, column in enumerate(columns, start=1):
        np.maximum(index, (column > best) * np.uint8(k), out=index)  # a later class that wins is the larger index
        np.maximum(best, column, out=best)
    out[:] = index
    return best
