"""Pictures of calibration. Each function returns a matplotlib `Figure` and touches no global state."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hf_adafocal.metrics.binning import BinStats, binned, equal_width_edges
from hf_adafocal.metrics.scores import top_label
from hf_adafocal.metrics.validation import check_pairs

ACCURACY, GAP, INK, PAPER = "#2b6ca3", "#d1495b", "#333333", "#e9eef4"
# Points at the width of two panels, 6.2 inches: shown 600 pixels wide the smallest letters are 11 pixels high.
PANEL = 3.1  # inches
STYLE = {"titlesize": 10, "labelsize": 9, "ticksize": 8, "notesize": 8}


def reliability_of_probabilities(
    probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 15, *, title: str = ""
) -> Figure:
    """Reliability diagram of class probabilities: accuracy of the predicted class against its probability.

    Args:
        probabilities: Shape `(N, C)`, rows sum to 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.
        num_bins: Bins of one width on [0, 1].
        title: First line above the diagram; the second one is the ECE.

    Returns:
        The figure; `savefig` writes it at 200 dots per inch.

    Raises:
        ValueError: If shapes do not fit, rows are no probabilities or labels no class indices.

    >>> p = np.array([[0.75, 0.25]] * 4)
    >>> reliability_of_probabilities(p, np.array([0, 0, 0, 1])).axes[0].get_title()
    'ECE 0.0 %'
    """
    return reliability_of_confidences(*top_label(probabilities, labels), num_bins, title=title)


def reliability_of_confidences(
    confidence: np.ndarray, correct: np.ndarray, num_bins: int = 15, *, title: str = ""
) -> Figure:
    """Reliability diagram of confidences: accuracy against confidence.

    Args:
        confidence: Probability that the prediction is correct, shape `(N,)`, in [0, 1].
        correct: 1 where it was, 0 where it was not, shape `(N,)`.
        num_bins: Bins of one width on [0, 1].
        title: First line above the diagram; the second one is the ECE.

    Returns:
        The figure; `savefig` writes it at 200 dots per inch.

    Raises:
        ValueError: If the shapes differ or a value is out of range.

    >>> reliability_of_confidences(np.full(4, 0.75), np.array([1, 1, 1, 1])).axes[0].get_title()
    'ECE 25.0 %'
    """
    return reliability_diagram({title: binned(*check_pairs(confidence, correct), num_bins, "equal_width")})


def reliability_diagram(diagrams: BinStats | Mapping[str, BinStats], *, accuracy_label: str = "accuracy") -> Figure:
    """Reliability diagram of bin statistics: accuracy against confidence, above the number of samples per bin.

    A point below the diagonal is over-confident. Intervals are Wilson's, 95 %. The title gives the ECE (AdaECE where
    the bins are not of one width).

    Args:
        diagrams: Bin statistics, or several by title, drawn side by side.
        accuracy_label: What the vertical axis counts.

    Returns:
        The figure; `savefig` writes it at 200 dots per inch.

    Raises:
        TypeError: If it is given arrays: `reliability_of_probabilities` and `reliability_of_confidences` take them.
        ValueError: If there is nothing to draw.
    """
    if isinstance(diagrams, BinStats):
        diagrams = {"": diagrams}
    if not isinstance(diagrams, Mapping) or not all(isinstance(stats, BinStats) for stats in diagrams.values()):
        raise TypeError(
            f"Expected bin statistics, found {type(diagrams).__name__}. From probabilities (N, C) and labels draw "
            "with reliability_of_probabilities, from confidences and correctness with reliability_of_confidences."
        )
    if not diagrams or any(stats.count.sum() == 0 for stats in diagrams.values()):
        raise ValueError("Expected bins that hold samples, found none.")
    figure = Figure(figsize=(PANEL * len(diagrams) + 0.3 * (len(diagrams) == 1), 4.2), dpi=200, layout="constrained")
    grid = figure.subplots(2, len(diagrams), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1.25])
    for (title, stats), (upper, lower) in zip(diagrams.items(), grid.T, strict=True):
        _reliability(upper, stats, title)
        _counts(lower, stats)
    grid[0, 0].set_ylabel(accuracy_label, fontsize=STYLE["labelsize"])
    grid[1, 0].set_ylabel("samples", fontsize=STYLE["labelsize"])
    top = max(int(stats.count.max()) for stats in diagrams.values())
    grid[1, 0].set_ylim(0.7, top * 30)  # room for the counts above the bars
    legend = [
        Line2D([], [], color=ACCURACY, marker="o", markersize=4, linewidth=1, label="accuracy, 95 % interval"),
        Patch(facecolor=GAP, alpha=0.35, label="gap to confidence"),
        Line2D([], [], color=INK, linestyle="--", linewidth=0.8, label="calibrated"),
    ]
    columns = 3 if len(diagrams) > 1 else 1
    figure.legend(handles=legend, fontsize=STYLE["notesize"], loc="outside lower center", ncols=columns, frameon=False)
    return figure


def adaptation_diagrams(history: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Plot how a loss adapted over training: gamma of each bin, or the label smoothing.

    Args:
        history: Updates of a report: `{"step": int, "gammas": [...]}` or `{"step": int, "smoothing": float}`.

    Returns:
        Figures by name, "gamma" or "smoothing"; empty if nothing adapted.
    """
    figures = {}
    gammas = [update for update in history if "gammas" in update]
    if gammas:
        figures["gamma"] = gamma_trajectory([u["step"] for u in gammas], [u["gammas"] for u in gammas])
    smoothing = [update for update in history if "smoothing" in update]
    if smoothing:
        figure, axes = _trajectory("smoothing of the labels")
        values = [update["smoothing"] for update in smoothing]
        axes.plot([u["step"] for u in smoothing], values, color=ACCURACY, linewidth=1.2, marker="o", markersize=3)
        axes.set_ylim(0)
        figures["smoothing"] = figure
    return figures


