"""Loss functions and modules: cross-entropy, the focal family, AdaFocal and its rivals, by name in `LOSSES`."""

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "AdaDualFocalLoss": "adafocal",
    "AdaFocalLoss": "adafocal",
    "AdaptiveLabelSmoothingLoss": "modules",
    "BrierLoss": "modules",
    "ClasswiseAdaFocalLoss": "adafocal",
    "CombinedLoss": "batch_loss",
    "ConfidencePenaltyLoss": "modules",
    "CrossEntropyLoss": "modules",
    "DualFocalLoss": "modules",
    "FLSD53Loss": "modules",
    "FocalLoss": "modules",
    "InverseFocalLoss": "modules",
    "LOSSES": "registry",
    "LabelSmoothingLoss": "modules",
    "build_loss": "registry",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
