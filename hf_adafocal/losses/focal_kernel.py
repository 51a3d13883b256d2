"""The modulating factor of the focal losses, and its gradient in closed form.

Autograd's own pass through the factor launches some twenty small kernels. On a GPU each of them costs more than its
arithmetic, so for logits `(N, C)` in eager mode the slope of the loss is written out. What is compiled, transformed by
`torch.func` or differentiated more than once goes through autograd instead, with the same values.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_adafocal.losses import cross_entropy_kernel

Gamma = float | Tensor | Callable[[Tensor], Tensor]


def focal(logits: Tensor, labels: Tensor, gamma: Gamma, ignore_index: int, summed: bool = False) -> Tensor:
    """Focal loss of each sample, or their sum.

    Args:
        logits: Unnormalised scores, shape `(N, C)` or `(N, C, d1, ...)`, float32 or float64.
        labels: Class indices in `[0, C)` or `ignore_index`, shape `(N,)` or `(N, d1, ...)`, int64.
        gamma: As in `functional.focal_loss`.
        ignore_index: Label of samples whose loss and gradient are 0.
        summed: Return the sum over samples.

    Returns:
        Loss in nats, a scalar or the labels' shape.

    Raises:
        ValueError: As `functional.focal_loss`.
    """
    if _has_written_slope(logits, gamma):
        with torch.no_grad():
            log_p = F.log_softmax(logits, dim=1)
            ce, total_weight = cross_entropy_kernel.nll_forward(log_p, labels, ignore_index)
            minus_q = _minus_one_minus_p(ce)
            p = 1 + minus_q
        gamma = resolved(gamma, p, ce)
        if not (isinstance(gamma, Tensor) and gamma.requires_grad):
            parts = (log_p, total_weight, ce, minus_q, p)
            return _FocalLoss.apply(logits, labels, gamma, ignore_index, summed, *parts)
    loss = modulate(cross_entropy_kernel.cross_entropy(logits, labels, ignore_index), gamma)
    return loss.sum() if summed else loss


def modulate(ce: Tensor, gamma: Gamma) -> Tensor:
    """Turn the cross-entropy of each sample into a focal loss: `(1 - sign(gamma) p)^|gamma| ce` with `p = exp(-ce)`.

    It works on the output of any cross-entropy kernel that returns one value per sample.

    Args:
        ce: Cross-entropy in nats, any shape, float32 or wider. Values that rounding put below 0 count as p = 1.
        gamma: As in `functional.focal_loss`; a tensor broadcasts to the shape of `ce`.

    Returns:
        The modulated loss, the shape of `ce`.

    Raises:
        ValueError: If gamma is a tensor that does not broadcast to the shape of `ce`.

    >>> modulate(torch.tensor([2.0]), 0.0)
    tensor([2.])
    """
    return reweight(ce, _minus_one_minus_p(ce), gamma)


def reweight(ce: Tensor, minus_q: Tensor, gamma: Gamma) -> Tensor:
    """Compute `(1 - sign(gamma) m)^|gamma| ce`.

    Args:
        ce: Cross-entropy, any shape.
        minus_q: `m - 1`, not 0, the shape of `ce`; it says more of an m close to 1 than m does.
        gamma: As in `modulate`; a function gets m.
    """
    gamma = resolved(gamma, (1 + minus_q).detach() if callable(gamma) else minus_q, ce)
    if not isinstance(gamma, Tensor) and gamma == 0:
        return ce
    if isinstance(gamma, Tensor):
        return (gamma.sign() - 1 - minus_q).abs() ** gamma.abs() * ce
    base = 2 + minus_q if gamma < 0 else minus_q.abs()
    return base ** abs(gamma) * ce


def resolved(gamma: Gamma, p: Tensor, ce: Tensor) -> Tensor | float:
    """Evaluate gamma if it is a function of p, and check that a tensor broadcasts to the shape of `ce`."""
    found: Tensor | float = gamma(p) if callable(gamma) else gamma
    if not isinstance(found, Tensor):
        return found
    if found.shape != ce.shape:
        fits = (size in (1, wanted) for size, wanted in zip(found.shape[::-1], ce.shape[::-1], strict=False))
        if found.ndim > ce.ndim or not all(fits):
            raise ValueError(f"gamma must broadcast to shape {tuple(ce.shape)}, found {tuple(found.shape)}.")
    return found.to(ce)


def _minus_one_minus_p(ce: Tensor) -> Tensor:
    """Compute `p - 1` without cancellation and never 0, where a power below 1 has no finite slope."""
    return torch.expm1(-torch.finfo(ce.dtype).tiny - ce)


def _has_written_slope(logits: Tensor, gamma: Gamma) -> bool:
    """Whether `_FocalLoss` applies, with its closed-form gradient; gamma 0 is cross-entropy and does without it."""
    return (
        not torch.compiler.is_compiling()  # first: the rest would break or specialise the graph
        and logits.ndim == 2
        and (callable(gamma) or isinstance(gamma, Tensor) or gamma != 0)
        and cross_entropy_kernel.is_plain(logits)
        and not cross_entropy_kernel.gains_by_p(logits)
    )


class _FocalLoss(torch.autograd.Function):
    """Focal loss with its first gradient in closed form; higher ones go through autograd."""

    @staticmethod
    def forward(ctx, logits, labels, gamma, ignore_index, summed, log_p, total_weight, ce, minus_q, p):
        # `1 - m` or `1 + m` by the sign of gamma: |m - 1| stays in [0, 1], -|m - 1| becomes 2 - |m - 1|.
        base = torch.remainder(torch.copysign(minus_q, gamma), 2)
        power = base ** abs(gamma)
        loss = power * ce
        ctx.save_for_backward(logits, labels, log_p, total_weight, p, base, power, loss)
        ctx.gamma, ctx.ignore_index, ctx.summed = gamma, ignore_index, summed
        return loss.sum() if summed else loss

    @staticmethod
    def backward(ctx, slope):
        logits, labels, log_p, total_weight, p, base, power, loss = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated
            ce = cross_entropy_kernel.cross_entropy(logits, labels, ctx.ignore_index)
            again = modulate(ce, ctx.gamma)
            again = again.sum() if ctx.summed else again
            return torch.autograd.grad(again, logits, slope, create_graph=True)[0], *[None] * 9
        # With s the sign of gamma: d power / d ce = |gamma| (power / base) s p.
        slope = slope * torch.addcdiv(power, ctx.gamma * p * loss, base)
        gradient = torch.ops.aten.nll_loss_backward(slope, log_p, labels, None, 0, ctx.ignore_index, total_weight)
        return torch.ops.aten._log_softmax_backward_data(gradient, log_p, 1, log_p.dtype), *[None] * 9
