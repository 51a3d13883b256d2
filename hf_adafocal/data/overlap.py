"""Whether sets that must be apart share rows: each row's inputs become a digest, and digests are compared."""

import hashlib
import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Subset
from transformers.utils import logging

logger = logging.get_logger(__name__)

POLICIES = ("error", "warn", "skip")
LABEL_PREFIX = "label"  # label, labels, label_ids, label_text: one text under two labels is still one text
DERIVED = {"attention_mask", "token_type_ids", "special_tokens_mask", "position_ids"}  # say nothing of their own
BATCH = 256  # rows held in memory at a time


class Fingerprint(NamedTuple):
    """What a data set holds, 9 bytes a row.

    Attributes:
        digests: 64 bits of BLAKE2b of each row's inputs, shape `(N,)`. Two sets of a million different rows have a
            digest in common with a probability of 5e-8.
        blank: Whether a row's inputs are empty, shape `(N,)`: a text of white space, tokens that are all special.
    """

    digests: np.ndarray
    blank: np.ndarray

    @property
    def size(self) -> int:
        """Rows."""
        return len(self.digests)

    @property
    def hash(self) -> str:
        """128 bits as 32 hexadecimal digits: of the rows' inputs in any order, with repetitions, without labels."""
        return hashlib.blake2b(np.sort(self.digests).astype("<u8").tobytes(), digest_size=16).hexdigest()

    def shared_with(self, *others: "Fingerprint") -> np.ndarray:
        """Whether each row's inputs stand in one of `others` too, shape `(N,)`; blank rows are nobody's copy."""
        theirs = np.concatenate([np.empty(0, np.uint64), *(other.digests for other in others)])
        return np.isin(self.digests, theirs) & ~self.blank


def fingerprint(
    dataset: Any, *, columns: Collection[str] | None = None, blank_tokens: Collection[int] = ()
) -> Fingerprint:
    """Digest each row's inputs: texts, tokens, images (as their file's bytes), numbers, and lists of them.

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
    """
    dataset = _unwrapped(dataset)
    if isinstance(dataset, datasets.Dataset):
        rows = _stored_rows(dataset, columns)
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        rows = _rows_as_given(dataset, columns)
    else:
        raise TypeError(f"a {type(dataset).__name__} is streamed")
    digests, blank = np.empty(len(dataset), np.uint64), np.empty(len(dataset), bool)
    blank_tokens = frozenset(blank_tokens)
    with _random_state_kept():
        for index, row in enumerate(rows):
            digests[index] = _digest(row)
            blank[index] = all(_is_blank(name, value, blank_tokens) for name, value in row)
    return Fingerprint(digests, blank)


class SplitCheck(NamedTuple):
    """What `check_splits` found.

    Attributes:
        fingerprints: Of each set; None for a set that could not be read.
        overlap: For each pair of sets, under a name like "test in train", the rows of the one that stand in the other.
    """

    fingerprints: dict[str, Fingerprint | None]
    overlap: dict[str, int]


def check_splits(
    sets: Mapping[str, Any],
    policy: str = "error",
    *,
    columns: Collection[str] | None = None,
    blank_tokens: Collection[int] = (),
) -> SplitCheck:
    """Find out whether sets share rows by content.

    A set that cannot be read (see `fingerprint`) gives one warning and is compared with nothing.

    Args:
        sets: Data sets by name, in the order train, calibration, test.
        policy: What shared rows are: an "error", a "warn"ing, or "skip": nothing is read.
        columns: As in `fingerprint`.
        blank_tokens: As in `fingerprint`.

    Raises:
        ValueError: If sets share rows and the policy is "error"; it says how many and which.
    """
    if policy == "skip":
        return SplitCheck(dict.fromkeys(sets), {})
    prints: dict[str, Fingerprint | None] = dict.fromkeys(sets)
    for name, dataset in sets.items():
        try:
            prints[name] = fingerprint(dataset, columns=columns, blank_tokens=blank_tokens)
        except TypeError as error:
            logger.warning(
                f"Whether the sets {', '.join(sets)} share rows cannot be checked for {name}: {error}. Keep them "
                "apart yourself; split_overlap='skip' silences this."
            )
    overlap, messages = {}, []
    readable = [(name, found) for name, found in prints.items() if found is not None]
    for place, (name, later) in enumerate(readable):
        for other, earlier in readable[:place]:
            shared = np.flatnonzero(later.shared_with(earlier))
            overlap[f"{name} in {other}"] = len(shared)
            if len(shared):
                messages.append(
                    f"{len(shared)} of {later.size} {name} rows have the same inputs as a {other} row "
                    f"(rows {', '.join(map(str, shared[:5]))}{', ...' if len(shared) > 5 else ''} of {name})"
                )
    if messages:
        _report(messages, policy)
    return SplitCheck(prints, overlap)


def without_overlap(
    dataset: Any, *others: Any, columns: Collection[str] | None = None, blank_tokens: Collection[int] = ()
) -> Any:
    """The rows of `dataset` whose inputs stand in none of `others`; `dataset` itself if that is all of them.

    Args:
        dataset: As in `fingerprint`.
        *others: Sets to keep apart from it.
        columns: As in `fingerprint`.
        blank_tokens: As in `fingerprint`; blank rows are kept.

    Returns:
        A `datasets.Dataset` for one, a `Subset` for anything else.

    Raises:
        ValueError: If no row would be left.
        TypeError: As in `fingerprint`.
    """
    own, *theirs = (fingerprint(part, columns=columns, blank_tokens=blank_tokens) for part in (dataset, *others))
    kept = np.flatnonzero(~own.shared_with(*theirs)).tolist()
    if len(kept) == own.size:
        return dataset
    if not kept:
        raise ValueError(
            f"All {own.size} rows stand in the held-out sets too, so dropping them leaves none. Is it the same data, "
            "or does the input column hold one value?"
        )
    return dataset.select(kept) if hasattr(dataset, "select") else Subset(dataset, kept)


def _report(messages: list[str], policy: str) -> None:
    found = "; ".join(messages)
    if policy == "error":
        raise ValueError(
            f"Sets that must be apart share rows: {found}. What was trained on looks better calibrated than it is. "
            "Drop the rows with `hf_adafocal.data.overlap.without_overlap(train, calibration)`, or allow them with "
            "AdaFocalTrainingArguments(split_overlap='warn')."
        )
    logger.warning(f"Sets that should be apart share rows, which split_overlap='warn' allows: {found}.")


def _unwrapped(dataset: Any) -> Any:
    """The selected rows of a `datasets.Dataset` under a `Subset`, so that its stored columns can be read."""
    if isinstance(dataset, Subset):
        inner = _unwrapped(dataset.dataset)
        if isinstance(inner, datasets.Dataset):
            return inner.select(list(dataset.indices))
    return dataset


def _counted(names: Collection[str], columns: Collection[str] | None) -> list[str]:
    counted = [name for name in names if not name.startswith(LABEL_PREFIX) and name not in DERIVED]
    counted = sorted(name for name in counted if columns is None or name in columns)
    if not counted:
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


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)


def _values(column: pa.Array) -> list:
    """One value a row: arrays without a copy where the column is numbers or equal shapes of them."""
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
    """Add a value so that equal contents give equal bytes, and lengths keep neighbours apart."""
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
    """Numbers as int64 or float64, an image as its pixels; None for anything else."""
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
    return name == "input_ids" and all(token in blank_tokens for token in np.ravel(value))
