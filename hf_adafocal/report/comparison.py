"""What a comparison says in words, computed from the differences between runs of one seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t

RAW, SCALED = "raw", "temperature_scaled"


def verdict(reports: dict[str, Sequence[dict[str, Any]]], baseline: str = "cross_entropy") -> str:
    """Which loss is calibrated best without a fit and after temperature scaling, by ECE, and at what price.

    Differences are paired by seed. One whose 95 % interval (Student's, for their mean) holds 0 is called noise. If the
    baseline with temperature scaling is not worse than the best loss without a fit, the advice is to use just that.

    Args:
        reports: For each loss the `test` entries of its runs, in one order of seeds; the baseline among them.
        baseline: The loss that the others are compared with.

    Returns:
        A few sentences; empty without the baseline or without another loss.

    Raises:
        ValueError: If the losses have different numbers of runs.
    """
    if baseline not in reports or len(reports) < 2:
        return ""
    counts = {loss: len(runs) for loss, runs in reports.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"Every loss needs a run of every seed, found {counts}.")
    seeds = counts[baseline]
    percent = {
        (loss, scaling, key): 100 * np.asarray([run[scaling][key] for run in runs])
        for loss, runs in reports.items()
        for scaling in (RAW, SCALED)
        for key in ("ece", "accuracy")
    }

    def best(scaling: str) -> str:
        return min(reports, key=lambda loss: percent[loss, scaling, "ece"].mean())

    def praise(scaling: str) -> str:
        loss = best(scaling)
        text = f"{loss} is calibrated best: ECE {percent[loss, scaling, 'ece'].mean():.2f} %"
        if loss == baseline:
            return text
        ece, accuracy = (percent[loss, scaling, key] - percent[baseline, scaling, key] for key in ("ece", "accuracy"))
        return f"{text}, {paired_difference(ece)} against {baseline}, for {paired_difference(accuracy)} of accuracy"

    fitted = percent[baseline, SCALED, "ece"]
    excess = fitted - percent[best(RAW), RAW, "ece"]
    if excess.mean() <= 0 or _is_noise(excess):
        advice = f"Just use temperature scaling: {baseline} with it has an ECE of {fitted.mean():.2f} %, "
    else:
        advice = (
            f"Temperature scaling does not make up for it: {baseline} with it has an ECE of {fitted.mean():.2f} %, "
        )
    intro = (
        f"{seeds} seeds, paired differences with 95 % intervals." if seeds > 1 else "One seed: repeat it with more."
    )
    return (
        f"{intro} Without a fit {praise(RAW)}. After temperature scaling {praise(SCALED)}. "
        f"{advice}{paired_difference(excess)} against the best without a fit."
    )


def paired_difference(differences: np.ndarray) -> str:
    """The mean of paired differences with its 95 % interval, and whether it is noise.

    Args:
        differences: In percent, one a seed, shape `(seeds,)`.

    >>> paired_difference(np.array([-5.0, -6.0, -7.0]))
    '-6.00 points (-8.48 to -3.52)'
    """
    text = f"{differences.mean():+.2f} points"
    interval = _interval(differences)
    if interval is None:
        return text
    return f"{text} ({interval[0]:+.2f} to {interval[1]:+.2f}{', noise' if _is_noise(differences) else ''})"


def _interval(differences: np.ndarray) -> tuple[float, float] | None:
    """Student's interval of 95 % for the mean of paired differences; None of a single one."""
    if len(differences) < 2:
        return None
    half = t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return differences.mean() - half, differences.mean() + half


def _is_noise(differences: np.ndarray) -> bool:
    interval = _interval(differences)
    return interval is not None and interval[0] <= 0 <= interval[1]
