"""What a run leaves beside its checkpoint: `report.json`, pictures and the card."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from hf_adafocal.metrics.binning import bin_statistics, equal_width_edges
from hf_adafocal.metrics.scores import softmax, top_label
from hf_adafocal.report.card import write_card
from hf_adafocal.scaling.fit import Scaling

logger = logging.get_logger(__name__)

FILE = "report.json"
LIBRARIES = ("hf-adafocal", "torch", "transformers", "datasets", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Version of each library that a result depends on."""
    return {name: version(name) for name in LIBRARIES}


def save_report(folder: str | Path, report: Mapping[str, Any], test: tuple[np.ndarray, np.ndarray]) -> None:
    """Write `report.json`, `reliability.png`, `gamma.png` if gamma moved, and the card.

    Args:
        folder: Of the checkpoint.
        report: As `finetune` returns it.
        test: Logits `(N, C)` as trained, before any scaling, and labels `(N,)` of the test split.
    """
    folder = Path(folder)
    (folder / FILE).write_text(json.dumps(report, indent=2) + "\n")
    _draw(folder, report, *test)
    write_card(folder, report)


def read_report(folder: str | Path) -> dict[str, Any] | None:
    """The report of a run folder, None if it has none.

    Raises:
        ValueError: If the file is no JSON.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}. Repeat the evaluation that wrote it.") from error


def add_baselines(runs: Mapping[str, Sequence[Path]], baseline: str = "cross_entropy") -> None:
    """Put the results of a baseline beside those of the other runs of its seed, in their reports and cards.

    Args:
        runs: For each loss its run folders, one a seed, in one order of seeds.
        baseline: The loss the others are compared with, raw and temperature scaled.
    """
    for loss, folders in runs.items():
        if loss == baseline or baseline not in runs:
            continue
        for folder, beside in zip(folders, runs[baseline], strict=True):
            report, other = read_report(folder), read_report(beside)
            if report is None or other is None:
                raise ValueError(f"Expected {FILE} in {folder} and {beside}; repeat the runs.")
            report["baselines"] = {
                baseline: other["test"]["raw"],
                f"{baseline} + temperature scaling": other["test"]["temperature_scaled"],
            }
            (folder / FILE).write_text(json.dumps(report, indent=2) + "\n")
            write_card(folder, report)


def pictures() -> Any:
    """The module `plots`; None, with a warning, if matplotlib is missing."""
    try:
        from hf_adafocal.report import plots
    except ImportError:
        logger.warning("matplotlib is missing, so no pictures are drawn; install the extra `plots`.")
        return None
    return plots


def _draw(folder: Path, report: Mapping[str, Any], logits: np.ndarray, labels: np.ndarray) -> None:
    plots = pictures()
    if plots is None:
        return
    scaling = Scaling.from_dict(report["test"]["scaling"])
    scaled = "vector scaled" if scaling.method == "vector" else f"temperature {1 / scaling.scale:.2f}"
    num_bins = report["test"]["raw"]["num_bins"]
    diagrams = {
        title: bin_statistics(*top_label(softmax(values), labels), equal_width_edges(num_bins))
        for title, values in (("as trained", logits), (scaled, scaling.apply(logits)))
    }
    plots.reliability_diagram(diagrams).savefig(folder / "reliability.png")
    if report.get("gamma"):
        steps = [entry["step"] for entry in report["gamma"]]
        plots.gamma_trajectory(steps, [entry["gammas"] for entry in report["gamma"]]).savefig(folder / "gamma.png")
