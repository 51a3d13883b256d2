"""Scale the loss of a batch so that an optimizer step uses the mean, or the sum, over all of its samples."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_adafocal.training.trainer import AdaFocalTrainer


class StepScale:
    """Counts and factors by which the losses of unequal micro-batches and processes add up to one mean.

    Args:
        trainer: The trainer whose steps are scaled.
    """

    def __init__(self, trainer: "AdaFocalTrainer") -> None:
        self._trainer = trainer

    def count(self, labels: Tensor) -> Tensor:
        """Count the labels of a batch that are not ignored, by their class weights if the loss has some, a scalar."""
        trainer = self._trainer
        count = getattr(trainer.loss, "count", None)
        return (labels != trainer.ignore_index).sum() if count is None else count(labels)

    def count_of_step(self, targets: Iterable[Tensor], device: torch.device) -> Tensor:
        """Count the labels of all micro-batches and processes of an optimizer step.

        Args:
            targets: Labels of each micro-batch of this process.
            device: Where the count is needed.

        Returns:
            A scalar, or shape `(n_gpu, 1)` for DataParallel, which splits what it is given.
        """
        trainer = self._trainer
        args = trainer.args
        targets = list(targets)
        for labels in targets:
            trainer.check_labels(labels, training=True)  # before they index the class weights
        count = torch.stack([self.count(labels).to(device) for labels in targets]).sum()
        if args.average_tokens_across_devices:
            count = trainer.processes.sum(count)
        if args.n_gpu > 1:
            share = 1 if args.average_tokens_across_devices else args.n_gpu
            count = (count / share).unsqueeze(0).expand(args.n_gpu, -1)
        return count

    def divisor(self, items_in_step: Any) -> Any:
        """Return the divisor of a batch's summed loss, from the count of its step."""
        if self._trainer.plan.reduction == "sum":
            return 1
        if isinstance(items_in_step, Tensor) and items_in_step.numel() > 1:  # DataParallel repeats the count
            items_in_step = items_in_step.flatten()[0]
            if not self._trainer.args.average_tokens_across_devices:
                items_in_step = items_in_step * self._trainer.args.n_gpu
        return items_in_step

    @property
    def factor(self) -> int:
        """Return the factor that undoes the averaging over processes in distributed training."""
        trainer = self._trainer
        if trainer.plan.reduction == "sum" or trainer.args.average_tokens_across_devices:
            return trainer.processes.count
        return 1

    def share(self, labels: Tensor, items_in_step: Any) -> Any:
        """Return the factor that turns a mean over a batch into its share of the loss of the step."""
        if items_in_step is None and self._trainer.plan.reduction != "sum":
            return 1
        return self.count(labels) / self.divisor(items_in_step) * self.factor
