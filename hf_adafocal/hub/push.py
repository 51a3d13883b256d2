"""Push a run folder to the Hugging Face Hub as a model: an allow-list of files, in one repeatable commit."""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from hf_adafocal.checkpoint_files import is_weights
from hf_adafocal.hub.client import PushResult, checked_token, push_files
from hf_adafocal.upload_selection import Selection, select_files

logger = logging.get_logger(__name__)


def push_run(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    include: Sequence[str] = (),
    include_training_state: bool = False,
    message: str = "Push a run with hf-adafocal",
) -> PushResult:
    """Push the folder of a run as a model: weights, configuration, tokenizer or processor, card, report, pictures.

    Everything goes into one commit, so the repository is never half new. A push that failed can be repeated; one that
    changes nothing makes no commit. Call it in one process of a distributed run.

    Only files of an allow-list are pushed, and only if they hold what their names say
    (`upload_selection.select_files`); the result names each other file with the reason. The Trainer's state
    (`trainer_state.json`, `training_args.bin`, optimizer, scheduler and random states, `checkpoint-*` folders, event
    files) is pushed with `include_training_state` alone. It holds pickles, which run code when they are loaded: share
    them with people who trust you.

    Args:
        folder: What `save_model` wrote, with the files beside it.
        repo_id: `<namespace>/<name>`, or `<name>` in the user's own namespace.
        private: Create the repository as a private one. The visibility of one that is there does not change.
        revision: Branch to push to, created from `main` if there is none of that name; `main` if left out.
        include: Patterns of further files to push, such as `*.onnx`.
        include_training_state: Push what is needed to go on training, too.
        message: First line of the commit message.

    Returns:
        What was pushed, what was left out and why, and whether there is a new commit.

    Raises:
        ValueError: If the folder holds no complete checkpoint in safetensors, a file is not what its name says, or
            one holds an access token.
        PushError: If the Hub cannot be reached or refuses, or `private` is asked of a public repository.
    """
    folder = Path(folder)
    selection = select_files(folder, include=include, training_state=include_training_state)
    _check_checkpoint(folder, selection)
    if "README.md" not in selection.files:
        logger.warning(f"{folder} holds no README.md, so the repository {repo_id} gets no model card from this push.")
    _check_for_token(selection.files)
    result = push_files(
        selection.files,
        repo_id,
        private=private,
        revision=revision,
        message=message,
        replaces=_is_looked_up,
    )
    if selection.left_out:
        reasons = ", ".join(f"{path} ({reason})" for path, reason in selection.left_out.items())
        logger.info(f"Not pushed: {reasons}.")
    return replace(result, left_out=selection.left_out)


def _is_looked_up(path: str) -> bool:
    """Whether `from_pretrained` finds a file by its name, so that one of an earlier push would replace the new."""
    return "/" not in path and (is_weights(path) or path == "adapter_config.json")


def _check_checkpoint(folder: Path, selection: Selection) -> None:
    top = {path for path in selection.files if "/" not in path}
    if not any(path.endswith(".safetensors") and is_weights(path) for path in top):
        found = {path: reason for path, reason in selection.left_out.items() if "/" not in path and is_weights(path)}
        pickled = [path for path, reason in found.items() if reason == "pickled weights"]
        if pickled:
            raise ValueError(
                f"The weights in {folder} are pickles ({', '.join(pickled)}), and these are not pushed. Convert them: "
                "load the folder with the model's `from_pretrained` and `save_pretrained` it there, which writes "
                "model.safetensors."
            )
        reasons = "".join(f" {path} is left out: {reason}." for path, reason in found.items())
        raise ValueError(
            f"{folder} holds no weights (model.safetensors).{reasons} Save the run with `trainer.save_model()` first."
        )
    if not {"config.json", "adapter_config.json"} & top:
        raise ValueError(f"{folder} holds no config.json. Save the run with `trainer.save_model()` first.")


def _check_for_token(files: Mapping[str, Path]) -> None:
    token = checked_token().encode()
    for source in files.values():
        if source.suffix != ".safetensors" and _contains(source, token):
            raise ValueError(f"{source} holds your Hugging Face token. Remove it from there, or leave the file out.")


def _contains(source: Path, secret: bytes) -> bool:
    if source.stat().st_size == 0:  # which cannot be mapped
        return False
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(secret) >= 0
