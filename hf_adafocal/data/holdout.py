"""Random train/held-out splits of one data set, stratified by label."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Subset

from hf_adafocal.data.columns import label_column
from hf_adafocal.preserved_state import random_state_kept


def hold_out(dataset: Any, fraction: float | int, seed: int) -> tuple[Any, Any]:
    """Split a data set at random into a rest and a held-out part, stratified by label if each row has one label.

    Each class is held out in proportion to its size, and keeps at least one row in the rest. Rows with several labels
    (per token or pixel), labels that are floats, and rows without a label column are split at random.

    Args:
        dataset: A `datasets.Dataset`, whose stored columns are read, or anything with a length and an index, as a
            list of dicts or a `torch.utils.data.Dataset`, whose rows are read once. It is not changed.
        fraction: Share of the rows to hold out, in (0, 1), or their number.
        seed: The same seed gives the same split, whatever the global random state.

    Returns:
        `(rest, held_out)`, both in the order of the data: `datasets.Dataset`s for one, `Subset`s for anything else.

    Raises:
        ValueError: If the set is a stream, one of the two parts would be empty, or a class would be missing in the
            rest.

    >>> rows = [{"text": str(index), "label": index % 4} for index in range(40)]
    >>> rest, held_out = hold_out(rows, 0.2, seed=0)
    >>> len(rest), sorted(row["label"] for row in held_out)
    (32, [0, 0, 1, 1, 2, 2, 3, 3])
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"Holding out a part of a data set needs a length and an index, found a {type(dataset).__name__}. Pass "
            "the held-out set yourself (`calibration_dataset`)."
        )
    size = len(dataset)
    held = math.ceil(round(size * fraction, 6)) if isinstance(fraction, float) else fraction
    if not 0 < held < size:
        raise ValueError(
            f"Cannot hold out {fraction} of {size} rows: one of the two parts would be empty. Change the fraction, or "
            "pass the held-out set yourself."
        )
    labels = row_labels(dataset)
    held_out = _stratified([0] * size if labels is None else labels, held, np.random.default_rng(seed))
    rest = np.setdiff1d(np.arange(size), held_out)
    return _select(dataset, rest), _select(dataset, held_out)


def row_labels(dataset: Any) -> list[Hashable] | None:
    """Return the label of each row; None if there is no label column, or if a row has several labels.

    Args:
        dataset: As in `hold_out`.
    """
    name = label_column(dataset)
    if name is None:
        return None
    if isinstance(dataset, datasets.Dataset):
        values = dataset.select_columns([name]).with_format(None)[name][:]
    else:
        with random_state_kept():
            values = [dataset[index][name] for index in range(len(dataset))]
    # Of a tensor or a NumPy number the Python number.
    values = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    binary = {0.0, 1.0}  # as floats, of models with a single output
    classes = (
        value is None or isinstance(value, str | int) or (isinstance(value, float) and value in binary)
        for value in values
    )
    return values if all(classes) else None


def _stratified(labels: Sequence[Hashable], held: int, generator: np.random.Generator) -> np.ndarray:
    """Return the sorted indices of `held` rows, by systematic sampling of the rows sorted by class."""
    codes: dict[Hashable, int] = {}
    classes = np.asarray([codes.setdefault(label, len(codes)) for label in labels])
    order = generator.permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]  # by class, in random order within a class
    sizes = np.bincount(classes)
    kept = _classes_with_a_kept_row(sizes, held)
    order = np.delete(order, (np.cumsum(sizes) - sizes)[kept])
    places = (np.arange(held) + generator.random()) * (len(order) / held)
    return np.sort(order[places.astype(int)])


def _classes_with_a_kept_row(sizes: np.ndarray, held: int) -> np.ndarray:
    """Return which classes need one row excluded from the sampling so that not all of their rows are held out."""
    kept = np.zeros(len(sizes), bool)
    while True:
        candidates = sizes.sum() - kept.sum()
        if held > candidates:
            raise ValueError(
                f"Cannot hold out {held} of {sizes.sum()} rows and keep a row of each of the {len(sizes)} classes. "
                "Change the fraction, or pass the held-out set yourself."
            )
        endangered = ~kept & (sizes * (1 - held / candidates) < 1)  # rounded up, the share is the whole class
        if not endangered.any():
            return kept
        kept |= endangered


def _select(dataset: Any, indices: np.ndarray) -> Any:
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices.tolist())
