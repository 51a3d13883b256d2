"""What a fine-tune is worth on its test split, before and after temperature scaling."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_adafocal.metrics.bootstrap import report_intervals
from hf_adafocal.metrics.scores import calibration_report, softmax
from hf_adafocal.scaling.fit import Scaling, fit_temperature_scaling

# What tables show of a report: key, heading, factor, digits.
COLUMNS = (
    ("accuracy", "accuracy %", 100, 2),
    ("nll", "NLL", 1, 3),
    ("brier", "Brier", 1, 3),
    ("ece", "ECE %", 100, 2),
    ("ada_ece", "AdaECE %", 100, 2),
)
# Kind of bins of each binned metric.
BINS = {"ece": "equal_width", "ada_ece": "equal_mass", "classwise_ece": "equal_width", "mce": "equal_width"}


def split_report(
    test: tuple[np.ndarray, np.ndarray],
    calibration: tuple[np.ndarray, np.ndarray],
    num_bins: int = 15,
    *,
    scaling: Scaling | None = None,
    num_resamples: int = 1000,
) -> dict[str, Any]:
    """Calibration of the test split, raw and with a temperature fitted on the calibration split.

    Args:
        test: Logits `(N, C)` and labels `(N,)` of the test split, before any scaling.
        calibration: Logits and labels of the calibration split.
        num_bins: Number of bins of the binned metrics.
        scaling: A scaling that was fitted before, to be used instead of a new temperature.
        num_resamples: Resamples of the bootstrap intervals.

    Returns:
        `scaling`, its record, and `temperature` (None for vector scaling); `bins`, the kind of bins of each binned
        metric; `raw` and `temperature_scaled`, two
        `calibration_report`s, the second one with whatever `scaling` is; `intervals`, for each of the two and each
        metric the `[low, high]` of `uncertainty.report_intervals`, with their `level` and `num_resamples`.

    Raises:
        ValueError: If shapes do not fit or a logit is not finite.
    """
    logits, labels = test
    if scaling is None:
        scaling = fit_temperature_scaling(*calibration)
    scaled = {"raw": softmax(logits), "temperature_scaled": softmax(scaling.apply(np.asarray(logits, dtype=float)))}
    intervals = {
        name: {
            metric: [interval.low, interval.high]
            for metric, interval in report_intervals(p, labels, num_bins, num_resamples=num_resamples).items()
        }
        for name, p in scaled.items()
    }
    return {
        "temperature": scaling.to_dict().get("temperature"),
        "scaling": scaling.to_dict(),
        "bins": dict(BINS),
        **{name: calibration_report(p, labels, num_bins) for name, p in scaled.items()},
        "intervals": {"level": 0.95, "num_resamples": num_resamples, **intervals},
    }


def report_table(report: dict[str, Any]) -> str:
    """One run's `test` entry as a Markdown table."""
    rows = [["", *(heading for _, heading, _, _ in COLUMNS)]]
    scaled = "vector scaled" if report["temperature"] is None else f"T = {report['temperature']:.2f}"
    for name, title in (("raw", "as trained"), ("temperature_scaled", scaled)):
        rows.append([title, *(f"{report[name][key] * factor:.{digits}f}" for key, _, factor, digits in COLUMNS)])
    return _markdown(rows)


def comparison_table(
    reports: dict[str, Sequence[dict[str, Any]]], columns: Sequence[tuple[str, str, float, int]] = COLUMNS
) -> str:
    """Mean and standard deviation over seeds of each loss, raw and after temperature scaling, as a Markdown table.

    Args:
        reports: For each loss the `test` entries of its runs.
        columns: Key in `raw` and `temperature_scaled`, heading, factor and digits of each column.
    """
    rows = [["loss", "seeds", "scaling", *(heading for _, heading, _, _ in columns), "T"]]
    for loss, runs in reports.items():
        for name, title in (("raw", "none"), ("temperature_scaled", "temperature")):
            cells = [
                _mean_and_deviation([run[name][key] * factor for run in runs], digits)
                for key, _, factor, digits in columns
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
