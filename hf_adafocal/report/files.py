"""Write and read the report files beside a checkpoint: `report.json`, pictures and the card."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_adafocal.report.atomic import write_atomically
from hf_adafocal.report.card import OVERLAY, PICTURES, check_current, write_card
from hf_adafocal.report.schema import RAW, SCALED, Report
from hf_adafocal.report.tables import scores_titles

logger = logging.get_logger(__name__)

FILE = "report.json"


def save_report(folder: str | Path, report: Report) -> None:
    """Write `report.json`, `reliability.png`, `gamma.png` if the loss adapted, and the card.

    Each file is written beside its place and renamed, so a full disk leaves the earlier one as it was.

    Args:
        folder: Of the checkpoint; created if it is missing.
        report: As `build_report` makes it.

    Raises:
        StaleReportError: If the folder holds weights that are not those the report describes. Nothing is written then.
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    check_current(folder, report)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, report)
    draw(folder, report)
    write_card(folder, report)


def _write(folder: Path, report: Report) -> None:
    write_atomically(folder / FILE, json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")


def read_report(folder: str | Path) -> Report | None:
    """Read the report of a run folder; None if it has none.

    Raises:
        ValueError: If the file is not JSON or not a report of this schema; the message names the file and the field.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def add_baselines(runs: Mapping[str, Sequence[Path]], baseline: str = "cross_entropy") -> None:
    """Add a baseline's results to the reports and cards of the other losses' runs with the same seed.

    Args:
        runs: For each loss its run folders, one per seed, in one order of seeds.
        baseline: The loss the others are compared with, raw and temperature scaled.
    """
    for loss, folders in runs.items():
        if loss == baseline or baseline not in runs:
            continue
        for folder, beside in zip(folders, runs[baseline], strict=True):
            report, other = read_report(folder), read_report(beside)
            if report is None or other is None:
                raise ValueError(f"Expected {FILE} in {folder} and {beside}; repeat the runs.")
            report = replace(report, baselines=baseline_rows(other, baseline))
            _write(folder, report)
            write_card(folder, report)


def baseline_rows(report: Report, loss: str) -> dict[str, dict[str, float]]:
    """Return the results of a run as baselines for another one: metrics as trained and temperature scaled, by title.

    Args:
        report: Of the baseline.
        loss: Its name.
    """
    titles = {RAW: loss, SCALED: f"{loss} + temperature scaling"}
    return {titles[name]: metrics for name, metrics in report.test.rows().items()}


def pictures() -> Any:
    """Import the module `plots`; return None, with a warning, if matplotlib is missing."""
    try:
        from hf_adafocal.report import plots
    except ImportError:
        logger.warning("matplotlib is missing, so no pictures are drawn; install the extra `plots`.")
        return None
    return plots


def draw(folder: str | Path, report: Report) -> None:
    """Draw `reliability.png`, and `gamma.png` or `smoothing.png` if the loss adapted; delete earlier pictures."""
    plots = pictures()
    figures: dict[str, Any] = {}
    if plots is not None and report.test.reliability:
        titles = scores_titles(report)
        bins = {titles[name]: stats for name, stats in report.test.reliability.items()}
        figures["reliability.png"] = plots.reliability_diagram(bins)
    if plots is not None:
        adapted = plots.adaptation_diagrams(report.adaptation)
        figures.update({f"{name}.png": figure for name, figure in adapted.items()})
    for name in PICTURES:
        path = Path(folder) / name
        if name in figures:
            content = io.BytesIO()
            figures[name].savefig(content, format="png")
            write_atomically(path, content.getvalue())
        elif name != OVERLAY or "num_images" not in report.metrics:  # that of a segmenter is drawn with its images
            path.unlink(missing_ok=True)
