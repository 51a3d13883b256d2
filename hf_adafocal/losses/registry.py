"""Registry of the losses by name, and construction of a loss from JSON settings."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from hf_adafocal.losses.adafocal import AdaDualFocalLoss, AdaFocalLoss, ClasswiseAdaFocalLoss
from hf_adafocal.losses.base import ClassificationLoss, PerSampleLoss
from hf_adafocal.losses.batch_loss import TERMS, CombinedLoss
from hf_adafocal.losses.brier import BrierLoss
from hf_adafocal.losses.confidence_penalty import ConfidencePenaltyLoss
from hf_adafocal.losses.focal import CrossEntropyLoss, DualFocalLoss, FLSD53Loss, FocalLoss, InverseFocalLoss
from hf_adafocal.losses.label_smoothing import AdaptiveLabelSmoothingLoss, LabelSmoothingLoss

PER_SAMPLE_LOSSES: dict[str, type[PerSampleLoss]] = {
    "cross_entropy": CrossEntropyLoss,
    "focal": FocalLoss,
    "flsd_53": FLSD53Loss,
    "adafocal": AdaFocalLoss,
    "label_smoothing": LabelSmoothingLoss,
    "adaptive_label_smoothing": AdaptiveLabelSmoothingLoss,
    "brier": BrierLoss,
    "dual_focal": DualFocalLoss,
    "inverse_focal": InverseFocalLoss,
    "confidence_penalty": ConfidencePenaltyLoss,
    "ada_dual_focal": AdaDualFocalLoss,
    "classwise_adafocal": ClasswiseAdaFocalLoss,
}

# All losses: those that sum over samples, and those with a term of the whole batch, which have one of them as base.
LOSSES: dict[str, Callable[..., ClassificationLoss]] = {
    **PER_SAMPLE_LOSSES,
    **{name: partial(CombinedLoss, name) for name in TERMS},
}


def build_loss(name: str, base: dict[str, Any] | None = None, **settings: Any) -> ClassificationLoss:
    """Build a loss from its name and settings.

    Args:
        name: A name in `LOSSES`.
        base: For a loss with a term of the whole batch: the `name` of its base and the base's settings.
        **settings: Arguments of the loss, by the names of its constructor.

    Returns:
        The loss, freshly initialised.

    Raises:
        ValueError: If a name is unknown, a setting out of range, or a loss that sums over samples gets a base.

    >>> build_loss("mmce", base={"name": "focal", "gamma": 2.0}, auxiliary_weight=3.0)
    CombinedLoss(
      'mmce', auxiliary_weight=3.0
      (base): FocalLoss(gamma=2.0)
    )
    """
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; found {name!r}.")
    if base is None:
        return LOSSES[name](**settings)
    if name not in TERMS:
        raise ValueError(f"{name!r} is a per-sample loss and takes no base, found {base}.")
    if base.get("name") not in PER_SAMPLE_LOSSES:
        raise ValueError(f"The base must be one of {', '.join(PER_SAMPLE_LOSSES)}; found {base.get('name')!r}.")
    return LOSSES[name](build_loss(**base), **settings)


def name_of(loss: nn.Module) -> str:
    """Return the name of a loss in `LOSSES`, or its class's name if it is not in it.

    >>> name_of(build_loss("dca")), name_of(nn.NLLLoss())
    ('dca', 'NLLLoss')
    """
    if isinstance(loss, CombinedLoss):
        return loss.term
    return name_of_class(type(loss))


def name_of_class(kind: type[nn.Module]) -> str:
    """Return the name in `LOSSES` of a class of per-sample losses, or its own name if it is not in it."""
    return next((name for name, ours in PER_SAMPLE_LOSSES.items() if ours is kind), kind.__name__)
