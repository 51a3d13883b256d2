"""When a loss moves, and how its table survives in a checkpoint."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from hf_adafocal.training.checkpoints import STATE_FILE, read_state
from hf_adafocal.training.smoothing_control import Schedule, gain_of_update, log_temperature, schedule

logger = logging.get_logger(__name__)

STATE_KEY = "adafocal"  # in the `stateful_callbacks` of trainer_state.json


def saved_table(checkpoint: str | Path) -> Any:
    """What a checkpoint says of AdaFocal's table, unchecked; None if it says nothing.

    Raises:
        ValueError: If its `trainer_state.json` cannot be read.
    """
    return read_state(checkpoint)["stateful_callbacks"].get(STATE_KEY)


class SaveAfterEvaluation(TrainerCallback):
    """Makes a checkpoint that falls on the last step of an epoch wait for what the end of the epoch brings.

    `save_strategy="steps"` would save before the evaluation of `eval_strategy="epoch"`, and a run resumed from there
    would never hold that evaluation: one update of gamma would be lost.
    """

    def __init__(self) -> None:
        self._postponed = False

    def on_step_end(self, args, state, control, **kwargs):
        """Take back the request to save if the epoch or the training ends with this step."""
        if control.should_save and (control.should_training_stop or state.epoch == int(state.epoch)):
            control.should_save, self._postponed = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Renew the request; the Trainer logs and evaluates before it saves."""
        control.should_save, self._postponed = control.should_save or self._postponed, False


class EpochBegin(TrainerCallback):
    """Calls a function as each epoch begins, also where a run resumes within one.

    Args:
        function: Takes no argument, as the `forget` of a `CombinedLoss`.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Call it."""
        self.function()


class TableCallback(SaveAfterEvaluation):
    """Keeps what follows held-out data, an AdaFocal table or an eps, in the checkpoints, and brings it back.

    It is plain JSON under `stateful_callbacks` of `trainer_state.json`, and this object restores the loss from it when
    training begins, whether or not `restore_callback_states_from_checkpoint` is set. It does not use
    `ExportableState`: with that flag transformers would replace it by a copy built from JSON alone, which could not
    hold the loss. (With the flag transformers warns that it ignores "adafocal"; the restored table is logged after.)

    With `load_best_model_at_end` the best checkpoint's weights come back with its table when training ends.

    Args:
        loss: Its `table`, `set_table`, `reset` and `readings` are used.
        log: Receives what the loss reads after each update, `{"gamma_00": ..., ...}`, as `Trainer.log` does.
    """

    def __init__(self, loss: Any, log: Callable[[dict[str, float]], None] | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.log = log
        self.updates = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Start from the checkpoint's table if there is one, else from a fresh one."""
        self.loss.to(args.device)
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is not None:
            self.check_table(saved, f"{STATE_FILE} of the checkpoint of step {state.global_step}")
            self._set_table(saved)
            logger.info(f"Restored AdaFocal's table after {self.updates} updates from the checkpoint.")
        else:
            self.loss.reset()
            self.updates = 0
            if state.global_step > 0:
                logger.warning(
                    f"The checkpoint of step {state.global_step} was not saved by a run with AdaFocalCallback: it has "
                    f"no {STATE_KEY!r} under stateful_callbacks in trainer_state.json. Training continues with its "
                    f"weights and a fresh start: {self.loss.readings()}."
                )
        self._export(state)

    def on_train_end(self, args, state, control, **kwargs):
        """Take the best checkpoint's table if its weights were loaded."""
        best = state.best_model_checkpoint
        if not args.load_best_model_at_end or best is None:
            return
        saved = saved_table(best)
        if saved is None:
            logger.warning(f"{best} has no table of AdaFocal, so gammas stay those of step {state.global_step}.")
            return
        self.check_table(saved, str(Path(best) / STATE_FILE))
        self._set_table(saved)
        self._export(state)
        logger.info(f"Restored AdaFocal's table after {self.updates} updates from the best checkpoint, {best}.")

    def note_update(self, state, **readings: float) -> None:
        """Keep and log what the loss has become."""
        self.updates += 1
        self._export(state)
        if self.log is not None:
            gammas = self.loss.table().get("gammas", ())
            of_bins = {f"gamma_{index:02d}": gamma for index, gamma in enumerate(gammas)}
            self.log({**(of_bins or self.loss.readings()), **readings})

    def _export(self, state) -> None:
        state.stateful_callbacks[STATE_KEY] = {**self.loss.table(), "updates": self.updates}

    def _set_table(self, saved: dict) -> None:
        self.loss.set_table(**{name: saved[name] for name in self.loss.table()})
        self.updates = saved["updates"]

    def check_table(self, saved: Any, source: str) -> None:
        """Check that a table from a checkpoint fits the loss; change nothing.

        Args:
            saved: What stands under `stateful_callbacks` in `trainer_state.json`.
            source: Where it stands, for the error.

        Raises:
            ValueError: If a field is missing, has the wrong length, or is not what a run writes.
        """
        where = f"stateful_callbacks.{STATE_KEY}"
        advice = "Resume with the settings of the saved run (loss, update_rule, num_bins), or from another checkpoint."
        if not isinstance(saved, dict):
            raise ValueError(f"{where} in {source} must be an object, found {saved!r}. {advice}")
        missing = {*self.loss.table(), "updates"} - saved.keys()
        if missing:
            raise ValueError(f"{where} in {source} lacks {sorted(missing)}. {advice}")
        for name, own in self.loss.table().items():
            values, size = saved[name], len(own) if isinstance(own, list) else None
            if name in ("edges", "gammas") and not (
                isinstance(values, list) and len(values) == size and all(map(_is_finite, values))
            ):
                raise ValueError(
                    f"{where}.{name} in {source} must be {size} finite numbers for {self.loss.num_bins} bins, "
                    f"found {values}. {advice}"
                )
            if name == "edges" and values != sorted(values):
                raise ValueError(f"{where}.edges in {source} must ascend, found {values}. {advice}")
        try:  # what is left: tables of classes, or an eps
            copy.deepcopy(self.loss).set_table(**{name: saved[name] for name in self.loss.table()})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} in {source} does not fit this run's loss: {error} {advice}") from error
        updates = saved["updates"]
        if type(updates) is not int or updates < 0:
            raise ValueError(f"{where}.updates in {source} must be a whole number from 0, found {updates!r}. {advice}")


