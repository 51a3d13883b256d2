"""Encoding of a label column as class indices: missing labels are dropped, unknown ones are errors."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers.utils import logging

logger = logging.get_logger(__name__)

MISSING_CODES = (-1, -100)  # benchmarks write -1 for "no label" and for hidden ones, PyTorch -100
MOST_MISSING = 0.05  # a larger share of -1 among plain integers is more likely a class (negative, neutral, positive)
OLD_COLUMN = "__label_as_given"
TEXT_OF_LABEL = "label_text"  # names of integer labels, beside them (SetFit's data sets)


@dataclass(frozen=True)
class ClassEncoding:
    """The classes of a training set: the index of each label.

    Attributes:
        names: Name of each class, in the order of the indices.
        keys: The label of each class as it stands in the data: an integer, a string or a bool; of a `ClassLabel`
            column the name.
        missing: Labels that mark a row without a label.
    """

    names: tuple[str, ...]
    keys: tuple[Any, ...]
    missing: frozenset[Any]

    @classmethod
    def of(cls, train: Dataset, column: str) -> "ClassEncoding":
        """Read the classes off the label column of the training set.

        The classes of a `ClassLabel` column are those it declares. Integers, strings and bools are sorted; classes
        are numbered from 0 whatever the labels are, and named by the column `label_text` or by the labels.

        Raises:
            ValueError: If the column does not hold one class per row, or all labels are missing.

        >>> train = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [1, 2, 3, None]})
        >>> ClassEncoding.of(train, "label").names
        ('1', '2', '3')
        """
        feature = train.features[column]
        values = labels_of(train, column)
        if isinstance(feature, ClassLabel):
            names = tuple(feature.names)
            return cls(names, names, frozenset((None,)))
        found = Counter(values)
        keys = tuple(sorted(found.keys() - {None} - _missing_codes(found, len(values), column)))
        if not keys:
            raise ValueError(f"All {len(values)} labels in the column {column!r} of train are missing.")
        return cls(_names(train, values, keys), keys, frozenset({None, *MISSING_CODES} - set(keys)))

    @property
    def feature(self) -> ClassLabel:
        """The type of the encoded column."""
        return ClassLabel(names=list(self.names))

    def encode(self, values: Sequence[Any], split: str) -> np.ndarray:
        """Return the class index of each label, shape `(N,)`, int64; -1 where it is missing.

        Args:
            values: As `labels_of` returns them.
            split: Name of the split, for the error.

        Raises:
            ValueError: If a label is none of the training set's.
        """
        index = {key: place for place, key in enumerate(self.keys)} | dict.fromkeys(self.missing, -1)
        unknown = Counter(value for value in values if value not in index)
        if unknown:
            raise ValueError(
                f"The split {split!r} has labels that train does not have: "
                + ", ".join(f"{_shown(label)} ({count} rows)" for label, count in unknown.most_common(5))
                + f"{', ...' if len(unknown) > 5 else ''}. Train has {', '.join(map(_shown, self.keys[:10]))}"
                f"{', ...' if len(self.keys) > 10 else ''}. Drop these rows, or add training rows with these labels."
            )
        return np.asarray([index[value] for value in values], dtype=np.int64)


def labels_of(part: Dataset, column: str) -> list[Any]:
    """Return the label of each row: an integer, a string or a bool, the name for a `ClassLabel`; None if missing.

    Raises:
        ValueError: If the column does not hold one class per row.
    """
    feature = part.features[column]
    dtype = getattr(feature, "dtype", "")
    kinds = ("int", "uint", "float", "string", "large_string", "bool")
    if not isinstance(feature, Value | ClassLabel) or not (isinstance(dtype, str) and dtype.startswith(kinds)):
        raise ValueError(f"The label column {column!r} must hold one class per row, found {feature}.")
    values = part.select_columns([column]).with_format(None)[column][:]
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    return [_label(value, column) for value in values]


def has_labels(part: Dataset, column: str) -> bool:
    """Tell whether any row of a split has a label; benchmarks hide those of a test split, as -1 or None."""
    if column not in part.features or len(part) == 0:
        return False
    return any(value is not None and value not in MISSING_CODES for value in labels_of(part, column))


def encode_labels(part: Dataset, column: str, encoding: ClassEncoding, split: str) -> Dataset:
    """Replace the label column by `label`, a `ClassLabel`, and drop rows without a label (a log line counts them).

    Args:
        part: A split.
        column: Its label column.
        encoding: The classes of the training set.
        split: Name of the split.

    Raises:
        ValueError: If a label is none of the training set's.

    >>> part = Dataset.from_dict({"text": ["a", "b", "c"], "topic": ["x", "y", None]})
    >>> encoded = encode_labels(part, "topic", ClassEncoding.of(part, "topic"), "train")
    >>> encoded["label"][:], encoded.features["label"].names
    ([0, 1], ['x', 'y'])
    """
    codes = encoding.encode(labels_of(part, column), split)
    if part.features[column] != encoding.feature or (codes < 0).any():
        part = part.rename_column(column, OLD_COLUMN).add_column("label", codes, feature=encoding.feature)
        part = part.remove_columns(OLD_COLUMN)
    elif column != "label":
        part = part.rename_column(column, "label")
    kept = np.flatnonzero(codes >= 0)
    if len(kept) < len(codes):
        logger.warning(f"Dropped {len(codes) - len(kept)} of {len(codes)} rows of {split} without a label.")
        part = part.select(kept)
    return part


def check_classes(parts: dict[str, Dataset], encoding: ClassEncoding) -> None:
    """Check that train has rows of every class that a held-out split has, and warn of classes without any.

    Args:
        parts: Splits with the encoded column `label`, by name, "train" among them.
        encoding: Their classes.

    Raises:
        ValueError: If it has not; the error names label and split.
    """
    count = {
        name: np.bincount(np.asarray(part["label"][:], dtype=int), minlength=len(encoding.names))
        for name, part in parts.items()
    }
    absent = count["train"] == 0
    for name, found in count.items():
        here = np.flatnonzero(absent & (found > 0))
        if len(here):
            labels = ", ".join(f"{_shown(encoding.names[index])} ({found[index]} rows)" for index in here[:5])
            raise ValueError(
                f"The split {name!r} has labels of which train has no row: {labels}"
                f"{', ...' if len(here) > 5 else ''}. Drop these rows, or add training rows with these labels."
            )
    if absent.any():
        names = ", ".join(_shown(encoding.names[index]) for index in np.flatnonzero(absent)[:5])
        logger.warning(
            f"No row has the label {names}{', ...' if absent.sum() > 5 else ''} ({absent.sum()} of "
            f"{len(absent)} declared classes), so the model gets outputs that nothing trains."
        )


def _missing_codes(found: Counter, size: int, column: str) -> set[int]:
    """Return the integers that mark missing labels in a column of plain integers."""
    codes = {code for code in MISSING_CODES if code in found and not isinstance(code, bool)}
    if not codes or any(isinstance(label, int) and label < 0 and label not in MISSING_CODES for label in found):
        return set()  # other negative labels stand beside them, so they are classes
    rows = sum(found[code] for code in codes)
    if MOST_MISSING * size < rows < size:
        raise ValueError(
            f"{rows} of {size} rows of train have the label {min(codes)} in the column {column!r}, which usually "
            "marks a missing label. If it is a class, number the classes from 0 or cast the column to strings; "
            "if not, drop these rows."
        )
    return codes


def _label(value: Any, column: str) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float):  # integers with missing ones among them are read as floats
        if math.isnan(value):
            return None
        if not value.is_integer():
            raise ValueError(
                f"The label column {column!r} must hold classes, found {value} (regression?). Classes are integers, "
                "strings or bools."
            )
        return int(value)
    return value


def _names(train: Dataset, values: Sequence[Any], keys: tuple[Any, ...]) -> tuple[str, ...]:
    plain = tuple(map(str, keys))
    if TEXT_OF_LABEL not in train.column_names or not all(isinstance(key, int) for key in keys):
        return plain
    beside = dict(zip(values, train.with_format(None)[TEXT_OF_LABEL][:], strict=True))
    names = tuple(str(beside[key]) for key in keys)
    return names if len(set(names)) == len(names) else plain


def _shown(label: Any) -> str:
    return repr(label) if isinstance(label, str) else str(label)
