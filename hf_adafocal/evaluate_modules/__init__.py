"""Metrics for `evaluate.load`, one folder each: `<name>/<name>.py` wraps functions of `hf_adafocal.metrics`.

This module handles paths alone, so `evaluate` is imported only when a metric is loaded.
"""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def evaluate_module(name: str) -> str:
    """Return the folder of a metric of this package, for `evaluate.load`; works offline.

    Args:
        name: The metric's name, for example "ece" or "ada_ece".

    Returns:
        An absolute path; a `str`, because `evaluate.load` takes no `pathlib.Path`.

    Raises:
        ValueError: If there is no metric of that name.

    >>> Path(evaluate_module("ece")).name
    'ece'
    """
    names = sorted(script.stem for script in _FOLDER.glob("*/*.py") if script.stem == script.parent.name)
    if name not in names:
        raise ValueError(f"Expected the name of a metric, one of {', '.join(names)}; found {name!r}.")
    return str(_FOLDER / name)
