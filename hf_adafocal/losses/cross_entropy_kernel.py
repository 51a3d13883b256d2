"""Cross-entropy per sample: PyTorch's, and for many logits on the CPU one that writes less memory.

`F.cross_entropy` writes three matrices of the logits' shape: log p, a gradient of it that is zero but for the labels,
and the gradient of the logits. That gradient is `p - onehot`, so keeping p makes it two. Time follows where the
matrices outgrow the caches and have so many columns that what is done once per sample costs little.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

LEAST_LOGITS, LEAST_CLASSES = 2**20, 200  # from where on the focal losses gained, on x86 with 2 cores

_cross_entropy = partial(F.cross_entropy, reduction="none")
_nll_loss = partial(F.nll_loss, reduction="none")


def _nll_loss_forward(log_p: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.nll_loss_forward(log_p, labels, None, 0, ignore_index)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy of each sample: `F.cross_entropy` with reduction "none", to rounding, with gradients of any order.

    Args:
        logits: Unnormalised scores, shape `(N, C)` or `(N, C, d1, ...)`, float32 or float64.
        labels: Class indices in `[0, C)` or `ignore_index`, shape `(N,)` or `(N, d1, ...)`, int64.
        ignore_index: Label of samples whose loss and gradient are 0.

    Returns:
        Cross-entropy in nats, the labels' shape and the logits' dtype.

    Raises:
        ValueError: If a label is neither in `[0, C)` nor `ignore_index` (on CPU; a GPU stops with an assert).

    >>> cross_entropy(torch.zeros(2, 2), torch.tensor([0, -100]), -100)
    tensor([0.6931, 0.0000])
    """
    return _checked(_by_p if gains_by_p(logits) else _cross_entropy, logits, labels, ignore_index)


def nll(log_p: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Negative log-likelihood of each sample: minus the label's entry of `log_p`; else as `cross_entropy`."""
    return _checked(_nll_loss, log_p, labels, ignore_index)


def nll_forward(log_p: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Compute `nll` of a matrix `(N, C)` outside autograd, and the total weight `aten::nll_loss_backward` needs."""
    return _checked(_nll_loss_forward, log_p, labels, ignore_index)


def _checked(kernel: Callable, scores: Tensor, labels: Tensor, ignore_index: int) -> Any:
    try:
        return kernel(scores, labels, ignore_index=ignore_index)
    except IndexError as error:  # PyTorch's own check, made while it gathers, costs nothing
        valid = labels[labels != ignore_index]
        raise ValueError(
            f"labels must lie in [0, {scores.shape[1]}) or equal ignore_index ({ignore_index}), "
            f"found {int(valid.min())} to {int(valid.max())}."
        ) from error


def gains_by_p(logits: Tensor) -> bool:
    """Whether keeping the probabilities for the backward pass is faster for these logits."""
    return (
        not torch.compiler.is_compiling()  # first: the rest would break or specialise the graph
        and logits.numel() >= LEAST_LOGITS
        and logits.shape[1] >= LEAST_CLASSES
        and logits.device.type == "cpu"
        and is_plain(logits)
    )


def is_plain(logits: Tensor) -> bool:
    """Whether gradients will be computed, and by ordinary autograd alone, so that an `autograd.Function` works."""
    return (
        logits.requires_grad
        and torch.is_grad_enabled()
        and type(logits) is Tensor  # others, such as DTensor, have their own rules for PyTorch's operations
        and not torch._C._are_functorch_transforms_active()  # autograd.Function asks so; no public function does
        and forward_ad.unpack_dual(logits).tangent is None
    )


def _by_p(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return _CrossEntropyByP.apply(logits, labels, ignore_index)[0]


class _CrossEntropyByP(torch.autograd.Function):
    """Cross-entropy that saves p for its backward pass, and returns p so that this can be differentiated."""

    @staticmethod
    def forward(ctx, logits, labels, ignore_index):
        p = logits.softmax(1)
        minus_p = _nll_loss(p, labels, ignore_index=ignore_index)  # 0 where ignored
        ce = minus_p.neg().log_().neg_()
        largest = -torch.finfo(p.dtype).tiny
        if not minus_p.max() <= largest:  # NaN hides what else there is
            counted = labels != ignore_index
            underflown = counted & (minus_p > largest)
            ce = ce.where(counted, 0)
            ce[underflown] = _cross_entropy(logits.movedim(1, -1)[underflown], labels[underflown])
        ctx.save_for_backward(p, labels)
        ctx.ignore_index = ignore_index
        ctx.set_materialize_grads(False)  # else zeros of the shape of p
        return ce, p

    @staticmethod
    def backward(ctx, slope, slope_of_p):
        p, labels = ctx.saved_tensors
        gradient = None
        if slope is not None:
            counted = labels != ctx.ignore_index
            slope = slope.where(counted, 0).unsqueeze(1)
            gradient = (p * slope).scatter_add_(1, labels.where(counted, 0).unsqueeze(1), -slope)
        if slope_of_p is not None:  # only when a gradient is differentiated
            through_p = p * (slope_of_p - (p * slope_of_p).sum(1, keepdim=True))
            gradient = through_p if gradient is None else gradient + through_p
        return gradient, None, None
