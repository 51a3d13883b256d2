"""What all loss modules share: how they are called, and how micro-batches add up."""

from typing import Any

from torch import Tensor, nn

from hf_adafocal.losses import functional


class ClassificationLoss(nn.Module):
    """The frame of losses that are a sum over samples: a member says its formula and nothing else.

    Call it with logits and labels (`functional.focal_loss` gives shapes and errors), or hand it to a stock `Trainer`
    as `compute_loss_func`: then it takes the model's outputs, and `num_items_in_batch` so that accumulated
    micro-batches and several processes add up to one mean.

    Args:
        weight: Weight of each class, shape `(C,)`.
        ignore_index: Label of samples that contribute nothing.
        reduction: "mean", "sum" or "none".
    """

    weight: Tensor | None

    def __init__(self, *, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: Tensor | Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            logits: Shape `(N, C, d1, ...)`, or a model output that carries them as `logits`.
            labels: Class indices, shape `(N, d1, ...)`.
            num_items_in_batch: Labels in the whole optimizer step; the sum is divided by it instead of being reduced.
        """
        logits = getattr(logits, "logits", logits)
        reduction = self.reduction if num_items_in_batch is None else "sum"
        loss = self.formula(logits, labels, weight=self.weight, ignore_index=self.ignore_index, reduction=reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """A loss of `functional` with this module's numbers; options are `weight`, `ignore_index`, `reduction`."""
        raise NotImplementedError(f"{type(self).__name__} must define `formula`.")


class FocalFamilyLoss(ClassificationLoss):
    """The frame of the focal family: a member says what its gamma is and nothing else.

    Args:
        **kwargs: `weight`, `ignore_index` and `reduction` of `ClassificationLoss`.
    """

    gamma: functional.Gamma  # a number, or a method from the label's probability to gamma

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Focal loss with the member's gamma."""
        return functional.focal_loss(logits, labels, self.gamma, **options)
