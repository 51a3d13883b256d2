"""Read predictions from files (tables and arrays) as confidence and correctness per sample."""

import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_adafocal.metrics.scores import top_label
from hf_adafocal.metrics.validation import as_array, check_pairs

PAIR_COLUMNS = ("confidence", "correct")
PROBABILITY_COLUMNS = ("probabilities", "label")
GROUP_COLUMN = "group"  # samples that are not independent, such as the pixels of an image, have one name there
CLASS_PREFIX = "prob_"  # `prob_cat, prob_dog, label` holds the probabilities of the classes cat and dog
SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".npz", ".npy")

Column = Callable[[], np.ndarray]  # reads the column when it is needed


def read_predictions(
    path: str | Path,
    *,
    pair_columns: Sequence[str] | None = None,
    probability_columns: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Read confidence and correctness from a file of predictions with one row, or array entry, per sample.

    The file holds one of these:

    * a confidence and a 0/1 outcome;
    * class probabilities, a list of C numbers per row (in text as a JSON list), and the label: its index, or the name
      of a class if the columns below name the classes;
    * one column per class, `prob_<class>`, and the label: the name of its class, or the index of its column if the
      names are not those of the labels.

    Args:
        path: A `.parquet`, `.csv`, `.tsv`, `.jsonl`, `.npz` or `.npy` file, the text formats also with `.gz`. A
            `.csv` file is separated by commas or semicolons. A `.npy` file holds an array of shape `(N, 2)`,
            confidence and correctness, or a structured array.
        pair_columns: Names of the confidence (in [0, 1]) and of the 0/1 outcome; "confidence" and "correct" if the
            file has them.
        probability_columns: Names of the probabilities and of the label; "probabilities" (or the columns that start
            with "prob_") and "label" if the file has them. The pairs are those of `top_label`.

    Returns:
        Confidence and correctness, each of shape `(N,)`, as `calibration_error` takes them.

    Raises:
        ValueError: If the file cannot be read, or a column is missing, holds nulls or something else than expected.
            The message is one line that names the file and the columns.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "predictions.csv"
    >>> _ = path.write_text("prob_cat,prob_dog,label\n0.25,0.75,dog\n0.5,0.5,dog\n")
    >>> read_predictions(path)
    (array([0.75, 0.5 ]), array([ True, False]))
    """
    path = Path(path)
    if pair_columns and probability_columns:
        raise ValueError("Name pair columns or probability columns, not both.")
    table = _open(path)
    chosen, is_pair = _choose(path, list(table), pair_columns, probability_columns)
    try:
        if is_pair:
            return check_pairs(*(_numbers(path, name, table) for name in chosen))
        *columns, label = chosen
        labels = _column(path, label, table)
        if len(columns) == 1:
            probabilities = _numbers(path, columns[0], table)
            if probabilities.ndim == 1:
                raise ValueError(
                    f"{path}, column {columns[0]!r}: expected a list of probabilities per row, found one number. "
                    "If it is the probability of class 1, name the two columns as pair columns."
                )
        else:
            probabilities = np.stack([_numbers(path, name, table) for name in columns], axis=-1)
            labels = _column_indices(labels, [name.removeprefix(CLASS_PREFIX) for name in columns])
        return top_label(probabilities, labels)
    except _Located:
        raise
    except Exception as error:
        shown = [*chosen[:2], "...", chosen[-1]] if len(chosen) > 4 else chosen
        raise ValueError(f"{path}, columns {' and '.join(map(repr, shown))}: {_one_line(error)}") from error


def read_groups(path: str | Path, column: str | None = None) -> np.ndarray | None:
    """Read the group of each sample of a file of predictions, such as the image of each pixel.

    Args:
        path: As in `read_predictions`.
        column: Name of the column; "group" if the file has it.

    Returns:
        Numbers or names, shape `(N,)`; None if no column is named and the file has no "group".

    Raises:
        ValueError: If the file cannot be read, or the column is missing or holds nulls.
    """
    path = Path(path)
    table = _open(path)
    if column is None and GROUP_COLUMN not in table:
        return None
    name = GROUP_COLUMN if column is None else column
    if name not in table:
        raise ValueError(f"{path}: no column {name!r}, found {_shown(list(table))}.")
    return _column(path, name, table)


class _Located(ValueError):
    """Error whose message already names the file and the column."""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:500] or type(error).__name__


def _open(path: Path) -> Mapping[str, Column]:
    """Return the columns of a file by name, as functions that read them."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if packed else suffixes)[-1:]
    if not kind or kind[0] not in SUFFIXES or (packed and kind[0] not in (".csv", ".tsv", ".jsonl")):
        raise ValueError(f"{path}: expected a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file (text also as .gz).")
    try:
        if kind[0] in (".npz", ".npy"):
            return _open_arrays(path)
        if kind[0] == ".parquet":
            return _open_parquet(path)
        with gzip.open(path) if packed else path.open("rb") as file:
            content = file.read()
        return _open_json_lines(content) if kind[0] == ".jsonl" else _open_text(content, kind[0] == ".tsv")
    except Exception as error:  # readers fail in many ways: decompression, decryption, decoding, their own errors
        raise ValueError(f"{path}: cannot be read as {kind[0][1:]}: {_one_line(error)}") from error


def _open_arrays(path: Path) -> Mapping[str, Column]:
    loaded = np.load(path)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        return {name: partial(loaded.__getitem__, name) for name in loaded.files}
    if loaded.dtype.names:
        return {name: partial(loaded.__getitem__, name) for name in loaded.dtype.names}
    if loaded.ndim != 2 or loaded.shape[1] != 2:
        raise ValueError(
            f"expected an array of shape (N, 2), confidence and correctness, found {loaded.shape}. Save several "
            "arrays by name as .npz."
        )
    return {name: partial(loaded[:, k].copy) for k, name in enumerate(PAIR_COLUMNS)}


def _open_parquet(path: Path) -> Mapping[str, Column]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    names = _distinct(file.schema_arrow.names)
    return {name: partial(_from_parquet, file, name) for name in names}


def _open_text(content: bytes, by_tabs: bool) -> Mapping[str, Column]:
    from pyarrow import csv

    header = content.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0]
    separator = "\t" if by_tabs else (";" if header.count(b";") > header.count(b",") else ",")
    options = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    table = csv.read_csv(io.BytesIO(content), parse_options=options)
    return {name: partial(_from_arrow, table[name]) for name in _distinct(table.column_names)}


