"""Calibrated fine-tuning for Hugging Face models: AdaFocal losses, a Trainer, metrics, reports.

Names load when they are first used, so `import hf_adafocal` imports neither torch nor transformers, and
`hf_adafocal.metrics` needs numpy alone.
"""

from importlib import import_module
from importlib.metadata import version

_HOME = {
    "AdaDualFocalLoss": "losses",
    "AdaFocalCallback": "callback",
    "AdaFocalLoss": "losses",
    "AdaFocalTrainer": "trainer",
    "AdaFocalTrainingArguments": "training_args",
    "AdaptiveLabelSmoothingLoss": "losses",
    "BrierLoss": "losses",
    "CalibrationHistogram": "streaming",
    "CalibrationMetrics": "calibration",
    "ClasswiseAdaFocalLoss": "losses",
    "CombinedLoss": "combined",
    "ConfidencePenaltyLoss": "losses",
    "CrossEntropyLoss": "losses",
    "DualFocalLoss": "losses",
    "FLSD53Loss": "losses",
    "FocalLoss": "losses",
    "GlobalPoolingCNNConfig": "models",
    "GlobalPoolingCNNForSequenceClassification": "models",
    "InverseFocalLoss": "losses",
    "LOSSES": "registry",
    "LabelSmoothingLoss": "losses",
    "PushError": "hub",
    "Scaling": "scaling",
    "Splits": "data",
    "adaptive_calibration_error": "metrics",
    "area_under_risk_coverage": "selective",
    "binary_calibration_report": "metrics",
    "bootstrap_interval": "uncertainty",
    "build_loss": "registry",
    "calibrate": "loop",
    "calibration_error_interval": "uncertainty",
    "calibration_gate": "gate",
    "calibration_report": "metrics",
    "evaluate_checkpoint": "assess",
    "evaluate_module": "evaluate_modules",
    "expected_calibration_error": "metrics",
    "fit_temperature": "scaling",
    "fit_temperature_scaling": "scaling",
    "fit_vector_scaling": "scaling",
    "fold_checkpoint": "folding",
    "fold_scaling": "folding",
    "gamma_trajectory": "plots",
    "last_complete_checkpoint": "checkpoints",
    "load_splits": "data",
    "ood_report": "ood",
    "paired_calibration_error_test": "uncertainty",
    "paired_test": "uncertainty",
    "publish_metric": "spaces",
    "push_run": "hub",
    "recorded_scaling": "folding",
    "reliability_diagram": "plots",
    "report_intervals": "uncertainty",
    "scale_checkpoint": "assess",
    "smooth_calibration_error": "estimators",
    "unfold_scaling": "folding",
    "write_card": "model_card",
}

__all__ = sorted(_HOME)  # noqa: PLE0604
__version__ = version("hf-adafocal")


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
