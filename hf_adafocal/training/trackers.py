"""Log calibration pictures to TensorBoard, W&B and trackio; the Trainer's own reports hold numbers alone."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

TRACKERS = ("tensorboard", "wandb", "trackio")


class PictureCallback(TrainerCallback):
    """Log a reliability diagram after each evaluation, and how the loss adapted once training ends.

    All pictures of an evaluation go to a tracker in one call, with `train/global_step` as the Trainer's numbers have
    it; from the main process alone.

    Args:
        evaluated: Returns matplotlib figures by name for the prefix of an evaluation.
        adapted: Returns figures of the whole run by name.
        writer: Returns the TensorBoard writer of the run, None if there is none (callbacks do not know each other).

    ```python
    from transformers.integrations import TensorBoardCallback

    board = TensorBoardCallback()
    pictures = PictureCallback(lambda prefix: {"reliability": figure}, dict, lambda: board.tb_writer)
    trainer = Trainer(model, args, callbacks=[board, pictures], ...)
    ```
    """

    def __init__(
        self,
        evaluated: Callable[[str], Mapping[str, Any]],
        adapted: Callable[[], Mapping[str, Any]],
        writer: Callable[[], Any],
    ) -> None:
        self.evaluated = evaluated
        self.adapted = adapted
        self.writer = writer

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Log the evaluation's pictures as `calibration/<prefix>_<name>`."""
        prefix = next((name.removesuffix("_runtime") for name in metrics or {} if name.endswith("_runtime")), None)
        if prefix is not None and state.is_world_process_zero:
            self._log(args, state, {f"{prefix}_{name}": figure for name, figure in self.evaluated(prefix).items()})

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Log the run's pictures as `calibration/<name>` with the summary of training, before the trackers close."""
        if "train_runtime" in (logs or {}) and state.is_world_process_zero:
            self._log(args, state, self.adapted())

    def _log(self, args, state, figures: Mapping[str, Any]) -> None:
        pictures = {f"calibration/{name}": figure for name, figure in figures.items()}
        if not pictures:
            return
        writer = self.writer()
        if writer is not None:
            for tag, figure in pictures.items():
                writer.add_figure(tag, figure, state.global_step)
        if "wandb" in args.report_to:
            _log_to_wandb(pictures, state.global_step)
        if "trackio" in args.report_to:
            _log_to_trackio(pictures, state.global_step)


def _log_to_wandb(pictures: Mapping[str, Any], step: int) -> None:
    import wandb

    if wandb.run is not None:
        images = {tag: wandb.Image(_pixels(figure), caption=_caption(step)) for tag, figure in pictures.items()}
        wandb.log({**images, "train/global_step": step})


def _log_to_trackio(pictures: Mapping[str, Any], step: int) -> None:
    import trackio

    images = {tag: trackio.Image(_pixels(figure), caption=_caption(step)) for tag, figure in pictures.items()}
    trackio.log({**images, "train/global_step": step})


def _caption(step: int) -> str:
    """Make a caption with the step, which the trackers' galleries do not show."""
    return f"optimizer step {step}"


def _pixels(figure: Any) -> Any:
    """Render a figure as RGB values, shape (height, width, 3), uint8."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
