"""Markdown tables of calibration metrics: of one report (command line, model card) and of several runs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_adafocal.report.comparison import loss_name
from hf_adafocal.report.schema import RAW, SCALED, Report


class Column(NamedTuple):
    """A metric's column in a table: key, heading and number format.

    Attributes:
        key: Its name in a report.
        heading: Of the column.
        factor: 100 for a fraction shown in percent.
        digits: After the decimal point.
    """

    key: str
    heading: str
    factor: float
    digits: int

    def text(self, value: float | None, interval: Sequence[float] | None = None) -> str:
        """Format a value, with its interval in brackets if there is one; empty for None.

        >>> Column("ece", "ECE %", 100, 2).text(0.03, (0.02, 0.04))
        '3.00 (2.00 to 4.00)'
        """
        if value is None:
            return ""
        low_to_high = " to ".join(f"{self.factor * end:.{self.digits}f}" for end in interval or ())
        return f"{self.factor * value:.{self.digits}f}" + (f" ({low_to_high})" if interval else "")


METRICS = {
    column.key: column
    for column in (
        Column("accuracy", "accuracy %", 100, 2),
        Column("nll", "NLL", 1, 3),
        Column("brier", "Brier", 1, 3),
        Column("ece", "ECE %", 100, 2),
        Column("ada_ece", "AdaECE %", 100, 2),
        Column("binary_ece", "ECE of class 1 %", 100, 2),
        Column("binary_ada_ece", "AdaECE of class 1 %", 100, 2),
        Column("classwise_ece", "classwise ECE %", 100, 2),
        Column("mce", "MCE %", 100, 2),
    )
}
MAIN_KEYS = ("accuracy", "nll", "brier", "ece", "ada_ece")
COLUMNS = tuple(METRICS[key] for key in MAIN_KEYS)


def report_table(
    report: Report,
    keys: Sequence[str] = MAIN_KEYS,
    *,
    intervals: Sequence[str] = (),
    mark: bool = False,
) -> str:
    """Render one report: its scores as trained and scaled, then the baselines.

    Args:
        report: Of a run.
        keys: Metrics to show; one that no row has is left out.
        intervals: Those that are shown with their 95 % interval.
        mark: Set the title of the checkpoint's own scores in bold and escape names, as a card needs it.
    """
    test = report.test
    titles = scores_titles(report)
    rows = []
    for name, metrics in test.rows().items():
        ends = test.intervals.get(name, {})
        title = titles[name]
        if name == report.shipped:
            title = f"**{title}** (this checkpoint)" if mark else f"{title} (this checkpoint)"
        rows.append((title, metrics, {key: ends[key] for key in intervals if key in ends}))
    named = ((escape(title) if mark else title, metrics) for title, metrics in report.baselines.items())
    rows += [(f"baseline: {title}", metrics, {}) for title, metrics in named]
    columns = [METRICS[key] for key in keys if any(key in metrics for _, metrics, _ in rows)]
    cells = [
        [title, *(column.text(metrics.get(column.key), ends.get(column.key)) for column in columns)]
        for title, metrics, ends in rows
    ]
    return markdown([["scores", *(column.heading for column in columns)], *cells])


def results_table(report: Report, baseline: Report | None = None) -> str:
    """Render a run and its baseline, as trained and with a temperature, with 95 % intervals of accuracy and ECE.

    Args:
        report: Of the run.
        baseline: Of a run with another loss on the same splits; None if there is none.
    """
    keys = ("accuracy", "nll", "ece", "ada_ece")
    rows = [["scores", *(METRICS[key].heading for key in keys)]]
    for found in (report,) if baseline is None else (baseline, report):
        for name, metrics in found.test.rows().items():
            title = f"{loss_name(found)}, {scores_titles(found)[name]}"
            title += " (this checkpoint)" if found is report and name == report.shipped else ""
            ends = found.test.intervals.get(name, {})
            cells = [
                METRICS[key].text(metrics.get(key), ends.get(key) if key in ("accuracy", "ece") else None)
                for key in keys
            ]
            rows.append([title, *cells])
    return markdown(rows)


def escape(text: Any) -> str:
    r"""Escape text for Markdown and HTML, in one line.

    >>> escape("a *b*\n<i>")
    'a \\*b\\* \\<i\\>'
    """
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(str(text).split()))


def scores_titles(report: Report) -> dict[str, str]:
    """Return the titles of the scores as trained and scaled, for tables and pictures."""
    temperature, scaling = report.test.temperature, report.test.scaling
    scaled = "Platt scaled" if scaling is not None and scaling.method == "platt" else "vector scaled"
    return {RAW: "as trained", SCALED: scaled if temperature is None else f"T = {temperature:.2f}"}


def comparison_table(
    tests: Mapping[str, Sequence[Mapping[str, Any]]], columns: Sequence[tuple[str, str, float, int]] = COLUMNS
) -> str:
    """Mean and standard deviation over seeds of each loss, as trained and after temperature scaling.

    Args:
        tests: For each loss the `test` entry of each run's report, as `Report.to_dict` has it.
        columns: Key in `raw` and `temperature_scaled`, heading, factor and digits of each column.
    """
    rows = [["loss", "seeds", "scaling", *(heading for _, heading, _, _ in columns), "T"]]
    for loss, runs in tests.items():
        for name, title in ((RAW, "none"), (SCALED, "temperature")):
            cells = [
                mean_and_deviation([run[name][key] * factor for run in runs], digits)
                for key, _, factor, digits in columns
            ]
            temperatures = [run["temperature"] for run in runs if run.get("temperature") is not None]
            temperature = mean_and_deviation(temperatures, 2) if name == RAW and temperatures else ""
            rows.append([loss, str(len(runs)), title, *cells, temperature])
    return markdown(rows)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return the mean and, from two values on, the sample standard deviation.

    >>> mean_and_deviation([1.0, 3.0], 2)
    '2.00 ± 1.41'
    """
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table with aligned columns; the first row is the heading, bars inside cells are escaped."""
    escaped = [[re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(3, *(len(row[column]) for row in escaped)) for column in range(len(escaped[0]))]
    lines = [escaped[0], ["-" * width for width in widths], *escaped[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in lines
    )
