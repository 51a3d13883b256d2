"""Pushing runs and metrics to the Hugging Face Hub."""

from hf_adafocal._lazy import lazy_attributes

_HOMES = {
    "PushError": "client",
    "publish_metric": "spaces",
    "push_run": "push",
}

__all__ = sorted(_HOMES)  # noqa: PLE0604
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
