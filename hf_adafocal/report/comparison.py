"""Summarise a comparison of losses in words, from paired differences between runs with the same seed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t

from hf_adafocal.report.schema import RAW, SCALED, Report

LEVEL = 0.95


def verdict(tests: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str = "cross_entropy") -> str:
    """State which loss is calibrated best as trained and after temperature scaling, where there is evidence for it.

    Differences of ECE are paired by seed. A loss is called best only if its 95 % intervals (Student's, for the mean
    difference) against every other loss lie below 0, with the level divided among those comparisons (Bonferroni).
    One seed is no evidence: then nothing is called best.

    Args:
        tests: For each loss the `test` entry of each run's report, in one order of seeds.
        baseline: The loss that the others are compared with.

    Returns:
        A few sentences; empty without the baseline or without another loss.

    Raises:
        ValueError: If the losses have different numbers of runs.
    """
    if baseline not in tests or len(tests) < 2:
        return ""
    counts = {loss: len(runs) for loss, runs in tests.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"Every loss needs a run of every seed, found {counts}.")
    seeds = counts[baseline]
    percent = {
        (loss, scaling, key): 100 * np.asarray([run[scaling][key] for run in runs])
        for loss, runs in tests.items()
        for scaling in (RAW, SCALED)
        for key in ("ece", "accuracy")
    }
    if seeds == 1:
        values = ", ".join(f"{loss} {percent[loss, RAW, 'ece'][0]:.2f} %" for loss in tests)
        return (
            f"One seed: differences between the losses cannot be told from chance, so none is called best (ECE as "
            f"trained: {values}). Repeat it with more seeds, say --seeds 0 1 2."
        )
    sentences = [f"{seeds} seeds, paired differences with 95 % intervals."]
    for scaling, when in ((RAW, "As trained"), (SCALED, "After temperature scaling")):
        sentences.append(f"{when} {_ranking(tests, percent, scaling, baseline)}")
    fitted, lowest = percent[baseline, SCALED, "ece"], percent[_lowest(tests, percent, RAW), RAW, "ece"]
    excess = fitted - lowest
    scaled = f"{baseline} with a fitted temperature has an ECE of {fitted.mean():.2f} %, {paired_difference(excess)}"
    against = "against the lowest as trained"
    if is_noise(excess):
        sentences.append(f"Whether a temperature is enough these seeds leave open: {scaled} {against}.")
    elif excess.mean() < 0:
        sentences.append(f"A temperature is enough here: {scaled} {against}.")
    else:
        sentences.append(f"A temperature alone does not reach it: {scaled} {against}.")
    return " ".join(sentences)


def results_in_words(report: Report, baseline: Report | None = None) -> str:
    """Describe one run against its baseline, claiming only differences beyond the 95 % intervals.

    Two values are told apart only if their intervals do not overlap.

    Args:
        report: Of the run.
        baseline: Of a run with another loss on the same splits; None if there is none.
    """
    own = report.test.rows()
    sentences = []
    if baseline is not None and RAW in own and RAW in baseline.test.rows():
        sentences.append(f"As trained, {_against(report, baseline, 'accuracy', RAW, 'an accuracy')};")
        sentences.append(f"{_against(report, baseline, 'ece', RAW, 'an ECE')}.")
    if report.folded and RAW in own:
        before, after = _value(report, "ece", RAW), _value(report, "ece", SCALED)
        sentences.append(
            f"A temperature of {report.test.temperature:.2f} is folded in: ECE {before.text} before, {after.text} "
            f"after, {_verdict(after, before)}."
        )
    else:
        sentences.append(report.scaling_outcome)
    if baseline is not None and SCALED in own and SCALED in baseline.test.rows():
        sentences.append(f"With a temperature for both, {_against(report, baseline, 'ece', SCALED, 'an ECE')}.")
    if baseline is not None:
        sentences.append("This is one seed on one split.")
    return " ".join(sentences)


def loss_name(report: Report) -> str:
    """Return the name of the loss that a run was trained with."""
    return str((report.loss or {}).get("name", "this model"))


class _Value(NamedTuple):
    """A metric of a report with the ends of its interval, and all as text."""

    text: str
    low: float
    high: float


def _value(report: Report, key: str, kind: str) -> _Value:
    value = report.test.rows()[kind][key]
    low, high = report.test.intervals.get(kind, {}).get(key, (value, value))
    return _Value(f"{100 * value:.2f} % ({100 * low:.2f} to {100 * high:.2f})", low, high)


def _against(report: Report, baseline: Report, key: str, kind: str, title: str) -> str:
    first, second = _value(report, key, kind), _value(baseline, key, kind)
    names = loss_name(report), loss_name(baseline)
    return f"{names[0]} has {title} of {first.text} and {names[1]} {second.text}, {_verdict(first, second)}"


def _verdict(first: _Value, second: _Value) -> str:
    if first.high < second.low or second.high < first.low:
        return f"{'lower' if first.high < second.low else 'higher'} beyond both intervals"
    return "which their intervals cannot tell apart"


def _lowest(tests: Mapping[str, Any], percent: Mapping[tuple[str, str, str], np.ndarray], scaling: str) -> str:
    return min(tests, key=lambda loss: percent[loss, scaling, "ece"].mean())


def _ranking(
    tests: Mapping[str, Any], percent: Mapping[tuple[str, str, str], np.ndarray], scaling: str, baseline: str
) -> str:
    loss = _lowest(tests, percent, scaling)
    others = [other for other in tests if other != loss]
    level = 1 - (1 - LEVEL) / len(others)
    ece = {other: percent[loss, scaling, "ece"] - percent[other, scaling, "ece"] for other in others}
    equals = [other for other in others if is_noise(ece[other], level)]
    value = f"{percent[loss, scaling, 'ece'].mean():.2f} %"
    text = f"{loss} is calibrated best: ECE {value}"
    if equals:
        text = f"none is calibrated best by evidence: {loss} has the lowest ECE, {value}, within noise of "
        text += " and ".join([", ".join(equals[:-1]), equals[-1]] if len(equals) > 1 else equals)
    if loss == baseline:
        return f"{text}."
    accuracy = percent[loss, scaling, "accuracy"] - percent[baseline, scaling, "accuracy"]
    price = f"{paired_difference(ece[baseline])} against {baseline}, for {paired_difference(accuracy)} of accuracy"
    return f"{text}; {price}."


def paired_difference(differences: np.ndarray) -> str:
    """Format the mean of paired differences with its 95 % interval, and whether it is noise.

    Args:
        differences: In percent, one per seed, shape `(seeds,)`.

    >>> paired_difference(np.array([-5.0, -6.0, -7.0]))
    '-6.00 points (-8.48 to -3.52)'
    """
    text = f"{differences.mean():+.2f} points"
    interval = student_interval(differences)
    if interval is None:
        return text
    return f"{text} ({interval[0]:+.2f} to {interval[1]:+.2f}{', noise' if is_noise(differences) else ''})"


def student_interval(differences: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """Compute Student's t interval for the mean of paired differences; None for a single one.

    >>> low, high = student_interval(np.array([-5.0, -6.0, -7.0]))
    >>> round(low, 2), round(high, 2)
    (-8.48, -3.52)
    """
    if len(differences) < 2:
        return None
    half = t.ppf((1 + level) / 2, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return float(differences.mean() - half), float(differences.mean() + half)


def is_noise(differences: np.ndarray, level: float = LEVEL) -> bool:
    """Whether the interval of the mean difference contains 0; true for a single difference."""
    interval = student_interval(differences, level)
    return interval is None or interval[0] <= 0 <= interval[1]
