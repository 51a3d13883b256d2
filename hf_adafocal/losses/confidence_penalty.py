"""Cross-entropy with a penalty on confident predictions as a loss module."""

from torch import Tensor

from hf_adafocal.losses import functional
from hf_adafocal.losses.base import PerSampleLoss


class ConfidencePenaltyLoss(PerSampleLoss):
    """Cross-entropy minus `penalty` times the entropy of the prediction.

    Errata: no code of the authors. netcal's `ConfidencePenalty` module adds the entropy instead (its function
    subtracts it), averages over classes as well as samples, and raises TypeError with a threshold.

    Args:
        penalty: The paper's beta; the default is its value for CIFAR-10, other tasks there took up to 2.
        **kwargs: `weight`, `ignore_index` and `reduction` of `PerSampleLoss`.

    Raises:
        ValueError: If `penalty` is negative or not finite.

    Source: Pereyra et al. 2017, arXiv 1701.06548.

    >>> import torch
    >>> ConfidencePenaltyLoss(penalty=1.0)(torch.zeros(1, 2), torch.tensor([0]))  # log 2 - log 2
    tensor(0.)
    """

    def __init__(self, penalty: float = 0.1, **kwargs) -> None:
        super().__init__(**kwargs)
        functional.check_penalty(penalty)
        self.penalty = penalty

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Compute cross-entropy minus the entropy with this module's penalty."""
        return functional.confidence_penalty_loss(logits, labels, self.penalty, **options)

    def extra_repr(self) -> str:
        """Show the penalty when printed."""
        return f"penalty={self.penalty}"
