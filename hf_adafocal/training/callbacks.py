"""Callbacks that update an adaptive loss during training and save its state in checkpoints."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from hf_adafocal.checkpoint_files import STATE_FILE
from hf_adafocal.training.checkpoints import read_state

logger = logging.get_logger(__name__)

STATE_KEY = "adafocal"  # in the `stateful_callbacks` of trainer_state.json
TRACED = ("gammas", "smoothing")  # entries of a loss's table that its history keeps
FEW_UPDATES = 20  # with fewer, gamma hardly leaves its initial value


def saved_adaptive_state(checkpoint: str | Path) -> Any:
    """Read the state of an adaptive loss from a checkpoint, unchecked; None if it holds none.

    Raises:
        ValueError: If its `trainer_state.json` cannot be read.
    """
    return read_state(checkpoint)["stateful_callbacks"].get(STATE_KEY)


class FirstStepCheck(TrainerCallback):
    """Call a function after the first step of each training run.

    Args:
        check: Takes no argument; what it raises ends the run.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check
        self._done = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Arm the check for the first step."""
        self._done = False

    def on_step_end(self, args, state, control, **kwargs):
        """Call the function, once per run."""
        if not self._done:
            self._done = True
            self.check()


class SaveAfterEvaluation(TrainerCallback):
    """Postpone a checkpoint on the last step of an epoch until the evaluation at the epoch's end is done.

    `save_strategy="steps"` would save before the evaluation of `eval_strategy="epoch"`, and a run resumed from there
    would never hold that evaluation: one update of gamma would be lost.
    """

    def __init__(self) -> None:
        self._postponed = False

    def on_step_end(self, args, state, control, **kwargs):
        """Withdraw the request to save if the epoch or the training ends with this step."""
        if control.should_save and (control.should_training_stop or state.epoch == int(state.epoch)):
            control.should_save, self._postponed = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Renew the request; the Trainer logs and evaluates before it saves."""
        control.should_save, self._postponed = control.should_save or self._postponed, False


