"""A Trainer whose hyper-parameter search starts each trial from the loss that its own arguments describe."""

from typing import Any

import torch
from transformers.trainer_utils import default_compute_objective

from hf_adafocal.training.arguments import STEERING_ARGUMENTS, AdaFocalTrainingArguments
from hf_adafocal.training.callbacks import AdaptiveStateCallback
from hf_adafocal.training.hub_uploads import UploadingTrainer
from hf_adafocal.training.plan import RunPlan, adaptive_part, build_run_loss, check_histogram
from hf_adafocal.training.smoothing_callback import SmoothingCallback


class SearchingTrainer(UploadingTrainer):
    """A `Trainer` with hyper-parameter search over the arguments of the loss.

    Attributes:
        plan: The loss, its settings and the data sets.
        loss: The training loss.
        adaptive_callback: Moves the loss; None if the loss does not adapt.
    """

    plan: RunPlan
    loss: torch.nn.Module
    adaptive_callback: AdaptiveStateCallback | None

    @property
    def steering(self) -> dict[str, Any]:
        """What the arguments say of the slices that steer a loss, by the names of `SmoothingCallback`."""
        named = zip(("every", "samples", "gain"), STEERING_ARGUMENTS, strict=True)
        return {name: getattr(self.args, argument, None) for name, argument in named}

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """As `Trainer.hyperparameter_search`; each trial starts from the loss that its own arguments describe.

        Without `compute_objective` it is the evaluation loss (the NLL), or the sum of what `compute_metrics` returns.

        Raises:
            ValueError: If a trial changes the loss to one that adapts in another way: take a trainer for each.
        """
        return super().hyperparameter_search(hp_space, compute_objective or self._objective, *args, **kwargs)

    def _objective(self, metrics: dict[str, float]) -> float:
        return default_compute_objective(
            {name: value for name, value in metrics.items() if name not in self.added_metrics}
        )

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        if trial is None or not isinstance(self.args, AdaFocalTrainingArguments) or not self.plan.from_arguments:
            return
        self.args.check_loss_settings()
        loss = build_run_loss(self.args, self.model, self.train_dataset)
        old, new = self.plan.adaptive, adaptive_part(loss)
        if getattr(old, "follows", None) != getattr(new, "follows", None):
            raise ValueError(
                f"A trial cannot change the loss to one that adapts in another way, found {self.args.loss!r}: search "
                "each of the two in a trainer of its own."
            )
        check_histogram(self.plan.histogram, new)
        self.loss = loss.to(self.args.device)
        self.plan = self.plan.with_loss(self.loss)
        if self.adaptive_callback is not None:
            self.adaptive_callback.loss = new
        if isinstance(self.adaptive_callback, SmoothingCallback):
            vars(self.adaptive_callback).update(self.steering)
