"""Reports of a run: schema, tables, pictures and the model card."""

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "gamma_trajectory": "plots",
    "reliability_diagram": "plots",
    "write_card": "card",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
