"""Runs from command-line arguments to a report: fine-tune, compare losses, evaluate and scale a checkpoint."""

from hf_adafocal._lazy import lazy_attributes

__getattr__, __dir__, __all__ = lazy_attributes(__name__, __file__)
