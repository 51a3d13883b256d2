"""Push a run to the Hugging Face Hub: safetensors and text, no pickles; repeatable, and with errors of one line.

The token is the one of `hf auth login` or of HF_TOKEN; no function takes it, and none writes it.
"""

import json
import mmap
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from hf_adafocal.checkpoint_files import check_header, is_log, is_pickle, is_training_state, is_weights

logger = logging.get_logger(__name__)
_HTTPError = HfHubHTTPError.__bases__[0]
_http = sys.modules[_HTTPError.__module__.partition(".")[0]]  # httpx, and httpx2 from huggingface_hub 2 on
_Answer = TypeVar("_Answer")

_WAITS = (1, 2, 4, 8)  # seconds before the second, third, ... attempt
_LONGEST_WAIT = 310  # seconds; the Hub counts requests in windows of five minutes
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_RETRIED_BY_THE_CLIENT = ("/preupload/", "/info/lfs/")
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
_AGAIN = "Push again: what has arrived is not sent twice."


class PushError(RuntimeError):
    """A push that failed: one line on what happened and what to do; `__cause__` is the error below it."""


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        repo_id: `<namespace>/<name>`.
        url: Address of the repository, at the revision if one was given.
        revision: The branch that was pushed to.
        commit: Hash of its latest commit.
        new_commit: False if the repository already held every file as it is, so that there was nothing to commit.
        files: Paths in the repository of the files that were pushed.
        removed: Weights of an earlier push that were deleted because these files replace them.
        left_out: Files of the folder that were not pushed, each with the reason.
    """

    repo_id: str
    url: str
    revision: str
    commit: str
    new_commit: bool
    files: tuple[str, ...]
    removed: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


def push_run(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    include_training_state: bool = False,
    message: str = "Push a run with hf-adafocal",
) -> PushResult:
    """Push the folder of a run as a model: weights, configuration, tokenizer or processor, card, report, pictures.

    Everything goes into one commit, so the repository is never half new. A push that failed can be repeated; one that
    changes nothing makes no commit. Call it in one process of a distributed run.

    Pickles and hidden files are never pushed. Training state is pushed with `include_training_state` alone: the
    Trainer's `trainer_state.json` and `training_args.bin`, optimizer, scheduler and random states, `checkpoint-*`
    folders, and the logs of trackers (`runs`, `wandb`, event files). These hold pickles, which run code when they are
    loaded: share them with people who trust you.

    Args:
        folder: What `save_model` wrote, with the files beside it.
        repo_id: `<namespace>/<name>`, or `<name>` in the user's own namespace.
        private: Create the repository as a private one. The visibility of one that is there does not change.
        revision: Branch to push to, created from `main` if there is none of that name; `main` if left out.
        include_training_state: Push what is needed to go on training, too.
        message: First line of the commit message.

    Returns:
        What was pushed, what was left out and why, and whether there is a new commit.

    Raises:
        ValueError: If the folder holds no complete checkpoint in safetensors, or a file holds the user's token.
        PushError: If the Hub cannot be reached or refuses, or `private` is asked of a public repository.
    """
    folder = Path(folder)
    files, left_out = select_files(folder, include_training_state)
    _check_checkpoint(folder, files, left_out)
    if "README.md" not in files:
        logger.warning(f"{folder} holds no README.md, so the repository {repo_id} gets no model card from this push.")
    token = _checked_token()
    for source in files.values():
        if source.suffix != ".safetensors" and _contains(source, token.encode()):
            raise ValueError(f"{source} holds your Hugging Face token. Remove it from there, or leave the file out.")
    result = push_files(
        files,
        repo_id,
        private=private,
        revision=revision,
        message=message,
        replaces=_is_looked_up,
    )
    if left_out:
        logger.info(f"Not pushed: {', '.join(f'{path} ({reason})' for path, reason in left_out.items())}.")
    return replace(result, left_out=left_out)


def select_files(folder: Path, include_training_state: bool = False) -> tuple[dict[str, Path], dict[str, str]]:
    """Which files of a run are pushed, see `push_run`.

    Returns:
        `files`, path in the repository and on disk, and `left_out`, path and reason.

    Raises:
        ValueError: If `folder` is not a folder.
    """
    if not folder.is_dir():
        raise ValueError(f"Expected the folder of a run, found no folder at {folder}.")
    files, left_out = {}, {}
    for source in sorted(folder.rglob("*")):
        if source.is_file():
            path = source.relative_to(folder).as_posix()
            reason = _reason_to_leave_out(PurePosixPath(path), source, include_training_state)
            if reason is None:
                files[path] = source
            else:
                left_out[path] = reason
    return files, left_out


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    message: str,
    repo_type: str = "model",
    private: bool = False,
    revision: str | None = None,
    space_sdk: str | None = None,
    replaces: Callable[[str], bool] = lambda _path: False,
) -> PushResult:
    """Push files in one commit, into a repository that is created if there is none.

    Requests that the client does not repeat itself are repeated here: after 1, 2, 4 and 8 seconds, or after as long
    as the Hub asks for.

    Args:
        files: For each path in the repository the file on disk, or its content.
        repo_id: As `push_run`.
        message: First line of the commit message.
        repo_type: "model" or "space".
        private: As `push_run`.
        revision: As `push_run`.
        space_sdk: Kind of a new Space, "gradio" or "static".
        replaces: Whether a file that is in the repository, but not among `files`, is to be deleted, by its path.

    Raises:
        PushError: As `push_run`.
    """
    _checked_token()
    api = HfApi(token=True)  # looks the token up for each request and keeps none
    with _in_one_line(repo_id):
        validate_repo_id(repo_id)
        created = _patiently(
            lambda: api.create_repo(
                repo_id, repo_type=repo_type, private=private or None, exist_ok=True, space_sdk=space_sdk
            )
        )
        repo_id = created.repo_id
        target = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
        before = _patiently(lambda: _state_of(api, target))
        if private and not before.private:
            raise PushError(
                f"{repo_id} is there already and public, but private=True. Make it private in its settings on the "
                "Hub, or push to a repository of another name."
            )
        commit, removed = _patiently(lambda: _commit(api, target, files, message, replaces))
    return PushResult(
        repo_id=repo_id,
        url=str(created) + (f"/tree/{revision}" if revision else ""),
        revision=revision or constants.DEFAULT_REVISION,
        commit=commit,
        new_commit=commit != before.sha,
        files=tuple(files),
        removed=removed,
    )


def _state_of(api: HfApi, target: dict[str, Any]) -> Any:
    """The repository at the revision, which becomes a branch if there is none."""
    try:
        return api.repo_info(**target)
    except RevisionNotFoundError:
        api.create_branch(target["repo_id"], repo_type=target["repo_type"], branch=target["revision"], exist_ok=True)
        return api.repo_info(**target)


def _commit(
    api: HfApi,
    target: dict[str, Any],
    files: Mapping[str, Path | bytes],
    message: str,
    replaces: Callable[[str], bool],
) -> tuple[str, tuple[str, ...]]:
    """Hash of the branch's commit after the push, and what was deleted.

    An attempt begins with a look at the repository, because the commit of the last one may have come about although
    its answer was lost. It is made of new operations, because the client notes in them what it found.
    """
    there = {file.rfilename for file in _state_of(api, target).siblings}
    stale = tuple(sorted(path for path in there - set(files) if replaces(path)))
    operations = [
        *(CommitOperationDelete(path_in_repo=path) for path in stale),
        *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=source) for path, source in files.items()),
    ]
    return api.create_commit(operations=operations, commit_message=message, **target).oid, stale


# What is in the folder -------------------------------------------------------------------------------------------


def _is_looked_up(path: str) -> bool:
    """Whether `from_pretrained` finds a file by its name, so that one of an earlier push would replace the new."""
    return "/" not in path and (is_weights(path) or path == "adapter_config.json")


def _reason_to_leave_out(path: PurePosixPath, source: Path, include_training_state: bool) -> str | None:
    if any(part.startswith(".") for part in path.parts):
        return "hidden"
    if is_weights(path) and path.suffix == ".bin" or path.suffix == ".ckpt":
        return "pickled weights"
    if is_training_state(path) or is_log(path):
        return None if include_training_state else "training state"
    return "pickle" if is_pickle(source) else None


def _check_checkpoint(folder: Path, files: Mapping[str, Path], left_out: Mapping[str, str]) -> None:
    top = [path for path in files if "/" not in path]
    if not any(path.endswith(".safetensors") for path in top):
        pickled = [path for path in left_out if "/" not in path and left_out[path] in ("pickled weights", "pickle")]
        if pickled:
            raise ValueError(
                f"The weights in {folder} are pickles ({', '.join(pickled)}), and these are not pushed. Convert them: "
                "load the folder with the model's `from_pretrained` and `save_pretrained` it there, which writes "
                "model.safetensors."
            )
        raise ValueError(f"{folder} holds no weights (*.safetensors). Save the run with `trainer.save_model()` first.")
    if not {"config.json", "adapter_config.json"} & set(top):
        raise ValueError(f"{folder} holds no config.json. Save the run with `trainer.save_model()` first.")
    for path in top:
        try:
            check_header(files[path])
        except ValueError as error:
            raise ValueError(f"{error} Save the run again before it is pushed.") from error


def _contains(source: Path, secret: bytes) -> bool:
    if source.stat().st_size == 0:  # which cannot be mapped
        return False
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(secret) >= 0


# What the Hub says -----------------------------------------------------------------------------------------------


def _checked_token() -> str:
    if constants.is_offline_mode():
        raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and push again.")
    token = get_token()
    if not token:
        raise PushError(f"No Hugging Face token was found. {_LOG_IN}")
    if not (token.isascii() and token.isprintable()) or " " in token:  # the client would quote it in its error
        raise PushError(f"The Hugging Face token holds characters that no token has. {_LOG_IN}")
    return token


def _patiently(ask: Callable[[], _Answer]) -> _Answer:
    """The answer, after a few attempts if need be."""
    for attempt, wait in enumerate(_WAITS, start=1):
        try:
            return ask()
        except (_HTTPError, json.JSONDecodeError) as error:
            wait = max(wait, _wished_wait(error))
            if not _may_pass(error) or wait > _LONGEST_WAIT:
                raise
            logger.warning(f"The Hub did not answer ({_what(error)}); attempt {attempt + 1} follows in {wait} s.")
        time.sleep(wait)
    return ask()


def _may_pass(error: Exception) -> bool:
    if isinstance(error, json.JSONDecodeError):  # an error page where the client reads JSON before the status
        return True
    request = error.response.request if isinstance(error, HfHubHTTPError) else error.request
    if any(part in request.url.path for part in _RETRIED_BY_THE_CLIENT):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    passing = (_http.TimeoutException, _http.NetworkError, _http.RemoteProtocolError)
    return isinstance(error, passing) and not isinstance(error, _http.ConnectError)


def _wished_wait(error: Exception) -> int:
    """Seconds that the Hub asks to wait, 0 if it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return 0
    headers = error.response.headers
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    seconds = limit[1] if limit else headers.get("retry-after", "").strip()
    return int(seconds) if seconds.isdigit() else 0


