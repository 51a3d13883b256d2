"""Base classes of the losses: the interface that all share, losses that sum over samples, and adaptive losses."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_adafocal.losses import functional


class ClassificationLoss(nn.Module):
    """Interface of all losses: logits and labels in, a loss out.

    Call it with logits and labels (`functional.focal_loss` gives shapes and errors), or hand it to a stock `Trainer`
    as `compute_loss_func`: it then takes the model's outputs, and `num_items_in_batch` so that accumulated
    micro-batches and several processes add up to one mean.

    Attributes:
        takes_weights: Whether the constructor takes class weights as `weight`.
        ignore_index: Label of samples that contribute nothing.
        reduction: "mean", "sum" or, for losses with one value per sample, "none".
    """

    takes_weights: ClassVar[bool] = True
    ignore_index: int
    reduction: str

    def forward(self, logits: Tensor | Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            logits: Shape `(N, C, d1, ...)`, or a model output that carries them as `logits`.
            labels: Class indices, shape `(N, d1, ...)`.
            num_items_in_batch: Total of `count` over the whole optimizer step; the sum is divided by it instead of
                being reduced.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `forward`.")

    @property
    def adaptive(self) -> "AdaptiveLoss | None":
        """The loss whose settings follow held-out data: this one, a combined loss's base, or None if neither does."""
        return None

    def count(self, labels: Tensor) -> Tensor:
        """Number of labels that count, or the sum of their class weights: what a mean divides by.

        Args:
            labels: Class indices or `ignore_index`, any shape.

        Returns:
            A scalar.
        """
        return (labels != self.ignore_index).sum()


class PerSampleLoss(ClassificationLoss):
    """Base class for losses that sum over samples; subclasses implement `formula`.

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
        """Compute the loss of a batch, as `ClassificationLoss.forward`."""
        logits = getattr(logits, "logits", logits)
        reduction = self.reduction if num_items_in_batch is None else "sum"
        loss = self.formula(logits, labels, weight=self.weight, ignore_index=self.ignore_index, reduction=reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def count(self, labels: Tensor) -> Tensor:
        """Number of labels that count, or the sum of their class weights, as `ClassificationLoss.count`."""
        if self.weight is None:
            return super().count(labels)
        counted = labels != self.ignore_index
        return (self.weight.to(labels.device)[labels.long().where(counted, 0)] * counted).sum()

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Compute a loss of `functional` with this module's settings.

        Args:
            logits: As in `forward`, always a tensor.
            labels: As in `forward`.
            **options: `weight`, `ignore_index` and `reduction`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `formula`.")


class FocalFamilyLoss(PerSampleLoss):
    """Base class for focal losses; subclasses define `gamma`.

    Args:
        **kwargs: `weight`, `ignore_index` and `reduction` of `PerSampleLoss`.
    """

    gamma: functional.Gamma  # a number, or a method from the label's probability to gamma

    def formula(self, logits: Tensor, labels: Tensor, **options) -> Tensor:
        """Compute focal loss with this module's gamma."""
        return functional.focal_loss(logits, labels, self.gamma, **options)


class AdaptiveLoss(ClassificationLoss):
    """Base class for losses whose settings follow held-out data.

    Attributes:
        follows: What moves the settings: "bins" (`update_from` with the statistics of equal-mass bins of the
            confidences) or "temperature" (`steer` with the logarithm of the best temperature).
        needs_class_statistics: Whether `update_from` needs the statistics of each predicted class too.
        num_bins: Bins of the statistics, for losses that follow bins.
        steering_gain: Change over a whole run per unit of log temperature, for losses that follow the temperature.
    """

    follows: ClassVar[Literal["bins", "temperature"]]
    needs_class_statistics: ClassVar[bool] = False
    num_bins: int
    steering_gain: ClassVar[float]

    @property
    def adaptive(self) -> "AdaptiveLoss":
        """This loss."""
        return self

    def reset(self) -> None:
        """Return to the settings for an untrained model."""
        raise NotImplementedError

    def readings(self) -> dict[str, float]:
        """Summarise the settings in a few numbers by name, for a log."""
        raise NotImplementedError

    def table(self) -> dict[str, Any]:
        """Return the whole state as JSON can hold it, by the names of `set_table`'s arguments."""
        raise NotImplementedError

    def set_table(self, **table: Any) -> None:
        """Replace the state, as when a run resumes.

        Args:
            **table: What `table` returned.

        Raises:
            ValueError: If it does not fit this loss, which is then unchanged.
        """
        raise NotImplementedError

    def update_from(self, statistics: Any) -> None:
        """Move the settings by the statistics of held-out data; losses that follow bins define it.

        Args:
            statistics: Has `edges` and `gap`, as `metrics.binning.BinStats`.

        Raises:
            ValueError: If the statistics do not fit this loss, which is then unchanged.
        """
        raise TypeError(f"{type(self).__name__} follows the {self.follows}: it has no `update_from`.")

    def steer(self, change: float) -> None:
        """Add to the setting, within its range; losses that follow the temperature define it.

        Args:
            change: In the unit of the setting.
        """
        raise TypeError(f"{type(self).__name__} follows the {self.follows}: it has no `steer`.")


def table_numbers(name: str, values: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Convert an entry of an adaptive loss's table to a tensor, checked.

    Args:
        name: Name of the entry, for the error.
        values: Numbers, nested in lists, an array or a tensor.
        shape: Shape the entry must have.
        like: Tensor that gives dtype and device.

    Raises:
        ValueError: If the values are no finite numbers of this shape.
    """
    try:
        found = torch.as_tensor(values)
        fits = found.dtype != torch.bool and found.shape == shape
        found = found.to(like)  # first: large float64 numbers are infinite in float32
        fits = fits and bool(torch.isfinite(found).all())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be finite numbers of shape {tuple(shape)}, found {values!r}.") from error
    if not fits:
        raise ValueError(f"{name} must be finite numbers of shape {tuple(shape)}, found {values!r}.")
    return found
