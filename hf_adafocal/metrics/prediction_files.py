"""Read predictions from files: confidence and correctness per sample."""

from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from hf_adafocal.metrics.scores import top_label
from hf_adafocal.metrics.validation import check_pairs

PAIR_COLUMNS = ("confidence", "correct")
PROBABILITY_COLUMNS = ("probabilities", "label")

_UNREADABLE = (OSError, ValueError, EOFError, BadZipFile)  # pyarrow's ArrowInvalid is a ValueError


def read_predictions(
    path: str | Path,
    *,
    pair_columns: Sequence[str] | None = None,
    probability_columns: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and correctness from a table of predictions, one row (or array entry) a sample.

    Args:
        path: A `.parquet`, `.csv` or `.npz` file.
        pair_columns: Names of the confidence (in [0, 1]) and of the 0/1 outcome; "confidence" and "correct" if the
            file has them.
        probability_columns: Names of the probabilities (a list of C numbers a row) and of the integer label;
            "probabilities" and "label" if the file has them. The pairs are those of `top_label`.

    Returns:
        Confidence and correctness, each of shape `(N,)`, as `calibration_error` takes them.

    Raises:
        ValueError: If the file cannot be read, or a column is missing, holds nulls or something else than expected.
            The message is one line that names the file and the columns.
    """
    path = Path(path)
    names, read = _open(path)
    columns, is_pair = _choose(path, names, pair_columns, probability_columns)
    first, second = (_column(path, name, read) for name in columns)
    if not is_pair and first.ndim == 1:
        raise ValueError(
            f"{path}, column {columns[0]!r}: expected a list of probabilities a row, found one number. "
            "If it is the probability of class 1, name the two columns as pair columns."
        )
    try:
        return check_pairs(first, second) if is_pair else top_label(first, second)
    except ValueError as error:
        raise ValueError(f"{path}, columns {columns[0]!r} and {columns[1]!r}: {error}") from error


def _open(path: Path) -> tuple[list[str], Callable[[str], np.ndarray]]:
    """Names of the columns and a function that reads one of them."""
    if path.suffix not in (".parquet", ".csv", ".npz"):
        raise ValueError(f"{path}: expected a .parquet, .csv or .npz file.")
    try:
        if path.suffix == ".npz":
            archive = np.load(path)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array without a name")
            return archive.files, archive.__getitem__
        from pyarrow import csv, parquet

        if path.suffix == ".csv":
            table = csv.read_csv(path)
            return table.column_names, lambda name: _from_arrow(table[name])
        file = parquet.ParquetFile(path)
        return file.schema_arrow.names, lambda name: _from_arrow(file.read(columns=[name])[name])
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {reason}") from error


def _choose(
    path: Path, names: list[str], pair: Sequence[str] | None, probabilities: Sequence[str] | None
) -> tuple[Sequence[str], bool]:
    """The two columns to read, and whether they are a pair."""
    if pair and probabilities:
        raise ValueError("Name pair columns or probability columns, not both.")
    if not (pair or probabilities):
        found = [columns for columns in (PAIR_COLUMNS, PROBABILITY_COLUMNS) if set(columns) <= set(names)]
        if len(found) != 1:
            raise ValueError(
                f"{path}: expected columns {PAIR_COLUMNS} or columns {PROBABILITY_COLUMNS}, found "
                f"{'both' if found else names}. Name the two to read as pair columns or probability columns."
            )
        return found[0], found[0] == PAIR_COLUMNS
    columns = pair or probabilities
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]!r}, found {names}.")
    return columns, columns is pair


def _column(path: Path, name: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
    try:
        values = read(name)
    except _UNREADABLE as error:
        raise ValueError(f"{path}, column {name!r}: {error}") from error
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path}, column {name!r}: expected numbers, found {values.dtype}.")
    return values


def _from_arrow(column) -> np.ndarray:
    """A pyarrow column as a vector, or as a matrix if it holds lists of one length."""
    from pyarrow import compute, types

    if column.null_count:
        raise ValueError(f"expected a value in each row, found {column.null_count} nulls. Drop those rows first.")
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        lengths = compute.unique(compute.list_value_length(column)).to_pylist()
        if len(lengths) > 1:
            raise ValueError(f"expected lists of one length, found {min(lengths)} to {max(lengths)}.")
        return _from_arrow(compute.list_flatten(column)).reshape(len(column), *(lengths or [0]))
    if not (types.is_boolean(column.type) or types.is_integer(column.type) or types.is_floating(column.type)):
        raise ValueError(f"expected numbers, found {column.type}.")
    return column.to_numpy()
