"""Calibrated fine-tuning for Hugging Face models: AdaFocal losses, a Trainer, metrics, reports.

Names are imported on first use, so `import hf_adafocal` imports neither torch nor transformers, and
`hf_adafocal.metrics` needs NumPy alone.
"""

from importlib.metadata import version

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "AdaDualFocalLoss": "losses",
    "AdaFocalCallback": "training",
    "AdaFocalLoss": "losses",
    "AdaFocalTrainer": "training",
    "AdaFocalTrainingArguments": "training",
    "AdaptiveLabelSmoothingLoss": "losses",
    "BrierLoss": "losses",
    "CalibrationHistogram": "metrics",
    "CalibrationMetrics": "training",
    "ClasswiseAdaFocalLoss": "losses",
    "CombinedLoss": "losses",
    "ConfidencePenaltyLoss": "losses",
    "CrossEntropyLoss": "losses",
    "DualFocalLoss": "losses",
    "FLSD53Loss": "losses",
    "FocalLoss": "losses",
    "GlobalPoolingCNNConfig": "models",
    "GlobalPoolingCNNForSequenceClassification": "models",
    "InverseFocalLoss": "losses",
    "LOSSES": "losses",
    "LabelSmoothingLoss": "losses",
    "PushError": "hub",
    "Scaling": "scaling",
    "Splits": "data",
    "adaptive_calibration_error": "metrics",
    "area_under_risk_coverage": "metrics",
    "balanced_class_weights": "losses",
    "binary_calibration_report": "metrics",
    "bootstrap_interval": "metrics",
    "build_loss": "losses",
    "calibrate": "training",
    "calibration_error_interval": "metrics",
    "calibration_gate": "metrics",
    "calibration_report": "metrics",
    "evaluate_checkpoint": "runs",
    "evaluate_module": "evaluate_modules",
    "expected_calibration_error": "metrics",
    "fit_temperature": "scaling",
    "fit_temperature_scaling": "scaling",
    "fit_vector_scaling": "scaling",
    "fold_checkpoint": "scaling",
    "fold_scaling": "scaling",
    "gamma_trajectory": "report",
    "last_complete_checkpoint": "training",
    "load_splits": "data",
    "ood_report": "metrics",
    "paired_calibration_error_test": "metrics",
    "paired_test": "metrics",
    "publish_metric": "hub",
    "push_run": "hub",
    "recorded_scaling": "scaling",
    "reliability_diagram": "report",
    "reliability_of_confidences": "report",
    "reliability_of_probabilities": "report",
    "report_intervals": "metrics",
    "scale_checkpoint": "runs",
    "smooth_calibration_error": "metrics",
    "unfold_scaling": "scaling",
    "write_card": "report",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__version__ = version("hf-adafocal")
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