class AdaFocalCallback(TableCallback):
    """Updates an AdaFocal loss after each evaluation of its calibration set, while the model trains: the paper's rule.

    The first update follows the first training steps: `eval_on_start`, and evaluations that you call yourself before
    or after training, move nothing.

    Args:
        loss: The `AdaFocalLoss` in use; its `update_from`, and what `TableCallback` needs, are used.
        calibrate: Returns the calibration set's statistics under the current model, with `edges` and `gap`; None if
            the evaluation just made was not the one to wait for after all, and gamma stays.
        metric_key_prefix: Prefix of the evaluation to wait for: "eval", or "eval_<name>" for a dict of datasets.
        log: As in `TableCallback`.
    """

    def __init__(
        self,
        loss: Any,
        calibrate: Callable[[], Any],
        metric_key_prefix: str = "eval",
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        super().__init__(loss, log)
        self.calibrate = calibrate
        self.metric_key_prefix = metric_key_prefix
        self._training = False
        self._first_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """As `TableCallback`; evaluations count from now on."""
        super().on_train_begin(args, state, control, **kwargs)
        self._training, self._first_step = True, state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        """As `TableCallback`; later evaluations leave gamma alone."""
        self._training = False
        super().on_train_end(args, state, control, **kwargs)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Move gamma if this was the evaluation to wait for."""
        ours = f"{self.metric_key_prefix}_runtime" in (metrics or {})  # the Trainer adds it to every evaluation
        if not (ours and self._training and state.global_step > self._first_step):  # also not `eval_on_start`
            return
        stats = self.calibrate()
        if stats is not None:
            self.loss.update_from(stats)
            self.note_update(state)


class TemperatureCallback(TableCallback):
    """Steers a loss by the temperature of slices of the calibration set, some ten times a run: our rule.

    Args:
        loss: Its `steer`, and what `TableCallback` needs, are used.
        measure: From the indices of calibration samples to their `steering.temperature_sums` under the current model,
            over all processes.
        calibration_size: Samples of the calibration set.
        gain: What the loss moves over a run per unit of log T; the `steering_gain` of the loss if left out.
        every: Optimizer steps from one update to the next; from the run's length if left out.
        samples: Calibration samples of one update; from the run's length if left out.
        log: As in `TableCallback`; the temperature of each slice is logged too.
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
    ) -> None:
        super().__init__(loss, log)
        self.measure, self.calibration_size = measure, calibration_size
        self.gain, self.every, self.samples = gain, every, samples
        self.plan = Schedule((), 1)

    def on_train_begin(self, args, state, control, **kwargs):
        """As `TableCallback`, and plan the run."""
        super().on_train_begin(args, state, control, **kwargs)
        self.plan = schedule(
            state.max_steps,
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            self.calibration_size,
            self.every,
            self.samples,
            args.world_size,
        )
        if not self.plan.steps:
            logger.warning(
                f"A run of {state.max_steps} steps is too short to steer the loss: it stays at {self.loss.readings()}."
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Move the loss if the plan says so."""
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step not in self.plan.steps:
            return
        update = self.plan.steps.index(state.global_step)
        seed = args.seed if args.data_seed is None else args.data_seed
        log_t = log_temperature(self.measure(self.plan.slice(update, self.calibration_size, seed)))
        gain = self.loss.steering_gain if self.gain is None else self.gain
        self.loss.steer(gain_of_update(gain, update, len(self.plan.steps)) * log_t)
        should_log = control.should_log  # of the step's training loss; a log of ours would take it back
        self.note_update(state, slice_temperature=math.exp(log_t))
        control.should_log = should_log


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
