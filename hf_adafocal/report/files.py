"""What a run leaves beside its checkpoint: `report.json`, pictures and the card."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from hf_adafocal.metrics.binning import bin_statistics, equal_width_edges
from hf_adafocal.metrics.scores import softmax, top_label
from hf_adafocal.report.card import write_card
from hf_adafocal.report.facts import versions as versions
from hf_adafocal.report.schema import RAW, SCALED, Report
from hf_adafocal.scaling.fit import Scaling

logger = logging.get_logger(__name__)

FILE = "report.json"


def save_report(folder: str | Path, report: Report, test: tuple[np.ndarray, np.ndarray] | None = None) -> None:
    """Write `report.json`, `reliability.png`, `gamma.png` if the loss adapted, and the card.

    Each file is written beside its place and renamed, so a full disk leaves the earlier one as it was.

    Args:
        folder: Of the checkpoint; created if it is missing.
        report: As `build_report` makes it.
        test: Only with a report that is still a dict.
    """
    folder = Path(folder)
    if not isinstance(report, Report):  # until all callers build theirs with `build_report`
        write_atomically(folder / FILE, json.dumps(report, indent=2) + "\n")
        _draw(folder, report, *test)
        write_card(folder, report)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    draw(folder, report)
    write_card(folder, report)


def read_report(folder: str | Path) -> Report | None:
    """The report of a run folder, None if it has none.

    Raises:
        ValueError: If the file is not JSON or not a report of this schema; the message names the file and the field.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and "schema_version" not in document:
            return document  # until all callers build theirs with `build_report`
        return Report.from_dict(document)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it, so that the earlier one is replaced whole or stays.

    Args:
        path: Where the content goes; a symbolic link is replaced, not followed.
        content: Text (UTF-8) or bytes.

    Raises:
        OSError: If it cannot be written; nothing is left behind.
    """
    data = content.encode("utf-8", errors="surrogateescape") if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


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
            if isinstance(report, Report) and isinstance(other, Report):
                rows = other.test.rows()
                titles = {RAW: baseline, SCALED: f"{baseline} + temperature scaling"}
                report = replace(report, baselines={titles[name]: metrics for name, metrics in rows.items()})
                write_atomically(folder / FILE, json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
                write_card(folder, report)
                continue
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


def draw(folder: str | Path, report: Report) -> None:
    """Draw `reliability.png`, and `gamma.png` if the loss adapted, from the report alone."""
    plots = pictures()
    if plots is None:
        return
    titles = {RAW: "as trained", SCALED: "vector scaled"}
    if report.test.temperature is not None:
        titles[SCALED] = f"temperature {report.test.temperature:.2f}"
    bins = {titles[name]: stats for name, stats in report.test.reliability.items()}
    if bins:
        _save(plots.reliability_diagram(bins), Path(folder) / "reliability.png")
    gammas = [update for update in report.adaptation if "gammas" in update]
    if gammas:
        figure = plots.gamma_trajectory([update["step"] for update in gammas], [update["gammas"] for update in gammas])
        _save(figure, Path(folder) / "gamma.png")


def _save(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


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
