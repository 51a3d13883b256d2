"""Calibration metrics, tests and intervals. Everything here needs NumPy alone."""

from hf_adafocal._lazy import lazy_attributes

__getattr__, __dir__, __all__ = lazy_attributes(__name__, __file__)
