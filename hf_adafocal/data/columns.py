"""Names of label columns and of the columns that a data set has."""

from collections.abc import Mapping
from typing import Any

from hf_adafocal.preserved_state import random_state_kept

LABEL_COLUMNS = ("labels", "label", "label_ids")  # what the data collators of transformers take for labels
LABEL_PREFIX = "label"  # columns named so describe the label (label, labels, label_ids, label_text)


def column_names(dataset: Any) -> list[str]:
    """Return the column names of a data set; those of its first row if it is not a `datasets` object.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`, or anything with a length and an index whose rows are
            dicts. The random state is left as it was.

    Returns:
        The names; empty for an empty set, a stream of unknown columns, or rows that are not dicts.

    >>> column_names([{"input_ids": [1, 2], "label": 0}])
    ['input_ids', 'label']
    """
    if isinstance(dataset, Mapping):  # several sets by name
        return []
    if hasattr(dataset, "column_names"):
        return list(dataset.column_names or ())
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or len(dataset) == 0:
        return []
    with random_state_kept():
        row = dataset[0]
    return list(row) if isinstance(row, Mapping) else []


def label_column(dataset: Any) -> str | None:
    """Return the name of the column that holds the labels: "labels", "label" or "label_ids"; None without one.

    Args:
        dataset: As in `column_names`.

    >>> label_column([{"input_ids": [1, 2], "label_ids": 0}])
    'label_ids'
    """
    names = column_names(dataset)
    return next((name for name in LABEL_COLUMNS if name in names), None)
