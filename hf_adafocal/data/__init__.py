"""Data sets in three roles (training, calibration, test) and checks that the roles share no rows."""

from hf_adafocal._lazy import lazy_attributes

__getattr__, __dir__, __all__ = lazy_attributes(__name__, __file__)
