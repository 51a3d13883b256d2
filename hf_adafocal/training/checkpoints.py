"""Which checkpoints of a run are complete, so that a run that was killed can go on."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

logger = logging.get_logger(__name__)

STATE_FILE = "trainer_state.json"  # the Trainer writes it last

# Any one of the patterns will do; the last ones are folders of FSDP and DeepSpeed.
PARTS = {
    "weights": (
        *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
        *("adapter_model.*", "*/adapter_model.*", "pytorch_model_fsdp*", "global_step*"),
    ),
    "optimizer": ("*optimizer*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*.pth",),
}


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The latest checkpoint that a killed run can go on from.

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
    for part, patterns in PARTS.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            raise ValueError(f"{checkpoint} is not complete: it holds no {part} ({', '.join(patterns)}).")
    for path in sorted(checkpoint.rglob("*")):
        read = READERS.get(path.suffix)
        if read is None or not path.is_file():
            continue
        try:
            read(path)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The content of a checkpoint's `trainer_state.json`.

    Raises:
        ValueError: If the file is missing, is not JSON, or is not the state of a Trainer.
    """
    path = Path(checkpoint) / STATE_FILE
    advice = "resume from another checkpoint, such as last_complete_checkpoint finds."
    try:
        state = _read_json(path)
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


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_index(path: Path) -> None:
    content = _read_json(path)
    if path.name.endswith(".index.json"):
        missing = sorted(name for name in set(content["weight_map"].values()) if not (path.parent / name).is_file())
        if missing:
            raise ValueError(f"it names {missing}, which are missing")


def _read_header(path: Path) -> None:
    with safe_open(path, framework="np"):  # compares the header with the file's length
        pass


def _read_directory(path: Path) -> None:
    with zipfile.ZipFile(path):  # torch.save writes the archive's directory at its end
        pass


READERS = {
    ".json": _read_index,
    ".safetensors": _read_header,
    **dict.fromkeys((".pt", ".pth", ".bin"), _read_directory),
}
