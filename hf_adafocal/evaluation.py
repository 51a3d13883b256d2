"""What a fine-tune is worth on its test split, before and after temperature scaling."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_adafocal.metrics import calibration_report, softmax
from hf_adafocal.scaling import fit_temperature

# What tables show of a report: key, heading, factor, digits.
COLUMNS = (
    ("accuracy", "accuracy %", 100, 2),
    ("nll", "NLL", 1, 3),
    ("brier", "Brier", 1, 3),
    ("ece", "ECE %", 100, 2),
    ("ada_ece", "AdaECE %", 100, 2),
)


def split_report(
    test: tuple[np.ndarray, np.ndarray], calibration: tuple[np.ndarray, np.ndarray], num_bins: int = 15
) -> dict[str, Any]:
    """Calibration of the test split, raw and with a temperature fitted on the calibration split.

    Args:
        test: Logits `(N, C)` and labels `(N,)` of the test split.
        calibration: Logits and labels of the calibration split.
        num_bins: Bins of the binned metrics.

    Returns:
        `temperature`, and `raw` and `temperature_scaled`: two `calibration_report`s.

    Raises:
        ValueError: If shapes do not fit or a logit is not finite.
    """
    logits, labels = test
    temperature = fit_temperature(*calibration)
    return {
        "temperature": temperature,
        "raw": calibration_report(softmax(logits), labels, num_bins),
        "temperature_scaled": calibration_report(softmax(np.asarray(logits) / temperature), labels, num_bins),
    }


def report_table(report: dict[str, Any]) -> str:
    """One run's `test` entry as a Markdown table."""
    rows = [["", *(heading for _, heading, _, _ in COLUMNS)]]
    for name, title in (("raw", "as trained"), ("temperature_scaled", f"T = {report['temperature']:.2f}")):
        rows.append([title, *(f"{report[name][key] * factor:.{digits}f}" for key, _, factor, digits in COLUMNS)])
    return _markdown(rows)


def comparison_table(reports: dict[str, Sequence[dict[str, Any]]]) -> str:
    """Mean and standard deviation over seeds of each loss, raw and after temperature scaling, as a Markdown table.

    Args:
        reports: For each loss the `test` entries of its runs.
    """
    rows = [["loss", "seeds", "scaling", *(heading for _, heading, _, _ in COLUMNS), "T"]]
    for loss, runs in reports.items():
        for name, title in (("raw", "none"), ("temperature_scaled", "temperature")):
            cells = [
                _mean_and_deviation([run[name][key] * factor for run in runs], digits)
                for key, _, factor, digits in COLUMNS
            ]
            temperature = _mean_and_deviation([run["temperature"] for run in runs], 2) if name == "raw" else ""
            rows.append([loss, str(len(runs)), title, *cells, temperature])
    return _markdown(rows)


def _mean_and_deviation(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows
    )
