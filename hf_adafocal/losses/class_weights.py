"""Class weights that balance the classes of a training set."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def balanced_class_weights(labels: Any, num_classes: int, ignore_index: int = -100) -> Tensor:
    """Weigh each class inversely to its frequency: `n / (k n_c)`, n labels of k classes that occur, n_c of class c.

    These are scikit-learn's weights for `class_weight="balanced"`; the mean weight of the labels is 1.

    Args:
        labels: Class indices or `ignore_index`: a tensor or array of any shape, a list, or an iterable of those, such
            as the label masks of a segmentation set.
        num_classes: Classes of the model.
        ignore_index: Label that does not count.

    Returns:
        Weights, float32, shape `(num_classes,)`. A class without labels has weight 1.

    Raises:
        ValueError: If a label is neither in `[0, num_classes)` nor `ignore_index`, or none counts.

    Source: King and Zeng 2001, "Logistic regression in rare events data", as in scikit-learn.

    >>> balanced_class_weights([0, 0, 0, 1], num_classes=3)
    tensor([0.6667, 2.0000, 1.0000])
    """
    counts = torch.zeros(num_classes, dtype=torch.int64)
    for part in _parts(labels):
        found = torch.as_tensor(part).flatten().cpu()
        if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
            raise ValueError(f"labels must be integer class indices, found {found.dtype}.")
        found = found[found != ignore_index].long()
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < num_classes:
            raise ValueError(
                f"labels must lie in [0, {num_classes}) or equal ignore_index ({ignore_index}), "
                f"found {int(found.min())} to {int(found.max())}."
            )
        counts += torch.bincount(found, minlength=num_classes)
    occurring = int((counts > 0).sum())
    if occurring == 0:
        raise ValueError("Balanced class weights need labels, found none that counts.")
    weights = counts.sum().double() / (occurring * counts)
    return weights.where(counts > 0, 1.0).float()


def _parts(labels: Any) -> Iterable[Any]:
    """Split the labels into arrays: one if they have a common shape and a length, else one per row."""
    if hasattr(labels, "__array__"):
        return [labels]
    parts = list(labels)
    return [parts] if parts and all(isinstance(part, int) for part in parts) else parts