class AdaptiveStateCallback(SaveAfterEvaluation):
    """Save and restore the loss's adaptive state in checkpoints.

    The state is plain JSON under `stateful_callbacks` of `trainer_state.json`: the loss's table, the number of
    updates, and the history of what was traced, with a point at the step where training began. The loss is restored
    from it when training begins, whether or not `restore_callback_states_from_checkpoint` is set. It does not use
    `ExportableState`: with that flag transformers would replace it by a copy built from JSON alone, which could not
    hold the loss. (With the flag transformers warns that it ignores "adafocal"; the restored table is logged after.)

    With `load_best_model_at_end` the best checkpoint's weights come back with its table when training ends.

    Args:
        loss: An `AdaptiveLoss`.
        log: Receives the loss's readings after each update, as `Trainer.log` does.

    Attributes:
        updates: Number of updates so far.
        history: `{"step": ..., "gammas": [...]}` or `{"step": ..., "smoothing": ...}` at the start and after each
            update.
    """

    def __init__(self, loss: Any, log: Callable[[dict[str, float]], None] | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.log = log
        self.updates = 0
        self.history: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Restore the checkpoint's state if there is one, else reset the loss."""
        if isinstance(self.loss, nn.Module):
            self.loss.to(args.device)
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is not None:
            self.check_saved(saved, f"{STATE_FILE} of the checkpoint of step {state.global_step}")
            self._restore(saved)
            logger.info(f"Restored the loss's table after {self.updates} updates from the checkpoint.")
        else:
            self.loss.reset()
            self.updates, self.history = 0, []
            self._trace(state)
            if state.global_step > 0:
                logger.warning(
                    f"The checkpoint of step {state.global_step} was not saved by a run with AdaFocalCallback: it has "
                    f"no {STATE_KEY!r} under stateful_callbacks in trainer_state.json. Training continues with its "
                    f"weights and a fresh start: {self.loss.readings()}."
                )
        self._export(state)

    def on_train_end(self, args, state, control, **kwargs):
        """Restore the best checkpoint's table if its weights were loaded."""
        if not args.load_best_model_at_end:
            return
        best, saved = _best_on_main_process(state)
        if best is not None and saved is None:
            logger.warning(f"{best} has no table of the loss, so it stays that of step {state.global_step}.")
        if best is None or saved is None:
            return
        self.check_saved(saved, str(Path(best) / STATE_FILE))
        self._restore(saved)
        self._export(state)
        logger.info(f"Restored the loss's table after {self.updates} updates from the best checkpoint, {best}.")

    def note_update(self, state, **readings: float) -> None:
        """Record and log the loss's state after an update."""
        self.updates += 1
        self._trace(state)
        self._export(state)
        if self.log is not None:
            self.log({**self.loss.readings(), **readings})

    def _trace(self, state) -> None:
        table = self.loss.table()
        traced = {name: table[name] for name in TRACED if name in table}
        self.history.append({"step": state.global_step, **traced})

    def _export(self, state) -> None:
        state.stateful_callbacks[STATE_KEY] = {
            **self.loss.table(),
            "updates": self.updates,
            "history": list(self.history),
        }

    def _restore(self, saved: dict) -> None:
        self.loss.set_table(**{name: saved[name] for name in self.loss.table()})
        self.updates, self.history = saved["updates"], list(saved["history"])

    def check_saved(self, saved: Any, source: str) -> None:
        """Check that the state in a checkpoint fits the loss; change nothing.

        Args:
            saved: What stands under `stateful_callbacks` in `trainer_state.json`.
            source: Where it stands, for the error.

        Raises:
            ValueError: If a field is missing, has the wrong length, or is not what a run writes.
        """
        where = f"stateful_callbacks.{STATE_KEY}"
        advice = "Resume with the settings of the saved run (loss, num_bins), or from another checkpoint."
        if not isinstance(saved, dict):
            raise ValueError(f"{where} in {source} must be an object, found {saved!r}. {advice}")
        missing = {*self.loss.table(), "updates", "history"} - saved.keys()
        if missing:
            raise ValueError(f"{where} in {source} lacks {sorted(missing)}. {advice}")
        try:
            copy.deepcopy(self.loss).set_table(**{name: saved[name] for name in self.loss.table()})
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{where} in {source} does not fit this run's loss: {error} {advice}") from error
        updates, history = saved["updates"], saved["history"]
        if type(updates) is not int or updates < 0:
            raise ValueError(f"{where}.updates in {source} must be a whole number from 0, found {updates!r}. {advice}")
        if not isinstance(history, list) or not all(isinstance(entry, dict) and "step" in entry for entry in history):
            raise ValueError(f"{where}.history in {source} must be a list of updates, found {history!r}. {advice}")


class AdaFocalCallback(AdaptiveStateCallback):
    """Update an AdaFocal loss after each evaluation of its calibration set while the model trains, as the paper does.

    The first update follows the first training steps: `eval_on_start`, and evaluations that you call yourself before
    or after training, move nothing.

    For a stock `Trainer`: give it the loss as `compute_loss_func`, a `CalibrationMetrics` as `compute_metrics`, and
    this callback. The calibration set is then the evaluation set, or the entry "calibration" of several.

    Args:
        loss: An `AdaptiveLoss` that follows bins, such as `AdaFocalLoss`.
        calibrate: Returns the calibration set's statistics under the current model, with `edges` and `gap`; None if
            the evaluation just made was not the one to wait for after all, and gamma stays.
        metric_key_prefix: Prefix of the evaluation to wait for; "eval" or "eval_calibration" if left out.
        log: As in `AdaptiveStateCallback`.
        evaluate: Called at the end of each epoch when `eval_strategy` is "no", to evaluate the calibration set.
        calibration_text: Size of the calibration set in words, for the line that describes the run.

    Raises:
        ValueError: As training begins, if nothing would ever be evaluated; after an epoch, if no evaluation was of
            the calibration set.

    >>> from hf_adafocal import AdaFocalLoss, CalibrationMetrics
    >>> loss = AdaFocalLoss()
    >>> callback = AdaFocalCallback(loss, CalibrationMetrics(loss.num_bins).calibrate)  # of a stock `Trainer`
    >>> callback.prefixes
    ('eval', 'eval_calibration')
    """

    def __init__(
        self,
        loss: Any,
        calibrate: Callable[[], Any],
        metric_key_prefix: str | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
        evaluate: Callable[[], Any] | None = None,
        calibration_text: str = "",
    ) -> None:
        super().__init__(loss, log)
        counted = getattr(getattr(calibrate, "__self__", None), "num_bins", loss.num_bins)
        if counted != loss.num_bins:
            raise ValueError(f"The loss has {loss.num_bins} bins and its statistics {counted}: give both one number.")
        self.calibrate = calibrate
        self.calibration_text = calibration_text
        self.prefixes = ("eval", "eval_calibration") if metric_key_prefix is None else (metric_key_prefix,)
        self.evaluate = evaluate
        self._first_step: int | None = None  # where training began; None outside of it
        self._missed: set[str] = set()  # prefixes of evaluations that moved nothing

    def on_train_begin(self, args, state, control, **kwargs):
        """Restore the state, and let evaluations update gamma from now on."""
        if args.eval_strategy == IntervalStrategy.NO and self.evaluate is None:
            raise ValueError(
                "Gamma moves when the trainer evaluates, but eval_strategy is 'no', so it would never move. Set "
                "eval_strategy='epoch' or 'steps', or train with AdaFocalTrainer."
            )
        super().on_train_begin(args, state, control, **kwargs)
        self._first_step = state.global_step
        self._missed = set()
        self._describe(args, state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Raise if the last epoch evaluated only other sets than the calibration set."""
        self._check_that_gamma_moved()

    def _check_that_gamma_moved(self) -> None:
        if self._missed and self.updates == 0:
            raise ValueError(
                f"Gamma has not moved: the evaluations were of {sorted(self._missed)}, none of "
                f"{' or '.join(map(repr, self.prefixes))}. Name the calibration set's entry of eval_dataset "
                "'calibration', or say metric_key_prefix."
            )

    def on_epoch_end(self, args, state, control, **kwargs):
        """Evaluate the calibration set if the Trainer never does."""
        super().on_epoch_end(args, state, control, **kwargs)
        if args.eval_strategy == IntervalStrategy.NO and self.evaluate is not None:
            saving, logging_ = control.should_save, control.should_log  # an evaluation inside takes them back
            self.evaluate()
            control.should_save, control.should_log = saving, logging_

    def on_train_end(self, args, state, control, **kwargs):
        """Restore the best checkpoint's table; later evaluations do not update gamma."""
        self._first_step = None
        self._check_that_gamma_moved()
        made = self.updates
        super().on_train_end(args, state, control, **kwargs)
        if self.updates < FEW_UPDATES <= made and not getattr(args, "calibrate_at_end", False):
            logger.warning(
                f"load_best_model_at_end restored the weights after {self.updates} of {made} updates of gamma, too "
                "few to have calibrated them. Compare with the last ones, train without it, or fold a temperature."
            )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Update gamma if this was an evaluation of the calibration set."""
        if self._first_step is None or state.global_step <= self._first_step:  # also `eval_on_start`
            return
        # The Trainer adds a run time to the metrics of every evaluation.
        evaluated = {name.removesuffix("_runtime") for name in metrics or {} if name.endswith("_runtime")}
        if not evaluated & set(self.prefixes):
            self._missed |= evaluated
            return
        stats = self.calibrate()
        if stats is not None:
            self.loss.update_from(stats)
            self.note_update(state)

    def _describe(self, args, state) -> None:
        """Log how often gamma will be updated, and warn if that is too rare."""
        expected = expected_evaluations(args, state)
        samples = f" and {self.calibration_text}" if self.calibration_text else ""
        text = f"{type(self.loss).__name__} with {self.loss.num_bins} bins{samples}: gamma will move {expected} times"
        if expected >= FEW_UPDATES:
            logger.info(f"{text}.")
        else:
            folded = getattr(args, "calibrate_at_end", False)
            logger.warning(
                f"{text}, too few to leave its start far behind: expect the calibration of a focal loss with gamma "
                f"{self.loss.readings().get('gamma_mean', 1.0):g}. More evaluations help (eval_strategy='steps', "
                f"smaller eval_steps){'' if folded else ', or a temperature at the end'}."
            )


def expected_evaluations(args: Any, state: Any) -> int:
    """Compute how many evaluations a training run makes from start to end; at most, where epochs end early."""
    epochs = min(state.num_train_epochs, state.max_steps)  # the Trainer has sys.maxsize epochs of a stream
    if args.eval_strategy == IntervalStrategy.NO:
        return epochs
    if args.eval_strategy == IntervalStrategy.EPOCH:
        return max(epochs + 1 - max(math.ceil(args.eval_delay), 1), 0)
    every = state.eval_steps
    last, control = copy.copy(state), TrainerControl()
    last.global_step = state.max_steps
    DefaultFlowCallback().on_step_end(args, last, control)  # releases differ in whether the last step is evaluated
    return sum(step >= args.eval_delay for step in range(every, state.max_steps, every)) + control.should_evaluate


def _best_on_main_process(state: Any) -> tuple[str | None, Any]:
    """Read the best checkpoint and its adaptive state on the main process; machines need not share a disk.

    Other machines do not even know the checkpoint, because the Trainer notes only one that it sees.
    """
    found: list[Any] = [None, None]
    if state.is_world_process_zero and (best := state.best_model_checkpoint) is not None:
        try:
            found = [best, saved_adaptive_state(best)]
        except ValueError as error:
            found = [best, error]
    broadcast_object_list(found)
    if isinstance(found[1], ValueError):
        raise found[1]
    return found[0], found[1]