def _what(error: Exception) -> str:
    return str(error.response.status_code) if isinstance(error, HfHubHTTPError) else type(error).__name__


@contextmanager
def _in_one_line(repo_id: str) -> Iterator[None]:
    try:
        yield
    except PushError:
        raise
    except (_HTTPError, OSError, ValueError, RuntimeError) as error:
        message = " ".join(_advice(_below(error), repo_id).split())
        raise PushError(message.replace(get_token() or "\n", "[token]")) from error


def _below(error: Exception) -> Exception:
    """The error of the Hub under the client's "Error while uploading"."""
    cause = error.__cause__
    return cause if type(error) is RuntimeError and isinstance(cause, (_HTTPError, OSError, ValueError)) else error


def _advice(error: Exception, repo_id: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and push again."
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not the id of a repository; expected <namespace>/<name>. {error}"
    if isinstance(error, HfHubHTTPError):
        return _advice_on_status(error, error.response.status_code, repo_id)
    if isinstance(error, _http.TransportError):
        return f"The connection to {constants.ENDPOINT} failed: {error or _what(error)}. Check the network. {_AGAIN}"
    if isinstance(error, json.JSONDecodeError):
        return f"{constants.ENDPOINT} did not answer as the Hub does. Check the network and HF_ENDPOINT. {_AGAIN}"
    return f"The push to {repo_id} failed: {error}"


def _advice_on_status(error: HfHubHTTPError, status: int, repo_id: str) -> str:
    said = f"{status}: {error.server_message}" if error.server_message else str(status)
    if isinstance(error, RevisionNotFoundError):
        return f"The revision was not found in {repo_id} ({said}). Push to the name of a branch."
    if status == 401:
        return f"The Hub does not accept the token ({said}). {_LOG_IN}"
    if status == 402:
        return f'The Hub asks for payment ({said}). A Space with sdk="static" is free, and its metric loads as well.'
    if status == 403:
        return (
            f"The token may not write to {repo_id} ({said}). Use a token with write access to that namespace, or push "
            "to another one."
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} was not found, or the token may not see it ({said}). Check the id and the token."
    if status in (409, 412):
        return f"{repo_id} changed during the push ({said}). {_AGAIN}"
    if status == 429:
        seconds = _wished_wait(error)
        return f"The Hub asks to wait{f' {seconds} s' if seconds else ''} ({said}). Wait, then push. {_AGAIN}"
    if status in _TRANSIENT:
        return f"The Hub fails at the moment ({said}). Wait. {_AGAIN}"
    return f"The Hub refused the push to {repo_id} ({said})."
