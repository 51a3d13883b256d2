"""Post-hoc scaling of logits, and folding it into a classifier's last layer."""

from hf_adafocal._lazy import lazy_attributes

__getattr__, __dir__, __all__ = lazy_attributes(__name__, __file__)