def _open_json_lines(content: bytes) -> Mapping[str, Column]:
    rows = [json.loads(line) for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected one object per line")
    names = {name: None for row in rows for name in row}

    def read(name: str) -> np.ndarray:
        values = [row.get(name) for row in rows]
        missing = sum(value is None for value in values)
        if missing:
            raise ValueError(f"expected a value in each row, found {missing} nulls. Drop those rows first.")
        if len({len(value) for value in values if isinstance(value, list)}) > 1:
            lengths = [len(value) for value in values if isinstance(value, list)]
            raise ValueError(f"expected lists of one length, found {min(lengths)} to {max(lengths)}.")
        return np.asarray(values)

    return {name: partial(read, name) for name in names}


def _distinct(names: Sequence[str]) -> Sequence[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the column name {twice[0]!r} occurs {names.count(twice[0])} times")
    return names


def _choose(
    path: Path, names: list[str], pair: Sequence[str] | None, probabilities: Sequence[str] | None
) -> tuple[Sequence[str], bool]:
    """Choose the columns to read, and tell whether they are a confidence and an outcome."""
    named = pair or probabilities
    if named is not None:
        missing = [name for name in named if name not in names]
        if missing:
            raise ValueError(f"{path}: no column {missing[0]!r}, found {_shown(names)}.")
        return named, named is pair
    classes = [name for name in names if name.startswith(CLASS_PREFIX)]
    known = [PAIR_COLUMNS, PROBABILITY_COLUMNS, (*classes, "label") if len(classes) > 1 else ("",)]
    found = [columns for columns in known if set(columns) <= set(names)]
    if len(found) != 1:
        reason = "more than one of them" if found else _shown(names)
        raise ValueError(
            f"{path}: expected columns {PAIR_COLUMNS}, columns {PROBABILITY_COLUMNS}, or 'label' with a column "
            f"{CLASS_PREFIX!r} + class for each class; found {reason}. Name the two to read as pair columns or "
            "probability columns."
        )
    return found[0], found[0] == PAIR_COLUMNS


def _shown(names: list[str]) -> str:
    return str(names) if len(names) <= 20 else f"{str(names[:20])[:-1]}, ... ({len(names)} columns)]"


def _column(path: Path, name: str, table: Mapping[str, Column]) -> np.ndarray:
    try:
        return as_array(table[name]())
    except Exception as error:
        raise _Located(f"{path}, column {name!r}: {_one_line(error)}") from error


def _numbers(path: Path, name: str, table: Mapping[str, Column]) -> np.ndarray:
    values = _column(path, name, table)
    if values.dtype.kind in "UO" and values.ndim == 1 and len(values) and str(values[0]).lstrip()[:1] == "[":
        try:
            values = as_array([json.loads(value) for value in values])
        except (TypeError, ValueError) as error:
            raise _Located(
                f"{path}, column {name!r}: expected JSON lists of one length: {_one_line(error)}"
            ) from error
    if values.dtype.kind not in "biuf":
        raise _Located(f"{path}, column {name!r}: expected numbers, found {_kind(values)}.")
    return values


def _kind(values: np.ndarray) -> str:
    return "text" if values.dtype.kind in "UO" else str(values.dtype)


def _column_indices(labels: np.ndarray, classes: list[str]) -> np.ndarray:
    """Index of the column of each label, given as the name of its class; numbers that name no class are indices."""
    position = {name: k for k, name in enumerate(classes)}
    found = [position.get(str(label), -1) for label in labels.tolist()]
    if -1 not in found:
        return np.array(found, dtype=np.intp)
    if labels.dtype.kind in "UO":
        raise ValueError(f"no column for the label {str(labels[found.index(-1)])!r}, found classes {_shown(classes)}.")
    return labels


def _from_parquet(file: Any, name: str) -> np.ndarray:
    return _from_arrow(file.read(columns=[name])[name])


def _from_arrow(column: Any) -> np.ndarray:
    """Array of a pyarrow column: a vector of numbers or strings, or a matrix if it holds lists of one length."""
    from pyarrow import compute, types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        raise ValueError(f"expected a value in each row, found {column.null_count} nulls. Drop those rows first.")
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        lengths = compute.unique(compute.list_value_length(column)).to_pylist()
        if len(lengths) > 1:
            raise ValueError(f"expected lists of one length, found {min(lengths)} to {max(lengths)}.")
        return _from_arrow(compute.list_flatten(column)).reshape(len(column), *(lengths or [0]))
    if types.is_decimal(column.type):
        column = column.cast("float64")
    known = (
        types.is_boolean(column.type)
        or types.is_integer(column.type)
        or types.is_floating(column.type)
        or types.is_string(column.type)
        or types.is_large_string(column.type)
    )
    if not known:
        raise ValueError(f"expected numbers, found {column.type}.")
    return column.to_numpy()
