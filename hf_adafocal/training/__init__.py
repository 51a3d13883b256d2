"""Training with calibration-aware losses: arguments, Trainer, callbacks, and a function for custom loops."""

from hf_adafocal._lazy import lazy_attributes

__getattr__, __dir__, __all__ = lazy_attributes(__name__, __file__)
