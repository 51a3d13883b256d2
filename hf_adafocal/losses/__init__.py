"""Losses for calibrated classification: cross-entropy, focal losses, AdaFocal, calibration penalties, by name."""

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "AdaDualFocalLoss": "adafocal",
    "AdaFocalLoss": "adafocal",
    "AdaptiveLabelSmoothingLoss": "label_smoothing",
    "BrierLoss": "brier",
    "ClasswiseAdaFocalLoss": "adafocal",
    "CombinedLoss": "batch_loss",
    "ConfidencePenaltyLoss": "confidence_penalty",
    "CrossEntropyLoss": "focal",
    "DualFocalLoss": "focal",
    "FLSD53Loss": "focal",
    "FocalLoss": "focal",
    "InverseFocalLoss": "focal",
    "LOSSES": "registry",
    "LabelSmoothingLoss": "label_smoothing",
    "as_classification_loss": "torch_losses",
    "balanced_class_weights": "class_weights",
    "build_loss": "registry",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
