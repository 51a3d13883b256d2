"""Names of columns: which column of a data set holds the labels, and which ones the inputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import ClassLabel, Features, Image, Value

from hf_adafocal.preserved_state import random_state_kept

LABEL_COLUMNS = ("labels", "label", "label_ids")  # what the data collators of transformers take for labels
TEXT_COLUMNS = ("text", "sentence", "content")
PAIRS_OF_TEXTS = (  # of the usual data sets of sentence pairs
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
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


class InputColumns(NamedTuple):
    """The columns of a data set's inputs, and the names they get: "image", or "text" and "text_pair".

    Attributes:
        kind: "image" or "text".
        names: New name by column.
    """

    kind: str
    names: dict[str, str]


def find_label_column(features: Features) -> str:
    """Find the label column by its name, or else the only column of type `ClassLabel`.

    Raises:
        ValueError: If there is none, or several.

    >>> find_label_column(Features({"text": Value("string"), "label": Value("int64")}))
    'label'
    """
    named = [name for name in LABEL_COLUMNS if name in features]
    typed = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    for found in (named, typed):
        if len(found) == 1:
            return found[0]
    raise ValueError(f"Cannot tell the label among the columns {sorted(features)}; pass label_column.")


def find_input_columns(features: Features, input_column: str | None, exclude: str) -> InputColumns:
    """Find the column of images or texts by type and name, or the two columns of sentence pairs.

    Args:
        features: Types of the columns.
        input_column: The column, or two text columns separated by a comma; None to find them.
        exclude: The label column.

    Raises:
        ValueError: If a column is missing or of another type, or the input cannot be told.

    >>> columns = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": Value("int64")})
    >>> find_input_columns(columns, None, "label").names
    {'premise': 'text', 'hypothesis': 'text_pair'}
    """
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    texts = [
        name
        for name, feature in features.items()
        if isinstance(feature, Value) and "string" in feature.dtype and name not in (exclude, "label_text")
    ]
    if input_column is not None:
        return _named_inputs(features, input_column, images, texts)
    if len(images) == 1:
        return InputColumns("image", {images[0]: "image"})
    pairs = [pair for pair in PAIRS_OF_TEXTS if set(pair) <= set(texts)]
    known = [name for name in TEXT_COLUMNS if name in texts] or texts
    if not images and len(pairs) == 1 and set(known) <= set(pairs[0]):
        return InputColumns("text", dict(zip(pairs[0], ("text", "text_pair"), strict=True)))
    if not images and len(known) == 1:
        return InputColumns("text", {known[0]: "text"})
    raise ValueError(
        f"Cannot tell the input among the columns {sorted(features)}; pass input_column: the column of images or "
        "texts, or two columns of texts separated by a comma."
    )


def _named_inputs(features: Features, input_column: str, images: list[str], texts: list[str]) -> InputColumns:
    chosen = [input_column] if input_column in features else [name.strip() for name in input_column.split(",")]
    for name in chosen:
        if name not in features:
            raise ValueError(f"There is no column {name!r}; the data set has {sorted(features)}.")
    if len(chosen) == 1 and chosen[0] in images:
        return InputColumns("image", {chosen[0]: "image"})
    if len(chosen) > 2 or len(set(chosen)) < len(chosen) or not set(chosen) <= set(texts):
        found = ", ".join(f"{name} ({features[name]})" for name in chosen)
        raise ValueError(f"input_column must name a column of images or texts, or two of texts; found {found}.")
    return InputColumns("text", dict(zip(chosen, ("text", "text_pair"), strict=False)))
