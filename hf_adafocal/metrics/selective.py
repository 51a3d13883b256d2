"""Selective prediction: risk-coverage curves and the areas under them (AURC, E-AURC, AUGRC).

The most confident predictions are accepted first; coverage is the share accepted, risk the share of those that is
wrong. The functions depend on the order of the confidences alone, so any score can be used: a probability, a margin, a
negative entropy.

Ties: results do not depend on the order in which a sort leaves equal confidences. `risk_coverage_curve` has one point
per distinct confidence, as no threshold can split a tie. An area is the expectation over all orders of the tied
samples: the number of errors is interpolated linearly from one point of the curve to the next. Without ties that is
the usual definition. All results are fractions and lower is better.
"""

from typing import Any, NamedTuple

import numpy as np

from hf_adafocal.metrics.validation import as_numbers


class RiskCoverageCurve(NamedTuple):
    """Risk and coverage at each threshold, one per distinct confidence, K in all.

    Attributes:
        coverage: Share of samples accepted, ascending, shape `(K,)`; the last is 1. There is no point at coverage 0,
            where no risk is defined.
        risk: Share of the accepted samples that is wrong, shape `(K,)`.
        threshold: Accept a sample if its confidence is this or more, descending, shape `(K,)`.
    """

    coverage: np.ndarray
    risk: np.ndarray
    threshold: np.ndarray


def risk_coverage_curve(confidence: Any, correct: Any) -> RiskCoverageCurve:
    """Compute the error rate among the accepted samples for every confidence threshold.

    Args:
        confidence: Any score that is higher for more confident predictions, shape `(N,)`, N >= 1; infinite is allowed.
        correct: 1 (or True) where the prediction was right, 0 where it was wrong, shape `(N,)`.

    Returns:
        Coverage, risk and threshold, from the most confident samples alone to all of them.

    Raises:
        ValueError: If the shapes differ or are empty, a confidence is NaN, or an outcome is neither 0 nor 1.

    Source: El-Yaniv and Wiener 2010 (the risk-coverage trade-off); Geifman and El-Yaniv 2017, arXiv 1705.08500.

    >>> risk_coverage_curve([0.9, 0.6, 0.6, 0.3], [1, 0, 1, 0]).coverage
    array([0.25, 0.75, 1.  ])
    """
    accepted, wrong, threshold = count_accepted(confidence, correct)
    return RiskCoverageCurve(accepted / accepted[-1], wrong / accepted, threshold)


def area_under_risk_coverage(confidence: Any, correct: Any) -> float:
    """Compute AURC: the mean risk over the coverages 1/N, 2/N, ..., 1; ties in expectation (see the module).

    AURC is defined as this mean and not by a trapezoidal rule, so N = 1 is no special case.

    Args:
        confidence: Any score that is higher for more confident predictions, shape `(N,)`, N >= 1; infinite is allowed.
        correct: 1 (or True) where the prediction was right, 0 where it was wrong, shape `(N,)`.

    Returns:
        A fraction in [0, 1]: 0 if all are right, 1 if all are wrong, the error rate if all confidences are equal.

    Raises:
        ValueError: As `risk_coverage_curve`.

    Source: Geifman, Uziel and El-Yaniv 2019, arXiv 1805.08206.

    >>> area_under_risk_coverage([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0])  # (0 + 1/2 + 1/3 + 1/2) / 4
    0.3333333333333333
    """
    accepted, wrong, _ = count_accepted(confidence, correct)
    return _mean_risk(_expected_errors(accepted, wrong))


def excess_area_under_risk_coverage(confidence: Any, correct: Any) -> float:
    """Compute E-AURC: AURC minus the lowest AURC possible at this accuracy; arguments as AURC's.

    The lowest one is that of these N samples with every right one accepted before every wrong one, so a perfect order
    gives exactly 0. The authors' `r + (1 - r) log(1 - r)` for error rate r is its limit for large N.

    Returns:
        A fraction in [0, 1): 0 for a perfect order, and if all samples are right or all are wrong.

    Raises:
        ValueError: As `risk_coverage_curve`.

    Source: Geifman, Uziel and El-Yaniv 2019, arXiv 1805.08206.

    >>> excess_area_under_risk_coverage([0.9, 0.8, 0.7], [1, 1, 0])
    0.0
    """
    accepted, wrong, _ = count_accepted(confidence, correct)
    total, right = accepted[-1], accepted[-1] - wrong[-1]
    least = np.maximum(np.arange(1, total + 1) - right, 0)
    return _mean_risk(_expected_errors(accepted, wrong)) - _mean_risk(least)


def area_under_generalized_risk_coverage(confidence: Any, correct: Any) -> float:
    """Compute AUGRC: the area under the generalized risk, the share of all samples that is accepted and wrong.

    Coverage runs from 0 to 1. AURC gives most weight to the few most confident samples; AUGRC depends only on the
    error rate r and on the AUROC of the confidence as a detector of right predictions: it is
    `(1 - AUROC) r (1 - r) + r^2 / 2`. The area between two points is a trapezoid, which is also the expectation over
    all orders of ties. Arguments as AURC's.

    Returns:
        A fraction in [0, 0.5]: 0 if all are right, 0.5 if all are wrong, half the error rate if all confidences are
        equal.

    Raises:
        ValueError: As `risk_coverage_curve`.

    Source: Traub et al. 2024, arXiv 2407.01032.

    >>> area_under_generalized_risk_coverage([0.9, 0.1], [1, 0])
    0.125
    """
    accepted, wrong, _ = count_accepted(confidence, correct)
    width, before = np.diff(accepted, prepend=0), np.append(0, wrong[:-1])
    return float(width @ (before + wrong) / (2 * accepted[-1] ** 2))


def count_accepted(confidence: Any, correct: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the samples at or above each distinct confidence and the wrong ones among them.

    Args:
        confidence: Shape `(N,)`, N >= 1.
        correct: 1 or 0, shape `(N,)`.

    Returns:
        Samples, wrong samples and the confidence, each of shape `(K,)`, in descending order of confidence.

    Raises:
        ValueError: As `risk_coverage_curve`.
    """
    confidence, correct = as_numbers(confidence, "confidence"), as_numbers(correct, "correct")
    if confidence.ndim != 1 or confidence.shape != correct.shape or confidence.size == 0:
        raise ValueError(
            "Expected two vectors of one length N >= 1: a confidence and a 0/1 outcome per sample; "
            f"found shapes {confidence.shape} and {correct.shape}."
        )
    if np.isnan(confidence).any():
        raise ValueError(f"confidence holds NaN in {np.count_nonzero(np.isnan(confidence))} of {len(confidence)}.")
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError(f"Outcomes must be 0 or 1, found values from {correct.min()} to {correct.max()}.")
    order = np.argsort(confidence)[::-1]
    confidence = confidence[order]
    last_of_tie = np.flatnonzero(np.append(confidence[1:] != confidence[:-1], True))
    wrong = np.cumsum(correct[order] == 0)
    return last_of_tie + 1, wrong[last_of_tie], confidence[last_of_tie]


def _expected_errors(accepted: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Expected errors among the first 1, 2, ..., N samples over all orders of ties, shape `(N,)`."""
    return np.interp(np.arange(1, accepted[-1] + 1), np.append(0, accepted), np.append(0, wrong))


def _mean_risk(errors: np.ndarray) -> float:
    return float(np.mean(errors / np.arange(1, len(errors) + 1)))
