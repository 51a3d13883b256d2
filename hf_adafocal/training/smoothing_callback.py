"""Callback that steers label smoothing by the temperature of slices of the calibration set."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor
from transformers.utils import logging

from hf_adafocal.training.callbacks import AdaptiveStateCallback
from hf_adafocal.training.smoothing_control import Schedule, gain_of_update, log_temperature, schedule

logger = logging.get_logger(__name__)


class SmoothingCallback(AdaptiveStateCallback):
    """Adapt label smoothing to the temperature of slices of the calibration set, about ten times a run.

    Args:
        loss: An `AdaptiveLoss` that follows the temperature.
        measure: From indices of calibration samples to their `temperature_sums` under the current model, over all
            processes.
        calibration_size: Samples of the calibration set.
        gain: What the loss moves over a run per unit of log T; the `steering_gain` of the loss if left out.
        every: Optimizer steps from one update to the next; from the run's length if left out.
        samples: Calibration samples of one update; from the run's length if left out.
        log: As in `AdaptiveStateCallback`; the temperature of each slice is logged too.
        processes: That see batches of their own; all of the run if left out.
    """

    def __init__(
        self,
        loss: Any,
        measure: Callable[[np.ndarray], Tensor],
        calibration_size: int,
        gain: float | None = None,
        every: int | None = None,
        samples: int | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
        processes: int | None = None,
    ) -> None:
        super().__init__(loss, log)
        self.measure, self.calibration_size, self.processes = measure, calibration_size, processes
        self.gain, self.every, self.samples = gain, every, samples
        self.schedule = Schedule((), 1)

    def on_train_begin(self, args, state, control, **kwargs):
        """Restore the state, and schedule the updates of the run."""
        super().on_train_begin(args, state, control, **kwargs)
        processes = args.world_size if self.processes is None else self.processes
        self.schedule = schedule(
            state.max_steps,
            args.train_batch_size * args.gradient_accumulation_steps * processes,
            self.calibration_size,
            self.every,
            self.samples,
            processes,
        )
        if not self.schedule.steps:
            logger.warning(
                f"A run of {state.max_steps} steps is too short to steer the loss: it stays at {self.loss.readings()}."
            )
        else:
            logger.info(
                f"{type(self.loss).__name__}: smoothing will move {len(self.schedule.steps)} times, each on "
                f"{self.schedule.slice_size} calibration samples."
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Update the loss at the steps of the schedule."""
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step not in self.schedule.steps:
            return
        update = self.schedule.steps.index(state.global_step)
        seed = args.seed if args.data_seed is None else args.data_seed
        log_t = log_temperature(self.measure(self.schedule.slice(update, self.calibration_size, seed)))
        gain = self.loss.steering_gain if self.gain is None else self.gain
        self.loss.steer(gain_of_update(gain, update, len(self.schedule.steps)) * log_t)
        should_log = control.should_log  # of the step's training loss; a log of ours would take it back
        self.note_update(state, slice_temperature=math.exp(log_t))
        control.should_log = should_log
