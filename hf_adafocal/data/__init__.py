"""Data sets in three roles (training, calibration, test) and checks that the roles share no rows."""

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "ImageRows": "tensor_rows",
    "Splits": "loading",
    "TensorRows": "tensor_rows",
    "check_splits": "overlap",
    "drop_overlap": "overlap",
    "encode_images": "encoding",
    "encode_texts": "encoding",
    "fingerprint": "fingerprint",
    "hold_out": "holdout",
    "label_column": "columns",
    "load_splits": "loading",
    "stack_images": "tensor_rows",
    "to_rgb": "images",
    "whole_batch": "tensor_rows",
    "without_overlap": "overlap",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
