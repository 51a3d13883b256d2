r"""Losses as pure functions of logits and labels.

The focal family is one function of the cross-entropy of each sample. With `ce = -log p` and `p = exp(-ce)`, every
member is `(1 - sign(gamma) p)^|gamma| ce`: cross-entropy (gamma 0), focal loss (gamma > 0), inverse focal loss
(gamma < 0), FLSD-53 and AdaFocal (gamma looked up from p). So each costs about what cross-entropy costs and takes
dense targets and `ignore_index` from it. Dual focal loss puts `p - q_j` in the place of p.

Label smoothing, the Brier score and the confidence penalty need all probabilities of a sample. Arguments that all
losses share are explained in `focal_loss`.

A class that is impossible for a sample, such as a padded option of multiple choice, may have a logit of -inf or what
masks write instead of it (-1e9, the lowest number of a dtype): it has probability 0, no gradient, and takes no part
in label smoothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_adafocal.losses import cross_entropy_kernel, focal_kernel
from hf_adafocal.losses.focal_kernel import Gamma, modulate

__all__ = [
    "SMOOTHING_RANGE",
    "Gamma",
    "brier_loss",
    "check_penalty",
    "check_reduction",
    "check_smoothing",
    "confidence_penalty_loss",
    "cross_entropy",
    "dual_focal_loss",
    "focal_loss",
    "label_smoothing_loss",
    "modulate",
]

SMOOTHING_RANGE = (-0.1, 0.5)
LEAST_LOG_P = -5e3  # below it a class is impossible: no trained network comes near, and masks begin at -1e4


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy in float32 with checked arguments; `focal_loss` with gamma 0.

    Args and errors are those of `focal_loss`; values are those of `torch.nn.functional.cross_entropy`.
    """
    return focal_loss(logits, labels, 0.0, weight=weight, ignore_index=ignore_index, reduction=reduction)


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    gamma: Gamma = 3.0,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Focal loss `-(1 - s p)^|gamma| log p`, `s = sign(gamma)`, p the probability of the label.

    Args:
        logits: Unnormalised scores, shape `(N, C)` or `(N, C, d1, ...)`; below float32 they are computed in float32.
        labels: Class indices in `[0, C)` or `ignore_index`, shape `(N,)` or `(N, d1, ...)`, any integer dtype.
        gamma: Focusing exponent, no unit: a number, a tensor that broadcasts to the labels' shape, or a function from
            p (detached, the labels' shape) to such a tensor. 0 is cross-entropy, below 0 inverse focal loss. The
            default 3 is what Mukhoti et al. recommend for calibration.
        weight: Weight of each class, shape `(C,)`. It scales the loss of a sample and does not enter p.
        ignore_index: Label of samples that contribute nothing.
        reduction: "mean" (over samples that count, by their class weight), "sum" or "none".

    Returns:
        Loss in nats: a scalar, or the labels' shape for "none" (0 where ignored). As in PyTorch, the mean over no
        sample is NaN.

    Raises:
        ValueError: If shapes do not fit (both are named), labels are not integers, a label is neither in `[0, C)` nor
            `ignore_index` (checked on CPU; a GPU stops with a device-side assert), or `reduction` is unknown.

    Source: Lin et al. 2017, arXiv 1708.02002, eq. 4; Mukhoti et al. 2020, arXiv 2002.09437; negative gamma: Ghosh et
    al. 2022, arXiv 2211.11838.

    >>> focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=0.0)  # log 2
    tensor(0.6931)
    >>> focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=1.0)  # log 2 / 2
    tensor(0.3466)
    """
    _check(logits, labels, weight, reduction)
    labels = labels.long()
    if weight is None and reduction != "none":
        total = focal_kernel.focal(_wide(logits), labels, gamma, ignore_index, summed=True)
        return total if reduction == "sum" else total / (labels != ignore_index).sum()
    loss = focal_kernel.focal(_wide(logits), labels, gamma, ignore_index)
    return _reduce(loss, labels, weight, ignore_index, reduction)


def dual_focal_loss(
    logits: Tensor,
    labels: Tensor,
    gamma: Gamma = 5.0,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Dual focal loss `-(1 - s (p - q_j))^|gamma| log p`, q_j the largest probability below that of the label.

    `q_j = max{q_i : q_i < p}`, 0 if there is none: the runner-up where the prediction is right, and the next class
    below the label (not the predicted one) where it is wrong. Gradient flows through q_j, both as the authors' code.

    Args:
        logits: As in `focal_loss`.
        labels: As in `focal_loss`.
        gamma: As in `focal_loss`; a function gets the margin `p - q_j` (detached) in place of p. `s = sign(gamma)`;
            the paper has positive gammas only.
        weight: As in `focal_loss`.
        ignore_index: As in `focal_loss`.
        reduction: As in `focal_loss`.

    Returns:
        Loss in nats: a scalar, or the labels' shape for "none".

    Raises:
        ValueError: As in `focal_loss`.

    Source: Tao et al. 2023, arXiv 2305.13665.

    >>> dual_focal_loss(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([0]), gamma=1.0)  # 0.7 -log 0.6
    tensor(0.3576)
    """
    _check(logits, labels, weight, reduction)
    labels, logits = labels.long(), _wide(logits)
    ce = cross_entropy_kernel.cross_entropy(logits, labels, ignore_index)
    lead = _lead_over_the_next(logits, _indices(labels, ignore_index))
    minus_q = torch.expm1(-ce) - torch.exp(-lead - ce) - torch.finfo(ce.dtype).tiny
    loss = focal_kernel.reweight(ce, minus_q, gamma)
    return _reduce(loss, labels, weight, ignore_index, reduction)