def gamma_trajectory(steps: Sequence[int], gammas: Sequence[Sequence[float]], switch: float = 0.2) -> Figure:
    """Plot the gamma of each bin over training.

    Args:
        steps: Optimizer step of each update, 0 for the start, shape `(updates,)`.
        gammas: Gamma of each bin after it, shape `(updates, num_bins)`.
        switch: Half-width of the band around 0 that gamma jumps over.

    Returns:
        The figure; one line per bin, from the least (dark) to the most confident (bright).

    Raises:
        ValueError: If the shapes do not fit.

    >>> len(gamma_trajectory([0, 10], [[1.0, 1.0], [1.5, 0.5]]).axes)  # the lines, and the bar that names the bins
    2
    """
    values = np.asarray(gammas, dtype=float)
    if values.ndim != 2 or len(values) != len(steps) or len(values) == 0:
        raise ValueError(f"gammas must have shape (updates, num_bins) for {len(steps)} updates, found {values.shape}.")
    figure, axes = _trajectory("gamma (below 0: inverse focal)")
    num_bins = values.shape[1]
    colors = colormaps["viridis"].resampled(num_bins)
    axes.axhspan(-switch, switch, color=PAPER, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.6)
    for index in range(num_bins):
        axes.plot(steps, values[:, index], color=colors(index), linewidth=1.2, marker="o", markersize=2)
    if num_bins == 1:
        return figure
    norm = BoundaryNorm(np.arange(num_bins + 1) + 0.5, num_bins)
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, pad=0.02, ticks=[1, (num_bins + 1) // 2, num_bins])
    bar.set_label("bin, by confidence", fontsize=STYLE["labelsize"])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=STYLE["ticksize"], length=0)
    return figure


