"""Digests of rows: each row's model inputs are hashed, so that data sets can be compared by content."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Subset

from hf_adafocal.data.columns import LABEL_PREFIX, column_names
from hf_adafocal.preserved_state import random_state_kept

DERIVED = {"attention_mask", "token_type_ids", "special_tokens_mask", "position_ids"}  # follow from the tokens
BATCH = 256  # rows held in memory at a time


class Fingerprint(NamedTuple):
    """Digests of the rows of a data set, 9 bytes per row.

    Attributes:
        digests: 64 bits of BLAKE2b of each row's inputs, shape `(N,)`. Two sets of a million different rows have a
            digest in common with a probability of 5e-8.
        blank: Whether a row's inputs are empty, shape `(N,)`: a text of white space, tokens that are all special.
    """

    digests: np.ndarray
    blank: np.ndarray

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.digests)

    @property
    def hash(self) -> str:
        """Hash of all rows as 32 hexadecimal digits (128 bits): repetitions count, the order and labels do not."""
        return hashlib.blake2b(np.sort(self.digests).astype("<u8").tobytes(), digest_size=16).hexdigest()

    def select(self, chosen: np.ndarray) -> "Fingerprint":
        """Return the fingerprint of the rows under a mask of shape `(N,)`."""
        return Fingerprint(self.digests[chosen], self.blank[chosen])

    def shared_with(self, *others: "Fingerprint") -> np.ndarray:
        """Return for each row whether one of `others` has a row with the same inputs, shape `(N,)`; blank rows: no."""
        # The kind that NumPy chooses by itself raises OverflowError in 2.0 for small sets of uint64.
        theirs = np.concatenate([np.empty(0, np.uint64), *(other.digests for other in others)])
        return np.isin(self.digests, theirs, kind="sort") & ~self.blank


def fingerprint(
    dataset: Any, *, columns: Collection[str] | None = None, blank_tokens: Collection[int] = ()
) -> Fingerprint:
    """Hash each row's inputs: texts, tokens, images (as their file's bytes), numbers, and lists of them.

    Columns whose name starts with "label" do not count, nor do masks and positions that follow from the tokens.
    Integers are one whatever their width or container, and so are floats; the shape of an array counts.

    Args:
        dataset: A `datasets.Dataset`, read as it is stored, whatever its format or transform; or anything with a
            length and an index whose rows are dicts, a `Subset` too, read as it gives its rows, once. A random
            transform inside the latter hides what its rows share. The random state is left as it was.
        columns: Names that count; all if left out. A row's number among them would make every row unique.
        blank_tokens: Ids that carry no content, as a tokenizer's `all_special_ids`.

    Raises:
        TypeError: If the set is streamed, a row is not a dict, or a value is of no kind named above.

    >>> one = fingerprint([{"input_ids": [1, 2], "labels": 0}])
    >>> other = fingerprint([{"input_ids": [3, 4], "labels": 0}, {"input_ids": [1, 2], "labels": 1}])
    >>> other.shared_with(one)
    array([False,  True])
    """
    dataset = _unwrapped(dataset)
    if _is_empty(dataset):
        return Fingerprint(np.empty(0, np.uint64), np.empty(0, bool))
    if isinstance(dataset, datasets.Dataset):
        rows = _stored_rows(dataset, columns)
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        rows = _rows_as_given(dataset, columns)
    else:
        raise TypeError(f"a {type(dataset).__name__} is streamed")
    digests, blank = np.empty(len(dataset), np.uint64), np.empty(len(dataset), bool)
    blank_tokens = frozenset(blank_tokens)
    with random_state_kept():
        for index, row in enumerate(rows):
            digests[index] = _digest(row)
            blank[index] = all(_is_blank(name, value, blank_tokens) for name, value in row)
    return Fingerprint(digests, blank)


def _is_empty(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and len(dataset) == 0


def _unwrapped(dataset: Any) -> Any:
    """Return the selected rows of a `datasets.Dataset` under a `Subset`, so that its stored columns can be read."""
    if isinstance(dataset, Subset):
        inner = _unwrapped(dataset.dataset)
        if isinstance(inner, datasets.Dataset):
            return inner.select(list(dataset.indices))
    return dataset


def input_columns(*sets: Any, columns: Collection[str] | None = None) -> list[str] | None:
    """Return the columns of model inputs that all sets have, for comparing their rows.

    Args:
        *sets: Data sets; those whose columns are unknown (streams, empty sets) are left out.
        columns: Names that may count; all if left out.

    Returns:
        Sorted names without labels and masks; None if the columns of no set are known.

    >>> input_columns([{"text": "a", "input_ids": [1], "label": 0}], [{"input_ids": [2], "labels": 1}])
    ['input_ids']
    """
    known = [set(names) for part in sets if not _is_empty(part) and (names := column_names(part))]
    return _counted(set.intersection(*known), columns, strict=False) if known else None


def _counted(names: Collection[str], columns: Collection[str] | None, strict: bool = True) -> list[str]:
    counted = [name for name in names if not name.startswith(LABEL_PREFIX) and name not in DERIVED]
    counted = sorted(name for name in counted if columns is None or name in columns)
    if not counted and strict:
        raise TypeError(f"no model input is among {sorted(names)}")
    return counted


Row = list[tuple[str, Any]]


def _stored_rows(dataset: datasets.Dataset, columns: Collection[str] | None) -> Iterator[Row]:
    names = _counted(dataset.column_names, columns)
    for table in dataset.select_columns(names).with_format("arrow").iter(BATCH):
        values = [_values(table.column(name).combine_chunks()) for name in names]
        yield from ([*zip(names, row, strict=True)] for row in zip(*values, strict=True))


def _rows_as_given(dataset: Any, columns: Collection[str] | None) -> Iterator[Row]:
    for index in range(len(dataset)):
        row = dataset[index]
        if not isinstance(row, Mapping):
            raise TypeError(f"a row is a {type(row).__name__}, not a dict")
        yield [(name, row[name]) for name in _counted(row, columns)]


def _values(column: pa.Array) -> list:
    """Return one value per row: arrays without a copy where the column is numbers or equal shapes of them."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        return [_file(value) for value in column.to_pylist()]
    arrays = _arrays(column)
    return column.to_pylist() if arrays is None else arrays


