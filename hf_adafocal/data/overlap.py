"""Detection and removal of rows that the training, calibration and test sets share by content."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Subset
from transformers.utils import logging

from hf_adafocal.data.fingerprint import Fingerprint, fingerprint, input_columns

logger = logging.get_logger(__name__)

POLICIES = ("drop", "error", "warn", "skip")


class SplitCheck(NamedTuple):
    """Fingerprints of data sets and the numbers of rows they share.

    Attributes:
        fingerprints: Of each set; None for a set that could not be read.
        overlap: For each pair of sets, under a name like "test in train", how many rows of the one stand in the other
            (after rows were dropped).
        dropped: Number of training rows that `drop_overlap` dropped.
    """

    fingerprints: dict[str, Fingerprint | None]
    overlap: dict[str, int]
    dropped: int = 0


def check_splits(
    sets: Mapping[str, Any],
    policy: str = "error",
    *,
    columns: Collection[str] | None = None,
    blank_tokens: Collection[int] = (),
) -> SplitCheck:
    """Compare data sets pairwise by the content of their rows, and raise or warn if they share some.

    The model inputs that all sets have are compared. A set that cannot be read (see `fingerprint`) gives one warning
    and is compared with nothing.

    Args:
        sets: Data sets by name, in the order train, calibration, test.
        policy: What to do if sets share rows: "error", "warn", or "skip" (no row is read).
        columns: Names of columns that may be compared; all if left out.
        blank_tokens: As in `fingerprint`.

    Raises:
        ValueError: If sets share rows and the policy is "error" (it says how many and which), or the policy is
            unknown.

    >>> rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    >>> check_splits({"train": rows, "test": [{"text": "c", "label": 1}]}).overlap
    {'test in train': 0}
    """
    _check_policy(policy, POLICIES[1:])
    if policy == "skip":
        return SplitCheck(dict.fromkeys(sets), {})
    compared = input_columns(*sets.values(), columns=columns)
    prints = _fingerprints(sets, compared, blank_tokens)
    names = list(sets)
    pairs = [(later, earlier) for place, later in enumerate(names) for earlier in names[:place]]
    return SplitCheck(prints, _compare(prints, pairs, policy, compared))


def drop_overlap(
    train: Any,
    held_out: Mapping[str, Any],
    policy: str = "drop",
    *,
    columns: Collection[str] | None = None,
    blank_tokens: Collection[int] = (),
) -> tuple[Any, SplitCheck]:
    """Drop the training rows whose inputs also occur in a held-out set, and log one line that counts them.

    Rows that the sets named "calibration" and "test" share are an error, since neither can give way. Other held-out
    sets are not compared with each other.

    Args:
        train: The training set. One that cannot be read gives one warning and stays as it is.
        held_out: Held-out sets by name.
        policy: "drop"; or "error" or "warn" if sets share rows; or "skip": no row is read.
        columns: Names of columns that may be compared; all if left out.
        blank_tokens: As in `fingerprint`; blank rows stay.

    Returns:
        The training set (a `datasets.Dataset` for one, else a `Subset`, or `train` itself if no row was dropped), and
        the fingerprints and counts of shared rows.

    Raises:
        ValueError: If "calibration" and "test" share rows (with "drop" and "error"), any held-out set shares rows
            with the training set (with "error"), no training row would be left, or the policy is unknown.

    >>> train = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    >>> kept, check = drop_overlap(train, {"calibration": [{"text": "b", "label": 0}]})
    >>> list(kept), check.dropped
    ([{'text': 'a', 'label': 0}], 1)
    """
    _check_policy(policy, POLICIES)
    sets = {"train": train, **held_out}
    if policy == "skip":
        return train, SplitCheck(dict.fromkeys(sets), {})
    compared = input_columns(*sets.values(), columns=columns)
    prints = _fingerprints(sets, compared, blank_tokens)
    dropped = 0
    if policy == "drop" and prints["train"] is not None:
        theirs = {name: found for name, found in prints.items() if name != "train" and found is not None}
        shared = prints["train"].shared_with(*theirs.values())
        dropped = int(shared.sum())
        if dropped:
            prints["train"] = prints["train"].select(~shared)
            train = _select(train, ~shared)
            logger.warning(
                f"Dropped {dropped} of {len(shared)} training rows whose inputs stand in a held-out set "
                f"({', '.join(theirs)}) too."
            )
    pairs = [(name, "train") for name in held_out]
    if {"calibration", "test"} <= set(held_out):
        pairs.append(("test", "calibration"))
    overlap = _compare(prints, pairs, "error" if policy == "drop" else policy, compared)
    return train, SplitCheck(prints, overlap, dropped)


def without_overlap(
    dataset: Any, *others: Any, columns: Collection[str] | None = None, blank_tokens: Collection[int] = ()
) -> Any:
    """Return the rows of `dataset` whose inputs occur in none of `others`; `dataset` itself if that is all of them.

    The same columns are compared as in `check_splits`: the model inputs that all sets have.

    Args:
        dataset: As in `fingerprint`.
        *others: Sets that must not share rows with it.
        columns: Names of columns that may be compared; all if left out.
        blank_tokens: As in `fingerprint`; blank rows stay.

    Returns:
        A `datasets.Dataset` for one, a `Subset` for anything else.

    Raises:
        ValueError: If no row would be left.
        TypeError: As in `fingerprint`.

    >>> rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    >>> list(without_overlap(rows, [{"text": "b", "label": 0}]))
    [{'text': 'a', 'label': 0}]
    """
    compared = input_columns(dataset, *others, columns=columns)
    own, *theirs = (fingerprint(part, columns=compared, blank_tokens=blank_tokens) for part in (dataset, *others))
    return _select(dataset, ~own.shared_with(*theirs))


def _check_policy(policy: str, policies: Collection[str]) -> None:
    if policy not in policies:
        raise ValueError(f"The policy for shared rows must be one of {', '.join(policies)}; found {policy!r}.")


def _fingerprints(
    sets: Mapping[str, Any], columns: Collection[str] | None, blank_tokens: Collection[int]
) -> dict[str, Fingerprint | None]:
    """Return the fingerprint of each set; None, with a warning, for one that cannot be read."""
    prints: dict[str, Fingerprint | None] = dict.fromkeys(sets)
    for name, dataset in sets.items():
        try:
            prints[name] = fingerprint(dataset, columns=columns, blank_tokens=blank_tokens)
        except TypeError as error:
            logger.warning(
                f"Whether the sets {', '.join(sets)} share rows cannot be checked for {name}: {error}. Keep them "
                "apart yourself; split_overlap='skip' silences this."
            )
    return prints


def _compare(
    prints: Mapping[str, Fingerprint | None],
    pairs: Iterable[tuple[str, str]],
    policy: str,
    columns: Collection[str] | None,
) -> dict[str, int]:
    """Count the rows that pairs of sets share, and raise or warn if there are some."""
    overlap, messages = {}, []
    advised = ""
    for name, other in pairs:
        later, earlier = prints[name], prints[other]
        if later is None or earlier is None:
            continue
        shared = np.flatnonzero(later.shared_with(earlier))
        overlap[f"{name} in {other}"] = len(shared)
        if len(shared):
            advised = advised or f"{other}, {name}"
            messages.append(
                f"{len(shared)} of {later.size} {name} rows have the same inputs as a {other} row "
                f"(rows {', '.join(map(str, shared[:5]))}{', ...' if len(shared) > 5 else ''} of {name})"
            )
    found = "; ".join(messages)
    if messages and policy == "error":
        raise ValueError(
            f"Sets that must be apart share rows: {found}. What was trained on looks better calibrated than it is. "
            "Drop the rows: split_overlap='drop' does so for training rows, and "
            f"`hf_adafocal.data.without_overlap({advised}, columns={list(columns or [])})` for any set; or "
            "allow them with split_overlap='warn'."
        )
    if messages:
        logger.warning(f"Sets that should be apart share rows, which split_overlap='warn' allows: {found}.")
    return overlap


def _select(dataset: Any, chosen: np.ndarray) -> Any:
    """Return the rows under a mask of shape `(N,)`, or the data set itself if that is all of them."""
    if chosen.all():
        return dataset
    if not chosen.any():
        raise ValueError(
            f"All {len(chosen)} rows stand in the held-out sets too, so dropping them leaves none. Is it the same "
            "data, or does the input column hold one value?"
        )
    rows = np.flatnonzero(chosen)
    return dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows.tolist())