def comparison_chart(errors: Mapping[str, Mapping[str, Sequence[float]]], label: str = "ECE, %") -> Figure:
    """Bar chart of the calibration error of several losses, before and after temperature scaling; a dot per seed.

    Args:
        errors: For each loss, for each kind of scaling, the error of each seed.
        label: Name and unit of the error.

    Returns:
        The figure; bars are means.
    """
    kinds = list(next(iter(errors.values())))
    height = 0.8 / len(kinds)
    figure = Figure(figsize=(5.2, 0.5 * len(errors) + 1.2), dpi=200, layout="constrained")
    axes = figure.subplots()
    for index, (kind, color) in enumerate(zip(kinds, (GAP, ACCURACY, INK), strict=False)):
        for row, by_kind in enumerate(errors.values()):
            values = np.asarray(by_kind[kind], dtype=float)
            position = row + (index - (len(kinds) - 1) / 2) * height
            axes.barh(
                position, values.mean(), height * 0.92, color=color, alpha=0.45, label=kind if row == 0 else None
            )
            axes.plot(values, np.full(len(values), position), "o", color=color, markersize=3)
    axes.set_yticks(range(len(errors)), list(errors))
    axes.invert_yaxis()
    _frame(axes)
    axes.set_xlim(0)
    axes.set_xlabel(label, fontsize=STYLE["labelsize"])
    figure.legend(fontsize=STYLE["notesize"], loc="outside upper right", ncols=len(kinds), frameon=False)
    return figure


def _reliability(axes, stats: BinStats, title: str) -> None:
    filled = stats.count > 0
    count, accuracy, confidence = stats.count[filled], stats.accuracy[filled], stats.confidence[filled]
    left, width = stats.edges[:-1][filled], np.diff(stats.edges)[filled]
    low, high = _wilson(accuracy, count)
    axes.bar(left, confidence - accuracy, width, accuracy, align="edge", color=GAP, alpha=0.35, linewidth=0)
    axes.bar(left, accuracy, width, align="edge", color=PAPER, edgecolor="white", linewidth=0.5, zorder=0)
    axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=0.8)
    bars = [accuracy - low, high - accuracy]
    axes.errorbar(confidence, accuracy, bars, fmt="o-", color=ACCURACY, markersize=3.5, linewidth=1, capsize=2)
    error = float(np.abs(stats.gap) @ stats.count / stats.count.sum())
    heading = f"{title}\n" if title else ""
    name = "ECE" if np.array_equal(stats.edges, equal_width_edges(len(stats.count))) else "AdaECE"
    axes.set_title(f"{heading}{name} {100 * error:.1f} %", fontsize=STYLE["titlesize"])
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
    _frame(axes)


def _counts(axes, stats: BinStats) -> None:
    filled = stats.count > 0
    axes.bar(stats.edges[:-1], stats.count, np.diff(stats.edges), align="edge", color=ACCURACY, edgecolor="white")
    centres = (stats.edges[:-1] + stats.edges[1:]) / 2
    for centre, count in zip(centres[filled], stats.count[filled], strict=True):
        axes.annotate(
            f"{count}", (centre, count), (0, 2), textcoords="offset points", rotation=90, ha="center", va="bottom",
            fontsize=STYLE["notesize"], color=INK,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("confidence", fontsize=STYLE["labelsize"])
    _frame(axes)


def _trajectory(label: str) -> tuple[Figure, Any]:
    """Make an empty figure over optimizer steps."""
    figure = Figure(figsize=(0.6 * 2 * PANEL, 2.7), dpi=200, layout="constrained")
    axes = figure.subplots()
    _frame(axes)
    axes.set_xlabel("optimizer step", fontsize=STYLE["labelsize"])
    axes.set_ylabel(label, fontsize=STYLE["labelsize"])
    return figure, axes


def _frame(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=STYLE["ticksize"])


def _wilson(share: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Compute Wilson's interval of a proportion of `count` samples; it stays inside [0, 1]."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return np.minimum(centre - half, share), np.maximum(centre + half, share)
