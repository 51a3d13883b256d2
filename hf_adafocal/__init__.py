"""Calibrated fine-tuning for Hugging Face models: AdaFocal losses, a Trainer, metrics, reports.

Names load when they are first used, so `import hf_adafocal` imports neither torch nor transformers, and
`hf_adafocal.metrics` needs numpy alone.
"""

from importlib import import_module
from importlib.metadata import version

_HOME = {
    "AdaFocalCallback": "callback",
    "AdaFocalLoss": "losses",
    "AdaFocalTrainer": "trainer",
    "AdaFocalTrainingArguments": "training_args",
    "CalibrationHistogram": "streaming",
    "CalibrationMetrics": "calibration",
    "CrossEntropyLoss": "losses",
    "FLSD53Loss": "losses",
    "FocalLoss": "losses",
    "GlobalPoolingCNNConfig": "models",
    "GlobalPoolingCNNForSequenceClassification": "models",
    "LOSSES": "losses",
    "Splits": "data",
    "adaptive_calibration_error": "metrics",
    "area_under_risk_coverage": "selective",
    "binary_calibration_report": "metrics",
    "bootstrap_interval": "uncertainty",
    "calibration_error_interval": "uncertainty",
    "calibration_gate": "gate",
    "calibration_report": "metrics",
    "evaluate_module": "evaluate_modules",
    "expected_calibration_error": "metrics",
    "fit_temperature": "scaling",
    "gamma_trajectory": "plots",
    "load_splits": "data",
    "ood_report": "ood",
    "paired_calibration_error_test": "uncertainty",
    "paired_test": "uncertainty",
    "reliability_diagram": "plots",
    "smooth_calibration_error": "estimators",
}

__all__ = sorted(_HOME)  # noqa: PLE0604
__version__ = version("hf-adafocal")


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
