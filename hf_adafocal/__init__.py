"""Calibrated fine-tuning for Hugging Face models: AdaFocal losses, a Trainer, metrics, reports.

Names are imported on first use, so `import hf_adafocal` imports neither torch nor transformers, and
`hf_adafocal.metrics` needs NumPy alone.
"""

from importlib.metadata import version

from hf_adafocal._lazy import lazy_attributes

__version__ = version("hf-adafocal")
__getattr__, __dir__, __all__ = lazy_attributes(__name__, __file__)
