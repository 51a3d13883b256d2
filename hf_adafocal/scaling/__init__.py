"""Post-hoc scaling of logits, and folding it into a classifier's last layer."""

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "Scaling": "fit",
    "best_temperature": "grid",
    "check_foldable": "folding",
    "fit_temperature": "fit",
    "fit_temperature_scaling": "fit",
    "fit_vector_scaling": "fit",
    "fold_checkpoint": "folding",
    "fold_scaling": "folding",
    "forget_scaling": "folding",
    "nll_on_grid": "grid",
    "recorded_scaling": "folding",
    "unfold_scaling": "folding",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
