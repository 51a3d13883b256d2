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
    "CalibrationMetrics": "calibration",
    "CrossEntropyLoss": "losses",
    "FLSD53Loss": "losses",
    "FocalLoss": "losses",
    "GlobalPoolingCNNConfig": "models",
    "GlobalPoolingCNNForSequenceClassification": "models",
    "LOSSES": "losses",
    "Splits": "data",
    "calibration_report": "metrics",
    "evaluate_module": "evaluate_modules",
    "fit_temperature": "scaling",
    "gamma_trajectory": "plots",
    "load_splits": "data",
    "reliability_diagram": "plots",
}

__all__ = sorted(_HOME)  # noqa: PLE0604
__version__ = version("hf-adafocal")


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