def _arrays(column: pa.Array) -> list[np.ndarray] | None:
    lengths, flat = [], column
    while pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        if flat.null_count:
            return None
        lengths.append(pc.list_value_length(flat).to_numpy(zero_copy_only=False))
        flat = flat.flatten()
    numbers = pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)
    if not lengths or not numbers or flat.null_count:
        return None
    values = flat.to_numpy(zero_copy_only=False)
    if len(lengths) == 1:
        return np.split(values, np.cumsum(lengths[0])[:-1])
    if any(np.ptp(level) for level in lengths if len(level)) or not all(map(len, lengths)):
        return None
    return list(values.reshape(len(column), *(int(level[0]) for level in lengths)))


def _file(value: dict | None) -> bytes | None:
    if value is None or value["bytes"] is not None:
        return None if value is None else value["bytes"]
    with fsspec.open(value["path"], "rb") as file:
        return file.read()


def _digest(row: Row) -> int:
    hasher = hashlib.blake2b(digest_size=8)
    for name, value in row:
        _add(hasher, name)
        _add(hasher, value)
    return int.from_bytes(hasher.digest(), "little")


def _add(hasher: Any, value: Any) -> None:
    """Feed a value to the hash, with its type and length, so that only equal contents give equal bytes."""
    if isinstance(value, str | bytes):
        content = value.encode(errors="surrogatepass") if isinstance(value, str) else value
        hasher.update(b"%s%d:" % (type(value).__name__.encode(), len(content)))
        hasher.update(content)
    elif isinstance(value, Mapping):
        hasher.update(b"dict%d:" % len(value))
        for name in sorted(value):
            _add(hasher, name)
            _add(hasher, value[name])
    elif value is None:
        hasher.update(b"none:")
    elif (array := _numbers(value)) is not None:
        hasher.update(f"{array.dtype.kind}{array.shape}:".encode())
        hasher.update(np.ascontiguousarray(array))
    elif isinstance(value, list | tuple | np.ndarray):
        hasher.update(b"list%d:" % len(value))
        for item in value:
            _add(hasher, item)
    else:
        raise TypeError(f"a row holds a {type(value).__name__}")


def _numbers(value: Any) -> np.ndarray | None:
    """Return numbers as int64 or float64, an image as its pixels; None for anything else."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        return None
    wide = {"b": "<i8", "i": "<i8", "u": "<i8", "f": "<f8"}.get(array.dtype.kind)
    return None if wide is None else array.astype(wide, copy=False)


def _is_blank(name: str, value: Any, blank_tokens: frozenset[int]) -> bool:
    if value is None or isinstance(value, str):
        return not (value or "").strip()
    return name == "input_ids" and all(token in blank_tokens for token in _tokens(value))


def _tokens(value: Any) -> Iterator[int]:
    """Yield the token ids of a row, whose lists may be nested and of unequal lengths (multiple choice)."""
    if isinstance(value, list | tuple) and any(
        isinstance(item, list | tuple | np.ndarray | torch.Tensor) for item in value
    ):
        for item in value:
            yield from _tokens(item)
    elif value is not None:
        yield from np.ravel(value).tolist()
