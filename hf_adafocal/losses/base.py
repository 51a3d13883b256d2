"""Base classes of the losses: the interface that all share, losses that sum over samples, and adaptive losses."""

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from hf_adafocal.losses import functional
from hf_adafocal.losses.layout import of_model


class ClassificationLoss(nn.Module):
    """Interface of all losses: a module that computes a loss from logits and labels.

    Call it with logits and labels (`functional.focal_loss` gives shapes and errors), or hand it to a stock `Trainer`
    as `compute_loss_func`: it then takes the model's outputs, and `num_items_in_batch` so that accumulated
    micro-batches and several processes add up to one mean.

    The mean of an optimizer step divides by the total of `count` over its micro-batches and processes. A stock
    `Trainer` passes the number of labels that are not -100, which is that total unless the loss has class weights or
    another `ignore_index`. With reduction "sum" the sums add up to the sum over the step, and `num_items_in_batch`
    changes nothing. Buffers such as class weights move to the device of the logits.

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
            num_items_in_batch: Total of `count` over the whole optimizer step: what this batch adds to the mean over
                the step is returned. Ignored with reduction "sum".

        Raises:
            ValueError: As `functional.focal_loss`, or if reduction is "none" and `num_items_in_batch` is given.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `forward`.")

    @property
    def adaptive(self) -> "AdaptiveLoss | None":
        """The loss that is updated from held-out data: this one, a combined loss's base, or None."""
        return None

    def count(self, labels: Tensor) -> Tensor:
        """Count the labels that are not ignored, or sum their class weights: the divisor of a mean.

        Args:
            labels: Class indices or `ignore_index`, any shape.

        Returns:
            A scalar.
        """
        return (labels != self.ignore_index).sum()


class PerSampleLoss(ClassificationLoss):
    """Base class for losses that sum over samples; subclasses implement `formula`.

    Args:
        weight: Weight of each class, shape `(C,)`, finite numbers from 0: a tensor or any sequence.
        ignore_index: Label of samples that contribute nothing; it can be set later too.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: If a class weight is negative or not finite, or `reduction` is unknown.

    >>> class SquaredLoss(PerSampleLoss):
    ...     def formula(self, logits, labels, *, weight, ignore_index, reduction):
    ...         p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    ...         return (1 - p).square().sum() / (len(labels) if reduction == "mean" else 1)
    >>> SquaredLoss()(torch.zeros(3, 2), torch.tensor([0, 1, 0]))
    tensor(0.2500)
    """

    weight: Tensor | None

    def __init__(
        self, *, weight: Tensor | Sequence[float] | None = None, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__()
        functional.check_reduction(reduction)
        self.register_buffer("weight", None if weight is None else _class_weights(weight), persistent=False)
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: Tensor | Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Compute the loss of a batch, as `ClassificationLoss.forward`."""
        logits, labels = of_model(logits, labels)
        loss = self._on(logits.device)
        options = {"weight": loss.weight, "ignore_index": self.ignore_index}
        if num_items_in_batch is None or self.reduction == "sum":
            return loss.formula(logits, labels, reduction=self.reduction, **options)
        if self.reduction == "none":
            raise ValueError(
                "A loss with reduction 'none' has no mean over an optimizer step: build it with reduction='mean' or "
                "'sum', or call it without num_items_in_batch."
            )
        return loss.formula(logits, labels, reduction="sum", **options) / num_items_in_batch

    def _on(self, device: torch.device) -> Self:
        """Return this loss with its buffers on a device; a copy for "meta", as nothing can be moved back from it."""
        if all(buffer.device == device for buffer in self.buffers()):
            return self
        return (copy.deepcopy(self) if device.type == "meta" else self).to(device)

    def count(self, labels: Tensor) -> Tensor:
        """Count the labels that are not ignored, or sum their class weights, as `ClassificationLoss.count`."""
        if self.weight is None:
            return super().count(labels)
        counted = labels != self.ignore_index
        return self.weight.to(labels.device)[labels.long().where(counted, 0)].where(counted, 0).sum()

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
    """Base class for losses whose settings are updated from held-out data during training.

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
        """Return the whole state as values that JSON can hold, by the names of `set_table`'s arguments."""
        raise NotImplementedError

    def set_table(self, *args: Any, **table: Any) -> None:
        """Replace the state, as when a run resumes.

        Args:
            *args: Entries in the order of `table`.
            **table: Entries by name, as `table` returns them.

        Raises:
            ValueError: If it does not fit this loss, which is then unchanged.
        """
        raise NotImplementedError

    def update_from(self, statistics: Any) -> None:
        """Update the settings from the statistics of held-out data; losses that follow bins define it.

        Args:
            statistics: Has `edges` and `gap`, as `metrics.binning.BinStats`.

        Raises:
            ValueError: If the statistics do not fit this loss, which is then unchanged.
        """
        raise TypeError(f"{type(self).__name__} follows the {self.follows}: it has no `update_from`.")

    def steer(self, change: float) -> None:
        """Add `change` to the setting and clip it to its range; losses that follow the temperature define it.

        Args:
            change: In the unit of the setting.
        """
        raise TypeError(f"{type(self).__name__} follows the {self.follows}: it has no `steer`.")


def finite(name: str, value: float, lowest: float = -math.inf) -> float:
    """Check that a setting is a finite number.

    Args:
        name: Its name, for the error.
        value: The setting.
        lowest: Least value it may have.

    Raises:
        ValueError: If it is not.
    """
    if not (lowest <= value and math.isfinite(value)):
        least = "" if lowest == -math.inf else f" from {lowest:g}"
        raise ValueError(f"{name} must be a finite number{least}, found {value}.")
    return value


def _class_weights(weight: Tensor | Sequence[float]) -> Tensor:
    found = torch.as_tensor(weight)
    if not found.is_floating_point():
        found = found.to(torch.get_default_dtype())
    if found.device.type != "meta" and not ((found >= 0) & found.isfinite()).all():
        raise ValueError(f"Class weights must be finite numbers from 0, found {found.tolist()}.")
    return found


def table_numbers(name: str, values: Any, shape: tuple[int, ...] | None, like: Tensor) -> Tensor:
    """Convert an entry of an adaptive loss's table to a tensor, after checking values and shape.

    Args:
        name: Name of the entry, for the error.
        values: Numbers, nested in lists, an array or a tensor.
        shape: Shape the entry must have; None for any.
        like: Tensor that gives dtype and device.

    Raises:
        ValueError: If the values are no finite numbers of this shape.
    """
    try:
        given = torch.as_tensor(values)
        found = given.to(like)  # large float64 numbers are infinite in float32
        sound = given.dtype != torch.bool and bool(found.isfinite().all())
    except (TypeError, ValueError, RuntimeError):
        sound = False
    if not sound or (shape is not None and found.shape != shape):
        expected = "finite numbers" + ("" if shape is None else f" of shape {tuple(shape)}")
        raise ValueError(f"{name} must be {expected}, found {values!r}.")
    return found
