"""Find the complete checkpoints of a run, from which an interrupted run can resume."""

import re
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_adafocal.checkpoint_files import RESUMABLE_PARTS, STATE_FILE, check_header, read_json

logger = logging.get_logger(__name__)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the latest complete checkpoint, from which an interrupted run can resume.

    `transformers.trainer_utils.get_last_checkpoint` takes the highest number, even if the run died while it wrote it.
    This one steps back until every part is there and can be read, and warns of what it passed over.

    Args:
        folder: The run's `output_dir`; it need not exist.

    Returns:
        Path of `folder/checkpoint-<step>`, for `train(resume_from_checkpoint=...)`; None if no checkpoint is complete,
        which makes `train` start from the beginning.
    """
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*")]
    steps = {int(match[1]): path for match, path in numbered if match and path.is_dir()}
    complete, passed_over = None, []
    for step in sorted(steps, reverse=True):
        try:
            check_checkpoint(steps[step])
        except ValueError as error:
            passed_over.append(str(error))
        else:
            complete = str(steps[step])
            break
    if passed_over:
        logger.warning(
            f"The last complete checkpoint in {folder} is {complete}; passed over: " + " ".join(passed_over)
        )
    return complete


def check_checkpoint(checkpoint: str | Path) -> None:
    """Check that every part of a checkpoint is there and that no file is cut short; read the headers alone.

    Raises:
        ValueError: If the checkpoint is not complete, with the file that shows it.
    """
    checkpoint = Path(checkpoint)
    read_state(checkpoint)
    for part, patterns in RESUMABLE_PARTS.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            raise ValueError(f"{checkpoint} is not complete: it holds no {part} ({', '.join(patterns)}).")
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            check_header(path)


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """Read a checkpoint's `trainer_state.json`.

    Raises:
        ValueError: If the file is missing, is not JSON, or is not the state of a Trainer.
    """
    path = Path(checkpoint) / STATE_FILE
    advice = "resume from another checkpoint, such as last_complete_checkpoint finds."
    try:
        state = read_json(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, so the checkpoint is not complete; {advice}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; {advice}") from error
    if not isinstance(state, dict) or type(state.get("global_step")) is not int:
        raise ValueError(f"{path} must be an object with a whole `global_step`, found {str(state)[:80]}; {advice}")
    callbacks = state.setdefault("stateful_callbacks", {})
    if not isinstance(callbacks, dict):
        raise ValueError(f"stateful_callbacks in {path} must be an object, found {str(callbacks)[:80]}; {advice}")
    return state
