"""Adapt loss modules of `torch.nn` to the interface of this package."""

from typing import Any

from torch import nn

from hf_adafocal.losses.base import ClassificationLoss
from hf_adafocal.losses.focal import CrossEntropyLoss
from hf_adafocal.losses.functional import SMOOTHING_RANGE
from hf_adafocal.losses.label_smoothing import LabelSmoothingLoss


def as_classification_loss(loss: nn.Module) -> ClassificationLoss:
    """Return a loss of this package with the values of the one given.

    Args:
        loss: A loss of this package, which is returned as it is, or a `torch.nn.CrossEntropyLoss` with any class
            weights, `ignore_index`, `reduction` and `label_smoothing` up to 0.5.

    Returns:
        A `CrossEntropyLoss` or `LabelSmoothingLoss` for PyTorch's; its mean is that over the whole optimizer step.

    Raises:
        TypeError: If it is any other loss: what its arguments mean is not known.
        ValueError: If the label smoothing is out of range.

    >>> as_classification_loss(nn.CrossEntropyLoss(label_smoothing=0.1))
    LabelSmoothingLoss(smoothing=0.1)
    """
    if isinstance(loss, ClassificationLoss):
        return loss
    if type(loss) is not nn.CrossEntropyLoss:
        raise TypeError(
            f"The loss must be one of hf_adafocal.losses or a torch.nn.CrossEntropyLoss, found {_described(loss)}. "
            "For a loss of your own subclass hf_adafocal.losses.base.PerSampleLoss and define `formula`; for targets "
            "that are not classes use the stock Trainer."
        )
    settings: dict[str, Any] = {"weight": loss.weight, "ignore_index": loss.ignore_index, "reduction": loss.reduction}
    if not loss.label_smoothing:
        return CrossEntropyLoss(**settings)
    if loss.label_smoothing > SMOOTHING_RANGE[1]:
        raise ValueError(f"label_smoothing must be at most {SMOOTHING_RANGE[1]}, found {loss.label_smoothing}.")
    return LabelSmoothingLoss(loss.label_smoothing, **settings)


def _described(loss: object) -> str:
    if isinstance(loss, type):
        return f"the class {loss.__name__}, not an instance"
    if isinstance(loss, str):
        return f"{loss!r} (a loss by name is built by `build_loss`)"
    return type(loss).__name__