def label_smoothing_loss(
    logits: Tensor,
    labels: Tensor,
    smoothing: float | Tensor = 0.05,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Label smoothing as in PyTorch: `(1 - eps) ce + eps mean_j(-log p_j)`, the mean over the possible classes.

    So the label's target is `1 - eps + eps / C`, C the classes whose logit is not that of a mask. (Others spread eps
    over the other classes only, which is PyTorch's eps times `C / (C - 1)`.) Below 0 it sharpens: then the loss has no
    lower bound, though it is finite for finite logits.

    Args:
        logits: As in `focal_loss`.
        labels: As in `focal_loss`.
        smoothing: eps, in [-0.1, 0.5]; 0 is cross-entropy. A number, or a tensor with one element (not checked).
        weight: Weight of each class, shape `(C,)`, as in PyTorch: it also weighs the classes of `mean_j`.
        ignore_index: As in `focal_loss`.
        reduction: As in `focal_loss`.

    Returns:
        Loss in nats: a scalar, or the labels' shape for "none".

    Raises:
        ValueError: As in `focal_loss`, or if `smoothing` is out of range.

    Source: Szegedy et al. 2016, arXiv 1512.00567.

    >>> label_smoothing_loss(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]), 0.1)  # -0.95 log 0.8 - 0.05 log 0.2
    tensor(0.2925)
    """
    _check(logits, labels, weight, reduction)
    if not isinstance(smoothing, Tensor):
        check_smoothing(smoothing)
    labels = labels.long()
    log_p = F.log_softmax(_wide(logits), dim=1)
    ce = cross_entropy_kernel.nll(log_p, labels, ignore_index)
    possible = log_p > LEAST_LOG_P
    scale = None
    if weight is not None:
        weight = weight.to(ce)
        scale = _of_label(weight, labels, ignore_index)
        ce, log_p = ce * scale, log_p * weight.view(-1, *[1] * (log_p.ndim - 2))
    uniform = -(log_p.where(possible, 0).sum(1) / possible.sum(1)).where(labels != ignore_index, 0)
    return _total((1 - smoothing) * ce + smoothing * uniform, labels, scale, ignore_index, reduction)


def brier_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Brier score of the softmax: `sum_k (p_k - 1[k = label])^2`, in [0, 2].

    Args, shapes and errors are those of `focal_loss`; the result has no unit.

    Source: Brier 1950; as a training loss Mukhoti et al. 2020, arXiv 2002.09437.

    >>> brier_loss(torch.tensor([[0.7, 0.3]]).log(), torch.tensor([0]))  # 0.3^2 + 0.3^2
    tensor(0.1800)
    """
    _check(logits, labels, weight, reduction)
    labels = labels.long()
    p = F.softmax(_wide(logits), dim=1)
    cross_entropy_kernel.nll(p.detach(), labels, ignore_index)  # checks the labels
    others = p.scatter(1, _indices(labels, ignore_index), 0)  # their sum is 1 - p without cancellation
    loss = (others.sum(1).square() + others.square().sum(1)).where(labels != ignore_index, 0)
    return _reduce(loss, labels, weight, ignore_index, reduction)


