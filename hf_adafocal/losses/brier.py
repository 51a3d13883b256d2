"""The Brier score as a loss module."""

from torch import Tensor

from hf_adafocal.losses import functional
from hf_adafocal.losses.base import PerSampleLoss


class BrierLoss(PerSampleLoss):
    """Brier score of the softmax, summed over classes.

    Args:
        **kwargs: `weight`, `ignore_index` and `reduction` of `PerSampleLoss`.

    Errata: the class of Mukhoti et al.'s code needs a GPU (`get_device()` is -1 on the CPU) and takes the softmax over
    a dimension that it does not name; it divides by the batch size only, which is this mean.

    Source: Brier 1950; as a training loss Mukhoti et al. 2020, arXiv 2002.09437.

    >>> import torch
    >>> BrierLoss()(torch.tensor([[0.7, 0.3]]).log(), torch.tensor([0]))  # 0.3^2 + 0.3^2
    tensor(0.1800)
    """

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Compute the Brier score."""
        return functional.brier_loss(logits, labels, **options)
