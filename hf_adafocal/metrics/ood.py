"""Out-of-distribution (OOD) detection: scores from logits, and AUROC, AUPR and FPR95 of a score.

Every score is higher for samples that are more likely in-distribution, and in-distribution is the positive class
unless stated otherwise. The metrics depend on the order of the scores alone. Samples of equal score are accepted or
rejected together, so the order of the samples does not matter. Results are fractions.
"""

from typing import Any, Literal

import numpy as np

from hf_adafocal.metrics.selective import count_accepted
from hf_adafocal.metrics.validation import as_array, as_numbers


def max_softmax_score(logits: Any) -> np.ndarray:
    """Compute the maximum softmax probability (MSP) of each row of logits, shape `(N,)`, in [1/C, 1].

    It is exactly 1 once the top logit leads by about 37, so that more confident samples tie; the entropy distinguishes
    them up to a lead of about 700.

    Args:
        logits: Unnormalised scores, not probabilities, shape `(N, C)`; computed in float64. A logit of -inf is a class
            of probability 0.

    Returns:
        One score per sample.

    Raises:
        ValueError: If `logits` is not `(N, C)`, holds NaN, or a row has no finite largest logit.

    Source: Hendrycks and Gimpel 2017, arXiv 1610.02136.

    >>> max_softmax_score(np.zeros((1, 4)))
    array([0.25])
    """
    _, shifted = _shift(logits)
    return 1 / np.exp(shifted, out=shifted).sum(axis=1)


def entropy_score(logits: Any) -> np.ndarray:
    """Compute the negative entropy of the softmax in nats, shape `(N,)`, in [-log C, 0].

    Arguments and errors as `max_softmax_score`.

    >>> entropy_score(np.zeros((1, 2)))  # -log 2
    array([-0.69314718])
    """
    _, shifted = _shift(logits)
    weights = np.exp(shifted)
    shifted[weights == 0] = 0  # p log p is 0 there, not 0 times minus infinity
    weights[np.arange(len(weights)), weights.argmax(axis=1)] = 0  # the top one, 1: added last, it rounds nothing away
    rest = weights.sum(axis=1)
    return np.einsum("nc,nc->n", weights, shifted) / (1 + rest) - np.log1p(rest)  # neither is above 0


def energy_score(logits: Any, temperature: float = 1.0) -> np.ndarray:
    """Compute the negative free energy `T log sum exp(logits / T)` of each row, shape `(N,)`.

    The unit is that of the logits; T is finite and above 0. Unlike the other two scores it changes when a constant is
    added to a row of logits. Other arguments and errors as `max_softmax_score`.

    Source: Liu et al. 2020, arXiv 2010.03759 (the energy is the negative of this score).

    >>> energy_score(np.zeros((1, 2)))  # log 2
    array([0.69314718])
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature must be finite and above 0, found {temperature}.")
    top, shifted = _shift(logits)
    shifted /= temperature
    return top + temperature * np.log(np.exp(shifted, out=shifted).sum(axis=1))


def ood_auroc(in_scores: Any, out_scores: Any) -> float:
    """Compute AUROC: the probability that an in-distribution sample scores higher than an OOD one; ties count half.

    It does not depend on which of the two is called positive.

    Args:
        in_scores: Scores of in-distribution samples, shape `(N,)`, N >= 1; infinite is allowed.
        out_scores: Scores of out-of-distribution samples, shape `(M,)`, M >= 1.

    Returns:
        A fraction in [0, 1]: 1 is perfect, 0.5 is chance.

    Raises:
        ValueError: If either is empty, not a vector or holds NaN.

    >>> ood_auroc([3.0, 2.0], [2.0, 1.0])
    0.875
    """
    true, false = _count_positive(in_scores, out_scores)
    width, before = np.diff(false, prepend=0), np.append(0, true[:-1])
    return float(width @ (before + true) / (2 * true[-1] * false[-1]))


def ood_aupr(in_scores: Any, out_scores: Any, positive: Literal["in", "out"] = "in") -> float:
    """Compute AUPR as average precision: the precision at each threshold, weighted by the recall it adds.

    `positive` is the class to retrieve: "in" from the highest score down, "out" from the lowest up; other arguments
    and errors as `ood_auroc`. Nothing is interpolated, which would be optimistic.

    Returns:
        A fraction in (0, 1]: 1 is perfect, chance is about the share of the positive class among all samples.

    >>> ood_aupr([3.0, 1.0], [2.0])  # 1/2 at a precision of 1, 1/2 at one of 2/3
    0.8333333333333333
    """
    if positive not in ("in", "out"):
        raise ValueError(f"positive must be 'in' or 'out', found {positive!r}.")
    true, false = _count_positive(in_scores, out_scores)
    if positive == "out":  # rejected instead of accepted: the same thresholds, counted from the other end
        accepted_in, accepted_out = np.append(0, true[:-1]), np.append(0, false[:-1])
        true, false = (false[-1] - accepted_out)[::-1], (true[-1] - accepted_in)[::-1]
    return float(np.diff(true, prepend=0) @ (true / (true + false)) / true[-1])


def ood_fpr95(in_scores: Any, out_scores: Any, recall: float = 0.95) -> float:
    """Compute FPR95: the share of OOD samples accepted at the highest threshold that accepts 95 % of the others.

    The threshold is a score that occurs. Some codebases call out-of-distribution positive and report another number,
    the in-distribution samples rejected with 95 % of the others: that is `ood_fpr95(-out_scores, -in_scores)`.

    `recall` is the least share of in-distribution samples to accept, in (0, 1]; other arguments and errors as
    `ood_auroc`.

    Returns:
        A fraction in [0, 1]: 0 is perfect.

    Source: Liang et al. 2018, arXiv 1706.02690 (FPR at 95 % TPR).

    >>> ood_fpr95([4.0, 2.0], [3.0, 1.0])
    0.5
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall must lie in (0, 1], found {recall}.")
    true, false = _count_positive(in_scores, out_scores)
    return float(false[np.argmax(true / true[-1] >= recall)] / false[-1])