def confidence_penalty_loss(
    logits: Tensor,
    labels: Tensor,
    penalty: float = 0.1,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy minus `penalty` times the entropy of the prediction, which penalises confident predictions.

    Args:
        logits: As in `focal_loss`.
        labels: As in `focal_loss`.
        penalty: The paper's beta, no unit, not negative; 0 is cross-entropy.
        weight: As in `focal_loss`; it scales a sample's cross-entropy and entropy alike.
        ignore_index: As in `focal_loss`.
        reduction: As in `focal_loss`.

    Returns:
        Loss in nats: a scalar, or the labels' shape for "none"; it can be negative.

    Raises:
        ValueError: As in `focal_loss`, or if `penalty` is negative or not finite.

    Source: Pereyra et al. 2017, arXiv 1701.06548.

    >>> confidence_penalty_loss(torch.zeros(1, 2), torch.tensor([0]), penalty=1.0)  # log 2 - log 2
    tensor(0.)
    """
    _check(logits, labels, weight, reduction)
    check_penalty(penalty)
    labels = labels.long()
    log_p = F.log_softmax(_wide(logits), dim=1)
    ce = cross_entropy_kernel.nll(log_p, labels, ignore_index)
    negentropy = (log_p.exp() * log_p.clamp_min(LEAST_LOG_P)).sum(1)  # an impossible class adds 0, not NaN
    loss = ce + penalty * negentropy.where(labels != ignore_index, 0)
    return _reduce(loss, labels, weight, ignore_index, reduction)


def check_reduction(reduction: str) -> None:
    """Check the name of a reduction.

    Raises:
        ValueError: If it is none of "mean", "sum" and "none".
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', found {reduction!r}.")


def check_smoothing(smoothing: float) -> None:
    """Check that a label smoothing lies in [-0.1, 0.5].

    Raises:
        ValueError: If it does not.
    """
    low, high = SMOOTHING_RANGE
    if not low <= smoothing <= high:
        raise ValueError(f"smoothing must lie in [{low}, {high}], found {smoothing}.")


def check_penalty(penalty: float) -> None:
    """Check that a confidence penalty is a finite number from 0.

    Raises:
        ValueError: If it is not.
    """
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty must be a finite number from 0, found {penalty}.")


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _indices(labels: Tensor, ignore_index: int) -> Tensor:
    """Return labels with a class dimension for `gather`, class 0 where ignored."""
    return labels.where(labels != ignore_index, 0).unsqueeze(1)


def _lead_over_the_next(logits: Tensor, indices: Tensor) -> Tensor:
    """Return how far the label's logit lies above the largest one below it; infinite if there is none."""
    scores = logits.detach()  # the search needs no gradient, only the two that it finds
    below = scores.where(scores < scores.gather(1, indices), -torch.inf).argmax(1, keepdim=True)
    lead = (logits.gather(1, indices) - logits.gather(1, below)).squeeze(1)
    return lead.where(lead > 0, torch.inf)


def _of_label(weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return weight[labels.where(labels != ignore_index, 0)]


def _reduce(loss: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    scale = None
    if weight is not None:
        scale = _of_label(weight.to(loss), labels, ignore_index)
        loss = loss * scale
    return _total(loss, labels, scale, ignore_index, reduction)


def _total(loss: Tensor, labels: Tensor, scale: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """Reduce weighted losses; `scale` is the class weight of each sample."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    counted = labels != ignore_index
    return loss.sum() / (counted.sum() if scale is None else (counted * scale).sum())


def _check(logits: Tensor, labels: Tensor, weight: Tensor | None, reduction: str) -> None:
    if logits.ndim < 2 or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            "Expected logits (N, C, d1, ...) and labels (N, d1, ...), "
            f"found {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be integer class indices, found {labels.dtype} of shape {tuple(labels.shape)} "
            f"for logits of shape {tuple(logits.shape)}."
        )
    if weight is not None and weight.shape != logits.shape[1:2]:
        raise ValueError(
            f"weight must have one entry per class, shape ({logits.shape[1]},), found {tuple(weight.shape)} "
            f"for logits of shape {tuple(logits.shape)}."
        )
    check_reduction(reduction)
