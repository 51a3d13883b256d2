"""Arrange the logits of transformers' models, whose classes are last or second, for losses and for metrics.

One rule decides where the classes are: logits of up to three dimensions have them last, as sequence and token
classifiers do; logits of four or more dimensions, `(N, C, d1, d2, ...)`, have them second, as segmentation models do.
A single logit is that of the positive one of two classes, as in rerankers (`num_labels=1`): see `two_classes`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def classes_last(logits: Tensor, labels: Tensor) -> Tensor:
    """Move the class dimension of logits last and resize dense logits to the size of their labels.

    Args:
        logits: Shape `(N, C)`, `(N, L, C)` or `(N, C, d1, d2, ...)`; of a single logit, C = 1, two classes are made.
        labels: Shape `(N,)`, `(N, L)` or `(N, D1, D2, ...)`.
    """
    if logits.ndim < 4:
        return two_classes(logits)
    return two_classes(resized(logits, labels).movedim(1, -1))


def classes_second(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Arrange logits and labels for a loss, which takes the classes second: `(n, C)` or `(N, C, d1, d2, ...)`.

    Token logits `(N, L, C)` become rows, which costs no copy; dense logits are resized to their labels.

    Args:
        logits: As in `classes_last`.
        labels: As in `classes_last`.
    """
    if logits.ndim < 4:
        logits = two_classes(logits)
        return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return two_classes(resized(logits, labels), dim=1), labels


def is_single(logits: Tensor) -> bool:
    """Return whether there is a single logit per sample, token or pixel, by the rule of this module."""
    return logits.shape[1 if logits.ndim > 3 else -1] == 1


def two_classes(logits: Tensor, dim: int = -1) -> Tensor:
    """Return logits `[0, z]` of two classes for a single logit z, whose sigmoid is the positive class's probability.

    `softmax([0, z])` is `[1 - sigmoid(z), sigmoid(z)]`, so that cross-entropy is the binary cross-entropy of z, with
    its gradient. Logits of several classes are returned as they are.

    Args:
        logits: Of any shape.
        dim: Where the classes are.

    >>> two_classes(torch.tensor([[2.0], [-1.0]])).tolist()
    [[0.0, 2.0], [0.0, -1.0]]
    """
    return torch.cat([torch.zeros_like(logits), logits], dim) if logits.shape[dim] == 1 else logits


def resized(logits: Tensor, labels: Tensor) -> Tensor:
    """Interpolate dense logits `(N, C, d1, d2, ...)` to the spatial size of labels `(N, D1, D2, ...)`.

    It is bilinear or trilinear, as in transformers' own segmentation losses; logits that fit are returned as they are.
    """
    mode = {4: "bilinear", 5: "trilinear"}.get(logits.ndim)
    if logits.shape[2:] == labels.shape[1:] or logits.ndim != labels.ndim + 1 or mode is None:
        return logits
    return F.interpolate(logits, size=labels.shape[1:], mode=mode, align_corners=False)


def of_model(logits: object, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and labels as losses take them, from a tensor or from a model's output.

    Args:
        logits: Shape `(N, C, d1, ...)`, the classes second whatever the number of dimensions; or a model output with
            `logits`, which are arranged by the rule of this module.
        labels: Class indices.
    """
    if isinstance(logits, Tensor):
        return logits, labels
    found = logits["logits"] if isinstance(logits, dict) else logits.logits  # type: ignore[attr-defined]
    return classes_second(found, labels)
