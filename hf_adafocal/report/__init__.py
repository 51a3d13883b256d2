"""Reports of a run: schema, tables, pictures and the model card."""

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "Report": "schema",
    "build_report": "schema",
    "gamma_trajectory": "plots",
    "read_report": "files",
    "reliability_diagram": "plots",
    "reliability_of_confidences": "plots",
    "reliability_of_probabilities": "plots",
    "save_report": "files",
    "weights_hash": "weights",
    "write_card": "card",
    "write_eval_results": "eval_results",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
