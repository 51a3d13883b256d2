"""Pictures for TensorBoard, W&B and trackio: what the Trainer's own reports, numbers alone, leave out."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

TRACKERS = ("tensorboard", "wandb", "trackio")


class PictureCallback(TrainerCallback):
    """Draws after each evaluation and hands the pictures to the trackers of the run, on the main process.

    Args:
        draw: Returns matplotlib figures by name for the prefix of the evaluation just made.
        writer: Returns the TensorBoard writer of the run, None if there is none (callbacks do not know each other).
    """

    def __init__(self, draw: Callable[[str], Mapping[str, Any]], writer: Callable[[], Any]) -> None:
        self.draw = draw
        self.writer = writer

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Draw, and log under `calibration/<prefix>_<name>`."""
        prefix = next((name.removesuffix("_runtime") for name in metrics or {} if name.endswith("_runtime")), None)
        if prefix is None or not state.is_world_process_zero:
            return
        for name, figure in self.draw(prefix).items():
            tag = f"calibration/{prefix}_{name}"
            writer = self.writer()
            if writer is not None:
                writer.add_figure(tag, figure, state.global_step)
            if "wandb" in args.report_to:
                _log_to_wandb(tag, figure, state.global_step)
            if "trackio" in args.report_to:
                _log_to_trackio(tag, figure)


def _log_to_wandb(tag: str, figure: Any, step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.log({tag: wandb.Image(figure), "train/global_step": step})


def _log_to_trackio(tag: str, figure: Any) -> None:
    import numpy as np
    import trackio
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    trackio.log({tag: trackio.Image(np.asarray(canvas.buffer_rgba())[..., :3].copy())})
