"""Pushing runs and metrics to the Hugging Face Hub."""

from hf_adafocal._lazy import lazy_attributes

__getattr__, __dir__, __all__ = lazy_attributes(__name__, __file__)
