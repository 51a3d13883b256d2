"""Callback that reports training progress to a loss whose batch term starts partway through the run."""

from torch import nn
from transformers import TrainerCallback


class TermStart(TrainerCallback):
    """Set `progress` of a `CombinedLoss` before each optimizer step, so that its term starts where `start` says.

    `AdaFocalTrainer` has one; give it to a stock `Trainer` whose `compute_loss_func` is such a loss.

    Args:
        loss: Any loss; one without `progress` is left alone.

    ```python
    loss = CombinedLoss("topological_focal", start=0.5)
    trainer = Trainer(..., compute_loss_func=loss, callbacks=[TermStart(loss)])
    ```
    """

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def on_step_begin(self, args, state, control, **kwargs):
        """Set the fraction of optimizer steps that are done; a resumed run continues from its own."""
        if hasattr(self.loss, "progress"):
            self.loss.progress = state.global_step / state.max_steps
