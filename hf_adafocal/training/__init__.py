"""Training with calibration-aware losses: arguments, Trainer, callbacks, and a function for custom loops."""

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "AdaFocalCallback": "callbacks",
    "AdaFocalTrainer": "trainer",
    "AdaFocalTrainingArguments": "arguments",
    "CalibrationMetrics": "stock_trainer",
    "calibrate": "loop",
    "last_complete_checkpoint": "checkpoints",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
