"""When gamma moves, and how its table survives in a checkpoint."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

STATE_KEY = "adafocal"  # in the `stateful_callbacks` of trainer_state.json


class AdaFocalCallback(TrainerCallback):
    """Updates an AdaFocal loss after each evaluation of its calibration set, while the model trains.

    The first update follows the first training steps: `eval_on_start`, and evaluations that you call yourself before
    or after training, move nothing.

    The table is plain JSON under `stateful_callbacks` of `trainer_state.json`, and this object restores the loss from
    it when training begins, whether or not `restore_callback_states_from_checkpoint` is set. It does not use
    `ExportableState`: with that flag transformers would replace it by a copy built from JSON alone, which could not
    hold the loss. (With the flag transformers warns that it ignores "adafocal"; the restored table is logged after.)

    Args:
        loss: The `AdaFocalLoss` in use; its `update`, `set_table`, `reset`, `edges` and `gammas` are used.
        calibrate: Returns the calibration set's statistics under the current model, with `edges` and `gap`.
        metric_key_prefix: Prefix of the evaluation to wait for: "eval", or "eval_<name>" for a dict of datasets.
        log: Receives `{"gamma_00": ..., ...}` after each update, as `Trainer.log` does.
    """

    def __init__(
        self,
        loss: Any,
        calibrate: Callable[[], Any],
        metric_key_prefix: str = "eval",
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.loss = loss
        self.calibrate = calibrate
        self.metric_key_prefix = metric_key_prefix
        self.log = log
        self.updates = 0
        self._training = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Start from the checkpoint's table if there is one, else from a fresh one."""
        self.loss.to(args.device)
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is not None:
            self._restore(saved)
            logger.info(f"Restored AdaFocal's table after {self.updates} updates from the checkpoint.")
        else:
            if state.global_step > 0:
                logger.warning(
                    f"The checkpoint of step {state.global_step} was not saved by a run with AdaFocalCallback: it has "
                    f"no {STATE_KEY!r} under stateful_callbacks in trainer_state.json. Training continues with its "
                    f"weights, and gammas start afresh at {self.loss.gamma_initial}."
                )
            self.loss.reset()
            self.updates = 0
        self._export(state)
        self._training = True

    def on_train_end(self, args, state, control, **kwargs):
        """Evaluations after training leave gamma alone."""
        self._training = False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Move gamma if this was the evaluation to wait for."""
        ours = f"{self.metric_key_prefix}_runtime" in (metrics or {})  # the Trainer adds it to every evaluation
        if not (ours and self._training and state.global_step > 0):
            return
        stats = self.calibrate()
        self.loss.update(stats.edges, stats.gap)
        self.updates += 1
        self._export(state)
        if self.log is not None:
            self.log({f"gamma_{index:02d}": value for index, value in enumerate(self.loss.gammas.tolist())})

    def _export(self, state) -> None:
        state.stateful_callbacks[STATE_KEY] = {
            "edges": self.loss.edges.tolist(),
            "gammas": self.loss.gammas.tolist(),
            "updates": self.updates,
        }

    def _restore(self, saved: dict) -> None:
        missing = {"edges", "gammas", "updates"} - saved.keys()
        if missing:
            raise ValueError(
                f"stateful_callbacks.{STATE_KEY} in the checkpoint's trainer_state.json lacks {sorted(missing)}; "
                "resume from another checkpoint."
            )
        try:
            self.loss.set_table(saved["edges"], saved["gammas"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"stateful_callbacks.{STATE_KEY} in the checkpoint's trainer_state.json does not fit this run's loss: "
                f"{error} Resume with the settings of the saved run, or from another checkpoint."
            ) from error
        self.updates = int(saved["updates"])
