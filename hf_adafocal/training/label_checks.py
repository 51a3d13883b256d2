"""Check that labels are classes of the model: in whole data sets before training, and in each batch."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import StackDataset, Subset
from transformers.utils import logging

from hf_adafocal.data.columns import label_column
from hf_adafocal.training.model_conventions import base_model, has_single_output

logger = logging.get_logger(__name__)

ROWS_AT_ONCE = 10_000
SHOWN = 5  # labels in a message


def num_classes_of(model: Any) -> int | None:
    """Return the number of classes of a model, by its config: 2 for a single output; None if it does not say."""
    model = base_model(model)
    if has_single_output(model):
        return 2
    name = type(model).__name__
    known = "Classification" in name or "SemanticSegmentation" in name  # num_labels of other models means nothing
    return getattr(getattr(model, "config", None), "num_labels", None) if known else None


def check_labels(parts: Mapping[str, Any], model: Any, ignore_index: int = -100) -> None:
    """Check the labels of data sets against the classes of a model, and those of held-out sets against train's.

    Args:
        parts: Data sets by name, "training" among them. Looked at are `datasets.Dataset`s without a transform, lists
            of rows, and `StackDataset`s; of others `LabelCheck` sees the batches.
        model: Its config tells the number of classes.
        ignore_index: Label that does not count.

    Raises:
        ValueError: If a label is none of the classes, or labels are numbered from 1; the error names label and set.
    """
    num_classes = num_classes_of(model)
    found: dict[str, Counter] = {}
    kinds = "iuf" if has_single_output(model) else "iu"
    for name, part in parts.items():
        labels = list(_labels(part, kinds))
        if labels:
            found[name] = Counter()
            for values in labels:
                check_values(
                    values.ravel(), num_classes, ignore_index, f"{name} set", "rows" if values.ndim == 1 else ""
                )
                if values.ndim == 1:
                    found[name].update(values[values != ignore_index].tolist())
    train = set(found.get("training", ()))
    if not train:
        return
    names = getattr(getattr(base_model(model), "config", None), "id2label", None) or {}
    seen = set().union(*found.values())
    unnamed = names.get(0, "LABEL_0") == "LABEL_0"
    if num_classes is not None and num_classes > 2 and unnamed and seen == set(range(1, num_classes)):
        raise ValueError(
            f"The labels of the training set run from 1 to {num_classes - 1}, and the {num_classes} classes of the "
            "model are numbered from 0: nothing would train its class 0. Number the labels from 0 and build the "
            f"model with num_labels={num_classes - 1}; if there is a class 0, name it in the config's id2label."
        )
    for name, counts in found.items():
        missing = {label: count for label, count in counts.items() if label not in train}
        if missing:
            logger.warning(
                f"The {name} set has labels of which the training set has no row: {_shown(Counter(missing), 'rows')}. "
                "The model cannot learn them."
            )


class LabelCheck:
    """Check the labels of batches: all of them on the CPU, elsewhere the first of training and of evaluation.

    Reading values on another device waits for it, so there later ones are left to the device's own assert.

    Args:
        model: Its config tells the number of classes; without one, only negative labels are wrong.
        ignore_index: Label that does not count.
    """

    def __init__(self, model: Any, ignore_index: int = -100) -> None:
        self.num_classes, self.ignore_index = num_classes_of(model), ignore_index
        self._floats = has_single_output(model)
        self._seen: set[bool] = set()  # training or evaluation

    def __call__(self, labels: Any, training: bool) -> None:
        """Check the labels of a batch: integers, or floats of a single output; others are left to `check_batch`.

        Args:
            labels: Of any shape.
            training: Whether the batch is one to train on.

        Raises:
            ValueError: If a label is no class and not ignored.
        """
        if not isinstance(labels, torch.Tensor) or (labels.is_floating_point() and not self._floats):
            return
        if labels.device.type == "cpu" or training not in self._seen:
            self._seen.add(training)
            values = labels.detach().flatten().cpu()
            values = values.double() if values.is_floating_point() else values
            check_values(values.numpy(), self.num_classes, self.ignore_index, "batch", "")


def check_values(labels: np.ndarray, num_classes: int | None, ignore_index: int, where: str, unit: str = "") -> None:
    """Check that labels are classes.

    Args:
        labels: Of any shape; floats must be whole.
        num_classes: Of the model; None if unknown.
        ignore_index: Label that does not count.
        where: What holds them, for the error.
        unit: What each stands for, for the error.

    Raises:
        ValueError: If one is none.
    """
    wrong = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if labels.dtype.kind == "f":
        wrong |= labels != np.floor(labels)
    if not wrong.any():
        return
    bad = labels[wrong]
    bad = bad[bad != ignore_index]
    if not len(bad):
        return
    classes = "numbered from 0" if num_classes is None else f"0 to {num_classes - 1}"
    raise ValueError(
        f"The {where} has labels that are no classes of the model ({classes}): "
        f"{_shown(Counter(bad.tolist()), unit)}. {_advice(labels, bad, num_classes, ignore_index)}"
    )


def _advice(labels: np.ndarray, bad: np.ndarray, num_classes: int | None, ignore_index: int) -> str:
    if ignore_index != -100 and set(bad.tolist()) <= {-100, 255}:
        return (
            f"The label to ignore is {ignore_index} (semantic_loss_ignore_index of the model's config): use one and "
            "the same in labels and config."
        )
    if num_classes == 2 and (bad != np.floor(bad)).any():
        return "A head with one output tells two classes apart, 0 and 1; for regression use the stock Trainer."
    if (bad < 0).all():
        return f"Drop what has no label, or label it {ignore_index}, which is ignored."
    if (bad == num_classes).all() and labels.min() == 1:
        return "Labels that begin at 1 must be numbered from 0."
    return f"Drop them, label them {ignore_index} (ignored), or build the model with more classes (num_labels)."


def _shown(labels: Counter, unit: str) -> str:
    shown = labels.most_common(SHOWN)
    text = ", ".join(f"{label} ({count} {unit})" if unit else str(label) for label, count in shown)
    return f"{text}{', ...' if len(labels) > SHOWN else ''}"


def _labels(dataset: Any, kinds: str = "iu") -> Iterator[np.ndarray]:
    """Return the labels of a data set in parts: vectors of one label per row, or arrays of more dimensions.

    Args:
        dataset: What holds them.
        kinds: Letters of the NumPy types that labels may have; of others nothing is returned.
    """
    if isinstance(dataset, datasets.Dataset):
        yield from _of_columns(dataset, kinds)
    elif isinstance(dataset, StackDataset) and isinstance(dataset.datasets, dict):
        labels = dataset.datasets.get("labels")
        if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
            yield labels.numpy()
    elif isinstance(dataset, Subset) and isinstance(dataset.dataset, list | tuple):
        yield from _of_rows([dataset.dataset[index] for index in dataset.indices], kinds)
    elif isinstance(dataset, list | tuple):
        yield from _of_rows(dataset, kinds)


def _of_columns(dataset: datasets.Dataset, kinds: str) -> Iterator[np.ndarray]:
    name = label_column(dataset)
    if name is None or dataset.format["type"] == "custom":  # a transform may change the labels
        return
    feature: Any = dataset.features[name]
    lists = 0
    while hasattr(feature, "feature"):
        feature, lists = feature.feature, lists + 1
    dtypes = ("int", "uint", "float") if "f" in kinds else ("int", "uint")
    if not str(getattr(feature, "dtype", "")).startswith(dtypes):
        return
    for batch in dataset.select_columns([name]).with_format("arrow").iter(ROWS_AT_ONCE):
        column = batch[name].combine_chunks()
        for _ in range(lists):
            column = column.flatten()
        if column.null_count:
            raise ValueError(f"{column.null_count} labels in the column {name!r} are missing (None): drop those rows.")
        values = column.to_numpy(zero_copy_only=False)
        yield values[:, None] if lists else values


def _of_rows(rows: Any, kinds: str) -> Iterator[np.ndarray]:
    name = label_column(rows)
    if name is None:
        return
    values = [np.asarray(row[name]) for row in rows if name in row]
    if any(value.dtype.kind not in kinds for value in values):
        return  # each batch is checked
    if all(value.ndim == 0 for value in values):
        yield np.asarray(values)
    else:
        yield from (value.reshape(-1, 1) for value in values)
