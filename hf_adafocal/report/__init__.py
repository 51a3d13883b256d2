"""Reports of a run: schema, tables, pictures and the model card."""

from hf_adafocal._lazy import lazy_attributes

__getattr__, __dir__, __all__ = lazy_attributes(__name__, __file__)
