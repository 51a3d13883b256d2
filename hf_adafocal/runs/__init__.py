"""Whole runs from command-line arguments to a report: fine-tune, compare, evaluate, scale."""

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "compare": "finetune",
    "evaluate_checkpoint": "evaluate",
    "finetune": "finetune",
    "scale_checkpoint": "evaluate",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
