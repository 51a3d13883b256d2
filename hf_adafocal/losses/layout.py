"""Arrange the logits of transformers' models, whose classes are last or second, for losses and for metrics.

One rule decides where the classes are: logits of up to three dimensions have them last, as sequence and token
classifiers do; logits of four or more dimensions, `(N, C, d1, d2, ...)`, have them second, as segmentation models do.
"""

import torch.nn.functional as F
from torch import Tensor


def classes_last(logits: Tensor, labels: Tensor) -> Tensor:
    """Move the class dimension of logits last and resize dense logits to the size of their labels.

    Args:
        logits: Shape `(N, C)`, `(N, L, C)` or `(N, C, d1, d2, ...)`.
        labels: Shape `(N,)`, `(N, L)` or `(N, D1, D2, ...)`.
    """
    if logits.ndim < 4:
        return logits
    return resized(logits, labels).movedim(1, -1)


def classes_second(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Arrange logits and labels for a loss, which takes the classes second: `(n, C)` or `(N, C, d1, d2, ...)`.

    Token logits `(N, L, C)` become rows, which costs no copy; dense logits are resized to their labels.

    Args:
        logits: As in `classes_last`.
        labels: As in `classes_last`.
    """
    if logits.ndim < 4:
        return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return resized(logits, labels), labels


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
