"""Runs from command-line arguments to a report: fine-tune, compare losses, evaluate and scale a checkpoint."""

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "compare": "compare",
    "evaluate_checkpoint": "evaluate",
    "finetune": "finetune",
    "scale_checkpoint": "evaluate",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