def ood_report(in_logits: Any, out_logits: Any) -> dict[str, float | int]:
    """Compute all detection metrics of the three scores; the energy has temperature 1.

    Args:
        in_logits: Logits of in-distribution samples, shape `(N, C)`.
        out_logits: Logits of out-of-distribution samples, shape `(M, C)`, of the same model.

    Returns:
        `num_in`, `num_out`, and for each SCORE of max_softmax, entropy and energy: `SCORE_auroc`, `SCORE_aupr_in`,
        `SCORE_aupr_out`, `SCORE_fpr95`.

    Raises:
        ValueError: As `max_softmax_score`, or if the two have different numbers of classes.

    >>> report = ood_report([[4.0, 0.0], [3.0, 0.0]], [[1.0, 0.0], [0.5, 0.0]])
    >>> report["num_in"], report["energy_auroc"]
    (2, 1.0)
    """
    in_logits, out_logits = as_array(in_logits), as_array(out_logits)
    if in_logits.shape[1:] != out_logits.shape[1:]:
        raise ValueError(
            "Both sets of logits must come from one model, (N, C) and (M, C); "
            f"found shapes {in_logits.shape} and {out_logits.shape}."
        )
    report: dict[str, float | int] = {"num_in": len(in_logits), "num_out": len(out_logits)}
    for name, score in (("max_softmax", max_softmax_score), ("entropy", entropy_score), ("energy", energy_score)):
        scores = score(in_logits), score(out_logits)
        report[f"{name}_auroc"] = ood_auroc(*scores)
        report[f"{name}_aupr_in"] = ood_aupr(*scores, positive="in")
        report[f"{name}_aupr_out"] = ood_aupr(*scores, positive="out")
        report[f"{name}_fpr95"] = ood_fpr95(*scores)
    return report


def _shift(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest logit of each row, shape `(N,)`, and the logits minus it: a new float64 array, at most 0."""
    logits = as_numbers(logits, "logits", keep=True)
    if logits.ndim != 2 or logits.size == 0:
        raise ValueError(f"Expected logits (N, C) with N, C >= 1, found shape {logits.shape}.")
    top = logits.max(axis=1).astype(np.float64)
    if not np.isfinite(top).all():  # the maximum of a row with NaN is NaN
        bad = np.count_nonzero(~np.isfinite(top))
        raise ValueError(f"The largest logit of each row must be finite: {bad} of {len(top)} are NaN or infinite.")
    return top, np.subtract(logits, top[:, None], dtype=np.float64)


def _count_positive(in_scores: np.ndarray, out_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of in-distribution and of OOD samples at or above each distinct score, from the highest down."""
    in_scores, out_scores = as_numbers(in_scores, "in_scores"), as_numbers(out_scores, "out_scores")
    for name, scores in (("in_scores", in_scores), ("out_scores", out_scores)):
        if scores.ndim != 1 or scores.size == 0 or np.isnan(scores).any():
            nans = np.count_nonzero(np.isnan(scores))
            raise ValueError(f"{name} must be (N,) with N >= 1 and no NaN, found shape {scores.shape}, {nans} NaN.")
    scores = np.concatenate([in_scores, out_scores])
    accepted, out, _ = count_accepted(scores, np.arange(len(scores)) < len(in_scores))
    return accepted - out, out
